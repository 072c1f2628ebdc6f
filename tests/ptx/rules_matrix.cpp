// Rules of products of small matrices whose elements lie in the registers of a warp's 32 lanes, and of loading them.
// The loop that runs a warp calls these handlers when all lanes have arrived.
#include <bit>
#include <cstring>

#include "tests/ptx/access.h"
#include "tests/ptx/counters.h"

namespace ptx {

namespace {

void need_whole_warp(const Warp& w, const Instruction& i) {
  if (w.active != ~0u)
    fail(w, i, std::countr_zero(w.active),
         "a warp of " + std::to_string(std::popcount(w.active)) + " lanes, where 32 are needed");
}

// A tf32 number: its last 13 bits are not looked at.
float tf32(const Warp& w, uint32_t place, int lane) {
  return std::bit_cast<float>(lanes_of<uint32_t>(w, place)[lane] & 0xffffe000u);
}

// D = A B + C with A of 16 x 8, B of 8 x 8. Operands in Instruction::vector: 4 of D, 4 of A, 2 of B, 4 of C. Each sum
// begins with C and takes the products in order; the chip does not say in which order it adds.
void multiply_m16n8k8(Warp& w, const Instruction& i) {
  need_whole_warp(w, i);
  float a[16][8], b[8][8], c[16][8];
  for (int lane = 0; lane < lanes; lane++) {
    const int group = lane / 4, in_group = lane % 4;
    for (int k = 0; k < 4; k++) {
      a[group + k % 2 * 8][in_group + k / 2 * 4] = tf32(w, i.vector[4 + k], lane);
      c[group + k / 2 * 8][in_group * 2 + k % 2] = lanes_of<float>(w, i.vector[10 + k])[lane];
    }
    for (int k = 0; k < 2; k++) b[in_group + 4 * k][group] = tf32(w, i.vector[8 + k], lane);
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 8; k++)
      for (int column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < lanes; lane++)
    for (int k = 0; k < 4; k++) lanes_of<float>(w, i.vector[k])[lane] = c[lane / 4 + k / 2 * 8][lane % 4 * 2 + k % 2];
}

void mma(Builder& b) {
  Instruction& i = b.instruction;
  for (const char* word : {"sync", "aligned", "m16n8k8", "row", "col", "f32", "tf32", "tf32", "f32"}) b.need(word);
  const Type real{'f', 32}, word{'b', 32};
  const auto expect = [&](int found, int wanted) {
    if (found != wanted) b.refuse("a fragment of " + std::to_string(found) + " registers");
  };
  expect(b.vector_destination(real), 4);
  expect(b.vector_source(word, 4), 4);
  expect(b.vector_source(word, 8), 2);
  expect(b.vector_source(real, 10), 4);
  b.constant(i.c, ~0u, word);  // all lanes meet
  i.flow = Flow::meeting;
  i.cost = Class::tensor;
  i.handler = multiply_m16n8k8;
}

// Matrices of 8 x 8 numbers of 16 bits. The lane 8 m + r gives the address of row r of matrix m; the lane 4 g + t gets
// the numbers 2 t and 2 t + 1 of row g of each, or, transposed, of column g.
void load_matrices(Warp& w, const Instruction& i) {
  need_whole_warp(w, i);
  const int matrices = i.parts;
  w.active = matrices == 4 ? ~0u : (1u << 8 * matrices) - 1;  // whose addresses are used
  const Addresses a = addresses_of(w, i);
  if (w.counters) w.counters->count_shared(w, i, a);
  const Addresses at = check_shared(w, i, a, Access::load_for_others);
  w.active = ~0u;
  for (int m = 0; m < matrices; m++) {
    uint16_t numbers[8][8];
    for (int row = 0; row < 8; row++) std::memcpy(numbers[row], &w.block->shared[at.of[8 * m + row]], 16);
    uint32_t* d = lanes_of<uint32_t>(w, i.vector[size_t(m)]);
    for (int lane = 0; lane < lanes; lane++) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = i.flag ? numbers[2 * t][g] : numbers[g][2 * t];
      const uint32_t high = i.flag ? numbers[2 * t + 1][g] : numbers[g][2 * t + 1];
      d[lane] = low | high << 16;
    }
  }
}

void ldmatrix(Builder& b) {
  Instruction& i = b.instruction;
  for (const char* word : {"sync", "aligned", "m8n8"}) b.need(word);
  const int matrices = b.has("x1") ? 1 : b.has("x2") ? 2 : 4;
  if (matrices == 4) b.need("x4");
  i.flag = b.has("trans");
  if (!b.has("shared::cta")) b.need("shared");
  b.need("b16");
  i.parts = uint8_t(b.vector_destination({'b', 32}));
  if (i.parts != matrices) b.refuse("so many registers for so many matrices");
  b.address();
  i.bytes = 16;
  i.space = Space::shared;
  b.constant(i.c, ~0u, {'b', 32});
  i.flow = Flow::meeting;
  i.cost = Class::matrix_load;
  i.handler = load_matrices;
}

}  // namespace

const Rules& matrix_rules() {
  static const Rules rules{{"mma", mma}, {"ldmatrix", ldmatrix}};
  return rules;
}

}  // namespace ptx
