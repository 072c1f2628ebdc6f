// Each opcode's rule against what the PTX manual says of it, in 32 lanes, all active and every third one.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <sstream>

#include "tests/ptx/machine.h"

namespace ptx::test {
namespace {

constexpr float inf = std::numeric_limits<float>::infinity(), nan_ = std::numeric_limits<float>::quiet_NaN();
constexpr double dinf = std::numeric_limits<double>::infinity();

template <class T>
std::string type_of() {
  const std::string bits = std::to_string(8 * sizeof(T));
  return (std::is_floating_point_v<T> ? ".f" : std::is_signed_v<T> ? ".s" : ".u") + bits;
}
template <class T>
std::string register_of() {  // registers have at least 16 bits
  return std::is_floating_point_v<T> ? type_of<T>() : ".b" + std::to_string(std::max<size_t>(16, 8 * sizeof(T)));
}

// Values with every corner of the type, and random ones; 32 of them, in an order that the salt decides.
template <class T>
std::vector<T> values(int salt) {
  std::vector<T> v;
  using L = std::numeric_limits<T>;
  if constexpr (std::is_floating_point_v<T>)
    v = {T(0),           T(-0.0),  T(1),        T(-1),    T(0.5),          T(2.5),        T(-2.5),
         T(3.5),         L::max(), L::lowest(), L::min(), L::denorm_min(), L::infinity(), -L::infinity(),
         L::quiet_NaN(), T(1e9),   T(-1e9),     T(255.5), T(-129)};
  else
    v = {T(0),  T(1),   T(2),  T(31),    T(32),    T(33),           T(63),
         T(64), T(255), T(-1), L::max(), L::min(), T(L::max() - 1), T(1000)};
  std::mt19937_64 random(salt);
  while (v.size() < 32) {
    if constexpr (std::is_floating_point_v<T>)
      v.push_back(T(std::ldexp(double(int64_t(random())), int(random() % 64) - 70)));
    else v.push_back(T(random()));
  }
  std::shuffle(v.begin(), v.end(), random);
  return v;
}

template <class T>
bool same(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return (a != a && b != b) || (a == b && std::signbit(a) == std::signbit(b));
  else return a == b;
}

// Runs "OP d, a, b, c" on lanes' values, with all lanes and under a guard, and compares with `expected`. Operands are
// named d, a, b, c in `op`.
template <class D, class... S>
void check(const std::string& op, std::type_identity_t<std::function<D(S...)>> expected, int salts = 8) {
  const char* names[] = {"a", "b", "c"};
  std::string body =
      ".reg .pred %p;\n.reg .b32 %lane, %third;\n.reg .b64 %at, %base;\n.reg " + register_of<D>() + " d;\n";
  const std::string sources[] = {register_of<S>()...}, types[] = {type_of<S>()...};
  const size_t bytes[] = {sizeof(S)...};
  for (size_t k = 0; k < sizeof...(S); k++) body += ".reg " + sources[k] + " " + names[k] + ";\n";
  body += "mov.u32 %lane, %tid.x;\n";
  for (size_t k = 0; k < sizeof...(S); k++)
    body += "ld.param.u64 %base, [p" + std::to_string(k + 1) + "];\nmul.wide.u32 %at, %lane, " +
            std::to_string(bytes[k]) + ";\nadd.s64 %at, %at, %base;\nld.global" + types[k] + " " + names[k] +
            ", [%at];\n";
  body += "ld.param.u64 %base, [p0];\nmul.wide.u32 %at, %lane, " + std::to_string(sizeof(D)) +
          ";\nadd.s64 %at, %at, %base;\nld.global" + type_of<D>() + " d, [%at];\nrem.u32 %third, %lane, 3;\n";
  const std::string store = ";\nst.global" + type_of<D>() + " [%at], d;\nret;";
  const int pointers = 1 + int(sizeof...(S));
  const bool one_instruction = op.front() != '{';
  Machine all(module_of(body + op + store, pointers));
  Machine some(module_of(body + (one_instruction ? "setp.eq.u32 %p, %third, 0;\n@%p " + op : "") + store, pointers));
  for (int salt = 0; salt < salts; salt++) {
    int column = salt * 7;
    const auto next = [&] { return column++; };
    const std::tuple<std::vector<S>...> in{values<S>(next())...};
    for (Machine* machine : {&all, &some}) {
      if (machine == &some && !one_instruction) continue;
      const uint64_t out = Machine::upload(std::vector<D>(32, D(7)));
      std::vector<uint64_t> pointers{out};
      std::apply([&](const auto&... v) { (pointers.push_back(Machine::upload(v)), ...); }, in);
      machine->run(1, 32, pointers);
      const std::vector<D> got = Machine::download<D>(out, 32);
      for (int lane = 0; lane < 32; lane++) {
        const D want = machine == &some && lane % 3 != 0
                           ? D(7)
                           : std::apply([&](const auto&... v) { return expected(v[lane]...); }, in);
        ASSERT_TRUE(same(got[lane], want))
            << op << ", lane " << lane << ": " << +got[lane] << ", expected " << +want << " of "
            << std::apply(
                   [&](const auto&... v) {
                     std::ostringstream s;
                     ((s << +v[lane] << " "), ...);
                     return s.str();
                   },
                   in);
      }
    }
  }
}

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

TEST(PtxArithmetic, IntegersWrap) {
  check<u32, u32, u32>("add.u32 d, a, b", [](u32 a, u32 b) { return a + b; });
  check<s32, s32, s32>("sub.s32 d, a, b", [](s32 a, s32 b) { return s32(u32(a) - u32(b)); });
  check<u16, u16, u16>("add.s16 d, a, b", [](u16 a, u16 b) { return u16(a + b); });
  check<u64, u64, u64>("add.s64 d, a, b", [](u64 a, u64 b) { return a + b; });
  check<s32, s32, s32>("mul.lo.s32 d, a, b", [](s32 a, s32 b) { return s32(u32(a) * u32(b)); });
  check<u32, u32, u32>("mul.hi.u32 d, a, b", [](u32 a, u32 b) { return u32(u64(a) * b >> 32); });
  check<s32, s32, s32>("mul.hi.s32 d, a, b", [](s32 a, s32 b) { return s32(s64(a) * b >> 32); });
  check<u64, u64, u64>("mul.hi.u64 d, a, b", [](u64 a, u64 b) { return u64((unsigned __int128)(a)*b >> 64); });
  check<s64, s32, s32>("mul.wide.s32 d, a, b", [](s32 a, s32 b) { return s64(a) * b; });
  check<u32, u16, u16>("mul.wide.u16 d, a, b", [](u16 a, u16 b) { return u32(a) * b; });
  check<s32, s16, s16>("mul.wide.s16 d, a, b", [](s16 a, s16 b) { return s32(a) * b; });
  check<u32, u32, u32, u32>("mad.lo.u32 d, a, b, c", [](u32 a, u32 b, u32 c) { return a * b + c; });
  check<s64, s32, s32, s64>("mad.wide.s32 d, a, b, c",
                            [](s32 a, s32 b, s64 c) { return s64(u64(s64(a) * b) + u64(c)); });
  check<s32, s32>("neg.s32 d, a", [](s32 a) { return s32(0 - u32(a)); });
  check<s32, s32>("abs.s32 d, a", [](s32 a) { return a < 0 ? s32(0 - u32(a)) : a; });
  check<s32, s32, s32>("min.s32 d, a, b", [](s32 a, s32 b) { return std::min(a, b); });
  check<u32, u32, u32>("max.u32 d, a, b", [](u32 a, u32 b) { return std::max(a, b); });
}

TEST(PtxArithmetic, DivisionOfIntegers) {
  check<u32, u32, u32>("div.u32 d, a, b", [](u32 a, u32 b) { return b ? a / b : ~0u; });
  check<s32, s32, s32>("div.s32 d, a, b", [](s32 a, s32 b) { return b == 0 ? -1 : b == -1 ? s32(0 - u32(a)) : a / b; });
  check<u32, u32, u32>("rem.u32 d, a, b", [](u32 a, u32 b) { return b ? a % b : a; });
  check<s64, s64, s64>("rem.s64 d, a, b", [](s64 a, s64 b) { return b == 0 ? a : b == -1 ? 0 : a % b; });
}

TEST(PtxArithmetic, FloatingPoint) {
  check<float, float, float>("add.rn.f32 d, a, b", [](float a, float b) { return a + b; });
  check<float, float, float>("mul.f32 d, a, b", [](float a, float b) { return a * b; });
  check<double, double, double>("sub.f64 d, a, b", [](double a, double b) { return a - b; });
  check<float, float, float, float>("fma.rn.f32 d, a, b, c",
                                    [](float a, float b, float c) { return std::fma(a, b, c); });
  check<double, double, double, double>("fma.rn.f64 d, a, b, c",
                                        [](double a, double b, double c) { return std::fma(a, b, c); });
  check<float, float, float>("div.rn.f32 d, a, b", [](float a, float b) { return a / b; });
  check<double, double>("sqrt.rn.f64 d, a", [](double a) { return std::sqrt(a); });
  check<float, float>("rcp.rn.f32 d, a", [](float a) { return 1 / a; });
  check<float, float>("neg.f32 d, a", [](float a) { return -a; });
  check<float, float>("abs.f32 d, a", [](float a) { return std::fabs(a); });
  check<float, float, float>("copysign.f32 d, a, b", [](float a, float b) { return std::copysign(b, a); });
}

// Of a number and a NaN the number, of zeros the sign decides.
TEST(PtxArithmetic, LeastAndGreatest) {
  const auto least = [](float a, float b) {
    return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
  };
  const auto greatest = [](float a, float b) {
    return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
  };
  check<float, float, float>("min.f32 d, a, b", least, 40);
  check<float, float, float>("max.f32 d, a, b", greatest, 40);
}

TEST(PtxArithmetic, DirectionsOfRounding) {
  // 1 + 2^-30 lies between 1 and the next float.
  Machine m(
      module_of(".reg .f32 %f<4>; .reg .b64 %rd;\nld.param.u64 %rd, [p0];\nmov.f32 %f0, 0f3F800000;\n"
                "mov.f32 %f1, 0f30800000;\nfma.rm.f32 %f2, %f0, %f0, %f1;\nfma.rp.f32 %f3, %f0, %f0, %f1;\n"
                "st.global.v2.f32 [%rd], {%f2, %f3};\nret;",
                1));
  const uint64_t out = Machine::unwritten(8);
  m.run(1, 1, {out});
  EXPECT_EQ(Machine::download<float>(out, 2), (std::vector<float>{1.f, std::nextafter(1.f, 2.f)}));
}

TEST(PtxArithmetic, ApproximateFunctionsAreNear) {
  const auto near = [](const std::string& op, float (*f)(float), std::vector<float> at) {
    at.resize(32, 1.f);
    Machine m(
        module_of(".reg .f32 a, d; .reg .b32 %lane; .reg .b64 %in, %out, %by;\nmov.u32 %lane, %tid.x;\n"
                  "mul.wide.u32 %by, %lane, 4;\nld.param.u64 %in, [p0];\nadd.s64 %in, %in, %by;\n"
                  "ld.param.u64 %out, [p1];\nadd.s64 %out, %out, %by;\nld.global.f32 a, [%in];\n" +
                      op + ";\nst.global.f32 [%out], d;\nret;",
                  2));
    const uint64_t out = Machine::unwritten(128);
    m.run(1, 32, {Machine::upload(at), out});
    const std::vector<float> got = Machine::download<float>(out, 32);
    for (int k = 0; k < 32; k++)
      EXPECT_TRUE(same(got[k], f(at[k])) || std::fabs(got[k] - f(at[k])) <= 2e-7f * std::fabs(f(at[k])))
          << op << " of " << at[k] << ": " << got[k] << ", expected " << f(at[k]);
  };
  near("ex2.approx.ftz.f32 d, a", [](float x) { return std::exp2(x); },
       {0, 1, -1, 0.3f, 127.9f, 128, -126, -200, inf, -inf, nan_});
  near("lg2.approx.ftz.f32 d, a", [](float x) { return std::log2(x); }, {1, 2, 3, 1e-30f, 1e30f, 0, -1, inf, nan_});
  near("rcp.approx.ftz.f32 d, a", [](float x) { return 1 / x; }, {1, 3, -7, 1e20f, inf, 0});
  near("rsqrt.approx.f32 d, a", [](float x) { return 1 / std::sqrt(x); }, {1, 3, 1e20f, inf});
}

TEST(PtxLogic, BitsAndShifts) {
  check<u32, u32, u32>("and.b32 d, a, b", [](u32 a, u32 b) { return a & b; });
  check<u64, u64, u64>("xor.b64 d, a, b", [](u64 a, u64 b) { return a ^ b; });
  check<u16, u16, u16>("or.b16 d, a, b", [](u16 a, u16 b) { return u16(a | b); });
  check<u32, u32>("not.b32 d, a", [](u32 a) { return ~a; });
  check<u32, u32, u32>("shl.b32 d, a, b", [](u32 a, u32 b) { return b > 31 ? 0 : a << b; });
  check<u64, u64, u32>("shl.b64 d, a, b", [](u64 a, u32 b) { return b > 63 ? 0 : a << b; });
  check<u32, u32, u32>("shr.u32 d, a, b", [](u32 a, u32 b) { return b > 31 ? 0 : a >> b; });
  check<s32, s32, u32>("shr.s32 d, a, b", [](s32 a, u32 b) { return a >> std::min(b, 31u); });
  check<u32, u32, u32, u32>("shf.l.wrap.b32 d, a, b, c", [](u32 a, u32 b, u32 c) {
    c &= 31;
    return c ? b << c | a >> (32 - c) : b;
  });
  check<u32, u32, u32, u32>("shf.r.clamp.b32 d, a, b, c", [](u32 a, u32 b, u32 c) {
    return c >= 32 ? b : c ? b << (32 - c) | a >> c : a;
  });
  check<u32, u64>("clz.b64 d, a", [](u64 a) { return u32(std::countl_zero(a)); });
  check<u32, u32>("popc.b32 d, a", [](u32 a) { return u32(std::popcount(a)); });
  check<u32, u32>("brev.b32 d, a", [](u32 a) {
    u32 r = 0;
    for (int k = 0; k < 32; k++) r |= (a >> k & 1) << (31 - k);
    return r;
  });
  check<u32, s32>("bfind.s32 d, a", [](s32 a) {
    const u32 bits = a < 0 ? ~u32(a) : u32(a);
    return bits ? 31u - u32(std::countl_zero(bits)) : ~0u;
  });
  check<u32, u32, u32, u32>("lop3.b32 d, a, b, c, 0xE8",
                            [](u32 a, u32 b, u32 c) { return (a & b) | (a & c) | (b & c); });
}

TEST(PtxLogic, FieldsAndBytes) {
  // Bit by bit, as the manual has it.
  const auto extract = [](s64 a, u32 start, u32 length, bool is_signed) {
    start &= 255, length &= 255;
    const bool sign = is_signed && length && (u64(a) >> std::min(start + length - 1, 31u) & 1);
    u32 d = 0;
    for (u32 k = 0; k < 32; k++)
      d |= u32(k < length && start + k <= 31 ? u32(u64(a) >> (start + k) & 1) : u32(sign)) << k;
    return d;
  };
  check<u32, u32, u32, u32>(
      "bfe.u32 d, a, b, c", [&](u32 a, u32 b, u32 c) { return extract(a, b, c, false); }, 40);
  check<s32, s32, u32, u32>(
      "bfe.s32 d, a, b, c", [&](s32 a, u32 b, u32 c) { return s32(extract(u32(a), b, c, true)); }, 40);
  check<u32, u32, u32, u32>(
      "bfi.b32 d, a, b, c, 5",
      [](u32 a, u32 b, u32 c) {
        c &= 255;
        for (u32 k = 0; k < 5 && c + k <= 31; k++) b = (b & ~(1u << (c + k))) | (a >> k & 1) << (c + k);
        return b;
      },
      40);
  check<u32, u32, u32, u32>("prmt.b32 d, a, b, c", [](u32 a, u32 b, u32 c) {
    const u8 bytes[] = {u8(a), u8(a >> 8), u8(a >> 16), u8(a >> 24), u8(b), u8(b >> 8), u8(b >> 16), u8(b >> 24)};
    u32 d = 0;
    for (int k = 0; k < 4; k++) {
      const u32 nibble = c >> (4 * k) & 15;
      d |= u32(nibble & 8 ? u8(bytes[nibble & 7] & 128 ? 255 : 0) : bytes[nibble & 7]) << (8 * k);
    }
    return d;
  });
}

TEST(PtxComparison, OrderedAndUnordered) {
  const auto selected = [](const std::string& comparison, const std::string& type) {
    return "{ .reg .pred %q; setp." + comparison + "." + type + " %q, a, b; selp.b32 d, 1, 0, %q; }";
  };
  const auto check_float = [&](const std::string& name, std::function<bool(float, float)> f) {
    Machine m(
        module_of(".reg .f32 a, b; .reg .b32 %lane, d; .reg .b64 %by, %x, %y, %z;\nmov.u32 %lane, %tid.x;\n"
                  "mul.wide.u32 %by, %lane, 4;\nld.param.u64 %x, [p0];\nadd.s64 %x, %x, %by;\nld.param.u64 %y, [p1];\n"
                  "add.s64 %y, %y, %by;\nld.param.u64 %z, [p2];\nadd.s64 %z, %z, %by;\nld.global.f32 a, [%x];\n"
                  "ld.global.f32 b, [%y];\n" +
                      selected(name, "f32") + "\nst.global.u32 [%z], d;\nret;",
                  3));
    for (int salt = 0; salt < 20; salt++) {
      const auto a = values<float>(salt), b = salt % 2 ? values<float>(salt + 100) : a;
      const uint64_t out = Machine::unwritten(128);
      m.run(1, 32, {Machine::upload(a), Machine::upload(b), out});
      const auto got = Machine::download<u32>(out, 32);
      for (int k = 0; k < 32; k++) ASSERT_EQ(got[k], u32(f(a[k], b[k]))) << name << " of " << a[k] << " and " << b[k];
    }
  };
  const auto unordered = [](float a, float b) { return a != a || b != b; };
  check_float("eq", [](float a, float b) { return a == b; });
  check_float("ne", [&](float a, float b) { return !unordered(a, b) && a != b; });
  check_float("lt", [](float a, float b) { return a < b; });
  check_float("ge", [](float a, float b) { return a >= b; });
  check_float("neu", [&](float a, float b) { return unordered(a, b) || a != b; });
  check_float("ltu", [&](float a, float b) { return unordered(a, b) || a < b; });
  check_float("gtu", [&](float a, float b) { return unordered(a, b) || a > b; });
  check_float("num", [&](float a, float b) { return !unordered(a, b); });
  check_float("nan", unordered);
}

TEST(PtxConversion, NumbersToNumbers) {
  check<s32, float>("cvt.rzi.s32.f32 d, a", [](float a) {
    return a != a ? 0 : a >= 2147483648.f ? 2147483647 : a <= -2147483648.f ? s32(-2147483648ll) : s32(a);
  });
  check<u32, float>("cvt.rzi.u32.f32 d, a", [](float a) {
    return !(a > 0) ? 0u : a >= 4294967296.f ? 4294967295u : u32(a);
  });
  check<s32, float>("cvt.rni.s32.f32 d, a", [](float a) {
    const float r = std::nearbyint(a);
    return a != a ? 0 : r >= 2147483648.f ? 2147483647 : r <= -2147483648.f ? s32(-2147483648ll) : s32(r);
  });
  check<float, float>("cvt.rmi.f32.f32 d, a", [](float a) { return std::floor(a); });
  check<float, s32>("cvt.rn.f32.s32 d, a", [](s32 a) { return float(a); });
  check<float, u64>("cvt.rn.f32.u64 d, a", [](u64 a) { return float(a); });
  check<float, double>("cvt.rn.f32.f64 d, a", [](double a) { return float(a); });
  check<double, float>("cvt.f64.f32 d, a", [](float a) { return double(a); });
  check<float, float>("cvt.sat.f32.f32 d, a", [](float a) { return !(a > 0) ? 0.f : a > 1 ? 1.f : a; });
  check<u32, s16>("cvt.u32.s16 d, a", [](s16 a) { return u32(s32(a)); });
  check<u16, u32>("cvt.u16.u32 d, a", [](u32 a) { return u16(a); });
  check<s64, s32>("cvt.s64.s32 d, a", [](s32 a) { return s64(a); });
  check<u32, u64>("cvt.u32.u64 d, a", [](u64 a) { return u32(a); });
  check<u32, u32>("cvt.u32.u8 d, a", [](u32 a) { return a & 255; });
  check<s32, s32>("cvt.s32.s8 d, a", [](s32 a) { return s32(int8_t(a)); });
}

TEST(PtxConversion, WordsSplitAndJoined) {
  check<u64, u64>(
      "{ .reg .b32 %low, %high; mov.b64 {%low, %high}, a; mov.b64 d, {%high, %low}; }",
      [](u64 a) { return a << 32 | a >> 32; }, 1);
}

// What each lane's registers hold, lane after lane; the addresses of a lane's numbers are %a0, %b0 and so on.
const std::string matrix_prologue =
    ".reg .b32 %lane, %r<16>; .reg .b64 %at<4>, %by; .reg .f32 %f<16>;\n.shared .align 16 .b8 s[1024];\n"
    "mov.u32 %lane, %tid.x;\n";
std::string lane_address(int pointer, int bytes) {
  const std::string at = "%at" + std::to_string(pointer);
  return "ld.param.u64 " + at + ", [p" + std::to_string(pointer) + "];\nmul.wide.u32 %by, %lane, " +
         std::to_string(bytes) + ";\nadd.s64 " + at + ", " + at + ", %by;\n";
}

TEST(PtxMatrix, ProductOfFragments) {  // as the manual places the elements of mma.m16n8k8 with .tf32 operands
  Machine m(module_of(matrix_prologue + lane_address(0, 16) + lane_address(1, 16) + lane_address(2, 8) +
                          "ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%at0];\n"
                          "ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%at1];\nld.global.v2.b32 {%r4, %r5}, [%at2];\n"
                          "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f4, %f5, %f6, %f7}, "
                          "{%r0, %r1, %r2, %r3}, {%r4, %r5}, {%f0, %f1, %f2, %f3};\n"
                          "st.global.v4.f32 [%at0], {%f4, %f5, %f6, %f7};\nret;",
                      3));
  std::mt19937 random(1);
  for (int trial = 0; trial < 20; trial++) {
    double a[16][8], b[8][8], c[16][8];
    std::vector<float> of_a(128), of_b(64), of_c(128);
    const auto number = [&] { return float(int(random() % 65) - 32); };
    const auto with_last_bits = [&](float x) {  // which must not matter
      return std::bit_cast<float>(std::bit_cast<u32>(x) | u32(random() & 0x1fff));
    };
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; i++) {
        const float x = number();
        a[i == 0 || i == 2 ? g : g + 8][i < 2 ? t : t + 4] = x;
        of_a[size_t(lane * 4 + i)] = with_last_bits(x);
        c[i < 2 ? g : g + 8][2 * t + (i & 1)] = of_c[size_t(lane * 4 + i)] = number();
      }
      for (int i = 0; i < 2; i++) {
        const float x = number();
        b[i == 0 ? t : t + 4][g] = x;
        of_b[size_t(lane * 2 + i)] = with_last_bits(x);
      }
    }
    const uint64_t out = Machine::upload(of_c);
    m.run(1, 32, {out, Machine::upload(of_a), Machine::upload(of_b)}, uint64_t(trial));
    const std::vector<float> got = Machine::download<float>(out, 128);
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
        double sum = c[row][column];
        for (int k = 0; k < 8; k++) sum += a[row][k] * b[k][column];
        ASSERT_EQ(got[size_t(lane * 4 + i)], sum) << "lane " << lane << ", " << i;
      }
  }
}

