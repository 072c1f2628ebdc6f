// An .npz file.
#include "engine/io/npy.h"
#include "tests/fuzz/checks.h"

namespace baton {

FUZZ(npz) {
  const fuzz::MemoryFile file(input);
  for (const Split split : {Split::train, Split::test}) {
    OwnDataOptions options;
    options.split = split;
    fuzz::succeeds([&] { fuzz::load_and_check(file.path(), options); });
  }

  const std::map<std::string, Tensor> arrays = load_npz(file.path());
  size_t bytes = 0;
  bool writable = true;
  for (const auto& [name, tensor] : arrays) {
    fuzz::check_tensor(tensor);
    bytes += tensor.bytes.size();
    writable = writable && tensor.dtype != "F16" && !name.empty() && name.size() <= 1000 &&
               std::all_of(name.begin(), name.end(), [](unsigned char c) { return c > 0x20 && c < 0x7F && c != '/'; });
  }
  FUZZ_CHECK(bytes <= input.size() * 1032 * 4);  // deflated, and i1 becomes I32

  const fuzz::fs::path copy = fuzz::scratch() / "copy.npz";
  FUZZ_CHECK(fuzz::succeeds([&] { save_npz(copy, arrays); }) == writable);
  if (!writable) return;
  const std::map<std::string, Tensor> copies = load_npz(copy);
  FUZZ_CHECK(copies.size() == arrays.size());
  for (const auto& [name, tensor] : arrays) FUZZ_CHECK(fuzz::same(copies.at(name), tensor));
}

}  // namespace baton
