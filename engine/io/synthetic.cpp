#include "engine/io/synthetic.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <string>
#include <vector>

#include "engine/error.h"
#include "engine/io/stop.h"

namespace baton {
namespace {

struct Point {
  float x = 0, y = 0;
};

Point operator+(Point a, Point b) { return {a.x + b.x, a.y + b.y}; }
Point operator-(Point a, Point b) { return {a.x - b.x, a.y - b.y}; }
Point operator*(float s, Point a) { return {s * a.x, s * a.y}; }

constexpr float kPi = std::numbers::pi_v<float>;

// ---- digits ----

// A pen stroke: a smooth curve through its points. A corner is where one stroke ends and the next begins.
using Stroke = std::vector<Point>;
using Glyph = std::vector<Stroke>;

// The styles of each digit, in a box one high with y downwards; x runs from about 0.15 to 0.85.
const std::array<std::vector<Glyph>, 10>& glyphs() {
  // clang-format off
  static const std::array<std::vector<Glyph>, 10> table{{
      // 0
      {{{{.52f, .03f}, {.26f, .14f}, {.15f, .5f}, {.25f, .88f}, {.5f, .98f}, {.76f, .86f}, {.85f, .5f}, {.74f, .14f},
      {.5f, .03f}}}, {{{.62f, .1f}, {.4f, .06f}, {.22f, .38f}, {.2f, .78f}, {.4f, .98f}, {.66f, .8f}, {.8f, .4f},
      {.68f, .08f}, {.46f, .12f}}}, {{{.3f, .14f}, {.18f, .5f}, {.3f, .9f}, {.58f, .96f}, {.8f, .66f}, {.76f, .24f},
      {.52f, .03f}, {.24f, .2f}}}},
      // 1
      {{{{.52f, .02f}, {.5f, .5f}, {.49f, .98f}}}, {{{.32f, .26f}, {.45f, .16f}, {.54f, .03f}}, {{.54f, .03f},
      {.52f, .5f}, {.5f, .98f}}}, {{{.32f, .22f}, {.54f, .03f}}, {{.54f, .03f}, {.51f, .97f}}, {{.28f, .97f},
      {.76f, .96f}}}},
      // 2
      {{{{.19f, .26f}, {.3f, .07f}, {.56f, .02f}, {.77f, .2f}, {.68f, .48f}, {.42f, .76f}, {.17f, .96f}}, {{.17f, .96f},
      {.5f, .94f}, {.86f, .95f}}}, {{{.2f, .2f}, {.45f, .02f}, {.74f, .18f}, {.64f, .52f}, {.4f, .84f}, {.22f, .95f},
      {.15f, .84f}, {.3f, .76f}, {.52f, .87f}, {.7f, .96f}, {.9f, .86f}}}, {{{.24f, .12f}, {.5f, .03f}, {.72f, .16f},
      {.62f, .42f}, {.2f, .9f}}, {{.2f, .9f}, {.46f, .84f}, {.84f, .98f}}}},
      // 3
      {{{{.2f, .13f}, {.45f, .02f}, {.74f, .14f}, {.69f, .36f}, {.42f, .47f}}, {{.42f, .47f}, {.74f, .56f},
      {.82f, .78f}, {.52f, .98f}, {.17f, .88f}}}, {{{.2f, .05f}, {.76f, .04f}}, {{.76f, .04f}, {.44f, .4f}},
      {{.44f, .4f}, {.74f, .5f}, {.8f, .78f}, {.5f, .98f}, {.18f, .9f}}}, {{{.22f, .15f}, {.5f, .03f}, {.73f, .18f},
      {.58f, .42f}, {.4f, .48f}, {.46f, .53f}, {.7f, .58f}, {.76f, .8f}, {.5f, .98f}, {.24f, .93f}}}},
      // 4
      {{{{.27f, .05f}, {.21f, .32f}, {.2f, .53f}}, {{.2f, .53f}, {.5f, .55f}, {.82f, .5f}}, {{.74f, .08f}, {.71f, .5f},
      {.68f, .98f}}}, {{{.66f, .98f}, {.7f, .03f}}, {{.7f, .03f}, {.15f, .64f}}, {{.15f, .64f}, {.88f, .66f}}},
      {{{.3f, .04f}, {.17f, .38f}, {.3f, .56f}, {.58f, .52f}, {.78f, .4f}}, {{.78f, .05f}, {.73f, .5f}, {.64f, .98f}}}},
      // 5
      {{{{.8f, .04f}, {.28f, .06f}}, {{.28f, .06f}, {.24f, .44f}}, {{.24f, .44f}, {.52f, .36f}, {.8f, .56f},
      {.74f, .86f}, {.46f, .98f}, {.17f, .88f}}}, {{{.78f, .04f}, {.46f, .06f}, {.26f, .26f}, {.4f, .43f}, {.7f, .57f},
      {.7f, .87f}, {.42f, .98f}, {.18f, .89f}}}, {{{.3f, .1f}, {.27f, .48f}}, {{.27f, .48f}, {.56f, .42f}, {.76f, .64f},
      {.62f, .92f}, {.2f, .95f}}, {{.3f, .08f}, {.84f, .02f}}}},
      // 6
      {{{{.7f, .03f}, {.36f, .28f}, {.2f, .65f}, {.3f, .92f}, {.55f, .98f}, {.78f, .8f}, {.68f, .58f}, {.45f, .54f},
      {.23f, .7f}}}, {{{.44f, .02f}, {.28f, .4f}, {.22f, .76f}, {.4f, .97f}, {.66f, .9f}, {.7f, .68f}, {.5f, .58f},
      {.27f, .78f}}}, {{{.8f, .08f}, {.52f, .1f}, {.26f, .42f}, {.2f, .76f}, {.44f, .98f}, {.72f, .84f}, {.6f, .62f},
      {.22f, .72f}}}},
      // 7
      {{{{.16f, .07f}, {.82f, .05f}}, {{.82f, .05f}, {.6f, .42f}, {.44f, .98f}}}, {{{.18f, .08f}, {.8f, .05f}},
      {{.8f, .05f}, {.58f, .46f}, {.38f, .98f}}, {{.34f, .52f}, {.76f, .49f}}}, {{{.17f, .22f}, {.2f, .06f}},
      {{.2f, .06f}, {.5f, .1f}, {.8f, .04f}}, {{.8f, .04f}, {.62f, .36f}, {.54f, .98f}}}},
      // 8
      {{{{.7f, .13f}, {.48f, .02f}, {.25f, .18f}, {.4f, .42f}, {.7f, .64f}, {.74f, .88f}, {.48f, .98f}, {.22f, .84f},
      {.34f, .6f}, {.62f, .42f}, {.76f, .22f}, {.66f, .08f}}}, {{{.5f, .03f}, {.27f, .2f}, {.46f, .46f}, {.73f, .24f},
      {.5f, .03f}}, {{.48f, .46f}, {.2f, .72f}, {.48f, .98f}, {.8f, .74f}, {.5f, .46f}}}, {{{.78f, .06f}, {.4f, .06f},
      {.28f, .26f}, {.6f, .56f}, {.68f, .86f}, {.42f, .98f}, {.3f, .8f}, {.5f, .5f}, {.8f, .08f}}}},
      // 9
      {{{{.75f, .24f}, {.55f, .04f}, {.25f, .15f}, {.22f, .42f}, {.46f, .53f}, {.72f, .36f}, {.76f, .2f}},
      {{.76f, .18f}, {.73f, .6f}, {.66f, .98f}}}, {{{.74f, .2f}, {.5f, .03f}, {.24f, .22f}, {.36f, .48f}, {.66f, .4f},
      {.75f, .18f}, {.76f, .6f}, {.58f, .95f}, {.26f, .93f}}}, {{{.68f, .08f}, {.34f, .12f}, {.22f, .38f}, {.42f, .5f},
      {.7f, .3f}}, {{.74f, .06f}, {.6f, .5f}, {.48f, .98f}}}},
  }};
  // clang-format on
  return table;
}

// A smooth random displacement: normal vectors on a coarse grid over the picture, blended by cubic B-splines.
class Elastic {
 public:
  Elastic(SplitMix64& random, float amplitude) {
    for (Point& node : nodes_) node = {amplitude * random.normal(), amplitude * random.normal()};
  }
  // at: in pixels of the 28 x 28 picture.
  Point operator()(Point at) const {
    const float x = std::clamp(at.x / kCell, 0.0f, kCells - 0.001f),
                y = std::clamp(at.y / kCell, 0.0f, kCells - 0.001f);
    const int column = static_cast<int>(x), row = static_cast<int>(y);
    const std::array<float, 4> across = weights(x - column), down = weights(y - row);
    Point sum;
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < 4; ++i) sum = sum + down[j] * across[i] * nodes_[(row + j) * kNodes + column + i];
    }
    return sum;
  }

