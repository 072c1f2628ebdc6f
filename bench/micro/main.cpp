// The benchmarks of every kernel, of the library seam and of whole steps, in one program. bench/README.md says how to
// read the columns. Exits with 2 for bad options and 1 when a benchmark fails.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "common.h"
#include "kernels/gaussian.h"
#include "kernels/squares.h"

using namespace baton;

// -------------------------------------------------------------------------------------------------------- buffers
void Buffers::fill_normal(float* x, size_t n, float sd) {
  StepState s{};
  s.noise = key_of(++fills_, 100);
  copy_to_device(device, fill_, &s, sizeof s);
  init_normal(x, n, 0, int(n), sd, fill_, 1, stream());
}

float* Buffers::normal(size_t n, float sd) {
  float* x = arena.take<float>(n);
  fill_normal(x, n, sd);
  return x;
}

float* Buffers::positive(size_t n, float scale) {
  if (n > scratch_size_) scratch_ = scratch_arena_.take<float>(n), scratch_size_ = n;
  float* x = arena.take<float>(n);
  fill_normal(scratch_, n, std::sqrt(scale));
  square(x, scratch_, n, stream());
  return x;
}

StepState* Buffers::states(int replicas, int part_size) {
  step_++;
  std::vector<StepState> states(replicas);
  for (int r = 0; r < replicas; r++) {
    StepState& s = states[r];
    s = {};
    s.noise = key_of(r, 1);
    s.shuffle = key_of(r, 2);
    s.step = s.stage_step = step_;
    s.stage_steps = 1 << 30;
    s.part_size = part_size;
    s.base_lr_mean = s.base_lr_scale = s.lr_mean = s.lr_scale = 1e-8f;
    s.kl_weight = s.kl_now = 1.f / float(part_size);
    s.correction1 = s.correction2 = 1;
  }
  return put(states);
}

