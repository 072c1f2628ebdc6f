// Rules of bits: logic, shifts, fields and permutations of bytes.
#include <bit>

#include "tests/ptx/handlers.h"

namespace ptx {

namespace {

// A logical operation of registers, or of predicates, whose lanes are the bits of one word.
template <class F>
void predicate_logic(Warp& w, const Instruction& i) {
  uint32_t& d = predicate_of(w, i.d);
  const uint32_t result = F{}(predicate_of(w, i.a), predicate_of(w, i.b));
  d = (d & ~w.active) | (result & w.active);
}

template <class F>
void take_logic(Builder& b, F) {
  Instruction& i = b.instruction;
  const Type t = b.type();
  b.destination(i.d, t);
  b.source(i.a, t);
  b.source(i.b, t);
  if (t.bits == 64) i.cost = Class::integer64;
  if (t.is_predicate()) i.handler = predicate_logic<F>;
  else i.handler = for_bits(b, t, []<class T>() { return binary<T, T, T>([](T x, T y) { return T(F{}(x, y)); }); });
}

void and_(Builder& b) {
  take_logic(b, [](auto x, auto y) { return x & y; });
}
void or_(Builder& b) {
  take_logic(b, [](auto x, auto y) { return x | y; });
}
void xor_(Builder& b) {
  take_logic(b, [](auto x, auto y) { return x ^ y; });
}

void not_(Builder& b) {
  Instruction& i = b.instruction;
  const Type t = b.type();
  b.destination(i.d, t);
  b.source(i.a, t);
  if (t.bits == 64) i.cost = Class::integer64;
  if (t.is_predicate())
    i.handler = [](Warp& w, const Instruction& i) {
      uint32_t& d = predicate_of(w, i.d);
      d = (d & ~w.active) | (~predicate_of(w, i.a) & w.active);
    };
  else i.handler = for_bits(b, t, []<class T>() { return unary<T, T>([](T x) { return T(~x); }); });
}

// Shifts by the width of the type and more give zero, or copies of the sign.
void shl(Builder& b) {
  Instruction& i = b.instruction;
  const Type t = b.type();
  b.destination(i.d, t);
  b.source(i.a, t);
  b.source(i.b, {'u', 32});
  if (t.bits == 64) i.cost = Class::integer64;
  i.handler = for_bits(b, t, []<class T>() {
    return binary<T, T, uint32_t>([](T x, uint32_t n) { return n >= 8 * sizeof(T) ? T(0) : T(x << (n & 63)); });
  });
}
void shr(Builder& b) {
  Instruction& i = b.instruction;
  const Type t = b.type();
  b.destination(i.d, t);
  b.source(i.a, t);
  b.source(i.b, {'u', 32});
  if (t.bits == 64) i.cost = Class::integer64;
  i.handler = for_integer(b, t, []<class T>() {
    return binary<T, T, uint32_t>([](T x, uint32_t n) -> T {
      constexpr uint32_t most = 8 * sizeof(T) - 1;
      if constexpr (std::is_signed_v<T>) return T(x >> (n > most ? most : n));
      else return n > most ? T(0) : T(x >> n);
    });
  });
}

// A funnel shift: the upper (l) or lower (r) word of b:a, shifted by c, which wraps or is at most 32.
void shf(Builder& b) {
  Instruction& i = b.instruction;
  const bool left = b.has("l"), wraps = b.has("wrap");
  if (!left) b.need("r");
  if (!wraps) b.need("clamp");
  const Type t = b.type();
  b.destination(i.d, t);
  b.source(i.a, t);
  b.source(i.b, t);
  b.source(i.c, {'u', 32});
  if (left && wraps)
    i.handler = ternary<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t low, uint32_t high, uint32_t n) {
      return uint32_t(((uint64_t(high) << 32 | low) << (n & 31)) >> 32);
    });
  else if (left)
    i.handler = ternary<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t low, uint32_t high, uint32_t n) {
      return n >= 32 ? low : uint32_t(((uint64_t(high) << 32 | low) << n) >> 32);
    });
  else if (wraps)
    i.handler = ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
        [](uint32_t low, uint32_t high, uint32_t n) { return uint32_t((uint64_t(high) << 32 | low) >> (n & 31)); });
  else
    i.handler = ternary<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t low, uint32_t high, uint32_t n) {
      return uint32_t((uint64_t(high) << 32 | low) >> (n > 32 ? 32 : n));
    });
}

