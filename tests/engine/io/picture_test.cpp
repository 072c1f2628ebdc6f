// Pictures: what libpng and TurboJPEG write is read back, whatever the kind of file, and damage is an InputError.
#include "engine/io/picture.h"

#include <gtest/gtest.h>
#include <png.h>
#include <sys/resource.h>
#include <turbojpeg.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdlib>
#include <fstream>
#include <functional>

#include "engine/error.h"
#include "engine/io/dataset.h"

namespace baton {
namespace {

using Bytes = std::vector<uint8_t>;

// A picture as libpng writes it: samples in rows as the colour type has them, 16-bit ones as they are.
struct PngSpec {
  int height, width, type, depth = 8;
  bool interlaced = false;
  std::vector<uint16_t> samples = {};   // [height][width][channels of the type]
  std::vector<png_color> palette = {};  // for type PNG_COLOR_TYPE_PALETTE
  bool transparent = false;             // a tRNS chunk
  bool text = false;                    // a zTXt chunk, which is not wanted

  int channels() const {
    return type == PNG_COLOR_TYPE_RGB ? 3 : type == PNG_COLOR_TYPE_RGBA ? 4 : type == PNG_COLOR_TYPE_GRAY_ALPHA ? 2 : 1;
  }
};

Bytes encode_png(const PngSpec& spec) {
  Bytes out;
  png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, nullptr);
  png_infop info = png_create_info_struct(png);
  const size_t per_row = static_cast<size_t>(spec.width) * spec.channels();
  std::vector<Bytes> rows(spec.height);
  for (int y = 0; y < spec.height; ++y) {
    Bytes& row = rows[y];
    row.assign((per_row * spec.depth + 7) / 8, 0);
    for (size_t i = 0; i < per_row; ++i) {
      const uint16_t sample = spec.samples[y * per_row + i];
      if (spec.depth == 16) {
        row[2 * i] = static_cast<uint8_t>(sample >> 8);
        row[2 * i + 1] = static_cast<uint8_t>(sample);
      } else {
        const size_t bit = i * spec.depth;
        row[bit / 8] |= static_cast<uint8_t>(sample << (8 - spec.depth - bit % 8));
      }
    }
  }
  std::vector<png_bytep> pointers;
  for (Bytes& row : rows) pointers.push_back(row.data());
  png_byte alphas[2] = {0, 128};
  png_color_16 transparent{};
  char key[] = "Comment";
  std::string words(5000, 'x');
  png_text text{};
  text.compression = PNG_TEXT_COMPRESSION_zTXt;
  text.key = key;
  text.text = words.data();
  text.text_length = words.size();
  if (setjmp(png_jmpbuf(png))) std::abort();
  png_set_write_fn(
      png, &out,
      [](png_structp p, png_bytep data, size_t size) {
        auto& to = *static_cast<Bytes*>(png_get_io_ptr(p));
        to.insert(to.end(), data, data + size);
      },
      nullptr);
  png_set_IHDR(png, info, spec.width, spec.height, spec.depth, spec.type,
               spec.interlaced ? PNG_INTERLACE_ADAM7 : PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT,
               PNG_FILTER_TYPE_DEFAULT);
  if (!spec.palette.empty()) png_set_PLTE(png, info, spec.palette.data(), static_cast<int>(spec.palette.size()));
  if (spec.transparent) png_set_tRNS(png, info, alphas, spec.palette.empty() ? 0 : 2, &transparent);
  if (spec.text) png_set_text(png, info, &text, 1);
  png_set_rows(png, info, pointers.data());
  png_write_png(png, info, PNG_TRANSFORM_IDENTITY, nullptr);
  png_destroy_write_struct(&png, &info);
  return out;
}

PngSpec random_png(PngSpec spec, uint64_t seed) {
  SplitMix64 random(seed);
  const uint64_t bound = spec.palette.empty() ? uint64_t{1} << spec.depth : spec.palette.size();
  spec.samples.resize(static_cast<size_t>(spec.height) * spec.width * spec.channels());
  for (uint16_t& sample : spec.samples) sample = static_cast<uint16_t>(random.below(bound));
  return spec;
}

// What decode_picture should make of it.
Picture expected(const PngSpec& spec) {
  const int from = spec.channels();
  Picture picture{from < 3 && spec.palette.empty() ? 1 : 3, spec.height, spec.width, {}};
  for (int c = 0; c < picture.channels; ++c) {
    for (int i = 0; i < spec.height * spec.width; ++i) {
      int value;
      if (!spec.palette.empty()) {
        const png_color& color = spec.palette[spec.samples[i]];
        value = c == 0 ? color.red : c == 1 ? color.green : color.blue;
      } else {
        value = static_cast<int>(std::lround(spec.samples[i * from + c] * 255.0 / ((1 << spec.depth) - 1)));
      }
      picture.pixels.push_back(static_cast<uint8_t>(value));
    }
  }
  return picture;
}

void expect_same(const Picture& got, const Picture& want) {
  EXPECT_EQ(got.channels, want.channels);
  EXPECT_EQ(got.height, want.height);
  EXPECT_EQ(got.width, want.width);
  EXPECT_EQ(got.pixels, want.pixels);
}

const std::vector<png_color> kPalette{{255, 0, 0}, {1, 2, 3}, {9, 200, 77}};

PngSpec small_png(bool interlaced = false) { return random_png({5, 4, PNG_COLOR_TYPE_RGB, 8, interlaced}, 1); }

// A smooth picture, interleaved, that JPEG keeps nearly.
Bytes smooth(int height, int width, int channels) {
  Bytes pixels;
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      for (int c = 0; c < channels; ++c) pixels.push_back(static_cast<uint8_t>(40 + 3 * y + 2 * x + 30 * c));
    }
  }
  return pixels;
}

