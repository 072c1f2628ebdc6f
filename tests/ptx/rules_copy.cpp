// Rules of asynchronous copies from global to shared memory, and of the groups in which a thread waits for them.
#include <cstring>

#include "tests/ptx/access.h"
#include "tests/ptx/copies.h"
#include "tests/ptx/counters.h"

namespace ptx {

namespace {

// Starts copies of which each lane reads so many bytes. The source is read here; nobody sees it before the wait
// (copies.h).
void copy_bytes(Warp& w, const Instruction& i, const uint32_t* bytes) {
  const Addresses from = addresses_of(w, i), to = addresses_of(w, i.to);
  const uint32_t active = w.active;
  uint32_t reading = 0;
  for (int lane = 0; lane < lanes; lane++) {
    if (!has_lane(active, lane)) continue;
    if (bytes[lane] > i.bytes)
      fail(w, i, lane,
           "a copy that reads " + std::to_string(bytes[lane]) + " of " + std::to_string(i.bytes) + " bytes");
    reading |= uint32_t(bytes[lane] > 0) << lane;
  }
  if (w.counters) {
    w.counters->count_shared(w, i, to);
    w.active = reading;
    if (reading) w.counters->count_global(w, i, from, false);
    w.active = active;
  }
  const Addresses source = check_copied(w, i, from, bytes), offsets = check_shared(w, i, to, Access::store);
  for (int lane = 0; lane < lanes; lane++) {
    if (!has_lane(active, lane)) continue;
    char data[16] = {};
    if (bytes[lane] > 0) std::memcpy(data, DeviceMemory::instance().at(source.of[lane]), bytes[lane]);
    start_copy(w, i, lane, uint32_t(offsets.of[lane]), data);
  }
}

void copy(Warp& w, const Instruction& i) { copy_bytes(w, i, lanes_of<uint32_t>(w, i.b)); }
void copy_unless(Warp& w, const Instruction& i) {
  const uint32_t ignored = predicate_of(w, i.b);
  uint32_t bytes[lanes];
  for (int lane = 0; lane < lanes; lane++) bytes[lane] = has_lane(ignored, lane) ? 0 : i.bytes;
  copy_bytes(w, i, bytes);
}

// cp.async.ca|cg.shared.global [to], [from], bytes [, bytes to read, or a predicate: read none]; cp.async.commit_group;
// cp.async.wait_group n; cp.async.wait_all.
void cp(Builder& b) {
  Instruction& i = b.instruction;
  const Type word{'u', 32};
  b.need("async");
  if (b.has("commit_group")) {
    i.copying = Copying::commit;
    i.cost = Class::barrier;
    i.handler = [](Warp& w, const Instruction&) { commit_copies(w); };
    return;
  }
  const bool all = b.has("wait_all");
  if (all || b.has("wait_group")) {
    i.copying = Copying::wait;
    i.cost = Class::barrier;
    if (!all) i.address.displacement = std::stoi(b.text());
    i.handler = all ? Handler([](Warp& w, const Instruction&) { await_all_copies(w); })
                    : Handler([](Warp& w, const Instruction& i) { await_copies(w, uint32_t(i.address.displacement)); });
    return;
  }
  const bool past_l1 = b.has("cg");
  if (!past_l1) b.need("ca");
  if (!b.has("shared::cta")) b.need("shared");
  b.need("global");
  b.has("L2::128B");
  b.address(i.to);
  b.address();
  const std::string bytes = b.text();
  if (bytes != "16" && (past_l1 || (bytes != "4" && bytes != "8"))) b.refuse("a copy of " + bytes + " bytes");
  i.bytes = uint8_t(std::stoi(bytes));
  const bool guarded = b.next_is_predicate();
  if (guarded) b.source(i.b, {'p', 1});
  else if (b.operands_left() > 0) b.source(i.b, word);
  else b.constant(i.b, i.bytes, word);
  i.copying = Copying::start;
  i.cost = Class::async_copy;
  i.handler = guarded ? copy_unless : copy;
}

}  // namespace

const Rules& copy_rules() {
  static const Rules rules{{"cp", cp}};
  return rules;
}

}  // namespace ptx
