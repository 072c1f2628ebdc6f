// The moments of a batch of predictions over posterior samples s = 1..S, in nats, with 0 ln 0 = 0:
//
//   p_sc = exp(x_sc - m_s) / z_s,  m_s = max_c x_sc,  z_s = sum_c exp(x_sc - m_s)
//   H[p_s] = ln z_s - sum_c p_sc (x_sc - m_s)                        never negative: both terms are >= 0
//   probability_sum += sum_s p_s,  entropy_sum += sum_s H[p_s]       (+=, s ascending)
//   p = probability_sum / S,  entropy = -sum_c p_c ln p_c,  mutual information = max(0, entropy - entropy_sum / S)
//   square_sum += sum_s sum_c p_sc^2                                 at most S even with rounding: exp^2 <= exp <= z_s
//   aleatoric = 1 - square_sum / S,  epistemic = max(0, square_sum / S - sum_c p_c^2), which is 0 for S = 1
//
// Layouts: logits [samples][batch][classes]; probabilities [batch][classes]; entropies [batch]. A warp takes a row of
// the batch and goes through its samples in order, so the bits are the same in every run, and for every division of the
// samples into calls. A NaN among the logits of a row makes its outputs NaN. The variances are computed by instances of
// the kernels of their own (`squares`), so that they cost nothing where they are not asked for.
// Bytes: accumulate reads 4 a logit (twice, the second time from L1) and 8 of sums a class; finish reads and writes 4 a
// class. FLOPs: accumulate 2 exp and about 10 more a logit, 12 with squares; finish 1 log a class.
#include "kernels/predictive.h"

namespace baton {
namespace {

template <int fixed, bool squares>  // fixed: the number of classes where it is known at compile time, else 0
__global__ void accumulate(float* __restrict__ probability_sum, float* __restrict__ entropy_sum,
                           float* __restrict__ square_sum, const float* __restrict__ logits, int samples, int batch,
                           int any_classes) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= batch) return;
  const int classes = fixed ? fixed : any_classes;
  float* __restrict__ sums = probability_sum + size_t(row) * classes;
  float entropies = entropy_sum[row], all_squares = squares ? square_sum[row] : 0.f;
  for (int s = 0; s < samples; s++) {
    const float* __restrict__ x = logits + (size_t(s) * batch + row) * classes;
    float top = -INFINITY;
    SIMT_SIMD(reduction(max : top))
    for (int c = lane; c < classes; c += simt::warp_size) top = x[c] > top ? x[c] : top;
    top = simt::warp_max(top);
    float z = 0, moment = 0, square = 0;
    SIMT_SIMD(reduction(+ : z, moment, square))
    for (int c = lane; c < classes; c += simt::warp_size) {
      const float d = x[c] - top, e = expf(d);
      z += e;
      moment += e > 0.f ? e * d : 0.f;
      if constexpr (squares) square += e * e;
    }
    z = simt::warp_sum(z), moment = simt::warp_sum(moment);
    const float scale = 1.f / z;
    entropies += logf(z) - moment * scale;
    if constexpr (squares) all_squares += simt::warp_sum(square) * scale * scale;
    SIMT_SIMD()
    for (int c = lane; c < classes; c += simt::warp_size) sums[c] += expf(x[c] - top) * scale;
  }
  if (lane == 0) {
    entropy_sum[row] = entropies;
    if constexpr (squares) square_sum[row] = all_squares;
  }
}

