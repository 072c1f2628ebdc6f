// The names of an enumeration's values, as options, results and files spell them: an array in the enumeration's order.
#pragma once
#include <string>

#include "engine/error.h"

namespace baton {

// Throws InputError for an unknown name, listing the known ones.
template <class E, size_t n>
E parse_name(const char* what, const char* const (&names)[n], const std::string& name) {
  std::string known;
  for (size_t i = 0; i < n; i++) {
    if (name == names[i]) return E(i);
    known += (i ? ", " : "") + std::string(names[i]);
  }
  throw InputError(std::string("unknown ") + what + " '" + name + "': one of " + known);
}

}  // namespace baton
