// The text of a PTX module, taken apart into statements.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

std::string trimmed(std::string_view);
std::vector<std::string> words_of(std::string_view);               // between spaces
std::vector<std::string> split(std::string_view, char separator);  // trimmed, not empty; brackets are kept whole

// The text with comments blanked out; lines stay where they are.
std::string without_comments(std::string_view);

// One piece of the text, with the line it begins in.
struct Statement {
  enum Kind { open, close, label, line_directive, text } kind;  // a line directive ends with its line, a text with ';'
  std::string words;
  int line;
};

class Scanner {
 public:
  explicit Scanner(std::string_view text) : text_(text) {}  // which must outlive it, without comments
  bool at_end();
  Statement next();

 private:
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void move_to(size_t to);
  void skip_space();
  size_t end_of_braces() const;
  size_t end_of_statement() const;

  std::string_view text_;
  size_t at_ = 0;
  int line_ = 1;
};

}  // namespace ptx
