// Rules of loads and stores.
#include <cstring>

#include "tests/ptx/access.h"
#include "tests/ptx/counters.h"

namespace ptx {

namespace {

// Moves `parts` values of type T for each lane between registers and the places `at`, offsets into `memory`.
template <class T>
void move_to_registers(Warp& w, const Instruction& i, const char* memory, const Addresses& at) {
  for (int part = 0; part < i.parts; part++) {
    const char* from = memory + part * sizeof(T);
    T value[lanes];
    for (int lane = 0; lane < lanes; lane++) std::memcpy(&value[lane], from + at.of[lane], sizeof(T));
    if (i.flag) {  // into a wider register: extended
      uint64_t* d = lanes_of<uint64_t>(w, i.vector[part]);
      PTX_EACH_LANE d[lane] = has_lane(w.active, lane) ? uint64_t(int64_t(value[lane])) : d[lane];
    } else {
      Stored<T>* d = lanes_of<T>(w, i.vector[part]);
      PTX_EACH_LANE d[lane] = has_lane(w.active, lane) ? widened(value[lane]) : d[lane];
    }
  }
}
// Lanes store one after the other: of several that store to one place the last wins, as on the chip one of them does.
template <class T>
void move_to_memory(const Warp& w, const Instruction& i, char* memory, const Addresses& at) {
  for (int part = 0; part < i.parts; part++) {
    char* to = memory + part * sizeof(T);
    for (int lane = 0; lane < lanes; lane++) {
      if (!has_lane(w.active, lane)) continue;
      const T value = i.flag ? T(lanes_of<uint64_t>(w, i.vector[part])[lane]) : T(lanes_of<T>(w, i.vector[part])[lane]);
      std::memcpy(to + at.of[lane], &value, sizeof(T));
    }
  }
}

template <class T>
void load_parameter(Warp& w, const Instruction& i) {
  const std::vector<char>& parameters = w.block->launch->parameters;
  if (!i.address.has_base && i.parts == 1 && !i.flag &&
      uint64_t(i.address.displacement) + i.bytes <= parameters.size()) {
    T value;  // the same in all lanes, as nearly always
    std::memcpy(&value, parameters.data() + i.address.displacement, sizeof value);
    Stored<T>* d = lanes_of<T>(w, i.vector[0]);
    PTX_EACH_LANE d[lane] = has_lane(w.active, lane) ? widened(value) : d[lane];
    return;
  }
  const Addresses a = addresses_of(w, i);
  for (int lane = 0; lane < lanes; lane++)
    if (a.of[lane] + i.bytes > parameters.size())
      fail(w, i, lane, "a load beyond the kernel's arguments", FaultKind::access);
  move_to_registers<T>(w, i, parameters.data(), a);
}

template <class T, bool read_only>
void load_global(Warp& w, const Instruction& i) {
  const Addresses a = addresses_of(w, i);
  if (w.counters) w.counters->count_global(w, i, a, false);
  const Addresses at = check_global(w, i, a, read_only ? Access::load_read_only : Access::load);
  move_to_registers<T>(w, i, DeviceMemory::instance().at(0), at);
}
template <class T>
void store_global(Warp& w, const Instruction& i) {
  const Addresses a = addresses_of(w, i);
  if (w.counters) w.counters->count_global(w, i, a, true);
  move_to_memory<T>(w, i, DeviceMemory::instance().at(0), check_global(w, i, a, Access::store));
}

template <class T>
void load_shared_at(Warp& w, const Instruction& i, const Addresses& a) {
  if (w.counters) w.counters->count_shared(w, i, a);
  move_to_registers<T>(w, i, w.block->shared.data(), check_shared(w, i, a, Access::load));
}
template <class T>
void store_shared_at(Warp& w, const Instruction& i, const Addresses& a) {
  if (w.counters) w.counters->count_shared(w, i, a);
  move_to_memory<T>(w, i, w.block->shared.data(), check_shared(w, i, a, Access::store));
}
template <class T>
void load_shared(Warp& w, const Instruction& i) {
  load_shared_at<T>(w, i, addresses_of(w, i));
}
template <class T>
void store_shared(Warp& w, const Instruction& i) {
  store_shared_at<T>(w, i, addresses_of(w, i));
}

template <class T>
void load_generic(Warp& w, const Instruction& i) {
  Addresses a = addresses_of(w, i);
  if (is_shared(w, i, a)) load_shared_at<T>(w, i, a);
  else load_global<T, false>(w, i);
}
template <class T>
void store_generic(Warp& w, const Instruction& i) {
  Addresses a = addresses_of(w, i);
  if (is_shared(w, i, a)) store_shared_at<T>(w, i, a);
  else store_global<T>(w, i);
}

// Takes what says how an access is ordered or cached: the lanes here see one memory, in the order of the program.
void take_hints(Builder& b) {
  for (const char* hint : {"weak", "volatile", "relaxed", "acquire", "release", "cta", "gpu", "sys", "ca", "cg", "cs",
                           "lu", "cv", "wb", "wt", "L1::no_allocate", "L1::evict_last", "L1::evict_first", "L2::128B"})
    b.has(hint);
}

Space take_space(Builder& b) {
  if (b.has("param") || b.has("const")) return Space::parameter;
  if (b.has("shared") || b.has("shared::cta")) return Space::shared;
  if (b.has("global")) return Space::global;
  if (b.has("local")) b.refuse("local memory is not known here: kernels of this house have no stack");
  return Space::generic;
}

template <class Make>
Handler for_moved(const Builder& b, Type t, Make make) {  // signs matter to narrow types alone
  return t.is_signed() ? for_integer(b, t, make) : for_bits(b, t, make);
}

void ld(Builder& b) {
  Instruction& i = b.instruction;
  take_hints(b);
  const bool constant = b.has("const");
  i.space = constant ? Space::global : take_space(b);  // constant variables live in device memory here
  const bool read_only = b.has("nc");
  const bool pair = b.has("v2"), quad = b.has("v4");
  const Type t = b.type();
  i.parts = uint8_t(b.vector_destination(t));
  if (i.parts != (quad ? 4 : pair ? 2 : 1)) b.refuse("a vector of another length than its suffix says");
  b.address();
  i.bytes = uint8_t(i.parts * t.bits / 8);
  switch (i.space) {
    case Space::parameter:
      i.cost = Class::parameter;
      i.handler = for_moved(b, t, []<class T>() { return Handler(load_parameter<T>); });
      break;
    case Space::global:
      i.cost = constant ? Class::parameter : Class::global_load;
      i.handler = read_only ? for_moved(b, t, []<class T>() { return Handler(load_global<T, true>); })
                            : for_moved(b, t, []<class T>() { return Handler(load_global<T, false>); });
      i.kind = read_only;
      break;
    case Space::shared:
      i.cost = Class::shared_load;
      i.handler = for_moved(b, t, []<class T>() { return Handler(load_shared<T>); });
      break;
    case Space::generic:
      i.cost = Class::global_load;
      i.handler = for_moved(b, t, []<class T>() { return Handler(load_generic<T>); });
      break;
  }
}

void st(Builder& b) {
  Instruction& i = b.instruction;
  take_hints(b);
  i.space = take_space(b);
  const bool pair = b.has("v2"), quad = b.has("v4");
  const Type t = b.type();
  b.address();
  i.parts = uint8_t(b.vector_source(t));
  if (i.parts != (quad ? 4 : pair ? 2 : 1)) b.refuse("a vector of another length than its suffix says");
  i.bytes = uint8_t(i.parts * t.bits / 8);
  switch (i.space) {
    case Space::parameter:
      b.refuse("a store to the kernel's arguments");
    case Space::global:
      i.cost = Class::global_store;
      i.handler = for_bits(b, t, []<class T>() { return Handler(store_global<T>); });
      break;
    case Space::shared:
      i.cost = Class::shared_store;
      i.handler = for_bits(b, t, []<class T>() { return Handler(store_shared<T>); });
      break;
    case Space::generic:
      i.cost = Class::global_store;
      i.handler = for_bits(b, t, []<class T>() { return Handler(store_generic<T>); });
      break;
  }
}

}  // namespace

const Rules& memory_rules() {
  static const Rules rules{{"ld", ld}, {"st", st}};
  return rules;
}

}  // namespace ptx
