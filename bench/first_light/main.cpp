// What a first run on a GPU has to ask the device itself, as JSON lines:
//
//   first_light offers     what the library offers for the convolutions of the papers' networks, and what is chosen
//   first_light variance   those convolutions on inputs and weights that are not negative, as of variances: the least
//                          result, and the error against double precision
//   first_light calibrate  latencies and rates on which the cost model rests
//
// On the CPU the same code runs, and its figures are the CPU's.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>

#include "bench/first_light/kernels.h"
#include "engine/blas.h"
#include "engine/io/dataset.h"
#include "engine/io/program.h"

using namespace baton;
using json = nlohmann::ordered_json;

namespace {

void print(const json& line) {
  printf("%s\n", line.dump().c_str());
  fflush(stdout);  // what is measured stays, whatever happens next
}

// ----------------------------------------------------------------------------------------------------- convolutions
struct Layer {
  const char* name;
  ConvShape shape;
};

// The batch is the paper programs': 100 for LeNet5 on MNIST, else 128, at which the timings are made.
std::vector<Layer> layers_of(const std::string& network, int batch) {
  const int n = batch;
  if (network == "lenet5") return {{"conv1", {n, 1, 28, 28, 20, 5, 0}}, {"conv2", {n, 20, 12, 12, 50, 5, 0}}};
  if (network == "3conv3fc")
    return {
        {"conv1", {n, 3, 32, 32, 32, 5, 2}}, {"conv2", {n, 32, 15, 15, 64, 5, 2}}, {"conv3", {n, 64, 7, 7, 128, 5, 2}}};
  return {{"conv1", {n, 3, 32, 32, 64, 3, 1}},   {"conv2", {n, 64, 16, 16, 128, 3, 1}},
          {"conv3", {n, 128, 8, 8, 256, 3, 1}},  {"conv4", {n, 256, 8, 8, 256, 3, 1}},
          {"conv5", {n, 256, 4, 4, 512, 3, 1}},  {"conv6", {n, 512, 4, 4, 512, 3, 1}},
          {"conv7+8", {n, 512, 2, 2, 512, 3, 1}}};
}

json head(const char* kind, const std::string& network, const Layer& layer) {
  const ConvShape& s = layer.shape;
  return {{"kind", kind},
          {"layer", network + "." + layer.name},
          {"shape", {s.batch, s.in_channels, s.height, s.width, s.out_channels, s.kernel, s.pad}}};
}

void print_offers(Device& device, const std::string& network, const Layer& layer) {
  const std::pair<ConvDirection, const char*> directions[] = {{ConvDirection::forward, "forward"},
                                                              {ConvDirection::data, "data gradient"},
                                                              {ConvDirection::weights, "weight gradient"}};
  for (const auto& [direction, name] : directions)
    for (const OfferedAlgorithm& o : Convolution::offered_algorithms(device, layer.shape, direction)) {
      json line = head("offer", network, layer);
      line.update({{"direction", name},
                   {"algorithm", o.name},
                   {"status", o.status},
                   {"determinism", o.determinism},
                   {"math", o.math},
                   {"workspace", o.workspace},
                   {"chosen", o.chosen}});
      print(line);
    }
}

// The convolution of one image, in double precision.
std::vector<double> convolve(const ConvShape& s, const float* x, const float* w) {
  const int oh = s.out_height(), ow = s.out_width(), k = s.kernel;
  std::vector<double> y(size_t(s.out_channels) * oh * ow);
  for (int o = 0; o < s.out_channels; o++)
    for (int c = 0; c < s.in_channels; c++)
      for (int i = 0; i < oh; i++)
        for (int j = 0; j < ow; j++) {
          double sum = 0;
          for (int a = std::max(0, s.pad - i); a < std::min(k, s.height + s.pad - i); a++)
            for (int b = std::max(0, s.pad - j); b < std::min(k, s.width + s.pad - j); b++)
              sum += double(x[(size_t(c) * s.height + i + a - s.pad) * s.width + j + b - s.pad]) *
                     w[((size_t(o) * s.in_channels + c) * k + a) * k + b];
          y[(size_t(o) * oh + i) * ow + j] += sum;
        }
  return y;
}

// Squares of activations, zero in an image's left half and here and there (as behind a ReLU, and where digits are
// black), and variances of weights.
void print_variance(Device& device, const std::string& network, const Layer& layer) {
  const ConvShape& s = layer.shape;
  SplitMix64 random(1);
  std::vector<float> x(s.input_size()), w(s.weight_size());
  for (size_t i = 0; i < x.size(); i++) {
    const float a = random.normal();
    x[i] = a > 0 && int(i % s.width) >= s.width / 2 ? a * a : 0.f;
  }
  for (float& v : w) v = 1e-3f * random.uniform();

  Arena arena;
  const Convolution convolution(device, arena, s, 1);
  float *dx = arena.take<float>(x.size()), *dw = arena.take<float>(w.size()), *dy = arena.take<float>(s.output_size());
  upload(device, dx, x);
  upload(device, dw, w);
  upload(device, dy, std::vector<float>(s.output_size(), NAN));  // so that what is not written is seen
  convolution.forward(device, {dx, 0}, {dw, 0}, {dy, 0});
  const std::vector<float> y = download(device, dy, s.output_size());

  const std::vector<double> exact = convolve(s, x.data(), w.data());
  double error = 0, norm = 0;
  for (size_t i = 0; i < exact.size(); i++) {
    error += (y[i] - exact[i]) * (y[i] - exact[i]);
    norm += exact[i] * exact[i];
  }
  json line = head("variance", network, layer);
  line["algorithm"] = "direct";  // the CPU's, where there is nothing to choose
  for (const OfferedAlgorithm& o : Convolution::offered_algorithms(device, s, ConvDirection::forward))
    if (o.chosen) line["algorithm"] = o.name;
  const auto count = [&](auto wanted) { return std::count_if(y.begin(), y.end(), wanted); };
  line["least"] = *std::min_element(y.begin(), y.end(), [](float a, float b) { return a < b; });
  line["greatest"] = *std::max_element(y.begin(), y.end(), [](float a, float b) { return a < b; });
  line["negative"] = count([](float v) { return v < 0; });
  line["not_finite"] = count([](float v) { return !std::isfinite(v); });
  line["outputs"] = y.size();
  line["relative_error"] = norm > 0 ? std::sqrt(error / norm) : 0.;  // NaN when one is
  print(line);
}

// ------------------------------------------------------------------------------------------------------ calibration
// Seconds of what `body` puts on the stream, captured in a graph: the median of some replays.
double seconds_of(Device& device, const std::function<void()>& body, int replays = 5) {
  Graph graph;
  graph.capture(device, body);
  graph.replay(device);  // a first one warms up
  device.synchronize();
  std::vector<double> seconds;
  Event start, stop;
  for (int i = 0; i < replays; i++) {
    start.record(device);
    graph.replay(device);
    stop.record(device);
    seconds.push_back(stop.seconds_since(start));
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

double host_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void print_figure(const char* name, double value, const char* unit, const std::string& how) {
  print({{"kind", "calibration"}, {"name", name}, {"value", value}, {"unit", unit}, {"how", how}});
}

// A ring that visits `lines` places, 128 bytes apart, in random order.
std::vector<uint32_t> ring(size_t lines) {
  constexpr size_t step = 128 / sizeof(uint32_t);
  std::vector<uint32_t> order(lines);
  for (size_t i = 0; i < lines; i++) order[i] = uint32_t(i);
  SplitMix64 random(1);
  for (size_t i = lines - 1; i > 0; i--) std::swap(order[i], order[random.below(i)]);  // Sattolo: one cycle
  std::vector<uint32_t> next(lines * step);
  for (size_t i = 0; i < lines; i++) next[i * step] = uint32_t(order[i] * step);
  return next;
}

// small: sizes for a CPU and for an interpreter, whose figures say nothing of a GPU.
void calibrate(Device& device, bool small) {
  const Stream stream = device.stream();
  Arena arena;
  const auto text = [](auto number) { return std::to_string(number); };

  const int chain = small ? 20 : 500;
  const int wave = small ? 4096 : 132 * 8 * 256;
  int32_t* counters = arena.take<int32_t>(wave);
  for (const auto& [name, n] : {std::pair{"graph_node", 1}, {"graph_node_wave", wave}}) {
    const double seconds = seconds_of(device, [&, n = n] {
      for (int i = 0; i < chain; i++) touch(counters, n, stream);
    });
    print_figure(name, 1e6 * seconds / chain, "us",
                 "a kernel of " + text(n) + " threads that adds 1, in a graph of " + text(chain) + " in a chain");
  }
  {
    device.synchronize();
    const double start = host_seconds();
    for (int i = 0; i < chain; i++) touch(counters, 1, stream);
    print_figure("launch", 1e6 * (host_seconds() - start) / chain, "us",
                 "the host's time for a launch, without a graph");
    device.synchronize();
  }
  {
    Graph graph;
    graph.capture(device, [&] { touch(counters, 1, stream); });
    const int rounds = small ? 3 : 100, warmup = 2;
    double start = 0;
    for (int i = 0; i < warmup + rounds; i++) {
      if (i == warmup) start = host_seconds();
      graph.replay(device);
      download(device, counters, 16);
    }
    print_figure("round_trip", 1e6 * (host_seconds() - start) / rounds, "us",
                 "replay a graph of one kernel, read 64 bytes back");
  }

  const int steps = small ? 1000 : 20000;
  float* cell = arena.take<float>(1);
  print_figure("load_after_store",
               1e9 * seconds_of(device, [&] { load_after_store(cell, cell, steps, stream); }) / steps, "ns",
               "one thread: load what was stored just before, add, store");
  for (const auto& [name, kilobytes] :
       {std::pair{"load_l1", 16}, {"load_l2", small ? 256 : 8 << 10}, {"load_memory", small ? 4096 : 512 << 10}}) {
    Arena room;
    const std::vector<uint32_t> links = ring(size_t(kilobytes) * 1024 / 128);
    uint32_t *next = room.take<uint32_t>(links.size()), *end = room.take<uint32_t>(1);
    upload(device, next, links);
    print_figure(name, 1e9 * seconds_of(device, [&] { follow_links(next, steps, end, stream); }) / steps, "ns",
                 "one thread follows links through " + text(kilobytes) + " KB");
  }
  print_figure("barrier", 1e9 * seconds_of(device, [&] { meet(counters, steps, stream); }) / steps, "ns",
               "256 threads of one block meet");

  {
    Arena room;
    const int n = small ? 1 << 16 : 1 << 26;  // float4: 1 GB
    float4 *x = room.take<float4>(n), *y = room.take<float4>(n);
    float* sink = room.take<float>(1);
    draw_normals(reinterpret_cast<float*>(x), 4 * n, 1, stream);
    const int part = small ? 1 << 12 : 1 << 20, rows = small ? 4 : 64;  // float4: 16 MB
    print_figure("read_l2", 16e-9 * part * rows / seconds_of(device, [&] { read_all(x, part, rows, sink, stream); }),
                 "GB/s", "read " + text(part >> 6) + " KB " + text(rows) + " times over");
    print_figure("read_memory", 16e-9 * n / seconds_of(device, [&] { read_all(x, n, 1, sink, stream); }), "GB/s",
                 "read " + text(n >> 6) + " KB once");
    print_figure("copy_memory", 32e-9 * n / seconds_of(device, [&] { copy_on_device(device, y, x, size_t(n) * 16); }),
                 "GB/s", "copy " + text(n >> 6) + " KB, bytes read and written");
  }
  {
    Arena room;
    const int threads = small ? 1 << 10 : 1 << 20, rounds = small ? 8 : 64;
    float* sum = room.take<float>(threads);
    print_figure("normals",
                 4e-9 * threads * rounds / seconds_of(device, [&] { draw_normals(sum, threads, rounds, stream); }),
                 "G/s", "normals drawn and added up in registers");
    const int more = 32 * rounds;
    print_figure(
        "fma",
        2e-12 * fma_chains * threads * more / seconds_of(device, [&] { multiply_add(sum, threads, more, stream); }),
        "TFLOP/s", "float32 fused multiply-adds in eight chains a thread");
  }
}

int run(int argc, char** argv) {
  CLI::App app{"Asks the device what a first run on a GPU wants to know, and prints JSON lines"};
  std::string what;
  std::vector<std::string> networks{"lenet5", "3conv3fc", "vgg11"};
  std::vector<int> batches{128, 100};
  bool small = false;
  app.add_option("what", what, "offers and variance of convolutions, or calibrate")
      ->required()
      ->check(CLI::IsMember({"offers", "variance", "calibrate"}));
  app.add_option("--networks", networks, "whose convolutions")
      ->delimiter(',')
      ->check(CLI::IsMember({"lenet5", "3conv3fc", "vgg11"}))
      ->capture_default_str();
  app.add_option("--batches", batches, "of the convolutions")->delimiter(',')->capture_default_str();
  app.add_flag("--small", small, "sizes for a CPU or an interpreter");
  CLI11_PARSE(app, argc, argv);

  Device device;
  print({{"kind", "device"}, {"device", device.description()}});
  if (what == "calibrate") {
    calibrate(device, small);
    return 0;
  }
  int failures = 0;
  for (const std::string& network : networks)
    for (int batch : batches)
      for (const Layer& layer : layers_of(network, batch)) try {
          if (what == "offers") print_offers(device, network, layer);
          else print_variance(device, network, layer);
        } catch (const std::exception& e) {  // the other layers can still be asked
          json line = head("error", network, layer);
          line["error"] = e.what();
          print(line);
          failures++;
        }
  return failures ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("first_light", [&] { return run(argc, argv); });
}
