// How an opcode of PTX becomes an instruction: a rule a name, in tables by subject (rules_*.cpp).
//
// A rule takes the suffixes of the opcode and the operands one after the other from a Builder, and sets the handler. A
// suffix or an operand that no rule takes is an error, so nothing of an instruction is ignored by mistake.
#pragma once
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "tests/ptx/fault.h"
#include "tests/ptx/program.h"

namespace ptx {

// .u32, .s16, .b64, .f32, .pred: `kind` is the letter, p for a predicate.
struct Type {
  char kind = 'b';
  int bits = 32;
  bool is_float() const { return kind == 'f'; }
  bool is_signed() const { return kind == 's'; }
  bool is_predicate() const { return kind == 'p'; }
};
// Whether the text of a suffix names a type; if so, which.
bool read_type(std::string_view text, Type& type);

// What the parser knows about the names in the text.
class Names {
 public:
  struct Register {
    uint32_t place;
    Type type;
  };
  virtual ~Names() = default;
  virtual const Register* find_register(std::string_view name) const = 0;
  // The address of a shared, module or parameter variable.
  virtual bool find_symbol(std::string_view name, uint64_t& address) const = 0;
  // The place of a register that holds this number in every lane, or of a predicate that is true or false in all.
  virtual uint32_t constant(uint64_t value, Type) = 0;
  // The place of a register that nobody reads.
  virtual uint32_t unused(Type) = 0;
};

class Builder {
 public:
  Builder(Instruction&, std::string_view opcode, std::vector<std::string> operands, Names&);

  Instruction& instruction;

  const std::string& name() const { return name_; }
  bool has(std::string_view suffix);  // takes the suffix where it is there
  void need(std::string_view suffix);
  Type type();  // takes the first suffix that is a type
  size_t operands_left() const { return operands_.size() - next_; }
  bool next_is_vector() const { return operands_left() > 0 && operands_[next_].front() == '{'; }

  // Take the next operand.
  void destination(uint32_t& place, Type);
  void source(uint32_t& place, Type);
  // d or d|p: a result and a predicate beside it. Returns whether there is one.
  bool destination_and_predicate(uint32_t& place, Type, uint32_t& predicate);
  void guarded_source(uint32_t& place);            // a predicate, "!" before it sets Instruction::flag
  void unused_destination(uint32_t& place, Type);  // of a result that the instruction does not give
  // {a, b} or one register: into Instruction::vector, from the element `first` on; returns how many.
  int vector_destination(Type, size_t first = 0);
  int vector_source(Type, size_t first = 0);
  void address(Address&);  // [base + displacement]
  void address() { address(instruction.address); }
  std::string label();
  std::string text();  // the next operand as it is

  // An operand that the text does not have: this number in every lane.
  void constant(uint32_t& place, uint64_t value, Type);

  [[noreturn]] void refuse(const std::string& why) const;
  void finish() const;  // refuses what nobody took

 private:
  std::string take(const char* what);
  uint32_t place_of(const std::string& operand, Type, bool written);
  void note_read(uint32_t place);
  void note_write(uint32_t place);

  std::string name_;
  std::string opcode_;
  std::vector<std::string> suffixes_;
  std::vector<bool> taken_;
  std::vector<std::string> operands_;
  size_t next_ = 0;
  Names& names_;
};

using Rule = void (*)(Builder&);
struct NamedRule {
  const char* name;
  Rule rule;
};
using Rules = std::vector<NamedRule>;

const Rules& arithmetic_rules();
const Rules& logic_rules();
const Rules& comparison_rules();
const Rules& conversion_rules();
const Rules& memory_rules();
const Rules& copy_rules();
const Rules& atomic_rules();
const Rules& exchange_rules();
const Rules& matrix_rules();
const Rules& control_rules();

// The rule of an opcode's name ("add"), or nullptr.
Rule find_rule(std::string_view name);

}  // namespace ptx