 private:
  static constexpr int kCells = 4, kNodes = kCells + 3;
  static constexpr float kCell = 28.0f / kCells;
  static std::array<float, 4> weights(float t) {
    const float s = 1 - t;
    return {s * s * s / 6, (3 * t * t * t - 6 * t * t + 4) / 6, (3 * s * s * s - 6 * s * s + 4) / 6, t * t * t / 6};
  }
  std::array<Point, kNodes * kNodes> nodes_;
};

constexpr int kSide = 28;
using Canvas = std::array<float, kSide * kSide>;  // coverage by ink, 0 to 1

// Draws a segment of a round pen whose radius changes along it. Only the pixels around it are visited.
void draw_segment(Canvas& canvas, Point a, Point b, float radius_a, float radius_b) {
  const float reach = std::max(radius_a, radius_b) + 1;
  const int left = std::max(0, static_cast<int>(std::floor(std::min(a.x, b.x) - reach)));
  const int right = std::min(kSide - 1, static_cast<int>(std::ceil(std::max(a.x, b.x) + reach)));
  const int top = std::max(0, static_cast<int>(std::floor(std::min(a.y, b.y) - reach)));
  const int bottom = std::min(kSide - 1, static_cast<int>(std::ceil(std::max(a.y, b.y) + reach)));
  const Point along = b - a;
  const float length2 = std::max(along.x * along.x + along.y * along.y, 1e-6f);
  for (int y = top; y <= bottom; ++y) {
    for (int x = left; x <= right; ++x) {
      const Point to = Point{x + 0.5f, y + 0.5f} - a;
      const float t = std::clamp((to.x * along.x + to.y * along.y) / length2, 0.0f, 1.0f);
      const Point off = to - t * along;
      const float radius = radius_a + t * (radius_b - radius_a);
      const float ink = std::clamp(radius - std::sqrt(off.x * off.x + off.y * off.y) + 0.5f, 0.0f, 1.0f);
      float& pixel = canvas[y * kSide + x];
      pixel = std::max(pixel, ink);
    }
  }
}

