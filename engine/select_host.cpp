// Selection on the host: std::nth_element over a copy of the scores finds the threshold, in linear time on average.
// Then one pass marks all scores below the threshold, and as many of those that equal it as are still wanted.
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
  int left = lowest;  // how many of the scores that equal the threshold are still to be marked
  for (int i = 0; i < count; i++) left -= scores[i] < threshold;
  for (int i = 0; i < count; i++) {
    const bool equal = scores[i] == threshold && left > 0;
    left -= equal;
    marked[i] = scores[i] < threshold || equal;
  }
  return {threshold, lowest};
}

}  // namespace baton
