// Classes less one (a byte), the images' file (with its length), the labels' file.
#include "engine/io/dataset.h"
#include "tests/fuzz/checks.h"

namespace baton {

FUZZ(idx) {
  fuzz::Pieces pieces(input);
  const int classes = pieces.byte() + 1;
  const fuzz::MemoryFile images_file(pieces.sized()), labels_file(pieces.rest());
  OwnDataOptions options;
  options.labels = labels_file.path();
  options.classes = classes;
  options.labels_needed = true;
  OwnData data;
  const bool own = fuzz::succeeds([&] { data = fuzz::load_and_check(images_file.path(), options); });

  const Images images = read_idx(images_file.path(), labels_file.path(), classes);
  fuzz::check_images(images);
  FUZZ_CHECK(own && data.labelled && data.format == "IDX");
  FUZZ_CHECK(content_hash(data.images) == content_hash(images) && data.images.pixels == images.pixels);
}

}  // namespace baton
