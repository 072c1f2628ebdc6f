// A user's own pictures: PNG and JPEG files in a folder, or in a folder for each class.
#include <iterator>

#include "engine/io/files.h"
#include "engine/io/own_data_parts.h"
#include "engine/io/picture.h"

namespace baton {
namespace {

using namespace own_data;

constexpr int64_t kMostPicture = int64_t{1} << 26;  // pixels

// The names in a folder without the hidden ones, sorted by their bytes.
std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    std::string name = at->path().filename().string();
    if (!name.starts_with('.')) names.push_back(std::move(name));
  }
  if (error) throw InputError("cannot read the folder " + folder.string() + ": " + error.message());
  std::sort(names.begin(), names.end());
  return names;
}

// Lists a folder of pictures, or of classes: fills in names, class_names and the images' labels and classes.
OwnData list_pictures(const fs::path& folder, const OwnDataOptions& options) {
  OwnData data;
  data.format = "folder of pictures";
  std::vector<std::string> folders, files;
  std::error_code ignored;
  for (std::string& name : names_in(folder)) {
    (fs::is_directory(folder / name, ignored) ? folders : files).push_back(std::move(name));
  }
  if (folders.empty()) {
    if (files.empty()) refuse(folder, "holds no pictures");
    if (options.labels_needed) {
      refuse(folder, "has no labels, and they are needed: a folder for each class is expected");
    }
    data.images.labels.assign(files.size(), 0);
    data.images.classes = options.classes ? options.classes : 1;
    data.names = std::move(files);
    return data;
  }
  if (!files.empty()) refuse(folder / files[0], "lies beside folders of classes; only folders are expected there");

  data.labelled = true;
  data.class_names = options.class_names.empty() ? folders : options.class_names;
  const std::vector<std::string>& names = data.class_names;
  if (names.size() > kMostClasses || (options.classes != 0 && names.size() != static_cast<size_t>(options.classes))) {
    refuse(folder, "has " + std::to_string(names.size()) + " classes (" + listed(names) + "); " +
                       (options.classes ? "expected " : "at most ") +
                       std::to_string(options.classes ? options.classes : kMostClasses));
  }
  data.images.classes = static_cast<int>(names.size());
  std::vector<std::pair<size_t, std::string>> classes;  // label, folder
  for (std::string& name : folders) {
    const auto known = std::find(names.begin(), names.end(), name);
    if (known == names.end()) refuse(folder / name, "is none of the known classes: " + listed(names));
    classes.emplace_back(known - names.begin(), std::move(name));
  }
  std::sort(classes.begin(), classes.end());
  for (const auto& [label, name] : classes) {
    const std::vector<std::string> pictures = names_in(folder / name);
    if (pictures.empty()) refuse(folder / name, "is a class without pictures");
    for (const std::string& picture : pictures) data.names.push_back(name + "/" + picture);
    data.images.labels.resize(data.names.size(), static_cast<uint8_t>(label));
  }
  return data;
}

}  // namespace

OwnData own_data::load_pictures(const fs::path& folder, const OwnDataOptions& options) {
  if (options.labels) refuse(folder, "is a folder of pictures; a file of labels has no place beside it");
  OwnData data = list_pictures(folder, options);
  Images& images = data.images;
  const auto [first, last] = find_range(options, data.names.size(), folder);
  data.names = {std::make_move_iterator(data.names.begin() + first),
                std::make_move_iterator(data.names.begin() + last)};
  images.labels = {images.labels.begin() + first, images.labels.begin() + last};

  const int64_t most_pixels = static_cast<int64_t>(std::min<uint64_t>(kMostPicture, options.most_bytes));
  const auto decode = [&](const std::string& name) {
    const fs::path path = folder / name;
    std::error_code ignored;
    if (!fs::is_regular_file(path, ignored)) refuse(path, "is not a file; a picture is expected");
    Picture picture = decode_picture(path.string(), read_file(path, 4 * most_pixels + kRoom), most_pixels);
    check_size(path.string(), "is ", picture.height, picture.width, options);
    if (options.channels != 0 && picture.channels != options.channels) {
      picture = with_channels(picture, options.channels);
    }
    return picture;
  };
  // The first picture says what the others must be where the options do not.
  const Picture sample = decode(data.names[0]);
  images.channels = sample.channels;
  images.height = sample.height;
  images.width = sample.width;
  const size_t count = data.names.size(), bytes = images.image_bytes();
  check_total(folder.string(), count, bytes, options);

  // In blocks, so that memory grows with the pictures that are really there.
  const size_t block = std::clamp<size_t>((size_t{1} << 26) / bytes, 16, 4096);
  images.pixels.reserve(count * bytes);
  for (size_t from = 0; from < count; from += block) {
    const size_t here = std::min(block, count - from);
    images.pixels.resize((from + here) * bytes);
    side_by_side(here, [&](size_t i) {
      const std::string& name = data.names[from + i];
      const Picture picture = decode(name);
      const auto describe = [](const Picture& p) {
        return product(p.height, p.width) + " pixels " + (p.channels == 1 ? "in grey" : "in colour");
      };
      if (picture.pixels.size() != bytes || picture.height != images.height || picture.channels != images.channels) {
        refuse(folder / name, "is " + describe(picture) + "; " + data.names[0] + " is " + describe(sample));
      }
      std::copy(picture.pixels.begin(), picture.pixels.end(), images.pixels.begin() + (from + i) * bytes);
    });
  }
  images.count = static_cast<int>(count);
  return data;
}

}  // namespace baton
