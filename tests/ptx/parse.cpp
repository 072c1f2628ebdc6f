// PTX text to kernels. The text is what nvcc writes: directives, statements that end with ';', labels and scopes.
#include <cxxabi.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>

#include "tests/ptx/device_memory.h"
#include "tests/ptx/rules.h"
#include "tests/ptx/scanner.h"

namespace ptx {

namespace {

constexpr uint32_t red_zone = 64;  // bytes between static shared variables that nobody may touch

[[noreturn]] void refuse(const std::string& what, int line) {
  throw Fault(FaultKind::unsupported, "PTX line " + std::to_string(line) + ": " + what);
}

uint32_t round_up(uint32_t value, uint32_t to) { return (value + to - 1) / to * to; }
// ".shared .align 8 .b8 name[2048]", ".global .align 4 .u32 table[4] = {1, 2, 3, 4}", ".param .u64 .ptr .align 1 name".
struct Declaration {
  std::string space, name;
  uint32_t alignment = 1, element = 1, bytes = 0;
  bool is_extern = false, is_array = false;
  std::vector<char> initial;
};

Declaration read_declaration(std::string s, int line) {
  Declaration v;
  std::string initial;
  if (const size_t equals = s.find('='); equals != std::string::npos) {
    initial = trimmed(std::string_view(s).substr(equals + 1));
    s = s.substr(0, equals);
  }
  const std::vector<std::string> words = words_of(s);
  for (size_t k = 0; k < words.size(); k++) {
    const std::string& w = words[k];
    Type type;
    if (w == ".align") v.alignment = std::max<uint32_t>(v.alignment, uint32_t(std::atoi(words.at(++k).c_str())));
    else if (w == ".ptr") k = std::max(k, words.size() - 2);  // what it points to: the name comes last
    else if (w == ".extern") v.is_extern = true;
    else if (w == ".shared" || w == ".global" || w == ".const" || w == ".local" || w == ".param") v.space = w;
    else if (w == ".visible" || w == ".weak" || w == ".common") continue;
    else if (w.front() == '.' && read_type(w.substr(1), type)) {
      v.element = uint32_t(type.bits) / 8;
      v.alignment = std::max(v.alignment, v.element);
    } else if (w.front() != '.') v.name += w;
    else refuse("the declaration " + s, line);
  }
  if (const size_t bracket = v.name.find('['); bracket != std::string::npos) {
    v.is_array = true;
    v.bytes = v.element * uint32_t(std::strtoul(v.name.c_str() + bracket + 1, nullptr, 10));
    v.name.resize(bracket);
  } else {
    v.bytes = v.element;
  }
  if (initial.empty()) return v;
  v.initial.resize(v.bytes);
  std::erase_if(initial, [](char c) { return c == '{' || c == '}'; });
  size_t at = 0;
  for (const std::string& number : split(initial, ',')) {
    const bool bits = number.starts_with("0f") || number.starts_with("0d");
    const uint64_t value =
        bits ? std::strtoull(number.c_str() + 2, nullptr, 16) : std::strtoull(number.c_str(), nullptr, 0);
    if (at + v.element > v.bytes) refuse("too many numbers for " + v.name, line);
    std::memcpy(v.initial.data() + at, &value, v.element);
    at += v.element;
  }
  return v;
}

// The name that the source gives it: without namespaces, template arguments kept, parameters left out.
std::string readable(const std::string& symbol) {
  int status = 0;
  char* text = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  if (status != 0 || !text) return symbol;
  std::string name = text;
  std::free(text);
  int depth = 0;  // up to the parameters: the last '(' outside of template arguments
  size_t end = name.size();
  for (size_t at = name.size(); at-- > 0;) {
    if (name[at] == ')' || name[at] == '>') depth++;
    if (name[at] == '(' || name[at] == '<') depth--;
    if (depth == 0 && name[at] == '(') {
      end = at;
      break;
    }
  }
  name.resize(end);
  depth = 0;
  size_t from = 0;  // after the last "::" outside of template arguments, or the result's type
  for (size_t at = 0; at < name.size(); at++) {
    if (name[at] == '<' || name[at] == '(') depth++;
    if (name[at] == '>' || name[at] == ')') depth--;
    if (depth == 0 && (name[at] == ' ' || (name[at] == ':' && at > 0 && name[at - 1] == ':'))) from = at + 1;
  }
  return name.substr(from);
}

class ModuleParser {
 public:
  explicit ModuleParser(std::string_view text) : text_(without_comments(text)), scanner_(text_) {}

