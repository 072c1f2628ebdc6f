// Selection on the host: the threshold by std::nth_element over a copy of the scores, linear on average, then the marks
// in one pass. No indices: what is below the threshold is marked wherever it is, and of what equals it the first few.
#include "engine/select.h"

#include <algorithm>
#include <limits>

namespace baton {

Selection mark_lowest(Device&, uint8_t* marked, const float* scores, int count, int lowest) {
  if (count < 0 || lowest < 0 || lowest > count)
    throw InputError("mark_lowest: the " + std::to_string(lowest) + " lowest of scores [" + std::to_string(count) +
                     "]");
  for (int i = 0; i < count; i++)
    if (scores[i] != scores[i]) throw InputError("mark_lowest: scores[" + std::to_string(i) + "] is not a number");
  if (lowest == 0) {
    std::fill(marked, marked + count, uint8_t(0));
    return {-std::numeric_limits<float>::infinity(), 0};
  }
  std::vector<float> ranked(scores, scores + count);
  std::nth_element(ranked.begin(), ranked.begin() + (lowest - 1), ranked.end());
  const float threshold = ranked[size_t(lowest) - 1];
  int left = lowest;  // of those that equal the threshold
  for (int i = 0; i < count; i++) left -= scores[i] < threshold;
  for (int i = 0; i < count; i++) {
    const bool equal = scores[i] == threshold && left > 0;
    left -= equal;
    marked[i] = scores[i] < threshold || equal;
  }
  return {threshold, lowest};
}

}  // namespace baton
