// A byte of options, then files: the name's length (a byte; its highest bit: a symbolic link), the name, the content
// (or the link's target) with its length. A name that ends in '/' is a folder.
#include "engine/io/dataset.h"
#include "tests/fuzz/checks.h"

namespace baton {
namespace {

using fuzz::fs::path;

// Whether the name stays within the folder and the system takes it.
bool usable(const std::string& name) {
  if (name.empty() || name[0] == '/' || name.find('\0') != std::string::npos) return false;
  for (const path& part : path(name)) {
    if (part == "." || part == ".." || part.native().size() > 255) return false;
  }
  return true;
}

// What cannot be (a file in the place of a folder) is left out.
void lay_out(const path& root, fuzz::Pieces pieces) {
  fuzz::fs::create_directory(root);
  for (int files = 0; !pieces.empty() && files < 64; ++files) {
    const uint8_t head = pieces.byte();
    const fuzz::Input letters = pieces.take(head & 0x7F), content = pieces.sized();
    const std::string name(letters.begin(), letters.end());
    if (!usable(name)) continue;
    std::error_code ignored;
    if (name.ends_with('/')) {
      fuzz::fs::create_directories(root / name, ignored);
      continue;
    }
    fuzz::fs::create_directories((root / name).parent_path(), ignored);
    if (head & 0x80) {
      const std::string target(content.begin(), content.end());
      if (target.find('/') == std::string::npos && usable(target) && target.size() < 256) {
        fuzz::fs::create_symlink(target, root / name, ignored);
      }
    } else if (!fuzz::fs::is_symlink(root / name, ignored)) {
      std::ofstream(root / name, std::ios::binary)
          .write(reinterpret_cast<const char*>(content.data()), static_cast<std::streamsize>(content.size()));
    }
  }
}

void check_set(const Dataset& set) {
  fuzz::check_images(set.train);
  fuzz::check_images(set.test);
  FUZZ_CHECK(set.train.image_bytes() == set.test.image_bytes() && set.train.classes == set.test.classes);
}

}  // namespace

FUZZ(folder) {
  fuzz::Pieces pieces(input);
  const uint8_t choice = pieces.byte();
  struct Folder {
    path root = fuzz::scratch() / "set";
    ~Folder() { fuzz::fs::remove_all(root); }
  } folder;
  lay_out(folder.root, pieces);

  if (choice & 0x80) {
    fuzz::succeeds([&] { check_set(load_mnist(folder.root)); });
    fuzz::succeeds([&] { fuzz::check_images(load_idx_test(folder.root)); });
    fuzz::succeeds([&] { check_set(load_cifar10(folder.root)); });
    fuzz::succeeds([&] { check_set(load_cifar10(folder.root, {1, 1})); });
    fuzz::succeeds([&] { check_set(load_cifar100(folder.root)); });
  }
  OwnDataOptions options;
  options.most_bytes = uint64_t{1} << 22;  // more takes seconds, and on a busy machine seems to hang
  options.split = choice & 1 ? Split::test : Split::train;
  options.labels_needed = choice & 2;
  if (choice & 4) options.channels = choice & 8 ? 3 : 1;
  if (choice & 16) options.classes = choice & 8 ? 3 : 10;
  if (choice & 32) options.height = options.width = 4;
  if (choice & 64) options.class_names = {"dog", "cat", "a"};
  fuzz::load_and_check(folder.root, options);
}

}  // namespace baton