  std::unique_ptr<Module> parse();

  Module& module() { return *module_; }
  std::map<std::string, uint32_t> shared;  // module-level shared variables
  std::vector<Variable> shared_variables;
  uint32_t shared_bytes = 0, shared_used = 0;
  std::string dynamic_shared;  // the name of the extern array

  // Reads ".loc FILE LINE COLUMN [, function_name NAME, inlined_at FILE LINE COLUMN]".
  int read_place(const Statement&);

 private:
  void declare(const Statement&);
  void parse_kernel(const Statement& head);

  std::string text_;
  Scanner scanner_;
  std::map<std::array<int, 3>, int> places_;  // the last that was read of this file, line and column
  std::unique_ptr<Module> module_ = std::make_unique<Module>();
};

// Adds a static shared variable behind those that are there.
uint32_t place_shared(std::vector<Variable>& variables, uint32_t& bytes, uint32_t& used, const Declaration& v) {
  const uint32_t offset = round_up(bytes, std::max<uint32_t>(v.alignment, 16));
  variables.push_back({offset, v.bytes});
  bytes = round_up(offset + v.bytes + red_zone, 16);
  used = round_up(used, v.alignment) + v.bytes;
  return offset;
}

class KernelParser : public Names {
 public:
  KernelParser(ModuleParser& module, Kernel& kernel) : module_(module), kernel_(kernel) {
    kernel_.shared = module.shared_variables;
    kernel_.shared_bytes = module.shared_bytes;
    kernel_.shared_used = module.shared_used;
    kernel_.special_place = 0;
    next_place_ = special_count * narrow_bytes;
  }

  void add_parameter(const Declaration& v) {
    const uint32_t offset = round_up(kernel_.parameter_bytes, v.alignment);
    parameters_[v.name] = offset;
    kernel_.parameters.push_back({offset, v.bytes});
    kernel_.parameter_bytes = offset + v.bytes;
  }
  void parse_body(Scanner&);

  // ---- Names
  const Register* find_register(std::string_view name) const override;
  bool find_symbol(std::string_view name, uint64_t& address) const override;
  uint32_t constant(uint64_t value, Type) override;
  uint32_t unused(Type t) override { return take_place(t); }

 private:
  using Scope = std::map<std::string, Register, std::less<>>;

  uint32_t take_place(Type t) {
    const uint32_t bytes = t.is_predicate() ? 4 : t.bits == 64 ? wide_bytes : narrow_bytes;
    next_place_ = round_up(next_place_, t.is_predicate() ? 4 : place_alignment);
    const uint32_t place = next_place_;
    next_place_ += bytes;
    return place;
  }
  void declare_registers(const std::string&, int line);
  void add_instruction(const Statement&);
  void finish();