// The point at t in [0, 1] between b and c of the curve through a, b, c and d (Catmull-Rom).
Point on_curve(Point a, Point b, Point c, Point d, float t) {
  const float t2 = t * t, t3 = t2 * t;
  return 0.5f * ((-t3 + 2 * t2 - t) * a + (3 * t3 - 5 * t2 + 2) * b + (-3 * t3 + 4 * t2 + t) * c + (t3 - t2) * d);
}

// How one image is written: every draw of the generator that concerns the whole digit.
struct Hand {
  float xx, xy, yx, yy;  // the affine map from the glyph's box to pixels, around the centre
  Point centre;
  float radius, pressure, pressure_phase;
  float jitter;

  explicit Hand(SplitMix64& random) {
    const float angle = 0.16f * random.normal(), shear = 0.06f + 0.24f * random.normal();
    const float height = 20.0f * std::exp(0.10f * random.normal()),
                width = height * 0.92f * std::exp(0.18f * random.normal());
    const float c = std::cos(angle), s = std::sin(angle);
    xx = c * width, xy = -s * height - shear * height * c;
    yx = s * width, yy = c * height - shear * height * s;
    centre = {14 + 0.9f * random.normal(), 14 + 0.9f * random.normal()};
    radius = std::clamp(1.15f * std::exp(0.3f * random.normal()), 0.55f, 2.3f);
    pressure = 0.3f * random.uniform();
    pressure_phase = 2 * kPi * random.uniform();
    jitter = 0.035f;
  }
  Point place(Point p) const {
    const float x = p.x - 0.5f, y = p.y - 0.5f;
    return centre + Point{xx * x + xy * y, yx * x + yy * y};
  }
};

void draw_stroke(Canvas& canvas, const Stroke& stroke, const Hand& hand, const Elastic& elastic, SplitMix64& random) {
  constexpr int kMost = 16, kSteps = 7;
  std::array<Point, kMost> points;
  const int count = std::min<int>(kMost, static_cast<int>(stroke.size()));
  for (int i = 0; i < count; ++i) {
    points[i] = stroke[i] + hand.jitter * Point{random.normal(), random.normal()};
  }
  const auto at = [&](int i) { return points[std::clamp(i, 0, count - 1)]; };
  Point last;
  float last_radius = 0;
  for (int step = 0; step <= (count - 1) * kSteps; ++step) {
    const int i = std::min(step / kSteps, count - 2);
    const float t = static_cast<float>(step - i * kSteps) / kSteps;
    const Point flat = hand.place(on_curve(at(i - 1), at(i), at(i + 1), at(i + 2), t));
    const Point point = flat + elastic(flat);
    const float wave = std::sin(hand.pressure_phase + 0.25f * (point.x + 1.3f * point.y));
    const float radius = std::max(0.45f, hand.radius * (1 + hand.pressure * wave));
    if (step > 0) draw_segment(canvas, last, point, last_radius, radius);
    last = point;
    last_radius = radius;
  }
}

