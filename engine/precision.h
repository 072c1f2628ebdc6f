// The precision of the products of layers: what their operands are rounded to before they are multiplied. The sums of
// the products are of float32 in any case.
#pragma once
#include <string>

#include "engine/error.h"

namespace baton {

// fp32: operands are not rounded. tf32: to 10 bits of mantissa, as a GPU's tensor cores take them.
enum class Precision { fp32, tf32 };

inline const char* name(Precision p) { return p == Precision::tf32 ? "tf32" : "fp32"; }
// InputError for another name.
inline Precision parse_precision(const std::string& name) {
  if (name == "fp32") return Precision::fp32;
  if (name == "tf32") return Precision::tf32;
  throw InputError("unknown precision '" + name + "': fp32 or tf32");
}

}  // namespace baton