Bytes encode_jpeg(const Bytes& pixels, int height, int width, int format, int subsampling, int flags = 0) {
  tjhandle encoder = tjInitCompress();
  unsigned char* data = nullptr;
  unsigned long size = 0;
  EXPECT_EQ(tjCompress2(encoder, pixels.data(), width, 0, height, format, &data, &size, subsampling, 95, flags), 0)
      << tjGetErrorStr2(encoder);
  const Bytes bytes(data, data + size);
  tjFree(data);
  tjDestroy(encoder);
  return bytes;
}

Bytes small_jpeg(int flags = 0) { return encode_jpeg(smooth(20, 18, 3), 20, 18, TJPF_RGB, TJSAMP_420, flags); }

std::string error_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const InputError& error) {
    return error.what();
  }
  return "";
}
std::string error_of(const Bytes& bytes) {
  return error_of([&] { decode_picture("photo", bytes); });
}
bool contains(const std::string& text, const std::string& piece) { return text.find(piece) != std::string::npos; }

// The most memory that the process has had, in MB.
long peak_megabytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss / 1024;
}

// Sets the sides in the header of a PNG.
Bytes with_sides(Bytes png, uint32_t height, uint32_t width) {
  const auto put = [&](size_t at, uint32_t value) {
    for (int i = 0; i < 4; ++i) png[at + i] = static_cast<uint8_t>(value >> (24 - 8 * i));
  };
  put(16, width);
  put(20, height);
  put(29, static_cast<uint32_t>(crc32(0, png.data() + 12, 17)));
  return png;
}

