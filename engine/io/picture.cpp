// PNG by libpng, JPEG by TurboJPEG.
//
// The rows of a PNG are appended as they are decoded, and so are the passes of an interlaced one, which are put in
// place when all have come. So a header alone takes no more memory than one row. TurboJPEG needs memory for the whole
// picture, so a JPEG must be long enough for the pixels that it claims (kPixelsPerByte).
#include "engine/io/picture.h"

#include <png.h>
#include <turbojpeg.h>

#include <algorithm>
#include <array>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string_view>
#include <utility>

#include "engine/error.h"
#include "engine/io/files.h"

namespace baton {
namespace {

using Bytes = std::vector<uint8_t>;

constexpr std::array<uint8_t, 8> kPngMagic{0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
constexpr std::array<uint8_t, 3> kJpegMagic{0xff, 0xd8, 0xff};
constexpr int64_t kMostSide = 1 << 14;
constexpr uint64_t kMostFileBytes = uint64_t{1} << 28;

// A JPEG with Huffman codes has at least one bit for each 8 x 8 block of a component, and TurboJPEG refuses components
// with fewer than one block for 256 pixels.
constexpr uint64_t kPixelsPerByte = 8 * 256;

bool begins_with(std::span<const uint8_t> bytes, std::span<const uint8_t> magic) {
  return bytes.size() >= magic.size() && std::equal(magic.begin(), magic.end(), bytes.begin());
}

void check_sides(const std::string& who, int64_t height, int64_t width, int64_t most_pixels) {
  if (height < 1 || width < 1 || height > kMostSide || width > kMostSide || height * width > most_pixels) {
    refuse(who, "is " + std::to_string(height) + " x " + std::to_string(width) + " pixels; at most " +
                    std::to_string(kMostSide) + " a side and " + std::to_string(most_pixels) + " in all are read");
  }
}

// [height][width][channels] as decoders give it to [channels][height][width].
Bytes in_planes(Bytes interleaved, int channels) {
  if (channels == 1) return interleaved;
  const size_t pixels = interleaved.size() / channels;
  Bytes planes(interleaved.size());
  for (size_t i = 0; i < pixels; ++i) {
    for (int c = 0; c < channels; ++c) planes[c * pixels + i] = interleaved[i * channels + c];
  }
  return planes;
}

// -------------------------------------------------------------------------------------------------------------- PNG

// libpng reports errors by longjmp, which must not pass over anything that has a destructor: it starts in libpng,
// called from a lambda that owns nothing, and ends in attempt().
class PngReader {
 public:
  PngReader(const std::string& who, std::span<const uint8_t> bytes) : who_(who), rest_(bytes) {
    png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, this, on_error, on_warning);
    if (png_) info_ = png_create_info_struct(png_);
    if (info_) return;
    png_destroy_read_struct(&png_, nullptr, nullptr);
    throw RunError("cannot start libpng: out of memory");
  }
  ~PngReader() { png_destroy_read_struct(&png_, &info_, nullptr); }
  PngReader(const PngReader&) = delete;
  PngReader& operator=(const PngReader&) = delete;

  Picture read(int64_t most_pixels) {
    check(attempt([this] {
      png_set_read_fn(png_, this, on_read);
      png_set_user_limits(png_, PNG_UINT_31_MAX, PNG_UINT_31_MAX);  // check_sides() has a better message
      // Texts and colour profiles are not unpacked, for they are not used.
      png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_NEVER, nullptr, -1);
      png_read_info(png_, info_);
    }));
    const int64_t height = png_get_image_height(png_, info_), width = png_get_image_width(png_, info_);
    check_sides(who_, height, width, most_pixels);
    const bool interlaced = png_get_interlace_type(png_, info_) != PNG_INTERLACE_NONE;
    check(attempt([this] {
      const int depth = png_get_bit_depth(png_, info_), type = png_get_color_type(png_, info_);
      if (type == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png_);
      if (type == PNG_COLOR_TYPE_GRAY && depth < 8) png_set_expand_gray_1_2_4_to_8(png_);
      if (depth == 16) png_set_scale_16(png_);
      png_set_strip_alpha(png_);
      png_read_update_info(png_, info_);
    }));
    const int channels = png_get_channels(png_, info_);
    const size_t row_bytes = png_get_rowbytes(png_, info_);
    if ((channels != 1 && channels != 3) || row_bytes != static_cast<size_t>(channels * width)) {
      refuse(who_, "is a PNG of a kind that is not read");
    }

    Bytes pixels, row(row_bytes);
    const size_t whole = row_bytes * height;
    const auto append_row = [&](int64_t columns) {
      check(attempt([&] { png_read_row(png_, row.data(), nullptr); }));
      const size_t needed = pixels.size() + columns * channels;
      if (needed > pixels.capacity()) pixels.reserve(std::min(whole, std::max(needed, 2 * pixels.size())));
      pixels.insert(pixels.end(), row.begin(), row.begin() + columns * channels);
    };
    if (interlaced) {
      for (int pass = 0; pass < PNG_INTERLACE_ADAM7_PASSES; ++pass) {
        const int64_t rows = PNG_PASS_ROWS(height, pass), columns = PNG_PASS_COLS(width, pass);
        for (int64_t y = 0; y < rows && columns > 0; ++y) append_row(columns);
      }
      pixels = from_passes(pixels, channels, height, width);
    } else {
      for (int64_t y = 0; y < height; ++y) append_row(width);
    }
    check(attempt([this] { png_read_end(png_, nullptr); }));
    return {channels, static_cast<int>(height), static_cast<int>(width), in_planes(std::move(pixels), channels)};
  }