namespace {

// ---------------------------------------------------------------------------------------------------------- cases
struct Case {
  std::string name;
  Work work;
  Make make;
  bool cold, captured;
  int units;
};

// Google Benchmark calls a benchmark several times to find how often to run it: what was prepared is kept meanwhile.
struct Prepared {
  explicit Prepared(Device& device) : buffers(device) {}
  Buffers buffers;
  std::vector<std::function<void()>> calls;  // one a set of buffers
  Graph graph;
  int launches = 0;  // of the graph
};

struct Roofline {
  double gbps = 0, gflops = 0;  // 0: not given
  double seconds(const Work& w) const {
    return std::max(gbps > 0 ? w.bytes / (gbps * 1e9) : 0, gflops > 0 ? w.flops / (gflops * 1e9) : 0);
  }
};

struct Session {
  std::vector<std::unique_ptr<Case>> cases;
  std::unique_ptr<Device> device;
  std::unique_ptr<Prepared> prepared;
  const Case* prepared_for = nullptr;
  Roofline roofline;
  int exit_code = 0;
} session;

Prepared& prepare(const Case& c) {
  if (session.prepared_for == &c) return *session.prepared;
  session.prepared_for = nullptr;
  session.prepared.reset();  // its memory first
  Device& device = *session.device;
  session.prepared = std::make_unique<Prepared>(device);
  Prepared& p = *session.prepared;
  do {
    p.calls.push_back(c.make(p.buffers));
  } while (c.cold && p.buffers.arena.bytes() < cold_bytes);
  for (const auto& call : p.calls) call();  // warm-up, outside what is measured
  device.synchronize();
  if (on_gpu && c.captured) {
    const int sets = int(p.calls.size()), rounds = (127 + sets) / sets;
    p.launches = sets * rounds;
    p.graph.capture(device, [calls = p.calls, rounds] {
      for (int i = 0; i < rounds; i++)
        for (const auto& call : calls) call();
    });
    p.graph.replay(device);
    device.synchronize();
  }
  session.prepared_for = &c;
  return p;
}

// One iteration is one call (or one unit of it); on the GPU the mean over what lies between two events.
void measure(benchmark::State& state, const Case& c) {
  Prepared& p = prepare(c);
  double total = 0;  // seconds of all iterations
  if (on_gpu) {
    Device& device = *session.device;
    Event start, stop;
    for (auto _ : state) {
      start.record(device);
      if (c.captured) p.graph.replay(device);
      else p.calls[0]();
      stop.record(device);
      const double seconds = stop.seconds_since(start) / (c.captured ? p.launches : c.units);
      state.SetIterationTime(seconds);
      total += seconds;
    }
  } else {
    size_t next = 0;
    const auto start = std::chrono::steady_clock::now();
    for (auto _ : state) {
      p.calls[next]();
      if (++next == p.calls.size()) next = 0;
    }
    total = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  using benchmark::Counter;
  const double units = on_gpu ? 1 : c.units;  // of an iteration
  state.counters["bytes/s"] = Counter(c.work.bytes * units, Counter::kIsIterationInvariantRate);
  state.counters["FLOP/s"] = Counter(c.work.flops * units, Counter::kIsIterationInvariantRate);
  const double floor = session.roofline.seconds(c.work) * units;
  if (floor > 0) {
    state.counters["floor_us"] = floor * 1e6;
    state.counters["of_floor"] = floor * double(state.iterations()) / total;  // 1: at the roofline
  }
}

void measure_or_report(benchmark::State& state, const Case& c) {
  try {
    measure(state, c);
  } catch (const std::exception& e) {
    session.exit_code = 1;
    state.SkipWithError(e.what());
  }
}

void add_case(Case c) {
  session.cases.push_back(std::make_unique<Case>(std::move(c)));
  const Case& kept = *session.cases.back();
  auto* b = benchmark::RegisterBenchmark(kept.name.c_str(),
                                         [&kept](benchmark::State& state) { measure_or_report(state, kept); });
  b->Unit(benchmark::kMicrosecond);
  if (on_gpu) b->UseManualTime();
  else b->UseRealTime();
}

// --------------------------------------------------------------------------------------------------------- options
double positive_number(const std::string& what, const std::string& text) {
  char* end = nullptr;
  const double x = std::strtod(text.c_str(), &end);
  if (text.empty() || *end || !std::isfinite(x) || !(x > 0))
    throw InputError(what + " must be a positive number, not '" + text + "'");
  return x;
}

// Takes --name=value out of the arguments, else the environment's; 0 when neither is there.
double rate_option(int& argc, char** argv, const std::string& name, const char* variable) {
  double rate = 0;
  if (const char* text = std::getenv(variable)) rate = positive_number(variable, text);
  int kept = 1;
  for (int i = 1; i < argc; i++) {
    const std::string argument = argv[i];
    if (argument.rfind(name + "=", 0) == 0) rate = positive_number(name, argument.substr(name.size() + 1));
    else argv[kept++] = argv[i];
  }
  argc = kept;
  argv[argc] = nullptr;
  return rate;
}

int run(int argc, char** argv) {
  session.roofline.gbps = rate_option(argc, argv, "--roofline_gbps", "BATON_ROOFLINE_GBPS");
  session.roofline.gflops = rate_option(argc, argv, "--roofline_gflops", "BATON_ROOFLINE_GFLOPS");
  bool listing = false;  // needs no GPU
  for (int i = 1; i < argc; i++) listing |= std::string(argv[i]).rfind("--benchmark_list_tests", 0) == 0;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  if (!listing) {
    session.device = std::make_unique<Device>();
    benchmark::AddCustomContext("device", session.device->description());
    if (session.roofline.gbps > 0) benchmark::AddCustomContext("roofline_gbps", std::to_string(session.roofline.gbps));
    if (session.roofline.gflops > 0)
      benchmark::AddCustomContext("roofline_gflops", std::to_string(session.roofline.gflops));
  }
  add_product_benchmarks();
  add_reparam_benchmarks();
  add_kernel_benchmarks();
  add_family_benchmarks();
  add_bgd_benchmarks();
  add_baseline_benchmarks();
  add_task_benchmarks();
  add_last_layer_benchmarks();
  add_seam_benchmarks();
  add_step_benchmarks();
  if (benchmark::RunSpecifiedBenchmarks() == 0) throw InputError("no benchmark matches --benchmark_filter");
  benchmark::Shutdown();
  return session.exit_code;
}

}  // namespace

void add(const std::string& name, Work work, Make make, Sets sets) {
  const bool cold = sets == Sets::warm_cold || (sets == Sets::by_size && work.bytes >= 2e6);
  add_case({name + "/warm", work, make, false, true, 1});
  if (cold) add_case({name + "/cold", work, std::move(make), true, true, 1});
}

void add_direct(const std::string& name, Work work, int units, Make make) {
  add_case({name, work, std::move(make), false, false, units});
}

int main(int argc, char** argv) {
  int code = 1;
  try {
    code = run(argc, argv);
  } catch (const Error& e) {
    fprintf(stderr, "micro: %s\n", e.what());
    code = e.exit_code();
  } catch (const std::exception& e) {
    fprintf(stderr, "micro: %s\n", e.what());
  }
  session.prepared.reset();  // before the device, and both before the libraries are unloaded
  session.device.reset();
  return code;
}