TEST(Png, EveryKindIsRead) {
  struct Kind {
    int type;
    std::vector<int> depths;
  };
  for (const Kind& kind : {Kind{PNG_COLOR_TYPE_GRAY, {1, 2, 4, 8, 16}}, Kind{PNG_COLOR_TYPE_GRAY_ALPHA, {8, 16}},
                           Kind{PNG_COLOR_TYPE_RGB, {8, 16}}, Kind{PNG_COLOR_TYPE_RGBA, {8, 16}},
                           Kind{PNG_COLOR_TYPE_PALETTE, {2, 4, 8}}}) {
    for (int depth : kind.depths) {
      for (bool interlaced : {false, true}) {
        for (const auto& [height, width] : {std::pair{13, 11}, {1, 1}, {3, 2}, {1, 9}, {9, 1}, {28, 28}}) {
          for (bool extra : {false, true}) {
            SCOPED_TRACE(testing::Message() << "type " << kind.type << " depth " << depth << " interlaced "
                                            << interlaced << " " << height << " x " << width << " extra " << extra);
            PngSpec spec{height, width, kind.type, depth, interlaced};
            if (kind.type == PNG_COLOR_TYPE_PALETTE) spec.palette = kPalette;
            spec.transparent = extra && (kind.type & PNG_COLOR_MASK_ALPHA) == 0;
            spec.text = extra;
            spec = random_png(spec, depth);
            expect_same(decode_picture("photo", encode_png(spec)), expected(spec));
          }
        }
      }
    }
  }
}

TEST(Png, SixteenBitsAreRounded) {
  PngSpec spec{1, 6, PNG_COLOR_TYPE_GRAY, 16};
  spec.samples = {0, 128, 129, 256, 65406, 65407};
  EXPECT_EQ(decode_picture("photo", encode_png(spec)).pixels, (Bytes{0, 0, 1, 1, 254, 255}));
}

TEST(Png, TruncationAnywhereIsRefused) {
  for (bool interlaced : {false, true}) {
    const Bytes whole = encode_png(small_png(interlaced));
    for (size_t keep = 0; keep < whole.size(); ++keep) {
      const std::string message = error_of(Bytes(whole.begin(), whole.begin() + keep));
      EXPECT_TRUE(message.starts_with("photo is ")) << keep << ": " << message;
      EXPECT_TRUE(contains(message, keep < 8 ? "no picture" : "damaged PNG")) << keep << ": " << message;
    }
  }
}

TEST(Png, FlippedBitsAreRefused) {
  const Bytes whole = encode_png(small_png());
  testing::internal::CaptureStderr();
  for (size_t at = 0; at < whole.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      Bytes bytes = whole;
      bytes[at] ^= static_cast<uint8_t>(1 << bit);
      EXPECT_NE(error_of(bytes), "") << at << " " << bit;  // every byte of this file is under a CRC or a length
    }
  }
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
}

TEST(Png, SidesAreBoundedBeforeAnythingIsAllocated) {
  const Bytes png = encode_png(small_png());
  EXPECT_EQ(error_of(with_sides(png, 16385, 4)),
            "photo is 16385 x 4 pixels; at most 16384 a side and 67108864 in all are read");
  EXPECT_TRUE(contains(error_of(with_sides(png, 4, 0x7fffffff)), "4 x 2147483647 pixels"));
  EXPECT_TRUE(contains(error_of(with_sides(png, 16384, 16384)), "in all"));
  EXPECT_NE(error_of(with_sides(png, 0, 4)), "");
  EXPECT_NE(error_of(with_sides(png, 0x80000000u, 4)), "");
  EXPECT_NE(error_of([&] { decode_picture("photo", png, 19); }), "");
  EXPECT_EQ(decode_picture("photo", png, 20).height, 5);

  const long before = peak_megabytes();
  for (bool interlaced : {false, true}) {
    const Bytes deep = encode_png(random_png({5, 4, PNG_COLOR_TYPE_RGBA, 16, interlaced}, 1));
    EXPECT_TRUE(contains(error_of(with_sides(deep, 4096, 16384)), "damaged"));
  }
  EXPECT_LT(peak_megabytes() - before, 40);
}

