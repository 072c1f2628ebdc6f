// How launches run: memory, divergence, barriers, exchanges, schedules; and what the parser makes of a module.
#include <gtest/gtest.h>

#include <numeric>

#include "tests/ptx/counters.h"
#include "tests/ptx/machine.h"

namespace ptx::test {
namespace {

using u32 = uint32_t;

// %at: where thread x of the grid stores its word, p0 + 4 x; %i: x.
const std::string prologue =
    ".reg .pred %p<8>; .reg .b32 %i, %t, %r<16>; .reg .b64 %at, %by, %rd<8>; .reg .f32 %f<8>;\n"
    "mov.u32 %t, %tid.x;\nmov.u32 %r0, %ctaid.x;\nmov.u32 %r1, %ntid.x;\nmad.lo.s32 %i, %r0, %r1, %t;\n"
    "ld.param.u64 %at, [p0];\nmul.wide.s32 %by, %i, 4;\nadd.s64 %at, %at, %by;\n";

std::vector<u32> run_words(const std::string& body, u32 grid, u32 block, uint64_t seed = 0, u32 dynamic = 0,
                           const std::string& before = "") {
  Machine m(module_of(prologue + body, 1, before));
  const uint64_t out = Machine::upload(std::vector<u32>(size_t(grid) * block, 0));
  m.run(grid, block, {out}, seed, dynamic);
  return Machine::download<u32>(out, size_t(grid) * block);
}
// What a faulty program is told.
std::string fault_of(const std::string& body, u32 grid, u32 block, u32 dynamic = 0, const std::string& before = "") {
  try {
    run_words(body, grid, block, 0, dynamic, before);
  } catch (const Fault& fault) {
    return fault.what();
  }
  return "no fault";
}
#define EXPECT_HAS(text, words) EXPECT_NE((text).find(words), std::string::npos) << (text)

TEST(PtxRun, ThreadsKnowWhereTheyAre) {
  const auto words = run_words(
      "mov.u32 %r2, %laneid;\nmov.u32 %r3, %nctaid.x;\nshl.b32 %r3, %r3, 16;\n"
      "shl.b32 %r2, %r2, 8;\nadd.u32 %r2, %r2, %r3;\nadd.u32 %r2, %r2, %ctaid.x;\n"
      "st.global.u32 [%at], %r2;\nret;",
      3, 70);
  for (u32 i = 0; i < 210; i++) EXPECT_EQ(words[i], (3u << 16) + (i % 70 % 32 << 8) + i / 70);
}

// Each lane runs the loop as often as its number says; all meet again behind it.
const std::string collatz =
    "mov.u32 %r2, 0;\nadd.u32 %r3, %i, 1;\nLOOP:\nsetp.eq.u32 %p0, %r3, 1;\n@%p0 bra DONE;\nand.b32 %r4, %r3, 1;\n"
    "setp.eq.u32 %p1, %r4, 0;\n@%p1 bra EVEN;\nmad.lo.s32 %r3, %r3, 3, 1;\nbra NEXT;\nEVEN:\nshr.u32 %r3, %r3, "
    "1;\nNEXT:\n"
    "add.u32 %r2, %r2, 1;\nbra.uni LOOP;\nDONE:\nst.global.u32 [%at], %r2;\nret;";

TEST(PtxRun, LanesThatPartAreEachRight) {
  for (const uint64_t seed : {0, 1, 2, 3}) {
    const auto words = run_words(collatz, 2, 100, seed);
    for (u32 i = 0; i < 200; i++) {
      u32 steps = 0;
      for (uint64_t n = i + 1; n != 1; n = n % 2 ? 3 * n + 1 : n / 2) steps++;
      EXPECT_EQ(words[i], steps);
    }
  }
}

TEST(PtxRun, SharedMemoryAndBarriers) {
  const std::string body =
      ".shared .align 4 .b8 s[512];\nmov.u32 %r2, s;\nshl.b32 %r3, %t, 2;\nadd.u32 %r4, %r2, %r3;\n"
      "st.shared.u32 [%r4], %i;\nbar.sync 0;\nadd.u32 %r5, %t, 1;\nand.b32 %r5, %r5, 127;\n"
      "shl.b32 %r5, %r5, 2;\nadd.u32 %r5, %r5, %r2;\nld.shared.u32 %r6, [%r5];\n"
      "st.global.u32 [%at], %r6;\nret;";
  for (const uint64_t seed : {0, 1, 2}) {
    const auto words = run_words(body, 3, 128, seed);
    for (u32 i = 0; i < 384; i++) EXPECT_EQ(words[i], i / 128 * 128 + (i + 1) % 128);
  }
}

TEST(PtxRun, DynamicSharedMemoryAndGenericAddresses) {
  const std::string before = ".extern .shared .align 16 .b8 dynamic[];\n";
  const std::string body =
      "mov.u64 %rd1, dynamic;\ncvta.shared.u64 %rd2, %rd1;\nmul.wide.u32 %rd3, %t, 4;\n"
      "add.s64 %rd2, %rd2, %rd3;\nst.u32 [%rd2], %i;\nbar.sync 0;\nld.u32 %r2, [%rd2];\n"
      "st.u32 [%at], %r2;\nret;";
  const auto words = run_words(body, 2, 64, 0, 256, before);
  for (u32 i = 0; i < 128; i++) EXPECT_EQ(words[i], i);
  EXPECT_HAS(fault_of(body, 1, 64, 252, before), "a store to byte 252 of 252 bytes of dynamic shared memory");
}

// Two halves of a block wait for one another at a barrier of their own: bar.sync number, threads.
TEST(PtxRun, BarriersOfAPartOfTheBlock) {
  const std::string body =
      ".shared .align 4 .b8 s[512];\nmov.u32 %r2, s;\nshr.u32 %r7, %t, 6;\nadd.u32 %r8, %r7, 1;\nshl.b32 %r3, %t, 2;\n"
      "add.u32 %r4, %r2, %r3;\nst.shared.u32 [%r4], %i;\nbar.sync %r8, 64;\nxor.b32 %r5, %t, 63;\nshl.b32 %r5, %r5, "
      "2;\n"
      "add.u32 %r5, %r5, %r2;\nld.shared.u32 %r6, [%r5];\nst.global.u32 [%at], %r6;\nret;";
  for (const uint64_t seed : {0, 1, 2, 3, 4}) {
    const auto words = run_words(body, 1, 128, seed);
    for (u32 i = 0; i < 128; i++) EXPECT_EQ(words[i], i ^ 63);
  }
}

TEST(PtxRun, BarriersThatCount) {
  const auto words = run_words(
      "setp.lt.u32 %p0, %t, 37;\nbar.red.popc.u32 %r2, 0, %p0;\nbar.red.and.pred %p1, 0, %p0;\n"
      "bar.red.or.pred %p2, 0, %p0;\nselp.b32 %r3, 1000, 0, %p1;\nselp.b32 %r4, 2000, 0, %p2;\n"
      "add.u32 %r2, %r2, %r3;\nadd.u32 %r2, %r2, %r4;\nst.global.u32 [%at], %r2;\nret;",
      1, 96);
  for (const u32 w : words) EXPECT_EQ(w, 2037u);
}

TEST(PtxRun, ShufflesOfAllKinds) {
  const auto shuffled = [](const std::string& mode, const std::string& b, const std::string& c) {
    return run_words("add.u32 %r3, %t, 100;\nshfl.sync." + mode + ".b32 %r2|%p0, %r3, " + b + ", " + c +
                         ", -1;\nselp.b32 %r4, 1000, 0, %p0;\nadd.u32 %r2, %r2, %r4;\nst.global.u32 [%at], %r2;\nret;",
                     1, 32);
  };
  const auto up = shuffled("up", "3", "0"), down = shuffled("down", "5", "31"), fly = shuffled("bfly", "12", "31");
  const auto index = shuffled("idx", "7", "31"), segments = shuffled("down", "1", "0x1807");  // of eight lanes
  for (u32 l = 0; l < 32; l++) {
    EXPECT_EQ(up[l], l >= 3 ? 1100 + l - 3 : 100 + l);
    EXPECT_EQ(down[l], l + 5 < 32 ? 1100 + l + 5 : 100 + l);
    EXPECT_EQ(fly[l], 1100 + (l ^ 12));
    EXPECT_EQ(index[l], 1107u);
    EXPECT_EQ(segments[l], l % 8 < 7 ? 1100 + l + 1 : 100 + l);
  }
}

TEST(PtxRun, VotesMatchesAndReductions) {
  const auto ballot = run_words(
      "and.b32 %r2, %t, 3;\nsetp.eq.u32 %p0, %r2, 1;\nvote.sync.ballot.b32 %r3, !%p0, -1;\n"
      "st.global.u32 [%at], %r3;\nret;",
      1, 32);
  EXPECT_EQ(ballot[5], ~0x22222222u);
  const auto any = run_words(
      "setp.eq.u32 %p0, %t, 31;\nvote.sync.any.pred %p1, %p0, -1;\nvote.sync.all.pred %p2, %p0, -1;\n"
      "selp.b32 %r2, 1, 0, %p1;\nselp.b32 %r3, 2, 0, %p2;\nor.b32 %r2, %r2, %r3;\n"
      "st.global.u32 [%at], %r2;\nret;",
      1, 32);
  EXPECT_EQ(any, std::vector<u32>(32, 1));
  const auto match =
      run_words("and.b32 %r2, %t, 7;\nmatch.any.sync.b32 %r3, %r2, -1;\nst.global.u32 [%at], %r3;\nret;", 1, 32);
  EXPECT_EQ(match[11], 0x08080808u);
  const auto sum = run_words("redux.sync.add.u32 %r3, %t, -1;\nst.global.u32 [%at], %r3;\nret;", 1, 32);
  EXPECT_EQ(sum, std::vector<u32>(32, 496));
}

TEST(PtxRun, LanesComeToAnExchangeByDifferentWays) {  // and to the same instruction
  const std::string body =
      "setp.lt.u32 %p0, %t, 16;\nmov.u32 %r2, 5;\n@%p0 bra SMALL;\nmov.u32 %r2, 7;\nSMALL:\n"
      "shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1;\nst.global.u32 [%at], %r3;\nret;";
  for (const uint64_t seed : {0, 1, 2, 3, 4, 5}) {
    const auto words = run_words(body, 1, 32, seed);
    for (u32 l = 0; l < 32; l++) EXPECT_EQ(words[l], l < 16 ? 7u : 5u);
  }
}

TEST(PtxRun, AtomicOperations) {
  const std::string body =
      "ld.param.u64 %rd1, [p0];\nadd.u32 %r3, %i, 1;\natom.global.add.u32 %r2, [%rd1], %r3;\n"
      "red.global.max.u32 [%rd1+4], %r3;\natom.global.cas.b32 %r4, [%rd1+8], 0, %r3;\n"
      "atom.global.inc.u32 %r5, [%rd1+12], 9;\nret;";
  for (const uint64_t seed : {0, 1}) {
    const auto words = run_words(body, 2, 64, seed);
    EXPECT_EQ(words[0], 128u * 129 / 2);
    EXPECT_EQ(words[1], 128u);
    EXPECT_TRUE(seed || words[2] == 1) << words[2];
    EXPECT_EQ(words[3], 8u);  // counts to 9 and starts again
  }
}

TEST(PtxRun, VectorsAndNarrowTypes) {
  Machine m(
      module_of(".reg .f32 %f<4>; .reg .b64 %rd<4>; .reg .b16 %rs<4>; .reg .b32 %r<8>;\nld.param.u64 %rd0, [p0];\n"
                "ld.param.u64 %rd1, [p1];\nld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%rd0+16];\n"
                "st.global.v2.f32 [%rd1], {%f3, %f0};\nld.global.s8 %rs0, [%rd0];\ncvt.s32.s16 %r0, %rs0;\n"
                "st.global.u32 [%rd1+8], %r0;\nld.global.u8 %rs1, [%rd0];\nst.global.u16 [%rd1+12], %rs1;\nret;",
                2));
  const uint64_t in = Machine::upload(std::vector<float>{-0.1f, 0, 0, 0, 1, 2, 3, 4}), out = Machine::unwritten(16);
  m.run(1, 1, {in, out});
  EXPECT_EQ(Machine::download<float>(out, 2), (std::vector<float>{4, 1}));
  const float minus = -0.1f;
  int8_t low;
  std::memcpy(&low, &minus, 1);
  EXPECT_EQ(Machine::download<int32_t>(out + 8, 1)[0], low);
  EXPECT_EQ(Machine::download<uint16_t>(out + 12, 1)[0], uint8_t(low));
}

// %r3: where thread t has its word in shared memory; %r4: where another one has.
const std::string own_and_other =
    ".shared .align 16 .b8 s[512];\nmov.u32 %r2, s;\nshl.b32 %r3, %t, 2;\nxor.b32 %r4, %r3, 4;\n"
    "add.u32 %r3, %r2, %r3;\nadd.u32 %r4, %r2, %r4;\n";
const std::string copy_own = "cp.async.ca.shared.global [%r3], [%at], 4;\n", commit = "cp.async.commit_group;\n";

TEST(PtxRun, AsynchronousCopies) {
  // The buffer holds its thread's number at first; each adds what its neighbour copied.
  const std::string from_other = "ld.shared.u32 %r5, [%r4];\nadd.u32 %r5, %r5, 10;\nst.global.u32 [%at], %r5;\nret;";
  for (const std::string wait : {"cp.async.wait_group 0;\nbar.sync 0;\n", "cp.async.wait_all;\nbar.warp.sync -1;\n"})
    for (const uint64_t seed : {0, 1, 2}) {
      Machine m(module_of(prologue + own_and_other + copy_own + commit + wait + from_other, 1));
      std::vector<u32> in(64);
      std::iota(in.begin(), in.end(), 100u);
      const uint64_t at = Machine::upload(in);
      m.run(1, 64, {at}, seed);
      const auto got = Machine::download<u32>(at, 64);
      for (u32 t = 0; t < 64; t++) EXPECT_EQ(got[t], 110 + (t ^ 1));
    }
  // Of 16 bytes the first `t % 17`; the rest becomes 0. Nothing is read beyond them.
  Machine ragged(
      module_of(prologue +
                    ".shared .align 16 .b8 s[512];\nmov.u32 %r2, s;\nshl.b32 %r3, %t, 4;\nadd.u32 %r2, %r2, %r3;\n"
                    "rem.u32 %r4, %t, 17;\nld.param.u64 %rd1, [p1];\n"
                    "cp.async.cg.shared.global [%r2], [%rd1], 16, %r4;\n" +
                    commit +
                    "cp.async.wait_group 0;\nld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r2];\n"
                    "mul.wide.s32 %rd2, %t, 12;\nadd.s64 %at, %at, %rd2;\n"
                    "st.global.v4.u32 [%at], {%r5, %r6, %r7, %r8};\nret;",
                2));
  std::vector<unsigned char> bytes(16);
  std::iota(bytes.begin(), bytes.end(), 1);
  const uint64_t out = Machine::unwritten(512);
  ragged.run(1, 32, {out, Machine::upload(bytes)});
  const auto got = Machine::download<unsigned char>(out, 512);
  for (size_t k = 0; k < 512; k++) EXPECT_EQ(got[k], k % 16 < k / 16 % 17 ? k % 16 + 1 : 0);
}

// A predicate says that a lane reads nothing: its bytes become 0, wherever its source is said to be.
TEST(PtxRun, AsynchronousCopiesThatIgnoreTheirSource) {
  Machine machine(module_of(prologue + own_and_other +
                                "and.b32 %r6, %t, 1;\nsetp.eq.u32 %p0, %r6, 0;\nselp.b64 %rd1, 16, %at, %p0;\n"
                                "cp.async.ca.shared.global [%r3], [%rd1], 4, %p0;\n" +
                                commit +
                                "cp.async.wait_group 0;\nld.shared.u32 %r5, [%r3];\nst.global.u32 [%at], %r5;\nret;",
                            1));
  std::vector<u32> values(64);
  std::iota(values.begin(), values.end(), 100);
  const uint64_t at = Machine::upload(values);
  machine.run(1, 64, {at});
  const auto got = Machine::download<u32>(at, 64);
  for (u32 t = 0; t < 64; t++) EXPECT_EQ(got[t], t % 2 ? 100 + t : 0);
}

TEST(PtxFaults, AsynchronousCopiesThatNobodyWaitsFor) {
  const std::string read_own = "ld.shared.u32 %r5, [%r3];\nst.global.u32 [%at], %r5;\nret;";
  const std::string read_other = "ld.shared.u32 %r5, [%r4];\nst.global.u32 [%at], %r5;\nret;";
  const std::string start = own_and_other + copy_own + commit, wait = "cp.async.wait_group 0;\n";
  const char* missing = "read before an asynchronous copy has brought it";
  EXPECT_EQ(fault_of(start + wait + read_own, 1, 64), "no fault");
  EXPECT_EQ(fault_of(start + wait + "bar.sync 0;\n" + read_other, 1, 64), "no fault");
  EXPECT_HAS(fault_of(start + "bar.sync 0;\n" + read_own, 1, 64), missing);
  EXPECT_HAS(fault_of(start + "bar.sync 0;\n" + wait + read_other, 1, 64), missing);
  EXPECT_HAS(fault_of(start + wait + read_other, 1, 64), missing);
  EXPECT_HAS(fault_of(start + "cp.async.wait_group 1;\n" + read_own, 1, 64), missing);
  EXPECT_HAS(fault_of(own_and_other + copy_own + wait + read_own, 1, 64), missing);  // in no group
  EXPECT_HAS(fault_of(start + "ret;", 1, 64), "the kernel ends before it has waited for this copy");
  EXPECT_HAS(fault_of(start + wait + copy_own + commit + wait + read_other, 1, 64), missing);
  EXPECT_HAS(fault_of(own_and_other + "cp.async.ca.shared.global [%r3], [%at], 4, 5;\nret;", 1, 64),
             "a copy that reads 5 of 4 bytes");
  EXPECT_HAS(fault_of(own_and_other + "cp.async.ca.shared.global [%r3], [%at+2], 4;\nret;", 1, 64), "misaligned");
  EXPECT_HAS(fault_of(own_and_other + "cp.async.ca.shared.global [%r3], [%at+4], 4;\nret;", 1, 64),
             "outside any allocation");
}

// ------------------------------------------------------------------------------------------------------- faults
TEST(PtxFaults, NameThePlace) {
  const std::string text = fault_of("st.global.u32 [%at+4], %i;\nret;", 1, 64);
  EXPECT_HAS(text, "a store to 0x");
  EXPECT_HAS(text, "outside any allocation");
  EXPECT_HAS(text, "kernel test, block (0,0,0), thread (63,0,0)");
  EXPECT_HAS(text, "PTX line ");
  EXPECT_HAS(text, "st.global.u32 [%at+4], %i");
}

TEST(PtxFaults, SourceLinesOfInlinedFunctions) {
  const std::string before = ".file 1 \"kernel.cu\"\n.file 2 \"header.h\"\n";
  const std::string body =
      ".loc 1 40 3\nadd.u32 %r2, %i, 1;\n.loc 2 7 5, function_name $L, inlined_at 1 40 3\n"
      "st.global.u32 [%at+1], %r2;\nret;";
  const std::string text = fault_of(body, 1, 32, 0, before);
  EXPECT_HAS(text, "an access of 4 bytes at the misaligned address");
  EXPECT_HAS(text, "source header.h:7, called at kernel.cu:40");
}

TEST(PtxFaults, MemoryThatNobodyWrote) {
  Machine m(
      module_of(".reg .b64 %rd<2>; .reg .b32 %r;\nld.param.u64 %rd0, [p0];\nld.global.u32 %r, [%rd0];\n"
                "ld.param.u64 %rd1, [p1];\nst.global.u32 [%rd1], %r;\nret;",
                2));
  const uint64_t out = Machine::unwritten(4);
  try {
    m.run(1, 1, {Machine::unwritten(4), out});
    FAIL();
  } catch (const Fault& fault) {
    EXPECT_HAS(std::string(fault.what()), "is read before it was written");
  }
  m.run(1, 1, {Machine::upload(std::vector<u32>{9}), out});
  EXPECT_EQ(Machine::download<u32>(out, 1)[0], 9u);
  EXPECT_HAS(fault_of(".shared .align 4 .b8 s[8];\nld.shared.u32 %r2, [s];\nret;", 1, 1),
             "shared memory is read before it was written");
  EXPECT_HAS(fault_of(".shared .align 4 .b8 s[8];\nst.shared.u32 [s+8], %i;\nret;", 1, 1), "shared memory beyond");
}

TEST(PtxFaults, ReadOnlyLoadsOfWhatTheLaunchWrites) {
  const std::string load = "ld.global.nc.u32 %r2, [%at];\n", store = "st.global.u32 [%at], %i;\n";
  EXPECT_HAS(fault_of(load + store + "ret;", 1, 32), "which this launch has read through the read-only path");
  EXPECT_HAS(fault_of(store + load + "ret;", 1, 32), "a read-only load (ld.global.nc)");
  // Another word of the same 256 bytes is no fault, nor is the next launch.
  EXPECT_EQ(fault_of("ld.param.u64 %rd1, [p0];\nld.global.nc.u32 %r2, [%rd1];\nsetp.eq.u32 %p0, %i, 0;\n@!%p0 " +
                         store + "ret;",
                     1, 32),
            "no fault");
}

TEST(PtxFaults, BarriersThatDoNotMeet) {
  EXPECT_HAS(fault_of("setp.lt.u32 %p0, %t, 40;\n@%p0 bra A;\nbar.sync 0;\nbra B;\nA:\nbar.sync 0;\nB:\nret;", 1, 64),
             "threads of a block wait at different barriers");
  EXPECT_HAS(fault_of("setp.lt.u32 %p0, %t, 40;\n@%p0 ret;\nbar.sync 0;\nret;", 1, 64),
             "24 threads wait at a barrier for 64, 40 have exited");
  EXPECT_HAS(fault_of("setp.lt.u32 %p0, %t, 40;\n@%p0 bar.sync 0;\nret;", 1, 64),
             "under a predicate that not all lanes share");
}

TEST(PtxFaults, ExchangesWithLanesThatAreNotThere) {
  EXPECT_HAS(
      fault_of("setp.lt.u32 %p0, %t, 16;\n@!%p0 bra END;\nshfl.sync.bfly.b32 %r2, %i, 1, 31, -1;\nEND:\nret;", 1, 32),
      "never come to this instruction");
  EXPECT_HAS(fault_of("shfl.sync.idx.b32 %r2, %i, 20, 31, -1;\nst.global.u32 [%at], %r2;\nret;", 1, 16),
             "a shuffle from lane 20, which takes no part");
  EXPECT_HAS(fault_of("setp.lt.u32 %p0, %t, 16;\n@!%p0 ret;\nshfl.sync.bfly.b32 %r2, %i, 1, 31, -1;\nret;", 1, 32),
             "the mask names lane 16, which has exited");
}

TEST(PtxFaults, UnknownInstructionsAreNamedAndConcernTheirKernelAlone) {
  const std::string text =
      module_of(prologue + "st.global.u32 [%at], 7;\nret;", 1,
                ".visible .entry other()\n{\n.reg .b32 %r<4>;\nfrobnicate.b32 %r0, %r1;\nret;\n}\n");
  Machine m(text);
  const uint64_t out = Machine::unwritten(4);
  m.run(1, 1, {out});
  EXPECT_EQ(Machine::download<u32>(out, 1)[0], 7u);
  EXPECT_HAS(fault_of("frobnicate.b32 %r2, %r3;\nret;", 1, 1), "the instruction frobnicate.b32 is not known");
  EXPECT_HAS(fault_of("add.cc.u32 %r2, %r3, %r4;\nret;", 1, 1), "no rule for .cc");
  EXPECT_HAS(fault_of("add.u32 %r2, %r3, %r4, %r5;\nret;", 1, 1), "no rule for the operand %r5");
  EXPECT_HAS(fault_of("add.u64 %r2, %r3, %r4;\nret;", 1, 1), "of another width");
}

TEST(PtxParser, ConstantTablesAndLaunchBounds) {
  const auto words = run_words(
      "mov.u64 %rd1, table;\nand.b32 %r2, %t, 3;\nmul.wide.u32 %rd2, %r2, 4;\n"
      "add.s64 %rd1, %rd1, %rd2;\nld.global.u32 %r3, [%rd1];\nst.global.u32 [%at], %r3;\nret;",
      1, 32, 0, 0, ".global .align 4 .u32 table[4] = {3, 1, 4, 15};\n");
  EXPECT_EQ(words[2], 4u);
  EXPECT_EQ(words[7], 15u);
  Machine m(
      ".version 9.0\n.target sm_90\n.address_size 64\n.visible .entry test()\n.maxntid 128\n.minnctapersm "
      "4\n{\nret;\n}\n");
  EXPECT_EQ(m.kernel().max_threads, 128u);
}

// -------------------------------------------------------------------------------------------------------- counters
Counters count(const std::string& body, u32 grid, u32 block, size_t words) {
  Machine m(module_of(prologue + body, 1));
  Launch launch;
  Counters counters;
  const uint64_t out = Machine::upload(std::vector<u32>(words, 1));
  m.run(grid, block, {out}, 0, 0, &counters);
  return counters;
}

TEST(PtxCounters, SectorsOfARequest) {
  const Counters dense = count("ld.global.u32 %r2, [%at];\nst.global.u32 [%at], %r2;\nret;", 2, 64, 128);
  EXPECT_EQ(dense.load_requests, 4u);
  EXPECT_EQ(dense.load_sectors, 16u);
  EXPECT_EQ(dense.load_bytes, 512u);
  EXPECT_EQ(dense.loaded_footprint, 16u);
  EXPECT_EQ(dense.stored_footprint, 16u);
  // Every eighth word: a sector a lane. The same word for all: one sector, touched once.
  const std::string strided = "ld.param.u64 %rd1, [p0];\nmul.wide.u32 %rd2, %i, 32;\nadd.s64 %rd1, %rd1, %rd2;\n";
  EXPECT_EQ(count(strided + "ld.global.u32 %r2, [%rd1];\nret;", 1, 32, 256).load_sectors, 32u);
  const Counters same = count("ld.param.u64 %rd1, [p0];\nld.global.u32 %r2, [%rd1];\nret;", 4, 32, 128);
  EXPECT_EQ(same.load_sectors, 4u);
  EXPECT_EQ(same.loaded_footprint, 1u);
}

TEST(PtxCounters, WavefrontsOfSharedMemory) {
  const auto waves = [](int stride) {
    return count(".shared .align 4 .b8 s[16384];\nmul.lo.s32 %r2, %t, " + std::to_string(4 * stride) +
                     ";\nmov.u32 %r3, s;\nadd.u32 %r2, %r2, %r3;\nst.shared.u32 [%r2], %i;\nret;",
                 1, 32, 32)
        .shared_wavefronts;
  };
  EXPECT_EQ(waves(1), 1u);
  EXPECT_EQ(waves(2), 2u);
  EXPECT_EQ(waves(32), 32u);
  EXPECT_EQ(waves(33), 1u);
  EXPECT_EQ(waves(0), 1u);
}

TEST(PtxCounters, DivergenceAndChains) {
  const Counters parted =
      count("and.b32 %r2, %t, 1;\nsetp.eq.u32 %p0, %r2, 0;\n@%p0 bra A;\nadd.u32 %r3, %t, 1;\nA:\nret;", 1, 64, 64);
  EXPECT_EQ(parted.branches, 2u);
  EXPECT_EQ(parted.divergent_branches, 2u);
  // Loads of which each needs the one before; and as many that do not.
  std::string chain = "ld.global.u32 %r2, [%at];\n", apart = chain;
  for (int k = 0; k < 9; k++) {
    chain += "and.b32 %r2, %r2, 0;\ncvt.u64.u32 %rd1, %r2;\nadd.s64 %rd2, %at, %rd1;\nld.global.u32 %r2, [%rd2];\n";
    apart += "ld.global.u32 %r" + std::to_string(k + 3) + ", [%at];\n";
  }
  const Counters deep = count(chain + "st.global.u32 [%at], %r2;\nret;", 1, 32, 32);
  const Counters wide = count(apart + "st.global.u32 [%at], %r2;\nret;", 1, 32, 32);
  EXPECT_EQ(deep.longest.loads, 10u);
  EXPECT_GE(deep.longest.cycles, 10 * latency_of(Class::global_load));
  EXPECT_EQ(wide.longest.loads, 1u);
  EXPECT_LT(wide.longest.cycles, 2 * latency_of(Class::global_load));
  // Two copies, and loads for whose results nobody waits: only a wait for the copies' group takes time.
  const std::string copies =
      ".shared .align 4 .b8 s[128];\nshl.b32 %r2, %t, 2;\nmov.u32 %r3, s;\nadd.u32 %r2, %r2, %r3;\n"
      "cp.async.ca.shared.global [%r2], [%at], 4;\ncp.async.commit_group;\n";
  const Counters waits = count(copies + "cp.async.wait_group 0;\nld.shared.u32 %r4, [%r2];\nret;", 1, 32, 32);
  EXPECT_EQ(waits.longest.loads, 1u);
  EXPECT_GE(waits.longest.cycles, latency_of(Class::async_copy));
  EXPECT_EQ(waits.warp_instructions[size_t(Class::async_copy)], 1u);
  EXPECT_EQ(waits.load_bytes, 128u);
  const Counters later = count(copies + "cp.async.wait_group 1;\ncp.async.wait_all;\nret;", 1, 32, 32);
  EXPECT_GE(later.longest.cycles, latency_of(Class::async_copy));
  const Counters barriers = count("bar.sync 0;\nbar.sync 0;\nbar.sync 0;\nret;", 2, 64, 128);
  EXPECT_EQ(barriers.longest.barriers, 3u);
  EXPECT_EQ(barriers.blocks, 2u);
}

}  // namespace
}  // namespace ptx::test
