// The emulated target of simt.h: runs the CUDA threads of one block at a time as fibers (engine/README.md).
//
// A fiber runs threads that have not started yet, one after the other, and is left only when its thread has to wait. So
// a kernel without barriers never switches. The last thread to reach a barrier releases the others and runs on. A
// shuffle is a meeting of the lanes in its mask, where the last to come moves the values for all.
//
// A product (mma_tf32) and load_matrix are meetings of all 32 lanes, which order no accesses. What copy_async copies is
// NaN until its thread has waited for it; other threads see it after the next barrier (simt_emulated_copies.h).
//
// This file is compiled without sanitizers. It tells them itself which stack a thread is on, and that only barriers,
// shuffles and the borders of a launch order the accesses of two threads.
//
//   SIMT_SEED=n   n != 0: run threads and blocks in a random order, and switch at atomics; 0, the default: in order
#include <sys/mman.h>

#include <boost/context/detail/fcontext.hpp>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <utility>

#include "engine/simt_emulated_copies.h"

extern "C" {  // present when the program is linked with the sanitizer
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_set_fiber_name(void* fiber, const char* name);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);  // 1: no happens-before
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
// The shared variables of all kernels lie between these two symbols of the linker.
extern unsigned char __start_simt_shared[] __attribute__((weak)), __stop_simt_shared[] __attribute__((weak));
}

baton::simt::Index threadIdx, blockIdx, blockDim, gridDim;

namespace baton::simt::emu {
unsigned char* dynamic_shared;
namespace {
namespace ctx = boost::context::detail;
constexpr int max_threads = 1024, max_warps = max_threads / 32;
constexpr size_t max_shared = 227 * 1024;  // sm_90's limit for a block
constexpr size_t stack_size = 256 * 1024, guard = 4096;

struct Fiber {
  ctx::fcontext_t context = nullptr;
  const void* bottom = nullptr;  // its stack
  size_t size = 0;
  void* fake_stack = nullptr;  // ASan's
};
bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)); }
enum class State { running, at_barrier, at_exchange, done };
struct Thread {  // a CUDA thread
  State state;
  Index index;
  Fiber* fiber;
  void* tsan;                           // TSan's view of it
  Site site;                            // where it waits
  unsigned mask;                        // of a warp exchange: the lanes that take part,
  int source;                           // the lane whose value this one wants,
  alignas(16) unsigned char value[16];  // and its own value
  void* operand;                        // of a product or of load_matrix
  Copies copies;
};

struct Machine {
  void (*kernel)(void*);
  void* args;
  const char* name;
  Thread threads[max_threads];
  Thread* current;
  int n, order[max_threads], started, finished, at_barrier;
  unsigned barriers;                                // that this block has passed so far
  unsigned pending[max_warps];                      // per warp, the lanes that wait at an exchange
  int ready[max_threads], ready_head, ready_count;  // a ring,
  unsigned char ready_rank[max_threads];            // with the ranks of their warps
  int rank[max_warps], ready_of_rank[max_warps];
  Fiber fibers[max_threads], *idle[max_threads], os;
  int fiber_count, idle_count;
  void* os_tsan;
  uint64_t random, rank_seed;  // random: 0 in order
  char error[1024];

  // Addresses that stand for TSan's synchronisation objects.
  enum : int { launch_begin, launch_end, even_barrier, odd_barrier, first_warp };
  char sync[first_warp + max_warps];

