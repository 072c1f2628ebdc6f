// A PNG or a JPEG file.
#include "engine/io/picture.h"

#include <zlib.h>

#include "tests/fuzz/fuzz.h"

namespace baton {
namespace {

// Under libFuzzer a picture of 2^26 pixels takes seconds, and on a busy machine seems to hang.
#ifdef BATON_LIBFUZZER
constexpr int64_t kMostPixels = int64_t{1} << 20;
#else
constexpr int64_t kMostPixels = int64_t{1} << 26;
#endif

void decode(fuzz::Input bytes) {
  const Picture picture = decode_picture("picture", bytes, kMostPixels);
  FUZZ_CHECK(picture.channels == 1 || picture.channels == 3);
  FUZZ_CHECK(picture.height >= 1 && picture.width >= 1 && picture.height <= 1 << 14 && picture.width <= 1 << 14);
  const size_t pixels = static_cast<size_t>(picture.height) * picture.width;
  FUZZ_CHECK(picture.pixels.size() == pixels * picture.channels && pixels <= kMostPixels);
  if (pixels > 1 << 16) return;
  for (int channels : {1, 3}) {
    const Picture other = with_channels(picture, channels);
    FUZZ_CHECK(other.channels == channels && other.pixels.size() == pixels * channels);
  }
}

// A PNG with the right CRC in every chunk; without, whatever is changed in one stops there.
fuzz::Bytes with_crcs(fuzz::Input png) {
  fuzz::Bytes bytes(png.begin(), png.end());
  for (size_t at = 8; at + 12 <= bytes.size();) {
    const size_t length = size_t{bytes[at]} << 24 | bytes[at + 1] << 16 | bytes[at + 2] << 8 | bytes[at + 3];
    if (length > bytes.size() - at - 12) break;
    const auto crc = static_cast<uint32_t>(crc32_z(0, bytes.data() + at + 4, length + 4));
    for (int i = 0; i < 4; ++i) bytes[at + 8 + length + i] = static_cast<uint8_t>(crc >> (24 - 8 * i));
    at += 12 + length;
  }
  return bytes;
}

}  // namespace

FUZZ(picture) {
  FUZZ_CHECK(looks_like_picture(input) || !fuzz::succeeds([&] { decode(input); }));
  if (!input.empty() && input[0] == 0x89) {
    const fuzz::Bytes repaired = with_crcs(input);
    if (!std::equal(input.begin(), input.end(), repaired.begin())) fuzz::succeeds([&] { decode(repaired); });
  }
  decode(input);
}

}  // namespace baton
