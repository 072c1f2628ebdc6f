// A .npy file.
#include "engine/io/npy.h"

#include "engine/io/npy_images.h"
#include "tests/fuzz/checks.h"

namespace baton {

FUZZ(npy) {
  const fuzz::MemoryFile file(input);
  OwnDataOptions options;
  fuzz::succeeds([&] { fuzz::load_and_check(file.path(), options); });
  options.labels = file.path();  // an array of one number may be both
  fuzz::succeeds([&] { fuzz::load_and_check(file.path(), options); });

  const Tensor tensor = load_npy(file.path());
  fuzz::check_tensor(tensor);
  FUZZ_CHECK(tensor.shape.size() <= 8);
  for (int channels : {0, 1, 3}) {
    fuzz::succeeds([&] {
      const Images images = npy_images(tensor, channels);
      FUZZ_CHECK(images.pixels.size() == images.count * images.image_bytes() && !images.pixels.empty());
      FUZZ_CHECK(images.channels == 1 || images.channels == 3);
    });
  }
  fuzz::succeeds([&] { FUZZ_CHECK(npy_labels(tensor).size() == static_cast<size_t>(tensor.size())); });

  if (tensor.dtype == "F16") return;  // there is no writer for it
  const fuzz::fs::path copy = fuzz::scratch() / "copy.npy";
  save_npy(copy, tensor);
  FUZZ_CHECK(fuzz::same(load_npy(copy), tensor));
}

}  // namespace baton