  uint64_t draw(uint64_t below) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return random % below;
  }
  void acquire(int object) {
    if (__tsan_acquire) __tsan_acquire(&sync[object]);
  }
  void release(int object) {
    if (__tsan_release) __tsan_release(&sync[object]);
  }

  // ---- fibers
  __forceinline__ static void arrive(ctx::transfer_t from, Fiber* self, Fiber& os) {
    Fiber* left = static_cast<Fiber*>(from.data);
    left->context = from.fctx;
    if (__sanitizer_finish_switch_fiber) {
      const void* bottom;
      size_t size;
      __sanitizer_finish_switch_fiber(self->fake_stack, &bottom, &size);
      if (left == &os) os.bottom = bottom, os.size = size;
    }
  }
  __forceinline__ void jump(Fiber* from, Fiber* to) {
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&from->fake_stack, to->bottom, to->size);
    arrive(ctx::jump_fcontext(to->context, from), from, os);
  }
  static void entry(ctx::transfer_t from);
  Fiber* fresh_fiber() {
    if (idle_count) return idle[--idle_count];
    Fiber* f = &fibers[fiber_count++];
    void* memory =
        mmap(nullptr, stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fprintf(stderr, "simt_emu: no memory for the stack of a fiber\n"), abort();
    char* base = static_cast<char*>(memory);
    mprotect(base, guard, PROT_NONE);
    size_t colour = fiber_count % 32 * 128;  // else all stacks would share the same cache sets
    f->bottom = base + guard;
    f->size = stack_size - guard - colour;
    f->fake_stack = nullptr;
    f->context = ctx::make_fcontext(base + stack_size - colour, f->size, entry);
    return f;
  }

  // ---- scheduling
  void make_ready(Thread* t) {
    t->state = State::running;
    const int place = (ready_head + ready_count++) % max_threads, its_rank = rank[(t - threads) / 32];
    ready[place] = int(t - threads);
    ready_rank[place] = static_cast<unsigned char>(its_rank);
    ready_of_rank[its_rank]++;
  }
  bool choose_fresh() {
    int fresh = n - started;
    return fresh && (!ready_count || !random || rank_seed % 2 == 0 || draw(fresh + ready_count) < unsigned(fresh));
  }
  // In half of the blocks: any thread. In the others: a thread of the warp with the best of random ranks, which so runs
  // ahead. Its place in the ring.
  int favourite() {
    if (rank_seed % 2) return int(ready_head + draw(ready_count)) % max_threads;
    int best = 0;
    while (!ready_of_rank[best]) best++;
    const int straight = min(ready_count, max_threads - ready_head);  // before the ring begins again
    const void* found = memchr(ready_rank + ready_head, best, size_t(straight));
    if (!found) found = memchr(ready_rank, best, size_t(ready_count - straight));
    return int(static_cast<const unsigned char*>(found) - ready_rank);
  }
  void draw_ranks() {  // 0 is the best; warps may share one
    auto drawn = [&](int warp) { return (warp + 1) * (rank_seed | 1) >> 40 & 0xFFFF; };
    const int warps = (n + 31) / 32;
    for (int w = 0; w < warps; w++) {
      rank[w] = ready_of_rank[w] = 0;
      for (int other = 0; other < warps; other++) rank[w] += drawn(other) < drawn(w);
    }
  }
  Fiber* choose() {  // the fiber that runs next, when the current one cannot go on
    if (choose_fresh()) return fresh_fiber();
    if (!ready_count) {
      if (finished < n) report_stuck();
      return &os;
    }
    if (random) {
      const int chosen = favourite();
      std::swap(ready[ready_head], ready[chosen]);
      std::swap(ready_rank[ready_head], ready_rank[chosen]);
    }
    Thread* t = &threads[ready[ready_head]];
    ready_of_rank[ready_rank[ready_head]]--;
    ready_head = (ready_head + 1) % max_threads;
    ready_count--;
    return t->fiber;
  }
  __forceinline__ void enter(Thread* t) {
    current = t;
    threadIdx = t->index;
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(t->tsan, 1);
  }
  __forceinline__ void suspend(Thread* me) {
    Fiber* next = choose();
    if (next != me->fiber) {
      if (me->copies.any_arrived()) me->copies.hide();
      jump(me->fiber, next);
      if (me->copies.any_arrived()) me->copies.place();
    }
    enter(me);
  }
  void work(Fiber* self) {
    for (;;) {
      while (choose_fresh()) {
        Thread* t = &threads[order[started++]];
        t->fiber = self;
        enter(t);
        acquire(launch_begin);
        kernel(args);
        release(launch_end);
        if (const Copy* c = current->copies.under_way())
          fail("the kernel ends before it has waited for the copy at %s:%d", c->site.file, c->site.line);
        current->copies.hide();
        current->state = State::done;
        finished++;
        if (__tsan_create_fiber) break;  // else TSan would see races between the locals of two threads on one stack
      }
      if (!__tsan_create_fiber || finished == n) idle[idle_count++] = self;
      Fiber* next = choose();
      if (next != self) jump(self, next);
    }
  }
  template <class... A>
  void fail(const char* format, A... a) {
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(os_tsan, 0);
    int used = snprintf(error, sizeof error, "%s\n  block (%u,%u,%u), thread (%u,%u,%u): ", name, blockIdx.x,
                        blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    snprintf(error + used, sizeof error - used, format, a...);
    fiber_count = 0;  // the fibers that still wait are lost
    Fiber lost;
    jump(&lost, &os);
  }
  void report_stuck() {
    int waiting = 0, done = 0;
    Thread* first = nullptr;
    for (int i = 0; i < n; i++) {
      Thread& t = threads[i];
      if (t.state == State::done) done++;
      if (t.state == State::at_barrier || t.state == State::at_exchange) waiting++, first = first ? first : &t;
    }
    fail("%d threads wait for ever, the first (%d) at %s:%d; %d have returned", waiting, int(first - threads),
         first->site.file, first->site.line, done);
  }

  // ---- what kernels call
  __forceinline__ void barrier(Site site) {
    Thread* me = current;
    me->site = site;
    me->state = State::at_barrier;
    const int object = barriers & 1 ? odd_barrier : even_barrier;
    release(object);
    if (++at_barrier < n) {
      suspend(me);
    } else {
      for (int i = 0; i < n; i++) {
        Thread& t = threads[i];
        if (!same(t.site, site))
          fail("threads meet at different barriers, %s:%d and %s:%d", site.file, site.line, t.site.file, t.site.line);
      }
      for (int i = 0; i < n; i++) threads[i].copies.show(&threads[i] != me);
      at_barrier = 0;
      barriers++;
      me->state = State::running;
      for (int i = 0; i < n; i++)
        if (&threads[order[i]] != me) make_ready(&threads[order[i]]);
      if (random && draw(2)) make_ready(me), suspend(me);
    }
    acquire(object);
  }
  // Waits for the other lanes of the mask. The last of them to come calls act(the warp's first thread, mask).
  template <class Act>
  __forceinline__ void meet(unsigned mask, Site site, Act act) {
    Thread* me = current;
    const int self = int(me - threads), first = self & ~31, lanes = min(32, n - first);
    if (lanes < 32) mask &= (1u << lanes) - 1;
    if (!(mask >> (self & 31) & 1)) fail("lane not in its own mask at %s:%d", site.file, site.line);
    me->site = site, me->mask = mask;
    me->state = State::at_exchange;
    unsigned& here = pending[first / 32];
    here |= 1u << (self & 31);
    if ((here & mask) != mask) return suspend(me);
    for (int l = 0; l < lanes; l++) {
      Thread& t = threads[first + l];
      if ((mask >> l & 1) && (t.mask != mask || !same(t.site, site)))
        fail("lanes of a warp meet at different exchanges, %s:%d and %s:%d", site.file, site.line, t.site.file,
             t.site.line);
    }
    here &= ~mask;
    act(threads + first, mask);
    for (int l = 0; l < lanes; l++)
      if ((mask >> l & 1) && first + l != self) make_ready(&threads[first + l]);
    me->state = State::running;
  }
  __forceinline__ void exchange(unsigned mask, int source, void* value, size_t bytes, Site site) {
    Thread* me = current;
    const int object = first_warp + int(me - threads) / 32;
    me->source = source;
    if (bytes) memcpy(me->value, value, bytes);
    release(object);
    meet(mask, site, [&](Thread* warp, unsigned met) {
      if (source < 0) {  // __syncwarp
        for (int l = 0; l < 32; l++)
          if (met >> l & 1) warp[l].copies.show(warp + l != current);
        return;
      }
      unsigned char result[32][16];
      for (int l = 0; l < 32; l++)
        if (met >> l & 1) {
          const int from = warp[l].source;
          if (!(met >> from & 1))
            fail("shuffle from lane %d, which takes no part, at %s:%d", from, site.file, site.line);
          memcpy(result[l], warp[from].value, 16);
        }
      for (int l = 0; l < 32; l++)
        if (met >> l & 1) memcpy(warp[l].value, result[l], 16);
    });
    acquire(object);
    if (bytes) memcpy(value, me->value, bytes);
  }
  // A meeting of a whole warp; act gets the operands of its 32 lanes.
  template <class Operand, class Act>
  void collective(Operand* mine, Site site, Act act) {
    const int lanes = n - (int(current - threads) & ~31);
    if (lanes < 32) fail("a warp of %d lanes at %s:%d, where 32 are needed", lanes, site.file, site.line);
    current->operand = mine;
    meet(~0u, site, [&](Thread* warp, unsigned) {
      Operand* operands[32];
      for (int l = 0; l < 32; l++) operands[l] = static_cast<Operand*>(warp[l].operand);
      act(operands);
    });
  }
  void maybe_preempt() {
    if (random && draw(4) == 0 && (ready_count || started < n)) make_ready(current), suspend(current);
  }
  void block(Index where) {
    blockIdx = where;
    started = finished = at_barrier = ready_head = ready_count = 0;
    barriers = 0;
    rank_seed = random ? draw(~0ull) : 0;
    draw_ranks();
    memset(pending, 0, sizeof pending);
    for (idle_count = 0; idle_count < fiber_count; idle_count++) idle[idle_count] = &fibers[idle_count];
    for (int i = 0; i < n; i++) {
      threads[i].state = State::running;
      threads[i].site = {"", 0};
      threads[i].copies.clear();
      order[i] = i;
      if (random) std::swap(order[i], order[draw(i + 1)]);
    }
    Fiber* first = choose();
    if (first != &os) jump(&os, first);
  }
};
Machine* machine;

void Machine::entry(ctx::transfer_t from) {
  Fiber* self = &machine->fibers[machine->fiber_count - 1];  // the newest, for a fiber is entered as soon as it is made
  arrive(from, self, machine->os);
  machine->work(self);
}

// Fills shared memory with NaN. memset would not do: ASan checks it, and there are red zones in between.
void poison(unsigned char* from, unsigned char* to) {
  for (; to - from >= 8; from += 8) *reinterpret_cast<volatile uint64_t*>(from) = ~0ull;
  for (; from < to; from++) *reinterpret_cast<volatile unsigned char*>(from) = 0xFF;
}

void run_blocks(Machine& m, Index grid, Index block, size_t smem, uint64_t seed) {
  gridDim = grid, blockDim = block;
  const unsigned blocks = grid.x * grid.y * grid.z;
  m.n = block.x * block.y * block.z;
  m.random = seed ? seed * 0x9E3779B97F4A7C15u + 1 : 0;
  for (int i = 0; i < m.n; i++) {
    unsigned u = i;
    m.threads[i].index = {u % block.x, u / block.x % block.y, u / block.x / block.y};
    m.threads[i].tsan = __tsan_create_fiber ? __tsan_create_fiber(0) : nullptr;
    if (__tsan_set_fiber_name) __tsan_set_fiber_name(m.threads[i].tsan, ("CUDA thread " + std::to_string(i)).c_str());
  }
  m.os_tsan = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr;
  dynamic_shared = static_cast<unsigned char*>(malloc(smem));
  m.error[0] = 0;
  for (unsigned i = 0; i < blocks && !m.error[0]; i++) {
    const unsigned b = seed ? unsigned((i + seed) % blocks) : i;
    memset(dynamic_shared, 0xFF, smem);
    if (+__start_simt_shared != +__stop_simt_shared) poison(__start_simt_shared, __stop_simt_shared);
    m.release(Machine::launch_begin);
    m.block({b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y});
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(m.os_tsan, 1);
    m.acquire(Machine::launch_end);
  }
  free(dynamic_shared);
  if (__tsan_destroy_fiber)
    for (int i = 0; i < m.n; i++) __tsan_destroy_fiber(m.threads[i].tsan);
}
}  // namespace

