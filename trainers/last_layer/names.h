// The names of an enumeration's values, as options, results and files spell them.
#pragma once
#include <string>
#include <vector>

#include "engine/error.h"

namespace baton {

// What a value of an enumeration is, and the names of all in their order. An enumeration with names has a function
// names(E), which returns them for any value.
struct Names {
  const char* what;
  std::vector<const char*> all;
};

template <class E, class = decltype(names(E()))>
const char* to_string(E value) {
  return names(value).all[size_t(value)];
}
// Throws InputError for an unknown name, listing the known ones.
template <class E>
E parse_name(const std::string& name) {
  const Names known = names(E());
  std::string list;
  for (size_t i = 0; i < known.all.size(); i++) {
    if (name == known.all[i]) return E(i);
    list += (i ? ", " : "") + std::string(known.all[i]);
  }
  throw InputError(std::string("unknown ") + known.what + " '" + name + "': one of " + list);
}

}  // namespace baton
