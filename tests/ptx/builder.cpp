// Builder: takes an instruction's text apart for its rule.
#include <cctype>
#include <cstdlib>
#include <unordered_map>

#include "tests/ptx/rules.h"
#include "tests/ptx/scanner.h"

namespace ptx {

namespace {

bool starts_with_digit(std::string_view s) { return !s.empty() && std::isdigit(static_cast<unsigned char>(s.front())); }

// 0f3F800000, 0d3FF0000000000000, 12, -7, 0x1F, 3U.
bool read_number(const std::string& text, Type t, uint64_t& value) {
  if (text.starts_with("0f") || text.starts_with("0F") || text.starts_with("0d") || text.starts_with("0D")) {
    value = std::strtoull(text.c_str() + 2, nullptr, 16);
    return true;
  }
  const bool negative = text.front() == '-';
  const std::string digits = text.substr(negative ? 1 : 0);
  if (!starts_with_digit(digits)) return false;
  value = std::strtoull(digits.c_str(), nullptr, 0);
  if (negative) value = 0 - value;
  if (t.bits < 64) value &= t.bits <= 16 && !negative ? 0xffff : 0xffffffff;
  return true;
}

}  // namespace

bool read_type(std::string_view text, Type& type) {
  if (text == "pred") {
    type = {'p', 1};
    return true;
  }
  if (text.size() < 2 || std::string_view("usbf").find(text.front()) == std::string_view::npos) return false;
  int bits = 0;
  for (const char c : text.substr(1)) {
    if (!std::isdigit(static_cast<unsigned char>(c))) return false;
    bits = 10 * bits + (c - '0');
  }
  if (bits != 8 && bits != 16 && bits != 32 && bits != 64) return false;
  type = {text.front(), bits};
  return true;
}

Rule find_rule(std::string_view name) {
  static const auto* table = [] {
    auto* all = new std::unordered_map<std::string_view, Rule>;
    for (const Rules* rules :
         {&arithmetic_rules(), &logic_rules(), &comparison_rules(), &conversion_rules(), &memory_rules(), &copy_rules(),
          &atomic_rules(), &exchange_rules(), &matrix_rules(), &control_rules()})
      for (const NamedRule& r : *rules) all->emplace(r.name, r.rule);
    return all;
  }();
  const auto found = table->find(name);
  return found == table->end() ? nullptr : found->second;
}

Builder::Builder(Instruction& i, std::string_view opcode, std::vector<std::string> operands, Names& names)
    : instruction(i), opcode_(opcode), operands_(std::move(operands)), names_(names) {
  size_t from = 0;
  for (size_t at = 0; at <= opcode.size(); at++)
    if (at == opcode.size() || opcode[at] == '.') {
      const std::string word(opcode.substr(from, at - from));
      if (from == 0) name_ = word;
      else suffixes_.push_back(word);
      from = at + 1;
    }
  taken_.assign(suffixes_.size(), false);
}

bool Builder::has(std::string_view suffix) {
  for (size_t k = 0; k < suffixes_.size(); k++)
    if (!taken_[k] && suffixes_[k] == suffix) return taken_[k] = true;
  return false;
}
void Builder::need(std::string_view suffix) {
  if (!has(suffix)) refuse("known only with ." + std::string(suffix));
}
Type Builder::type() {
  Type t;
  for (size_t k = 0; k < suffixes_.size(); k++)
    if (!taken_[k] && read_type(suffixes_[k], t)) {
      taken_[k] = true;
      return t;
    }
  refuse("a type is missing");
}

void Builder::refuse(const std::string& why) const {
  throw Fault(FaultKind::unsupported, "the instruction " + opcode_ + " is not known to the interpreter: " + why);
}
void Builder::finish() const {
  for (size_t k = 0; k < suffixes_.size(); k++)
    if (!taken_[k]) refuse("no rule for ." + suffixes_[k]);
  if (next_ != operands_.size()) refuse("no rule for the operand " + operands_[next_]);
}

std::string Builder::take(const char* what) {
  if (next_ == operands_.size()) refuse(std::string(what) + " is missing");
  return operands_[next_++];
}
std::string Builder::text() { return take("an operand"); }

void Builder::note_read(uint32_t place) {
  if (instruction.read_count < instruction.reads.size()) instruction.reads[instruction.read_count++] = place;
}
void Builder::note_write(uint32_t place) {
  if (instruction.write_count < instruction.writes.size()) instruction.writes[instruction.write_count++] = place;
}

uint32_t Builder::place_of(const std::string& operand, Type t, bool written) {
  if (const Names::Register* r = names_.find_register(operand)) {
    if (r->type.is_predicate() != t.is_predicate() || (r->type.bits == 64) != (t.bits == 64))
      refuse("the register " + operand + " is of another width");
    (written ? note_write(r->place) : note_read(r->place));
    return r->place;
  }
  if (written) refuse("it writes to " + operand + ", which is no register");
  uint64_t value = 0;
  if (read_number(operand, t, value) || names_.find_symbol(operand, value)) return names_.constant(value, t);
  refuse("the operand " + operand);
}

void Builder::destination(uint32_t& place, Type t) {
  const std::string operand = take("a destination");
  place = operand == "_" ? names_.unused(t) : place_of(operand, t, true);
}
void Builder::unused_destination(uint32_t& place, Type t) { place = names_.unused(t); }
void Builder::constant(uint32_t& place, uint64_t value, Type t) { place = names_.constant(value, t); }
void Builder::source(uint32_t& place, Type t) { place = place_of(take("a source"), t, false); }

bool Builder::destination_and_predicate(uint32_t& place, Type t, uint32_t& predicate) {
  const std::string both = take("a destination");
  const size_t bar = both.find('|');
  place = place_of(trimmed(std::string_view(both).substr(0, bar)), t, true);
  if (bar == std::string::npos) return false;
  predicate = place_of(trimmed(std::string_view(both).substr(bar + 1)), {'p', 1}, true);
  return true;
}

void Builder::guarded_source(uint32_t& place) {
  std::string operand = take("a predicate");
  instruction.flag = operand.front() == '!';
  if (instruction.flag) operand.erase(0, 1);
  place = place_of(operand, {'p', 1}, false);
}

// Registers of a vector that are wider than its type are noted by Instruction::flag.
int Builder::vector_destination(Type t, size_t first) {
  const std::string operand = take("a destination");
  const auto list = operand.front() == '{' ? split(std::string_view(operand).substr(1, operand.size() - 2), ',')
                                           : std::vector{operand};
  if (first + list.size() > instruction.vector.size()) refuse("a vector of " + std::to_string(list.size()));
  for (size_t k = 0; k < list.size(); k++) {
    const Names::Register* r = names_.find_register(list[k]);
    const bool wider = r && r->type.bits == 64 && t.bits < 64;
    if (wider) instruction.flag = true;
    instruction.vector[first + k] = list[k] == "_" ? names_.unused(t) : place_of(list[k], wider ? r->type : t, true);
  }
  return int(list.size());
}
int Builder::vector_source(Type t, size_t first) {
  const std::string operand = take("a source");
  const auto list = operand.front() == '{' ? split(std::string_view(operand).substr(1, operand.size() - 2), ',')
                                           : std::vector{operand};
  if (first + list.size() > instruction.vector.size()) refuse("a vector of " + std::to_string(list.size()));
  for (size_t k = 0; k < list.size(); k++) {
    const Names::Register* r = names_.find_register(list[k]);
    const bool wider = r && r->type.bits == 64 && t.bits < 64;
    if (wider) instruction.flag = true;
    instruction.vector[first + k] = place_of(list[k], wider ? r->type : t, false);
  }
  return int(list.size());
}

void Builder::address(Address& a) {
  const std::string operand = take("an address");
  if (operand.size() < 2 || operand.front() != '[' || operand.back() != ']') refuse("the address " + operand);
  const std::string inside = trimmed(std::string_view(operand).substr(1, operand.size() - 2));
  const size_t plus = inside.find_first_of("+-", 1);
  const std::string base = trimmed(std::string_view(inside).substr(0, plus));
  if (const Names::Register* r = names_.find_register(base)) {
    a.has_base = true;
    a.wide_base = r->type.bits == 64;
    a.base = r->place;
    note_read(r->place);
  } else if (uint64_t value = 0; names_.find_symbol(base, value) || read_number(base, {'u', 64}, value)) {
    a.displacement = int64_t(value);
  } else {
    refuse("the address " + operand);
  }
  if (plus != std::string::npos)  // +16, +-16 or -16
    a.displacement += std::strtoll(inside.c_str() + plus + (inside[plus] == '+' ? 1 : 0), nullptr, 0);
}

std::string Builder::label() { return take("a label"); }

}  // namespace ptx
