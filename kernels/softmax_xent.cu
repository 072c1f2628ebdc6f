// Softmax cross-entropy with its gradient, and the totals of a step.
//
//   loss = ln sum_c exp(x_c - m) + (m - x_label),   m = max_c x_c
//   dx_c = scale (exp(x_c - m) / sum - [c = label])             (=, not +=)
//   hit  = 1 when no class beats the label: x_label > x_c for c < label, x_label >= x_c for c > label
//
// Layouts: logits, dlogits [replicas][batch][classes]; labels, loss, hit [replicas][batch]. The two leading axes are
// treated as one. dlogits must not overlap logits. A row with a NaN, an infinite maximum or a label outside [0,
// classes) has the loss NaN, and the totals then report its step; a row with a NaN has hit = 0. A warp takes a row;
// dlogits holds the exponentials between the two passes. There are no atomics, so every run gives the same bits. A call
// reads 4 and writes 4 bytes a logit, and 12 bytes a row; 1 exp and about 8 FLOPs a logit.
//
// add_to_totals: a block takes a replica. Thread t sums b = t, t + T, ... in double, then a fixed tree adds the
// threads' sums.
#include "kernels/softmax_xent.h"

#include <initializer_list>

#include "kernels/step_state.h"

namespace baton {
namespace {

// fixed: the number of classes where it is known at compile time, else 0.
template <int fixed, bool gradient>
__global__ void softmax_xent(float* __restrict__ loss, float* __restrict__ hit, float* __restrict__ dlogits,
                             const float* __restrict__ logits, const int32_t* __restrict__ labels, int rows,
                             int labelled, int any_classes, float scale) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= rows) return;
  const int classes = fixed ? fixed : any_classes;
  const float* __restrict__ x = logits + size_t(row) * classes;
  float* __restrict__ dx = gradient ? dlogits + size_t(row) * classes : nullptr;

  const int label = labels[row < labelled ? row : row % labelled];
  const bool known = label >= 0 && label < classes;
  const float own = known ? x[label] : NAN;
  float top = -INFINITY;
  int beaten = 0;
  SIMT_SIMD(reduction(max : top) reduction(+ : beaten))
  for (int c = lane; c < classes; c += simt::warp_size) {
    top = x[c] > top ? x[c] : top;
    beaten += c < label ? !(x[c] < own) : !(x[c] <= own);
  }
  top = simt::warp_max(top);
  beaten = simt::warp_sum(beaten);

  float sum = 0;
  SIMT_SIMD(reduction(+ : sum))
  for (int c = lane; c < classes; c += simt::warp_size) {
    const float e = expf(x[c] - top);
    if constexpr (gradient) dx[c] = e;  // the same thread reads it below
    sum += e;
  }
  sum = simt::warp_sum(sum);
  if (lane == 0) {
    loss[row] = logf(sum) + (top - own);
    hit[row] = beaten == 0 ? 1.f : 0.f;
  }
  if constexpr (gradient) {
    const float f = scale / sum;
    SIMT_SIMD()
    for (int c = lane; c < classes; c += simt::warp_size) dx[c] = dx[c] * f - (c == label ? scale : 0.f);
  }
}

constexpr int totals_threads = 128;

__global__ void __launch_bounds__(totals_threads)
    sum_up(Totals* __restrict__ totals, const float* __restrict__ loss, const float* __restrict__ hit,
           StepState* __restrict__ states, int batch) {
  __shared__ double parts[2][32];
  const int replica = blockIdx.x, t = threadIdx.x, warp = t / simt::warp_size, lane = simt::lane_id();
  loss += size_t(replica) * batch, hit += size_t(replica) * batch;
  double losses = 0, hits = 0;
  SIMT_SIMD(reduction(+ : losses, hits))
  for (int b = t; b < batch; b += blockDim.x) {
    losses += loss[b];
    hits += hit[b];
  }
  losses = simt::warp_sum(losses), hits = simt::warp_sum(hits);
  if (lane == 0) parts[0][warp] = losses, parts[1][warp] = hits;
  __syncthreads();
  if (warp == 0) {
    const bool mine = lane < int(blockDim.x) / simt::warp_size;
    losses = simt::warp_sum(mine ? parts[0][lane] : 0.);
    hits = simt::warp_sum(mine ? parts[1][lane] : 0.);
  }
  if (t == 0) {
    Totals& to = totals[replica];
    to.loss += losses;
    to.hits += hits;
    to.examples += batch;
    to.steps += 1;
    // A sum of finite floats cannot overflow a double, so the sum is finite exactly when every loss is.
    if (!(fabs(losses) < INFINITY) && to.nonfinite_step == 0) {
      to.nonfinite_step = int32_t(states[replica].step);
      states[replica].halted = to.nonfinite_step;
    }
  }
}

template <int fixed>
void launch_rows(float* loss, float* hit, float* dlogits, const float* logits, const int32_t* labels, int rows,
                 int labelled, int classes, float scale, Stream stream) {
  if (dlogits)
    simt::launch<softmax_xent<fixed, true>>(simt::warps(rows), stream, loss, hit, dlogits, logits, labels, rows,
                                            labelled, classes, scale);
  else
    simt::launch<softmax_xent<fixed, false>>(simt::warps(rows), stream, loss, hit, dlogits, logits, labels, rows,
                                             labelled, classes, scale);
}

std::string dims(std::initializer_list<int> sizes) {
  std::string s;
  for (int n : sizes) s.append("[").append(std::to_string(n)).append("]");
  return s;
}

}  // namespace

void softmax_cross_entropy(float* loss, float* hit, float* dlogits, const float* logits, const int32_t* labels,
                           int replicas, int batch, int classes, float scale, Stream stream, bool shared_labels) {
  BATON_RANGE("softmax_cross_entropy");
  if (replicas < 0 || batch < 0 || classes < 1 || int64_t(replicas) * batch > INT32_MAX)
    throw InputError("softmax_cross_entropy: logits has shape " + dims({replicas, batch, classes}) +
                     ", expected [replicas][batch][classes] with at least one class and at most 2^31 - 1 rows");
  if (dlogits && dlogits == logits)
    throw InputError("softmax_cross_entropy: dlogits " + dims({replicas, batch, classes}) +
                     " is logits itself, expected memory of its own");
  const int rows = replicas * batch, labelled = shared_labels ? batch : rows;
  if (classes == 10) launch_rows<10>(loss, hit, dlogits, logits, labels, rows, labelled, classes, scale, stream);
  else launch_rows<0>(loss, hit, dlogits, logits, labels, rows, labelled, classes, scale, stream);
}

void add_to_totals(Totals* totals, const float* loss, const float* hit, StepState* states, int replicas, int batch,
                   Stream stream) {
  BATON_RANGE("add_to_totals");
  if (replicas < 0 || batch < 1)
    throw InputError("add_to_totals: loss has shape " + dims({replicas, batch}) +
                     ", expected [replicas][batch] with at least one example");
  simt::launch<sum_up>(simt::blocks(replicas, totals_threads), stream, totals, loss, hit, states, batch);
}

}  // namespace baton