// A dash of a neighbouring character at the edge, or a speck.
void draw_clutter(Canvas& canvas, SplitMix64& random) {
  const float angle = 2 * kPi * random.uniform(), distance = random.uniform(9, 14);
  const Point a{14 + distance * std::cos(angle), 14 + distance * std::sin(angle)};
  const float turn = 2 * kPi * random.uniform(), length = random.uniform(0, 6);
  const Point b = a + length * Point{std::cos(turn), std::sin(turn)};
  const float radius = random.uniform(0.5f, 1.2f);
  draw_segment(canvas, a, b, radius, radius);
}

// Mixes each pixel with its neighbours along one axis (stride 1 or kSide).
void blur(Canvas& canvas, float share, int stride) {
  const Canvas old = canvas;
  for (int i = stride; i < kSide * kSide - stride; ++i) {
    canvas[i] = (1 - share) * old[i] + 0.5f * share * (old[i - stride] + old[i + stride]);
  }
}

void draw_digit(uint8_t* pixels, int digit, SplitMix64& random) {
  const std::vector<Glyph>& styles = glyphs()[digit];
  const Glyph& glyph = styles[random.below(styles.size())];
  const Hand hand(random);
  const Elastic elastic(random, 1.9f);
  Canvas canvas{};
  for (const Stroke& stroke : glyph) draw_stroke(canvas, stroke, hand, elastic, random);
  if (random.uniform() < 0.12f) draw_clutter(canvas, random);
  const float share = 0.5f * random.uniform();
  blur(canvas, share, 1);
  blur(canvas, share, kSide);
  const float ink = random.uniform(215, 275), noise = 14 * random.uniform();
  for (int i = 0; i < kSide * kSide; ++i) {
    const float value = ink * canvas[i] + noise * random.normal();
    // Paper stays black in most scans: weak noise without ink is dropped.
    pixels[i] = static_cast<uint8_t>(value < 18 ? 0.0f : std::min(value, 255.0f));
  }
}

// ---- textures ----

constexpr int kTextureSide = 32;

// How far inside (positive) or outside a shape of radius about 1 the point lies.
float shape_depth(int shape, Point p) {
  const float x = std::abs(p.x), y = std::abs(p.y), r = std::sqrt(x * x + y * y);
  switch (shape) {
    case 0:
      return 1 - r;  // disc
    case 1:
      return 0.86f - std::max(x, y);  // square
    case 2:
      return std::min(0.55f + p.y, 0.62f - 0.5f * p.y - 0.866f * x);  // triangle
    case 3:
      return 0.32f - std::abs(r - 0.75f);  // ring
    default:
      return std::max(std::min(0.3f - x, 1 - y), std::min(1 - x, 0.3f - y));  // cross
  }
}

// A pattern between -1 and 1 with a period of about 1. phase moves it.
float pattern(int texture, Point p, Point phase) {
  const float x = 2 * kPi * (p.x + phase.x), y = 2 * kPi * (p.y + phase.y);
  switch (texture) {
    case 0:
      return 0;  // plain
    case 1:
      return std::sin(x);  // stripes
    case 2:
      return std::clamp(3 * std::sin(x * 0.7f) * std::sin(y * 0.7f), -1.0f, 1.0f);  // checks
    case 3:
      return 2 * std::max(0.0f, std::cos(x * 0.8f) + std::cos(y * 0.8f) - 0.7f) - 1;  // dots
    default:
      return std::sin(x + 1.6f * std::sin(0.6f * y));  // waves
  }
}

struct Colour {
  std::array<float, 3> rgb;
  explicit Colour(SplitMix64& random) {
    for (float& part : rgb) part = random.uniform(20, 235);
  }
};

// One textured layer of the picture: its two colours, and the pattern's scale, direction and phase.
struct Layer {
  int texture;
  Colour base;
  std::array<float, 3> swing;
  float frequency, c, s;
  Point phase;

  Layer(SplitMix64& random, int texture_number, float contrast) : texture(texture_number), base(random) {
    for (float& part : swing) part = contrast * random.uniform(0.5f, 1.2f);
    if (random.uniform() < 0.5f) std::ranges::for_each(swing, [](float& part) { part = -part; });
    const float angle = 2 * kPi * random.uniform();
    frequency = random.uniform(0.16f, 0.28f);  // periods a pixel
    c = frequency * std::cos(angle), s = frequency * std::sin(angle);
    phase = {random.uniform(), random.uniform()};
  }
  float at(Point p) const { return pattern(texture, {c * p.x - s * p.y, s * p.x + c * p.y}, phase); }
};

