// A PTX module as it is executed: kernels as flat lists of instructions whose operands are places in a register file.
//
// A register holds a value for each of the 32 lanes of a warp, side by side, so that an instruction is a loop over
// lanes, which the compiler vectorises. A register of at most 32 bits takes 128 bytes, one of 64 bits 256 bytes, and a
// predicate is one word with a bit for each lane. Numbers in the source are registers too, filled once a launch.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

constexpr int lanes = 32;

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&);  // acts on the active lanes of the warp

// What the loop that runs a warp has to do about an instruction, beside calling its handler.
enum class Flow : uint8_t {
  next,     // nothing: on to the next one
  branch,   // lanes whose guard holds go to `target`
  exit,     // lanes whose guard holds are done
  barrier,  // lanes wait for the whole block
  meeting,  // lanes wait for those that a mask names: shuffles, votes, bar.warp.sync
};

// What tools/gpu-cost counts an instruction as.
enum class Class : uint8_t {
  integer,    // 32-bit integers, logic, moves, comparisons and selections
  integer64,  // what needs two or more of them
  division,   // of integers: a subroutine on the chip
  float32,    // add, mul, fma, min, max
  float64,
  special,  // exp2, log2, approximate reciprocals and roots: a quarter of a warp at a time
  exact32,  // correctly rounded division, reciprocal and root in float32: a sequence on the chip
  exact64,  // the same in float64
  conversion,
  global_load,
  global_store,
  shared_load,
  shared_store,
  parameter,  // loads of a kernel's arguments, which lie in a constant bank
  atomic,
  exchange,  // shuffles and votes
  barrier,
  tensor,       // mma
  matrix_load,  // ldmatrix
  async_copy,   // cp.async from global to shared memory
  control,      // branches, exits
  count,
};
const char* name_of(Class);

// What an instruction of asynchronous copies does.
enum class Copying : uint8_t { nothing, start, commit, wait };

enum class Space : uint8_t { parameter, global, shared, generic };

// base + displacement
struct Address {
  int64_t displacement = 0;                  // the whole address where has_base is false
  uint32_t base = 0;                         // place of a register
  bool has_base = false, wide_base = false;  // wide_base: of 64 bits
};

struct Instruction {
  Handler handler = nullptr;
  Flow flow = Flow::next;
  Class cost = Class::integer;
  bool guard_negated = false;
  bool flag = false;  // a rule's own: negated source of a vote, second destination of a shuffle, ...
  uint8_t kind = 0;   // a rule's own
  uint8_t parts = 1;  // of a vector operand
  uint8_t bytes = 0;  // that a memory instruction moves for each lane, all parts together
  Space space = Space::global;
  Copying copying = Copying::nothing;  // of a wait, address.displacement says how many groups may be under way
  int32_t guard = -1;                  // place of the predicate that guards it
  int32_t target = -1;                 // of a branch
  // Places (byte offsets into a warp's register file): destination, then sources in the order of the source text.
  uint32_t d = 0, a = 0, b = 0, c = 0, e = 0;
  std::array<uint32_t, 14> vector{};  // registers of vector operands, or the one of a scalar in vector[0]
  Address address, to;                // to: where an asynchronous copy writes
  uint32_t number = 0;                // its index in the kernel, for counters and messages
  // The registers that it reads and writes, for chains of dependent instructions.
  std::array<uint32_t, 12> reads{};
  std::array<uint32_t, 5> writes{};
  uint8_t read_count = 0, write_count = 0;
};

// A place in the source, where line information is there (-lineinfo).
struct SourcePlace {
  int file = 0;  // index of Module::files
  int line = 0;
  int column = 0;
  int caller = -1;  // where the function that it lies in was inlined: index of Module::places, -1: it was not
};

// Where an instruction comes from.
struct Origin {
  std::string text;  // as in the module, on one line
  int line = 0;      // in the module's text
  int place = -1;    // index of Module::places, -1: not known
};

struct Variable {
  uint32_t offset = 0, bytes = 0;
};

struct Kernel {
  std::string symbol;  // mangled
  std::string name;    // as written in the source, without its namespaces' and its arguments' text
  std::vector<Instruction> code;
  std::vector<Origin> origins;       // of each instruction
  std::vector<Variable> parameters;  // where each argument lies in the block of parameters
  uint32_t parameter_bytes = 0;
  uint32_t register_bytes = 0;  // of a warp's register file, constants and special registers included
  uint32_t special_place = 0;   // of the special registers
  uint32_t constants_place = 0;
  std::vector<char> constants;
  std::vector<Variable> shared;   // static shared variables, with gaps between them that nobody may touch
  uint32_t shared_bytes = 0;      // of them with the gaps
  uint32_t shared_used = 0;       // and without: what the chip's limits count
  uint32_t max_threads = 0;       // .maxntid, 0: not said
  bool reads_through_nc = false;  // has ld.global.nc
  std::string unknown;            // why it cannot run: an instruction that is not known here
};

struct Module {
  std::map<std::string, std::unique_ptr<Kernel>> kernels;  // by symbol
  std::map<std::string, uint64_t> globals;                 // device addresses of module variables
  std::vector<std::string> files;                          // of line information
  std::vector<SourcePlace> places;
};

// Throws Fault (unsupported) for text that is not understood outside kernels; an instruction that is not known makes
// its own kernel unusable (Kernel::unknown). Allocates the module's global variables in device memory.
std::unique_ptr<Module> parse_module(std::string_view text);

// The special registers (%tid.x and so on), in the order of their places.
enum Special : int {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  lanemask_eq,
  lanemask_le,
  lanemask_lt,
  lanemask_ge,
  lanemask_gt,
  special_count,
};

constexpr uint32_t narrow_bytes = 4 * lanes, wide_bytes = 8 * lanes, place_alignment = 64;

// Shared addresses. Static variables come first; dynamic shared memory begins at dynamic_window. In the generic address
// space they lie at shared_window and above, as on the chip.
constexpr uint32_t dynamic_window = 0x100000;
constexpr uint64_t shared_window = 0x1000000, shared_window_bytes = 0x1000000;

}  // namespace ptx