void block_barrier(Site s) { machine->barrier(s); }
void warp_exchange(unsigned mask, int source, void* value, size_t bytes, Site s) {
  machine->exchange(mask, source, value, bytes, s);
}
void preempt() { machine->maybe_preempt(); }
int lane() { return int(machine->current - machine->threads) & 31; }

namespace {
float without_last_bits(float x) { return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, x) & 0xffffe000u); }
}  // namespace
// The fragments are laid out as simt.h says. Each sum begins with C and takes the products in order: tests/ptx does the
// same, the chip does not say.
void multiply(Fragments* mine, Site s) {
  machine->collective(mine, s, [](Fragments* const* lanes) {
    float a[16][8], b[8][8], c[16][8];
    for (int l = 0; l < 32; l++) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 4; i++) {
        a[g + i % 2 * 8][t + i / 2 * 4] = without_last_bits(lanes[l]->a[i]);
        c[g + i / 2 * 8][2 * t + i % 2] = lanes[l]->c[i];
      }
      for (int i = 0; i < 2; i++) b[t + 4 * i][g] = without_last_bits(lanes[l]->b[i]);
    }
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < 8; k++)
        for (int column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) lanes[l]->c[i] = c[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2];
  });
}
void exchange_rows(Rows* mine, Site s) {
  if (reinterpret_cast<uintptr_t>(mine->mine) % 16)
    machine->fail("a row that is not aligned to 16 bytes at %s:%d", s.file, s.line);
  machine->collective(mine, s, [](Rows* const* lanes) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) lanes[l]->read[i] = lanes[8 * i + l / 4]->mine;
  });
}

