#include "tests/support/buffers.h"

namespace baton::test {

size_t buffer_guard() {
#if defined(__SANITIZE_ADDRESS__)
  return 0;
#else
  return 256;  // the arena's alignment
#endif
}

}  // namespace baton::test
