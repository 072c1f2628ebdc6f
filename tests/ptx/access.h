// Accesses of a warp to memory: the addresses of its lanes, and every check that they must pass.
#pragma once
#include "tests/ptx/device_memory.h"
#include "tests/ptx/handlers.h"

namespace ptx {

// Where each lane accesses memory. Lanes that are not active have the address of the first active one, so that loops
// over all 32 touch nothing else.
struct Addresses {
  uint64_t of[lanes];
  // Whether lane l lies l times `bytes` behind lane 0.
  bool contiguous(int bytes) const {
    uint64_t differs = 0;
    for (int lane = 0; lane < lanes; lane++) differs |= of[lane] ^ (of[0] + uint64_t(lane) * bytes);
    return differs == 0;
  }
  bool uniform() const {
    uint64_t differs = 0;
    for (int lane = 1; lane < lanes; lane++) differs |= of[lane] ^ of[0];
    return differs == 0;
  }
};

Addresses addresses_of(const Warp&, const Address&);
inline Addresses addresses_of(const Warp& w, const Instruction& i) { return addresses_of(w, i.address); }

// load_for_others: a lane gives the address, and other lanes get what is there.
enum class Access { load, load_read_only, load_for_others, store, atomic };

// Checks an access to global memory and returns offsets into device memory's storage: aligned, within allocations,
// written before where it is read, and not read through the read-only path (ld.global.nc) by a launch that stores
// there. Marks what is stored as written. Throws Fault.
Addresses check_global(Warp&, const Instruction&, const Addresses&, Access);

// The same for the source of an asynchronous copy, of which each lane reads as many bytes as its number says. All
// addresses are aligned to Instruction::bytes.
Addresses check_copied(const Warp&, const Instruction&, const Addresses&, const uint32_t* bytes);

// The same for shared memory; returns offsets into Block::shared.
Addresses check_shared(Warp&, const Instruction&, const Addresses&, Access);

// Of a generic address: whether it lies in shared memory. All active lanes must agree; throws Fault where they do not.
bool is_shared(const Warp&, const Instruction&, Addresses&);

}  // namespace ptx