TEST(Jpeg, GreyAndColourAreRead) {
  for (int flags : {0, TJFLAG_PROGRESSIVE}) {
    for (int subsampling : {TJSAMP_444, TJSAMP_422, TJSAMP_420, TJSAMP_GRAY, TJSAMP_440, TJSAMP_411}) {
      for (const auto& [height, width] : {std::pair{20, 18}, {1, 1}, {7, 33}}) {
        const Bytes pixels = smooth(height, width, 3);
        const Picture picture =
            decode_picture("photo", encode_jpeg(pixels, height, width, TJPF_RGB, subsampling, flags));
        const bool grey = subsampling == TJSAMP_GRAY;
        ASSERT_EQ(picture.channels, grey ? 1 : 3);
        ASSERT_EQ(picture.height, height);
        ASSERT_EQ(picture.width, width);
        ASSERT_EQ(picture.pixels.size(), static_cast<size_t>(picture.channels) * height * width);
        int worst = 0;
        for (int i = 0; i < height * width; ++i) {
          for (int c = 0; c < picture.channels; ++c) {
            const double want = grey ? 0.299 * pixels[3 * i] + 0.587 * pixels[3 * i + 1] + 0.114 * pixels[3 * i + 2]
                                     : pixels[3 * i + c];
            worst = std::max(worst, std::abs(picture.pixels[c * height * width + i] - static_cast<int>(want)));
          }
        }
        EXPECT_LE(worst, 6) << "subsampling " << subsampling << " flags " << flags;
      }
    }
  }
}

TEST(Jpeg, CmykIsRefused) {
  Bytes pixels(16 * 16 * 4, 90);
  EXPECT_TRUE(contains(error_of(encode_jpeg(pixels, 16, 16, TJPF_CMYK, TJSAMP_444)), "CMYK"));
}

TEST(Jpeg, TruncationAnywhereIsRefused) {
  testing::internal::CaptureStderr();
  for (int flags : {0, TJFLAG_PROGRESSIVE}) {
    const Bytes whole = small_jpeg(flags);
    for (size_t keep = 0; keep < whole.size(); ++keep) {
      const std::string message = error_of(Bytes(whole.begin(), whole.begin() + keep));
      EXPECT_TRUE(contains(message, keep < 3 ? "no picture" : "damaged JPEG")) << keep << ": " << message;
    }
  }
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
}

TEST(Jpeg, FlippedBitsAreAPictureOrAnInputError) {
  for (int flags : {0, TJFLAG_PROGRESSIVE}) {
    const Bytes whole = small_jpeg(flags);
    for (size_t at = 0; at < whole.size(); ++at) {
      Bytes bytes = whole;
      bytes[at] ^= static_cast<uint8_t>(1 << at % 8);
      error_of(bytes);  // JPEG has no checksums; anything but InputError leaves this function
    }
  }
}

TEST(Jpeg, ClaimedSidesMustBePlausible) {
  Bytes jpeg = small_jpeg();
  const uint8_t frame[] = {0xff, 0xc0};
  const auto at = std::search(jpeg.begin(), jpeg.end(), std::begin(frame), std::end(frame)) + 5;
  const auto sides = [&](int height, int width) {
    at[0] = static_cast<uint8_t>(height >> 8);
    at[1] = static_cast<uint8_t>(height);
    at[2] = static_cast<uint8_t>(width >> 8);
    at[3] = static_cast<uint8_t>(width);
    return error_of(jpeg);
  };
  const long before = peak_megabytes();
  EXPECT_TRUE(contains(sides(4000, 16000), "bytes cannot hold 4000 x 16000 pixels"));
  EXPECT_LT(peak_megabytes() - before, 40);
  EXPECT_TRUE(contains(sides(20000, 10), "at most 16384 a side"));
  EXPECT_TRUE(contains(sides(16384, 16384), "in all"));
  EXPECT_TRUE(contains(sides(40, 18), "damaged"));
  EXPECT_NE(sides(20, 0), "");
}