void clz(Builder& b) {
  Instruction& i = b.instruction;
  const Type t = b.type();
  b.destination(i.d, {'u', 32});
  b.source(i.a, t);
  i.handler =
      for_bits(b, t, []<class T>() { return unary<uint32_t, T>([](T x) { return uint32_t(std::countl_zero(x)); }); });
}
void popc(Builder& b) {
  Instruction& i = b.instruction;
  const Type t = b.type();
  b.destination(i.d, {'u', 32});
  b.source(i.a, t);
  i.handler =
      for_bits(b, t, []<class T>() { return unary<uint32_t, T>([](T x) { return uint32_t(std::popcount(x)); }); });
}
void brev(Builder& b) {
  Instruction& i = b.instruction;
  const Type t = b.type();
  b.destination(i.d, t);
  b.source(i.a, t);
  i.handler = for_bits(b, t, []<class T>() {
    return unary<T, T>([](T x) {
      T y = 0;
      for (size_t bit = 0; bit < 8 * sizeof(T); bit++) y = T(y << 1 | (x >> bit & 1));
      return y;
    });
  });
}
// The place of the highest bit that differs from the sign; all bits where there is none.
void bfind(Builder& b) {
  Instruction& i = b.instruction;
  const Type t = b.type();
  b.destination(i.d, {'u', 32});
  b.source(i.a, t);
  i.handler = for_integer(b, t, []<class T>() {
    return unary<uint32_t, T>([](T x) -> uint32_t {
      using U = std::make_unsigned_t<T>;
      const U bits = x < 0 ? U(~U(x)) : U(x);
      return bits == 0 ? ~0u : uint32_t(8 * sizeof(T) - 1 - std::countl_zero(bits));
    });
  });
}

// A mask of `length` ones from bit `start` on; both count up to 32.
constexpr uint32_t field(uint32_t start, uint32_t length) {
  if (start > 31 || length == 0) return 0;
  return (length > 31 ? ~0u : (1u << length) - 1) << start;
}

