// A byte (odd: CIFAR-100), then for CIFAR-100 one file, for CIFAR-10 files with their lengths.
#include <deque>

#include "engine/io/dataset.h"
#include "tests/fuzz/checks.h"

namespace baton {

FUZZ(cifar) {
  fuzz::Pieces pieces(input);
  const bool fine = pieces.byte() & 1;
  std::deque<fuzz::MemoryFile> files;
  if (fine) files.emplace_back(pieces.rest());
  while (!pieces.empty() && files.size() < 5) files.emplace_back(pieces.sized());
  if (files.empty()) files.emplace_back(fuzz::Input{});

  OwnDataOptions options;
  options.classes = fine ? 100 : 10;
  OwnData data;
  const bool own = fuzz::succeeds([&] { data = fuzz::load_and_check(files[0].path(), options); });

  std::vector<fuzz::fs::path> paths;
  for (const fuzz::MemoryFile& file : files) paths.push_back(file.path());
  const Images images = fine ? read_cifar100(paths[0]) : read_cifar10(paths);
  fuzz::check_images(images);
  FUZZ_CHECK(images.classes == options.classes && images.image_bytes() == 3072);
  // The bytes of a batch may be those of another format too.
  if (!own || data.format != (fine ? "CIFAR-100 binary" : "CIFAR-10 binary")) return;
  FUZZ_CHECK(data.images.count <= images.count);
  FUZZ_CHECK(std::equal(data.images.pixels.begin(), data.images.pixels.end(), images.pixels.begin()));
  FUZZ_CHECK(std::equal(data.images.labels.begin(), data.images.labels.end(), images.labels.begin()));
}

}  // namespace baton
