// Pictures in PNG and JPEG files, decoded by libpng and libjpeg-turbo.
#pragma once
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace baton {

struct Picture {
  int channels = 0, height = 0, width = 0;  // channels: 1 (grey) or 3 (R, G, B)
  std::vector<uint8_t> pixels;              // [channels][height][width], 0 to 255
};

// Decodes PNG or JPEG, which it recognizes by the first bytes. Grey files give one channel, all others three; 16 bits
// are rounded to 8, palettes expanded, transparency dropped (as by PIL's convert("RGB")). CMYK JPEGs are refused. `who`
// names the file in messages. The sides are checked before memory for them is allocated: at most 2^14 each and
// most_pixels in all. Throws InputError for anything else, and for a damaged or truncated file.
Picture decode_picture(const std::string& who, std::span<const uint8_t> bytes, int64_t most_pixels = int64_t(1) << 26);
Picture load_picture(const std::filesystem::path& path);

// Converts to channels = 1 or 3. One from three: ITU-R 601 luma, (19595 R + 38470 G + 7471 B + 2^15) >> 16, as PIL's
// convert("L"). Three from one: three times the same.
Picture with_channels(const Picture&, int channels);

// Whether the bytes begin as a PNG or a JPEG file does.
bool looks_like_picture(std::span<const uint8_t> bytes);

}  // namespace baton