 private:
  template <class Call>
  bool attempt(const Call& call) {
    if (setjmp(png_jmpbuf(png_))) return false;
    call();
    return true;
  }
  void check(bool succeeded) const {
    if (!succeeded) refuse(who_, std::string("is a damaged PNG: ") + message_.data());
  }

  static PngReader& of(png_voidp self) { return *static_cast<PngReader*>(self); }
  static void on_error(png_structp png, png_const_charp text) {
    std::array<char, 160>& message = of(png_get_error_ptr(png)).message_;
    std::snprintf(message.data(), message.size(), "%s", text);
    png_longjmp(png, 1);
  }
  static void on_warning(png_structp, png_const_charp) {}  // without it, libpng prints warnings
  static void on_read(png_structp png, png_bytep to, size_t count) {
    std::span<const uint8_t>& rest = of(png_get_io_ptr(png)).rest_;
    if (count > rest.size()) png_error(png, "it is cut short");
    std::memcpy(to, rest.data(), count);
    rest = rest.subspan(count);
  }

  // Adam7: seven pictures one after the other, from every eighth to every second row and column.
  static Bytes from_passes(const Bytes& passes, int channels, int64_t height, int64_t width) {
    Bytes pixels(passes.size());
    const uint8_t* from = passes.data();
    for (int pass = 0; pass < PNG_INTERLACE_ADAM7_PASSES; ++pass) {
      const int64_t rows = PNG_PASS_ROWS(height, pass), columns = PNG_PASS_COLS(width, pass);
      for (int64_t y = 0; y < rows; ++y) {
        for (int64_t x = 0; x < columns; ++x, from += channels) {
          const int64_t at = PNG_ROW_FROM_PASS_ROW(y, pass) * width + PNG_COL_FROM_PASS_COL(x, pass);
          std::copy_n(from, channels, pixels.begin() + at * channels);
        }
      }
    }
    return pixels;
  }

  const std::string& who_;
  std::span<const uint8_t> rest_;
  png_structp png_ = nullptr;
  png_infop info_ = nullptr;
  std::array<char, 160> message_{};
};

// ------------------------------------------------------------------------------------------------------------- JPEG

Picture decode_jpeg(const std::string& who, std::span<const uint8_t> bytes, int64_t most_pixels) {
  struct Destroy {
    void operator()(tjhandle handle) const { tjDestroy(handle); }
  };
  const std::unique_ptr<void, Destroy> decoder(tjInitDecompress());
  if (!decoder) throw RunError("cannot start TurboJPEG: out of memory");
  const auto check = [&](int status) {
    if (status != 0) refuse(who, std::string("is a damaged JPEG: ") + tjGetErrorStr2(decoder.get()));
  };

  int width = 0, height = 0, subsampling = 0, space = 0;
  check(tjDecompressHeader3(decoder.get(), bytes.data(), bytes.size(), &width, &height, &subsampling, &space));
  if (space == TJCS_CMYK || space == TJCS_YCCK) refuse(who, "is a JPEG in CMYK; expected RGB or grey");
  if (height == 0 && width == 0) refuse(who, "is a damaged JPEG: it holds tables and no picture");
  check_sides(who, height, width, most_pixels);
  const uint64_t claimed = static_cast<uint64_t>(height) * width;
  if (claimed / kPixelsPerByte > bytes.size()) {
    refuse(who, "is a damaged JPEG: " + std::to_string(bytes.size()) + " bytes cannot hold " + std::to_string(height) +
                    " x " + std::to_string(width) + " pixels");
  }

  const int channels = space == TJCS_GRAY ? 1 : 3;
  Bytes pixels(claimed * channels);
  // Warnings are errors here, for libjpeg warns of damage and makes up the missing pixels. Files with hundreds of
  // progressive scans are meant to take very long, and are refused. PIL uses the accurate transform too.
  constexpr int kFlags = TJFLAG_STOPONWARNING | TJFLAG_LIMITSCANS | TJFLAG_ACCURATEDCT;
  check(tjDecompress2(decoder.get(), bytes.data(), bytes.size(), pixels.data(), width, 0, height,
                      channels == 1 ? TJPF_GRAY : TJPF_RGB, kFlags));
  return {channels, height, width, in_planes(std::move(pixels), channels)};
}

}  // namespace

bool looks_like_picture(std::span<const uint8_t> bytes) {
  return begins_with(bytes, kPngMagic) || begins_with(bytes, kJpegMagic);
}

Picture decode_picture(const std::string& who, std::span<const uint8_t> bytes, int64_t most_pixels) {
  if (begins_with(bytes, kPngMagic)) return PngReader(who, bytes).read(most_pixels);
  if (begins_with(bytes, kJpegMagic)) return decode_jpeg(who, bytes, most_pixels);
  refuse(who, "is no picture: expected a PNG or a JPEG file");
}

Picture load_picture(const std::filesystem::path& path) {
  return decode_picture(path.string(), read_file(path, kMostFileBytes));
}

Picture with_channels(const Picture& picture, int channels) {
  if (channels != 1 && channels != 3) {
    throw InputError("pictures have 1 or 3 channels, not " + std::to_string(channels));
  }
  if (picture.channels == channels) return picture;
  Picture to{channels, picture.height, picture.width, {}};
  const size_t pixels = static_cast<size_t>(picture.height) * picture.width;
  to.pixels.resize(pixels * channels);
  const uint8_t* from = picture.pixels.data();
  for (size_t i = 0; i < pixels; ++i) {
    if (channels == 3) {
      for (int c = 0; c < 3; ++c) to.pixels[c * pixels + i] = from[i];
    } else {
      const uint32_t red = from[i], green = from[pixels + i], blue = from[2 * pixels + i];
      to.pixels[i] = static_cast<uint8_t>((19595 * red + 38470 * green + 7471 * blue + (1u << 15)) >> 16);
    }
  }
  return to;
}

}  // namespace baton
