// The names of an enumeration's values, as options, results and files spell them.
#pragma once
#include <iterator>
#include <string>

#include "engine/error.h"

namespace baton {

// Specialised for an enumeration E: `what` one of its values is, and `names` of all in their order.
template <class E>
struct NamesOf;

template <class E>
auto to_string(E value) -> decltype(NamesOf<E>::names[0]) {
  return NamesOf<E>::names[int(value)];
}
// Throws InputError for an unknown name, listing the known ones.
template <class E>
E parse_name(const std::string& name) {
  std::string known;
  for (size_t i = 0; i < std::size(NamesOf<E>::names); i++) {
    if (name == NamesOf<E>::names[i]) return E(i);
    known += (i ? ", " : "") + std::string(NamesOf<E>::names[i]);
  }
  throw InputError(std::string("unknown ") + NamesOf<E>::what + " '" + name + "': one of " + known);
}

}  // namespace baton