// The bits [start, start + length) of b replaced by the lowest ones of a.
void bfi(Builder& b) {
  Instruction& i = b.instruction;
  b.need("b32");
  const Type t{'b', 32};
  b.destination(i.d, t);
  b.source(i.a, t);
  b.source(i.b, t);
  b.source(i.c, t);
  b.source(i.e, t);
  i.handler = [](Warp& w, const Instruction& i) {
    uint32_t* d = lanes_of<uint32_t>(w, i.d);
    const uint32_t *a = lanes_of<uint32_t>(w, i.a), *into = lanes_of<uint32_t>(w, i.b);
    const uint32_t *start = lanes_of<uint32_t>(w, i.c), *length = lanes_of<uint32_t>(w, i.e);
    for (int lane = 0; lane < lanes; lane++)
      if (has_lane(w.active, lane)) {
        const uint32_t at = start[lane] & 255, mask = field(at, length[lane] & 255);
        d[lane] = (into[lane] & ~mask) | (at > 31 ? 0 : a[lane] << at & mask);
      }
  };
}
// The bits [start, start + length), extended by zeros or by their highest one.
void bfe(Builder& b) {
  Instruction& i = b.instruction;
  const Type t = b.type();
  b.destination(i.d, t);
  b.source(i.a, t);
  b.source(i.b, {'u', 32});
  b.source(i.c, {'u', 32});
  if (t.bits != 32) b.refuse("only for 32 bits");
  if (t.is_signed())
    i.handler =
        ternary<int32_t, int32_t, uint32_t, uint32_t>([](int32_t x, uint32_t start, uint32_t length) -> int32_t {
          start &= 255, length &= 255;
          if (length == 0) return 0;
          const uint32_t top = start + length - 1 > 31 ? 31 : start + length - 1;
          const uint32_t sign = uint32_t(x) >> top & 1;
          const uint32_t mask = field(0, length), value = start > 31 ? 0 : uint32_t(x) >> start;
          const uint32_t known = start > 31 ? 0 : (32 - start < length ? field(0, 32 - start) : mask);
          return int32_t((value & known) | (sign ? ~known : 0));
        });
  else
    i.handler = ternary<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t x, uint32_t start, uint32_t length) {
      start &= 255;
      return start > 31 ? 0u : (x >> start) & field(0, length & 255);
    });
}
void bmsk(Builder& b) {
  Instruction& i = b.instruction;
  b.need("clamp");
  const Type t = b.type();
  b.destination(i.d, t);
  b.source(i.a, t);
  b.source(i.b, t);
  i.handler =
      binary<uint32_t, uint32_t, uint32_t>([](uint32_t start, uint32_t length) { return field(start, length); });
}

// Four bytes chosen from b:a by the nibbles of c; the highest bit of a nibble asks for eight copies of the byte's sign.
void prmt(Builder& b) {
  Instruction& i = b.instruction;
  b.need("b32");
  const Type t{'b', 32};
  b.destination(i.d, t);
  b.source(i.a, t);
  b.source(i.b, t);
  b.source(i.c, t);
  i.handler = ternary<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t low, uint32_t high, uint32_t choice) {
    const uint64_t both = uint64_t(high) << 32 | low;
    uint32_t result = 0;
    for (int k = 0; k < 4; k++) {
      const uint32_t nibble = choice >> (4 * k) & 15;
      uint32_t byte = uint32_t(both >> (8 * (nibble & 7))) & 255;
      if (nibble & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << (8 * k);
    }
    return result;
  });
}

// Any function of three bits, whose table is the last operand.
void lop3(Builder& b) {
  Instruction& i = b.instruction;
  b.need("b32");
  const Type t{'b', 32};
  b.destination(i.d, t);
  b.source(i.a, t);
  b.source(i.b, t);
  b.source(i.c, t);
  b.source(i.e, t);
  i.handler = [](Warp& w, const Instruction& i) {
    uint32_t* d = lanes_of<uint32_t>(w, i.d);
    const uint32_t *a = lanes_of<uint32_t>(w, i.a), *b = lanes_of<uint32_t>(w, i.b), *c = lanes_of<uint32_t>(w, i.c);
    const uint32_t table = *lanes_of<uint32_t>(w, i.e);
    for (int lane = 0; lane < lanes; lane++)
      if (has_lane(w.active, lane)) {
        uint32_t result = 0;
        for (int row = 0; row < 8; row++)
          if (table >> row & 1)
            result |= (row & 4 ? a[lane] : ~a[lane]) & (row & 2 ? b[lane] : ~b[lane]) & (row & 1 ? c[lane] : ~c[lane]);
        d[lane] = result;
      }
  };
}

}  // namespace

const Rules& logic_rules() {
  static const Rules rules{
      {"and", and_}, {"or", or_},    {"xor", xor_},  {"not", not_},  {"shl", shl},     {"shr", shr},
      {"shf", shf},  {"clz", clz},   {"popc", popc}, {"brev", brev}, {"bfind", bfind}, {"bfi", bfi},
      {"bfe", bfe},  {"bmsk", bmsk}, {"prmt", prmt}, {"lop3", lop3},
  };
  return rules;
}

}  // namespace ptx