  ModuleParser& module_;
  Kernel& kernel_;
  std::vector<Scope> scopes_;
  Scope specials_;
  std::map<std::string, uint32_t, std::less<>> parameters_, shared_;
  std::map<std::string, int32_t> labels_;
  std::vector<std::pair<size_t, std::string>> branches_;  // instructions that jump to a label
  std::map<std::pair<uint64_t, int>, uint32_t> constant_places_;
  uint32_t next_place_ = 0;
  int place_ = -1;  // of the last .loc
};

// Constants get places behind the registers, whose number is known at the end only; until then they carry this mark.
constexpr uint32_t constant_mark = 0x80000000u;

uint32_t KernelParser::constant(uint64_t value, Type t) {
  const int width = t.is_predicate() ? 1 : t.bits == 64 ? 8 : 4;
  const auto [found, fresh] = constant_places_.try_emplace({value, width}, 0);
  if (fresh) {
    std::vector<char>& c = kernel_.constants;
    const uint32_t at = round_up(uint32_t(c.size()), place_alignment);
    c.resize(at + (width == 8 ? wide_bytes : narrow_bytes));
    const uint32_t all = value ? ~0u : 0u;
    for (int lane = 0; lane < lanes; lane++)
      if (width == 1) std::memcpy(&c[at + lane * 4], &all, 4);
      else std::memcpy(&c[at + lane * width], &value, size_t(width));
    found->second = at | constant_mark;
  }
  return found->second;
}

const Names::Register* KernelParser::find_register(std::string_view name) const {
  for (size_t k = scopes_.size(); k-- > 0;)
    if (const auto found = scopes_[k].find(name); found != scopes_[k].end()) return &found->second;
  static const Scope specials = [] {
    const char* names[special_count] = {"%tid.x",       "%tid.y",       "%tid.z",       "%ntid.x",      "%ntid.y",
                                        "%ntid.z",      "%ctaid.x",     "%ctaid.y",     "%ctaid.z",     "%nctaid.x",
                                        "%nctaid.y",    "%nctaid.z",    "%laneid",      "%warpid",      "%nwarpid",
                                        "%lanemask_eq", "%lanemask_le", "%lanemask_lt", "%lanemask_ge", "%lanemask_gt"};
    Scope all;
    for (int k = 0; k < special_count; k++) all[names[k]] = {uint32_t(k) * narrow_bytes, {'u', 32}};
    return all;
  }();
  const auto found = specials.find(name);
  return found == specials.end() ? nullptr : &found->second;
}

bool KernelParser::find_symbol(std::string_view name, uint64_t& address) const {
  if (const auto p = parameters_.find(name); p != parameters_.end()) return address = p->second, true;
  if (const auto s = shared_.find(name); s != shared_.end()) return address = s->second, true;
  const std::string key(name);
  if (const auto s = module_.shared.find(key); s != module_.shared.end()) return address = s->second, true;
  if (name == module_.dynamic_shared) return address = dynamic_window, true;
  const auto& globals = module_.module().globals;
  if (const auto g = globals.find(key); g != globals.end()) return address = g->second, true;
  if (name == "WARP_SZ") return address = lanes, true;
  return false;
}

// .reg .b32 %r<103>;   .reg .pred p, q;
void KernelParser::declare_registers(const std::string& s, int line) {
  const size_t dot = s.find('.', 1), end = s.find(' ', dot);
  Type type;
  if (dot == std::string::npos || end == std::string::npos || !read_type(s.substr(dot + 1, end - dot - 1), type))
    refuse("the registers " + s, line);
  for (const std::string& name : split(s.substr(end), ',')) {
    const size_t angle = name.find('<');
    if (angle == std::string::npos) {
      scopes_.back()[name] = {take_place(type), type};
      continue;
    }
    const int count = std::atoi(name.c_str() + angle + 1);
    for (int k = 0; k < count; k++)
      scopes_.back()[name.substr(0, angle) + std::to_string(k)] = {take_place(type), type};
  }
}

void KernelParser::add_instruction(const Statement& statement) {
  std::string_view s = statement.words;
  Instruction i;
  i.number = uint32_t(kernel_.code.size());
  Origin origin{statement.words, statement.line, place_};
  if (s.front() == '@') {
    const size_t end = s.find(' ');
    std::string guard(s.substr(1, end - 1));
    if (guard.front() == '!') i.guard_negated = true, guard.erase(0, 1);
    const Register* r = find_register(guard);
    if (!r) refuse("the guard " + guard, statement.line);
    i.guard = int32_t(r->place);
    i.reads[i.read_count++] = r->place;
    s = s.substr(s.find_first_not_of(' ', end));
  }
  const size_t end = std::min(s.find(' '), s.size());
  const std::string opcode(s.substr(0, end));
  try {
    Builder builder(i, opcode, split(s.substr(end), ','), *this);
    const Rule rule = find_rule(builder.name());
    if (!rule) builder.refuse("no rule has its name");
    rule(builder);
    if (i.flow == Flow::branch) branches_.emplace_back(kernel_.code.size(), builder.label());
    builder.finish();
  } catch (const Fault& fault) {
    if (kernel_.unknown.empty())
      kernel_.unknown =
          std::string(fault.what()) + " (PTX line " + std::to_string(statement.line) + ": " + statement.words + ")";
  }
  if (i.cost == Class::global_load && i.kind) kernel_.reads_through_nc = true;
  kernel_.code.push_back(i);
  kernel_.origins.push_back(std::move(origin));
}

void KernelParser::parse_body(Scanner& scanner) {
  scopes_.emplace_back();
  while (!scopes_.empty()) {
    const Statement s = scanner.next();
    switch (s.kind) {
      case Statement::open:
        scopes_.emplace_back();
        break;
      case Statement::close:
        scopes_.pop_back();
        break;
      case Statement::label:
        labels_[s.words] = int32_t(kernel_.code.size());
        break;
      case Statement::line_directive:
        if (s.words.starts_with(".loc")) place_ = module_.read_place(s);
        break;
      case Statement::text:
        if (s.words.front() != '.') add_instruction(s);
        else if (s.words.starts_with(".reg")) declare_registers(s.words, s.line);
        else if (s.words.starts_with(".shared")) {
          const Declaration v = read_declaration(s.words, s.line);
          shared_[v.name] = place_shared(kernel_.shared, kernel_.shared_bytes, kernel_.shared_used, v);
        } else if (!s.words.starts_with(".pragma")) {
          if (kernel_.unknown.empty())
            kernel_.unknown = "PTX line " + std::to_string(s.line) + ": the directive " + s.words + " is not known";
        }
    }
    if (scanner.at_end() && !scopes_.empty()) refuse("the text ends within " + kernel_.name, s.line);
  }
  finish();
}

void KernelParser::finish() {
  Instruction end;  // so that no kernel runs off its text
  end.flow = Flow::exit;
  end.cost = Class::control;
  end.handler = [](Warp&, const Instruction&) {};
  end.number = uint32_t(kernel_.code.size());
  kernel_.code.push_back(end);
  kernel_.origins.push_back({"<end>", 0, -1});
  for (const auto& [at, label] : branches_) {
    const auto found = labels_.find(label);
    if (found == labels_.end()) refuse("no label " + label, kernel_.origins[at].line);
    kernel_.code[at].target = found->second;
  }
  kernel_.constants_place = round_up(next_place_, place_alignment);
  kernel_.register_bytes = kernel_.constants_place + uint32_t(kernel_.constants.size());
  const auto settle = [&](uint32_t& place) {
    if (place & constant_mark) place = (place & ~constant_mark) + kernel_.constants_place;
  };
  for (Instruction& i : kernel_.code) {
    settle(i.d), settle(i.a), settle(i.b), settle(i.c), settle(i.e);
    for (uint32_t& place : i.vector) settle(place);
  }
}

int ModuleParser::read_place(const Statement& s) {
  std::string plain = s.words;
  std::replace(plain.begin(), plain.end(), ',', ' ');
  const std::vector<std::string> words = words_of(plain);
  const auto three = [&](size_t from) {
    if (words.size() < from + 3) refuse(s.words, s.line);
    return std::array<int, 3>{std::atoi(words[from].c_str()), std::atoi(words[from + 1].c_str()),
                              std::atoi(words[from + 2].c_str())};
  };
  const std::array<int, 3> here = three(1);
  SourcePlace place{here[0], here[1], here[2], -1};
  if (const auto at = std::find(words.begin(), words.end(), "inlined_at"); at != words.end())
    if (const auto caller = places_.find(three(size_t(at - words.begin()) + 1)); caller != places_.end())
      place.caller = caller->second;
  if (const auto known = places_.find(here); known != places_.end())
    if (module_->places[size_t(known->second)].caller == place.caller) return known->second;
  module_->places.push_back(place);
  return places_[here] = int(module_->places.size()) - 1;
}

void ModuleParser::declare(const Statement& s) {
  const Declaration v = read_declaration(s.words, s.line);
  if (v.space == ".shared") {
    if (v.is_extern || (v.is_array && v.bytes == 0)) dynamic_shared = v.name;
    else shared[v.name] = place_shared(shared_variables, shared_bytes, shared_used, v);
  } else if (v.space == ".global" || v.space == ".const") {
    DeviceMemory& memory = DeviceMemory::instance();
    const uint64_t address = memory.allocate(std::max<uint32_t>(v.bytes, 1));
    if (address == 0) refuse("no memory for " + v.name, s.line);
    module_->globals[v.name] = address;
    memory.fill(address, 0, v.bytes, v.name.c_str());
    std::memcpy(memory.storage(address, v.bytes, v.name.c_str()), v.initial.data(), v.initial.size());
  } else {
    refuse("the statement " + s.words, s.line);
  }
}

void ModuleParser::parse_kernel(const Statement& head) {
  auto kernel = std::make_unique<Kernel>();
  const size_t entry = head.words.find(".entry"), paren = head.words.find('(');
  kernel->symbol = trimmed(std::string_view(head.words).substr(entry + 6, paren - entry - 6));
  kernel->name = readable(kernel->symbol);
  KernelParser parser(*this, *kernel);
  if (paren != std::string::npos) {
    const size_t close = head.words.rfind(')');
    for (const std::string& p : split(head.words.substr(paren + 1, close - paren - 1), ','))
      parser.add_parameter(read_declaration(p, head.line));
  }
  for (;;) {
    const Statement s = scanner_.next();
    if (s.kind == Statement::open) break;
    if (s.kind == Statement::line_directive && (s.words.starts_with(".maxntid") || s.words.starts_with(".reqntid"))) {
      uint32_t threads = 1;
      for (const std::string& n : split(s.words.substr(8), ',')) threads *= uint32_t(std::max(1, std::atoi(n.c_str())));
      kernel->max_threads = threads;
    } else if (s.kind != Statement::line_directive) {
      refuse("the head of " + kernel->name + " has '" + s.words + "'", s.line);
    }
  }
  parser.parse_body(scanner_);
  module_->kernels[kernel->symbol] = std::move(kernel);
}

std::unique_ptr<Module> ModuleParser::parse() {
  while (!scanner_.at_end()) {
    const Statement s = scanner_.next();
    if (s.kind == Statement::line_directive) {
      if (!s.words.starts_with(".file")) continue;
      const size_t index = size_t(std::atoi(s.words.c_str() + 5));
      const size_t open = s.words.find('"'), close = s.words.rfind('"');
      if (module_->files.size() <= index) module_->files.resize(index + 1);
      if (open != close) module_->files[index] = s.words.substr(open + 1, close - open - 1);
    } else if (s.kind != Statement::text) {
      refuse("a statement outside of kernels is not understood", s.line);
    } else if (s.words.find(".entry") != std::string::npos) {
      parse_kernel(s);
    } else if (s.words.find(".func") != std::string::npos) {
      refuse("device functions that are called are not known to the interpreter: " + s.words, s.line);
    } else {
      declare(s);
    }
  }
  return std::move(module_);
}

}  // namespace

std::unique_ptr<Module> parse_module(std::string_view text) { return ModuleParser(text).parse(); }

}  // namespace ptx
