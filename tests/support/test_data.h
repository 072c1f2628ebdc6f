// Where the files lie that tests read. The build copies them beside the test programs, so a build folder may be moved
// to a machine that has no sources.
#pragma once
#include <cstdlib>
#include <filesystem>
#include <string>

namespace baton::test {

// $BATON_TEST_DATA; else the folder `data` beside the program.
inline std::filesystem::path test_data() {
  if (const char* given = std::getenv("BATON_TEST_DATA"); given && *given) return given;
  return std::filesystem::read_symlink("/proc/self/exe").parent_path() / "data";
}

// golden_file("layers/kl_diag_small"): that archive of tests/goldens.
inline std::filesystem::path golden_file(const std::string& name) { return test_data() / "goldens" / (name + ".npz"); }

}  // namespace baton::test