// probability may be probability_sum: only one thread reads and writes an element, and it reads first.
template <bool squares>
__global__ void finish(float* probability, float* __restrict__ entropy, float* __restrict__ mutual_information,
                       float* __restrict__ variances, const float* probability_sum,
                       const float* __restrict__ entropy_sum, const float* __restrict__ square_sum, int samples,
                       int batch, int classes) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= batch) return;
  const float n = float(samples);
  const float* sums = probability_sum + size_t(row) * classes;
  float* mean = probability + size_t(row) * classes;
  float h = 0, square = 0;
  SIMT_SIMD(reduction(+ : h, square))
  for (int c = lane; c < classes; c += simt::warp_size) {
    const float p = sums[c] / n;
    mean[c] = p;
    h -= p * logf(p > 0.f ? p : 1.f);
    if constexpr (squares) square += p * p;
  }
  h = simt::warp_sum(h);
  if constexpr (squares) square = simt::warp_sum(square);
  if (lane == 0) {
    const float information = h - entropy_sum[row] / n;
    entropy[row] = h;
    mutual_information[row] = information < 0.f ? 0.f : information;
    if constexpr (squares) {
      const float mean_square = square_sum[row] / n;
      // With one sample the two sums are the same but for the order of their terms. 0 * NaN stays NaN.
      const float epistemic = samples == 1 ? 0.f * square : mean_square - square;
      variances[row] = 1.f - mean_square;
      variances[size_t(batch) + row] = epistemic < 0.f ? 0.f : epistemic;
    }
  }
}

void check_shape(const char* who, int samples, int batch, int classes) {
  if (samples < 1 || batch < 0 || classes < 1)
    throw InputError(std::string(who) + ": logits has shape [" + std::to_string(samples) + "][" +
                     std::to_string(batch) + "][" + std::to_string(classes) +
                     "], expected [samples][batch][classes] with at least one sample and one class");
}

__global__ void choose_kernel(uint8_t* __restrict__ chosen, size_t chosen_stride, const float* __restrict__ logits,
                              int batch, int classes) {
  const int b = simt::thread_item(), s = simt::row();
  if (b >= batch) return;
  const float* x = logits + (size_t(s) * batch + b) * classes;
  int best = 0;
  float most = x[0];
  for (int c = 1; c < classes; c++) {
    const bool wins = x[c] > most;
    best = wins ? c : best;
    most = wins ? x[c] : most;
  }
  chosen[chosen_stride * s + b] = uint8_t(best);
}

}  // namespace

void accumulate_predictions(float* probability_sum, float* entropy_sum, const float* logits, int samples, int batch,
                            int classes, Stream stream, float* square_sum) {
  BATON_RANGE("accumulate_predictions");
  check_shape("accumulate_predictions", samples, batch, classes);
  const auto run = [&]<auto kernel>() {
    simt::launch<kernel>(simt::warps(batch), stream, probability_sum, entropy_sum, square_sum, logits, samples, batch,
                         classes);
  };
  if (classes == 10) square_sum ? run.operator()<accumulate<10, true>>() : run.operator()<accumulate<10, false>>();
  else square_sum ? run.operator()<accumulate<0, true>>() : run.operator()<accumulate<0, false>>();
}

void finish_predictions(float* probability, float* entropy, float* mutual_information, const float* probability_sum,
                        const float* entropy_sum, int samples, int batch, int classes, Stream stream, float* variances,
                        const float* square_sum) {
  BATON_RANGE("finish_predictions");
  check_shape("finish_predictions", samples, batch, classes);
  if (variances && !square_sum) throw InputError("finish_predictions: variances need square_sum, which is null");
  if (variances)
    simt::launch<finish<true>>(simt::warps(batch), stream, probability, entropy, mutual_information, variances,
                               probability_sum, entropy_sum, square_sum, samples, batch, classes);
  else
    simt::launch<finish<false>>(simt::warps(batch), stream, probability, entropy, mutual_information, variances,
                                probability_sum, entropy_sum, square_sum, samples, batch, classes);
}

void choose_classes(uint8_t* chosen, size_t chosen_stride, const float* logits, int samples, int batch, int classes,
                    Stream stream) {
  BATON_RANGE("choose_classes");
  if (classes < 1 || classes > 256)
    throw InputError("choose_classes: 1 to 256 classes, not " + std::to_string(classes));
  simt::launch<choose_kernel>(simt::each(batch, samples), stream, chosen, chosen_stride, logits, batch, classes);
}

}  // namespace baton