void check_copy(const void* to, const void* from, int bytes, int valid, int n, Site s) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    machine->fail("a copy between addresses that are not aligned to its %d bytes at %s:%d", bytes, s.file, s.line);
  if (valid < 0 || valid > n) machine->fail("a copy of %d of %d elements at %s:%d", valid, n, s.file, s.line);
}
void start_copy(const Copy& copy) {
  Copies& copies = machine->current->copies;
  if (copies.full())
    machine->fail("more than %d copies of a thread at once at %s:%d", Copies::most, copy.site.file, copy.site.line);
  copies.start(copy);
}
void commit_copies() { machine->current->copies.commit(); }
bool next_arrival(unsigned pending, Copy& copy) { return machine->current->copies.next_arrival(pending, copy); }

namespace {
uint64_t schedule_seed = getenv("SIMT_SEED") ? strtoull(getenv("SIMT_SEED"), nullptr, 0) : 0;
uint64_t launches;
}  // namespace
void set_seed(uint64_t seed) { schedule_seed = seed, launches = 0; }

void run(Index grid, Index block, size_t smem, void (*kernel)(void*), void* args, const char* name) {
  static std::mutex one_at_a_time;
  std::lock_guard lock(one_at_a_time);
  auto refuse = [&](size_t found, const char* what) {
    throw RunError(std::string(name) + ": " + std::to_string(found) + " " + what);
  };
  const unsigned threads = block.x * block.y * block.z;
  if (threads < 1 || threads > max_threads) refuse(threads, "threads in a block");
  if (smem > max_shared) refuse(smem, "bytes of shared memory");
  if (grid.y > 65535 || grid.z > 65535) refuse(max(grid.y, grid.z), "rows in the grid");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const uint64_t seed = schedule_seed ? schedule_seed * 1000003 + launches++ : 0;
  if (!machine) machine = new Machine();
  machine->kernel = kernel, machine->args = args, machine->name = name;
  run_blocks(*machine, grid, block, smem, seed);
  if (machine->error[0]) throw RunError(machine->error);
}
}  // namespace baton::simt::emu