TEST(PtxMatrix, RowsFromSharedMemory) {
  for (const int count : {1, 2, 4})
    for (const bool transposed : {false, true}) {
      std::string registers;
      for (int m = 0; m < count; m++) registers += (m ? ", %r" : "%r") + std::to_string(m);
      std::string body =
          matrix_prologue + lane_address(0, 16) + lane_address(1, 16) +
          "mov.u32 %r8, s;\nshl.b32 %r9, %lane, 4;\nadd.u32 %r8, %r8, %r9;\n"
          "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%at1];\nst.shared.v4.b32 [%r8], {%r4, %r5, %r6, %r7};\n"
          "bar.sync 0;\nldmatrix.sync.aligned.m8n8.x" +
          std::to_string(count) + (transposed ? ".trans" : "") + ".shared.b16 {" + registers + "}, [%r8];\n";
      for (int m = 0; m < count; m++)
        body += "st.global.b32 [%at0+" + std::to_string(4 * m) + "], %r" + std::to_string(m) + ";\n";
      Machine machine(module_of(body + "ret;", 2));
      std::vector<u16> in(256);
      for (size_t k = 0; k < 256; k++) in[k] = u16(1000 + k);
      for (const uint64_t seed : {0, 1}) {
        const uint64_t out = Machine::upload(std::vector<u32>(128, 7));
        machine.run(1, 32, {out, Machine::upload(in)}, seed);
        const std::vector<u32> got = Machine::download<u32>(out, 128);
        for (int lane = 0; lane < 32; lane++)
          for (int m = 0; m < 4; m++) {
            const auto number = [&](int row, int column) {
              return u32(in[size_t(64 * m + (transposed ? 8 * column + row : 8 * row + column))]);
            };
            const u32 want = number(lane / 4, lane % 4 * 2) | number(lane / 4, lane % 4 * 2 + 1) << 16;
            ASSERT_EQ(got[size_t(lane * 4 + m)], m < count ? want : 7u) << count << " matrices, lane " << lane;
          }
      }
    }
}

}  // namespace
}  // namespace ptx::test
