// The most bytes that are read, as a power of two (a byte, by 28), then a file: plain, gzip or xz.
#include "engine/io/files.h"
#include "tests/fuzz/fuzz.h"

namespace baton {

FUZZ(packed) {
  fuzz::Pieces pieces(input);
  const uint64_t most = uint64_t{1} << pieces.byte() % 28;
  const fuzz::Input content = pieces.rest();
  const fuzz::MemoryFile file(content);
  const fuzz::Bytes bytes = read_file(file.path(), most);
  FUZZ_CHECK(bytes.size() <= most);
  const bool gzip = content.size() >= 2 && content[0] == 0x1f && content[1] == 0x8b;
  const bool xz = content.size() >= 6 && content[0] == 0xfd && content[1] == '7';
  if (!gzip && !xz) FUZZ_CHECK(std::equal(bytes.begin(), bytes.end(), content.begin(), content.end()));
  if (bytes.size() > 1 << 16) return;
  // The limit is exact.
  FUZZ_CHECK(read_file(file.path(), bytes.size()) == bytes);
  if (!bytes.empty()) FUZZ_CHECK(!fuzz::succeeds([&] { read_file(file.path(), bytes.size() - 1); }));
}

}  // namespace baton