TEST(Jpeg, AFlatPictureIsNotTakenForAClaim) {
  for (int flags : {0, TJFLAG_PROGRESSIVE}) {
    for (int subsampling : {TJSAMP_420, TJSAMP_GRAY, TJSAMP_411}) {
      const Bytes bytes = encode_jpeg(Bytes(2048 * 2048 * 3, 128), 2048, 2048, TJPF_RGB, subsampling, flags);
      const Picture picture = decode_picture("photo", bytes);
      EXPECT_EQ(picture.pixels, Bytes(picture.pixels.size(), 128));
    }
  }
  // The most pixels to a byte that Huffman codes allow: a progressive picture of which only Cb's DC is there, with one
  // bit for each of its blocks, that is for 16 x 16 pixels.
  Bytes bytes{0xff, 0xd8, 0xff, 0xdb, 0, 67, 0};
  bytes.insert(bytes.end(), 64, 1);
  const Bytes frame{0xff, 0xc2, 0, 17, 8, 8, 0, 8, 0, 3, 1, 0x22, 0, 2, 0x11, 0, 3, 0x11, 0};  // 2048 x 2048, 4:2:0
  const Bytes code{0xff, 0xc4, 0, 20, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};   // "0": no difference
  const Bytes scan{0xff, 0xda, 0, 8, 1, 2, 0, 0, 0, 0};
  for (const Bytes& part : {frame, code, scan, Bytes(128 * 128 / 8), Bytes{0xff, 0xd9}}) {
    bytes.insert(bytes.end(), part.begin(), part.end());
  }
  const Picture picture = decode_picture("photo", bytes);
  EXPECT_EQ(picture.pixels, Bytes(size_t{2048} * 2048 * 3, 128));
}

TEST(PictureFiles, AreToldByTheirFirstBytes) {
  EXPECT_TRUE(looks_like_picture(encode_png(small_png())));
  EXPECT_TRUE(looks_like_picture(small_jpeg()));
  for (const Bytes& other : {Bytes{}, Bytes{0xff, 0xd8}, Bytes{'G', 'I', 'F', '8', '9', 'a', 0, 0, 0}}) {
    EXPECT_FALSE(looks_like_picture(other));
    EXPECT_EQ(error_of(other), "photo is no picture: expected a PNG or a JPEG file");
  }

  const auto path = std::filesystem::temp_directory_path() / ("baton_picture_" + std::to_string(::getpid()));
  const PngSpec spec = small_png();
  const Bytes bytes = encode_png(spec);
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  expect_same(load_picture(path), expected(spec));
  std::ofstream(path, std::ios::binary) << "text";
  EXPECT_TRUE(contains(error_of([&] { load_picture(path); }), path.string() + " is no picture"));
  std::filesystem::remove(path);
  EXPECT_TRUE(contains(error_of([&] { load_picture(path); }), path.string()));
}

TEST(WithChannels, GreysAsPilDoes) {
  const Picture color{3, 1, 3, {255, 10, 1, 255, 20, 0, 255, 30, 0}};
  const Picture grey = with_channels(color, 1);
  EXPECT_EQ(grey.channels, 1);
  EXPECT_EQ(grey.pixels, (Bytes{255, 18, 0}));
  // Weights that are too small or not rounded show here: (19595 R + 38470 G + 7471 B + 32768) >> 16.
  EXPECT_EQ(with_channels({3, 1, 1, {255, 0, 0}}, 1).pixels, Bytes{76});
  EXPECT_EQ(with_channels({3, 1, 1, {0, 255, 0}}, 1).pixels, Bytes{150});
  EXPECT_EQ(with_channels({3, 1, 1, {0, 0, 255}}, 1).pixels, Bytes{29});
  expect_same(with_channels(grey, 3), {3, 1, 3, {255, 18, 0, 255, 18, 0, 255, 18, 0}});
  expect_same(with_channels(color, 3), color);
  expect_same(with_channels(grey, 1), grey);
  EXPECT_THROW(with_channels(grey, 2), InputError);
}

}  // namespace
}  // namespace baton
