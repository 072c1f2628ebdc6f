// What refusals and warnings say.
#pragma once
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "engine/error.h"

namespace baton::test {

const char* const nothing_refused = "nothing was refused";

// The text of the InputError that `act` throws, or nothing_refused.
template <class F>
std::string refusal(F act) {
  try {
    act();
  } catch (const InputError& e) {
    return e.what();
  }
  return nothing_refused;
}

inline void expect_says(const std::string& message, const std::vector<std::string>& pieces) {
  for (const std::string& piece : pieces)
    EXPECT_NE(message.find(piece), std::string::npos) << "'" << piece << "' in: " << message;
}

}  // namespace baton::test
