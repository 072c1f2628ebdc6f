#include "tests/ptx/scanner.h"

#include <algorithm>
#include <cctype>

namespace ptx {

namespace {

bool is_space(char c) { return std::isspace(static_cast<unsigned char>(c)); }
bool in_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%'; }

}  // namespace

std::string trimmed(std::string_view s) {
  while (!s.empty() && is_space(s.front())) s.remove_prefix(1);
  while (!s.empty() && is_space(s.back())) s.remove_suffix(1);
  return std::string(s);
}

std::vector<std::string> words_of(std::string_view s) {
  std::vector<std::string> words;
  for (size_t at = 0; at < s.size();) {
    while (at < s.size() && is_space(s[at])) at++;
    const size_t from = at;
    while (at < s.size() && !is_space(s[at])) at++;
    if (at > from) words.emplace_back(s.substr(from, at - from));
  }
  return words;
}

std::vector<std::string> split(std::string_view s, char separator) {
  std::vector<std::string> list;
  int depth = 0;
  size_t from = 0;
  for (size_t at = 0; at <= s.size(); at++) {
    const char c = at < s.size() ? s[at] : separator;
    if (c == '{' || c == '[' || c == '(') depth++;
    if (c == '}' || c == ']' || c == ')') depth--;
    if (c == separator && (depth == 0 || at == s.size())) {
      if (std::string word = trimmed(s.substr(from, at - from)); !word.empty()) list.push_back(std::move(word));
      from = at + 1;
    }
  }
  return list;
}

std::string without_comments(std::string_view s) {
  std::string out(s);
  for (size_t at = 0; at + 1 < out.size();) {
    if (out[at] == '/' && out[at + 1] == '/') {
      while (at < out.size() && out[at] != '\n') out[at++] = ' ';
    } else if (out[at] == '/' && out[at + 1] == '*') {
      const size_t end = std::min(out.find("*/", at + 2), out.size() - 2) + 2;
      for (; at < end; at++)
        if (out[at] != '\n') out[at] = ' ';
    } else if (out[at] == '"') {
      at = std::min(out.find('"', at + 1), out.size() - 1) + 1;
    } else {
      at++;
    }
  }
  return out;
}

bool Scanner::at_end() {
  skip_space();
  return at_ == text_.size();
}

Statement Scanner::next() {
  skip_space();
  const int line = line_;
  const char c = peek();
  if (c == '{' || c == '}') {
    at_++;
    return {c == '{' ? Statement::open : Statement::close, "", line};
  }
  if (c == ';') {
    at_++;
    return next();
  }
  if (in_name(c)) {  // a label?
    size_t end = at_;
    while (end < text_.size() && in_name(text_[end])) end++;
    size_t after = end;
    while (after < text_.size() && is_space(text_[after])) after++;
    if (after < text_.size() && text_[after] == ':') {
      Statement s{Statement::label, std::string(text_.substr(at_, end - at_)), line};
      move_to(after + 1);
      return s;
    }
  }
  for (const char* directive : {".loc", ".file", ".version", ".target", ".address_size", ".maxntid", ".minnctapersm",
                                ".reqntid", ".maxnreg", ".explicitcluster", ".section"})
    if (text_.substr(at_).starts_with(directive)) {
      const size_t end = std::min(text_.find_first_of("\n{", at_), text_.size());
      Statement s{Statement::line_directive, trimmed(text_.substr(at_, end - at_)), line};
      move_to(end);
      if (s.words.starts_with(".section")) move_to(end_of_braces());
      return s;
    }
  const size_t end = end_of_statement();
  Statement s{Statement::text, trimmed(text_.substr(at_, end - at_)), line};
  for (char& x : s.words)
    if (is_space(x)) x = ' ';
  move_to(end);
  return s;
}

// At the ';', or at the '{' or the directive that follows a kernel's head. A brace within a statement belongs to it.
size_t Scanner::end_of_statement() const {
  const std::string_view head = text_.substr(at_, text_.find_first_of(";{", at_) - at_);
  const bool entry = head.find(".entry") != std::string_view::npos;
  int depth = 0;
  size_t end = at_;
  for (; end < text_.size(); end++) {
    const char c = text_[end];
    if (c == ';' && depth == 0) break;
    if (entry && depth == 0 && c == '{') break;
    if (entry && depth == 0 && c == '.')
      if (text_.substr(end).starts_with(".maxntid") || text_.substr(end).starts_with(".minnctapersm") ||
          text_.substr(end).starts_with(".reqntid"))
        break;
    if (c == '(' || c == '[' || c == '{') depth++;
    if (c == ')' || c == ']' || c == '}') depth--;
  }
  return end;
}

void Scanner::move_to(size_t to) {
  line_ += int(std::count(text_.begin() + long(at_), text_.begin() + long(to), '\n'));
  at_ = to;
}
void Scanner::skip_space() {
  size_t to = at_;
  while (to < text_.size() && is_space(text_[to])) to++;
  move_to(to);
}
size_t Scanner::end_of_braces() const {
  size_t at = text_.find('{', at_);
  for (int depth = 0; at < text_.size(); at++) {
    if (text_[at] == '{') depth++;
    if (text_[at] == '}' && --depth == 0) return at + 1;
  }
  return text_.size();
}

}  // namespace ptx
