// A safetensors file.
#include "engine/io/safetensors.h"

#include "tests/fuzz/checks.h"

namespace baton {

FUZZ(safetensors) {
  const fuzz::MemoryFile file(input);
  const TensorFile loaded = load_safetensors(file.path());
  for (const auto& named : loaded.tensors) {
    const std::string& name = named.first;
    const Tensor& tensor = named.second;
    fuzz::check_tensor(tensor);
    FUZZ_CHECK(loaded.has(name) && &loaded.at(name, tensor.shape) == &tensor);
    if (tensor.dtype == "F32" || tensor.dtype == "F16" || tensor.dtype == "BF16") {
      FUZZ_CHECK(tensor.as<float>().size() == static_cast<size_t>(tensor.size()));
    } else {
      FUZZ_CHECK(!fuzz::succeeds([&] { tensor.as<float>(); }));
    }
  }

  const fuzz::fs::path path = fuzz::scratch() / "copy.safetensors";
  save_safetensors(path, loaded);
  const TensorFile copy = load_safetensors(path);
  FUZZ_CHECK(copy.metadata == loaded.metadata && copy.tensors.size() == loaded.tensors.size());
  for (const auto& [name, tensor] : loaded.tensors) FUZZ_CHECK(fuzz::same(copy.at(name), tensor));
}

}  // namespace baton
