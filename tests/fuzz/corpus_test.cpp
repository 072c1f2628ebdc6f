// Runs every target of tests/fuzz over its corpus: each file as it is, cut short at up to 200 places, and with a few of
// its bytes changed, the same ones in every run. A file good-* must load, a file bad-* must be refused, and a file
// slow-*, which must load too, is run as it is alone.
//
// Usage: fuzz_corpus [TARGET...]
#include <csignal>
#include <cstring>
#include <utility>

#include "engine/io/dataset.h"
#include "tests/fuzz/fuzz.h"
#include "tests/support/test_data.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>

// The same bound as under libFuzzer: no allocation above 256 MB.
extern "C" const char* __asan_default_options();
extern "C" const char* __asan_default_options() { return "max_allocation_size_mb=256:allocator_may_return_null=0"; }
#endif

namespace baton::fuzz {
namespace {

constexpr size_t kCuts = 200, kMutations = 200;

// What runs, for a crash.
std::string doing;
Bytes current;

void report_crash() {
  static bool reported = false;
  if (std::exchange(reported, true) || doing.empty()) return;
  const fs::path saved = fs::temp_directory_path() / "fuzz-corpus-crash";
  std::ofstream(saved, std::ios::binary)
      .write(reinterpret_cast<const char*>(current.data()), static_cast<std::streamsize>(current.size()));
  std::fprintf(stderr, "crash: %s; the input is %s\n", doing.c_str(), saved.c_str());
  std::error_code ignored;
  fs::remove_all(scratch(), ignored);
}

Bytes content_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

Bytes mutated(Bytes bytes, SplitMix64 random) {
  constexpr uint8_t kTelling[] = {0, 1, 0x7f, 0x80, 0xff, '0', '9', '"'};
  for (uint64_t edits = 1 + random.below(4); edits > 0 && !bytes.empty(); --edits) {
    // Headers lie at the beginning or the end, and say more than what is between.
    const size_t near = std::min<size_t>(bytes.size(), 64), place = random.below(3);
    const size_t at = place == 0   ? random.below(near)
                      : place == 1 ? bytes.size() - 1 - random.below(near)
                                   : random.below(bytes.size());
    const auto here = bytes.begin() + static_cast<std::ptrdiff_t>(at);
    const auto some = static_cast<std::ptrdiff_t>(1 + random.below(std::min<size_t>(bytes.size() - at, 32)));
    switch (random.below(6)) {
      case 0:
        *here = static_cast<uint8_t>(random.next());
        break;
      case 1:
        *here = static_cast<uint8_t>(*here ^ 1u << random.below(8));
        break;
      case 2:
        *here = kTelling[random.below(std::size(kTelling))];
        break;
      case 3:
        *here = static_cast<uint8_t>(*here + (random.below(2) ? 1 : -1));
        break;
      case 4:
        bytes.erase(here, here + some);
        break;
      default: {
        const Bytes piece(here, here + some);
        bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(random.below(bytes.size())), piece.begin(),
                     piece.end());
      }
    }
  }
  return bytes;
}

struct Counts {
  size_t files = 0, runs = 0, loaded = 0, wrong = 0;
};

Counts run_corpus(const std::string& name, Target target, const fs::path& folder) {
  Counts counts;
  const auto run_one = [&](const std::string& what, Bytes bytes) {
    doing = what;
    current = std::move(bytes);
    const bool loads = run(target, current);
    ++counts.runs;
    counts.loaded += loads;
    return loads;
  };
  std::vector<fs::path> files;
  std::error_code error;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    files.push_back(at->path());
  }
  std::sort(files.begin(), files.end());
  for (const fs::path& path : files) {
    const std::string file = path.filename().string(), what = name + "/" + file;
    const Bytes bytes = content_of(path);
    const bool loads = run_one(what, bytes);
    ++counts.files;
    const bool good = file.starts_with("good-"), bad = file.starts_with("bad-"), slow = file.starts_with("slow-");
    if (((good || slow) && !loads) || (bad && loads)) {
      ++counts.wrong;
      std::fprintf(stderr, "%s: %s\n", what.c_str(), loads ? "loads, and is damaged" : "does not load");
    }
    if (slow) continue;
    const size_t cuts = std::min(kCuts, bytes.size());
    for (size_t cut = 0; cut < cuts; ++cut) {
      const size_t length = cut * bytes.size() / cuts;
      run_one(what + ", its first " + std::to_string(length) + " bytes",
              Bytes(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(length)));
    }
    uint64_t seed = 0xcbf29ce484222325ull;
    for (char c : what) seed = (seed ^ static_cast<uint8_t>(c)) * 0x100000001b3ull;
    for (size_t i = 0; i < kMutations; ++i) {
      run_one(what + ", change " + std::to_string(i), mutated(bytes, SplitMix64(seed, i)));
    }
  }
  doing.clear();
  return counts;
}

int run_all(const std::vector<std::string>& wanted) {
  std::signal(SIGABRT, [](int) { report_crash(); });
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(report_crash);
#endif
  size_t wrong = 0;
  for (const std::string& name : wanted) {
    if (targets().count(name)) continue;
    std::fprintf(stderr, "fuzz_corpus: there is no target %s\n", name.c_str());
    return 2;
  }
  for (const auto& [name, target] : targets()) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), name) == wanted.end()) continue;
    const Counts counts = run_corpus(name, target, test::test_data() / "corpus" / name);
    std::printf("%-12s %3zu files, %6zu inputs, %6zu of them loaded\n", name.c_str(), counts.files, counts.runs,
                counts.loaded);
    std::fflush(stdout);
    if (counts.files == 0) std::fprintf(stderr, "%s: its corpus is empty\n", name.c_str());
    wrong += counts.wrong + (counts.files == 0);
  }
  std::printf("%zu failed\n", wrong);
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace baton::fuzz

int main(int argc, char** argv) { return baton::fuzz::run_all({argv + 1, argv + argc}); }