void draw_texture(uint8_t* pixels, int label, SplitMix64& random) {
  // Each shape takes two of the textures and each texture two of the shapes.
  const int shape = label % 5, texture = (shape + 2 * (label / 5)) % 5;
  const Layer ground(random, static_cast<int>(random.below(5)), random.uniform(0, 40));
  Layer front(random, texture, random.uniform(22, 70));
  // A shape in the colour of its background could not be seen.
  float difference = 0;
  for (int k = 0; k < 3; ++k) difference += std::abs(front.base.rgb[k] - ground.base.rgb[k]);
  if (difference < 90) {
    for (int k = 0; k < 3; ++k) front.base.rgb[k] += ground.base.rgb[k] < 128 ? 60.0f : -60.0f;
  }

  const float radius = random.uniform(7, 13.5f), angle = 0.5f * random.normal();
  const float c = std::cos(angle) / radius, s = std::sin(angle) / radius, stretch = std::exp(0.15f * random.normal());
  const Point centre{16 + 2.5f * random.normal(), 16 + 2.5f * random.normal()};
  // A bar across the picture hides a piece of the shape in some images.
  const bool bar = random.uniform() < 0.35f;
  const float bar_angle = 2 * kPi * random.uniform(), bar_offset = random.uniform(-11, 11),
              bar_half = random.uniform(1, 3);
  const float bar_x = std::cos(bar_angle), bar_y = std::sin(bar_angle);
  const Colour bar_colour(random);
  // The light falls from one side.
  const float light_x = 0.014f * random.normal(), light_y = 0.014f * random.normal(),
              brightness = 1 + 0.12f * random.normal();
  const float noise = random.uniform(6, 24);

  for (int y = 0; y < kTextureSide; ++y) {
    for (int x = 0; x < kTextureSide; ++x) {
      const Point p{x + 0.5f, y + 0.5f}, q = p - centre;
      const Point inside{(c * q.x + s * q.y) * stretch, (c * q.y - s * q.x) / stretch};
      const float share = std::clamp(shape_depth(shape, inside) * radius + 0.5f, 0.0f, 1.0f);
      const float across = bar_x * (p.x - 16) + bar_y * (p.y - 16) - bar_offset;
      const float hidden = bar ? std::clamp(bar_half - std::abs(across) + 0.5f, 0.0f, 1.0f) : 0.0f;
      const float light = brightness + light_x * (p.x - 16) + light_y * (p.y - 16);
      const float ground_swing = ground.at(p), front_swing = front.at(p);
      for (int k = 0; k < 3; ++k) {
        const float behind = ground.base.rgb[k] + ground.swing[k] * ground_swing;
        const float before = front.base.rgb[k] + front.swing[k] * front_swing;
        float value = behind + share * (before - behind);
        value = light * (value + hidden * (bar_colour.rgb[k] - value)) + noise * random.normal();
        pixels[(k * kTextureSide + y) * kTextureSide + x] = static_cast<uint8_t>(std::clamp(value, 0.0f, 255.0f));
      }
    }
  }
}

// ---- both sets ----

// Every block of ten images holds the classes in an order of its own.
int class_of(int index, uint64_t seed) {
  std::array<int, 10> order{0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  SplitMix64 random(~seed, static_cast<uint64_t>(index / 10));
  for (int i = 9; i > 0; --i) std::swap(order[i], order[random.below(static_cast<uint64_t>(i) + 1)]);
  return order[index % 10];
}

template <class Draw>
Images generate(int count, uint64_t seed, int channels, int side, Draw draw) {
  if (count <= 0) throw InputError("cannot generate " + std::to_string(count) + " images");
  Images images{count, channels, side, side, 10, {}, {}};
  images.pixels.resize(count * images.image_bytes());
  images.labels.resize(count);
  constexpr int at_once = 1000;  // images between two calls of stop_requested()
  for (int first = 0; first < count; first += at_once) {
    if (stop_requested()) throw_stopped("images were being generated; nothing is lost");
#pragma omp parallel for schedule(static)
    for (int i = first; i < std::min(count, first + at_once); ++i) {
      const int label = class_of(i, seed);
      SplitMix64 random(seed, static_cast<uint64_t>(i));
      images.labels[i] = static_cast<uint8_t>(label);
      draw(&images.pixels[i * images.image_bytes()], label, random);
    }
  }
  return images;
}

}  // namespace

Images generate_digits(int count, uint64_t seed) { return generate(count, seed, 1, kSide, draw_digit); }

Images generate_textures(int count, uint64_t seed) { return generate(count, seed, 3, kTextureSide, draw_texture); }

}  // namespace baton
