#include "engine/io/safetensors.h"

#include <algorithm>
#include <cctype>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "engine/error.h"
#include "engine/io/files.h"

namespace baton {
namespace {

// Not ordered_json, which compares every key with all before it.
using unordered_json = nlohmann::json;

constexpr uint64_t kLongestHeader = 100'000'000;  // the format's own limit

constexpr std::pair<std::string_view, int> kDtypes[] = {{"F64", 8}, {"I64", 8}, {"U64", 8},  {"F32", 4}, {"I32", 4},
                                                        {"U32", 4}, {"F16", 2}, {"BF16", 2}, {"U8", 1}};

// Bytes an element; 0 if unknown.
int width_of_dtype(std::string_view dtype) {
  for (const auto& [name, width] : kDtypes) {
    if (name == dtype) return width;
  }
  return 0;
}

std::string known_dtypes() {
  std::string text;
  for (const auto& [name, width] : kDtypes) (text += text.empty() ? "" : ", ") += name;
  return text;
}

// Nothing for a negative extent or a product that does not fit.
std::optional<int64_t> product(std::span<const int64_t> shape) {
  int64_t size = 1;
  for (int64_t extent : shape) {
    if (extent < 0 || __builtin_mul_overflow(size, extent, &size)) return std::nullopt;
  }
  return size;
}

// Without control characters: a text out of a file may have any, and a message is one line.
std::string printable(std::string text) {
  for (char& c : text) {
    if (std::iscntrl(static_cast<unsigned char>(c))) c = '?';
  }
  return text;
}

// The product of the shape times the dtype's width; throws InputError that starts with `who`.
uint64_t byte_length(const std::string& who, const std::string& dtype, std::span<const int64_t> shape) {
  const int width = width_of_dtype(dtype);
  if (width == 0) {
    throw InputError(who + " has the unknown dtype '" + printable(dtype) + "'; expected one of " + known_dtypes());
  }
  const std::optional<int64_t> size = product(shape);
  int64_t length = 0;
  if (!size || __builtin_mul_overflow(*size, int64_t{width}, &length)) {
    throw InputError(who + " has the impossible shape " + shape_text(shape));
  }
  return static_cast<uint64_t>(length);
}

std::string named(const std::string& name) { return "tensor '" + printable(name) + "'"; }

struct Entry {
  std::string name;
  Tensor* tensor;
  uint64_t begin, end;
};

// One tensor's place and type, from its header entry `value`. Its bytes are still to be read.
Entry read_entry(const std::string& name, const unordered_json& value, Tensor& tensor) {
  const std::string& who = tensor.origin;
  const auto has = [&](const char* key) { return value.is_object() && value.contains(key); };
  const auto naturals = [](const unordered_json& list) {
    return list.is_array() &&
           std::all_of(list.begin(), list.end(), [](const unordered_json& e) { return e.is_number_unsigned(); });
  };
  if (!has("dtype") || !value["dtype"].is_string()) refuse(who, "has no dtype in the header");
  if (!has("shape") || !naturals(value["shape"])) refuse(who, "has no shape (a list of integers >= 0) in the header");
  if (!has("data_offsets") || !naturals(value["data_offsets"]) || value["data_offsets"].size() != 2) {
    refuse(who, "has no data_offsets (two integers >= 0) in the header");
  }
  tensor.dtype = value["dtype"].get<std::string>();
  for (const unordered_json& extent : value["shape"]) {
    const uint64_t n = extent.get<uint64_t>();
    if (n > INT64_MAX) refuse(who, "has the impossible extent " + std::to_string(n));
    tensor.shape.push_back(static_cast<int64_t>(n));
  }
  const Entry entry{name, &tensor, value["data_offsets"][0].get<uint64_t>(), value["data_offsets"][1].get<uint64_t>()};
  const uint64_t expected = byte_length(who, tensor.dtype, tensor.shape);
  const std::string place = "[" + std::to_string(entry.begin) + ", " + std::to_string(entry.end) + ")";
  if (entry.end < entry.begin) refuse(who, "has offsets " + place + ", which end before they begin");
  if (entry.end - entry.begin != expected) {
    refuse(who, "has " + std::to_string(entry.end - entry.begin) + " bytes " + place + "; " + tensor.dtype + " " +
                    shape_text(tensor.shape) + " needs " + std::to_string(expected));
  }
  return entry;
}

// Parses the header. Throws InputError for a name that is given twice, of which the parser alone would take the last.
// The text is parsed twice, as a parser that both calls back and keeps values goes through all of them at the end of
// each.
unordered_json parse_header(const std::string& who, std::string_view text) {
  std::set<std::string> names;
  std::optional<std::string> twice;
  const auto watch = [&](int depth, unordered_json::parse_event_t event, unordered_json& value) {
    if (event == unordered_json::parse_event_t::key && depth == 1 && !names.insert(value.get<std::string>()).second) {
      twice = value.get<std::string>();
    }
    return false;
  };
  unordered_json header;
  try {
    header = unordered_json::parse(text, watch);
    header = unordered_json::parse(text);
  } catch (const unordered_json::exception& error) {
    refuse(who, std::string("header is not JSON: ") + error.what());
  }
  if (!header.is_object()) refuse(who, "header is not a JSON object");
  if (twice) refuse(who, "header names " + named(*twice) + " twice");
  return header;
}

}  // namespace

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

float float_of_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

float float_of_half(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16, exponent = bits >> 10 & 0x1Fu, fraction = bits & 0x3FFu;
  if (exponent == 0x1F) return std::bit_cast<float>(sign | 0x7F800000u | fraction << 13);  // infinity, NaN
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24, exact in a float
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

int64_t Tensor::size() const { return product(shape).value_or(0); }

void Tensor::check() const {
  const std::string who = origin.empty() ? "a tensor" : origin;
  const uint64_t expected = byte_length(who, dtype, shape);
  if (bytes.size() != expected) {
    refuse(who, "holds " + std::to_string(bytes.size()) + " bytes; " + dtype + " " + shape_text(shape) + " needs " +
                    std::to_string(expected));
  }
}

void Tensor::expect_dtype(std::string_view wanted) const {
  if (dtype != wanted) {
    refuse(origin.empty() ? "a tensor" : origin, "holds " + dtype + "; expected " + std::string(wanted));
  }
}

std::vector<float> Tensor::widened() const {
  std::vector<float> values(static_cast<std::size_t>(size()));
  if (dtype == "F32") {
    if (!bytes.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  const bool half = dtype == "F16";
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto bits = static_cast<uint16_t>(bytes[2 * i] | bytes[2 * i + 1] << 8);
    values[i] = half ? float_of_half(bits) : float_of_bfloat16(bits);
  }
  return values;
}

const Tensor& TensorFile::at(const std::string& name) const {
  const auto found = tensors.find(name);
  if (found != tensors.end()) return found->second;
  std::string held;
  int listed = 0;
  for (const auto& [other, tensor] : tensors) {
    if (++listed > 8) break;
    held += (held.empty() ? "" : ", ") + printable(other);
  }
  if (tensors.size() > 8) held += ", and " + std::to_string(tensors.size() - 8) + " more";
  throw InputError((path.empty() ? "" : path + ": ") + named(name) + " is missing; the file holds " +
                   (held.empty() ? "no tensors" : held));
}

const Tensor& TensorFile::at(const std::string& name, const std::vector<int64_t>& shape) const {
  const Tensor& tensor = at(name);
  if (tensor.shape != shape) {
    throw InputError((path.empty() ? "" : path + ": ") + named(name) + " has shape " + shape_text(tensor.shape) +
                     "; expected " + shape_text(shape));
  }
  return tensor;
}

void save_safetensors(const std::filesystem::path& path, const TensorFile& file) {
  const std::string who = path.string() + ": ";
  std::vector<std::pair<const std::string*, const Tensor*>> order;
  for (const auto& [name, tensor] : file.tensors) {
    if (name == "__metadata__") throw InputError(who + "a tensor cannot be named __metadata__");
    if (tensor.bytes.size() != byte_length(who + named(name), tensor.dtype, tensor.shape)) {
      refuse(who + named(name), "holds " + std::to_string(tensor.bytes.size()) + " bytes, which " + tensor.dtype + " " +
                                    shape_text(tensor.shape) + " does not");
    }
    order.emplace_back(&name, &tensor);
  }
  std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return width_of_dtype(a.second->dtype) > width_of_dtype(b.second->dtype);
  });

  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!file.metadata.empty()) header["__metadata__"] = file.metadata;
  uint64_t offset = 0;
  for (const auto& [name, tensor] : order) {
    const uint64_t end = offset + tensor->bytes.size();
    header[*name] = {{"dtype", tensor->dtype}, {"shape", tensor->shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const unordered_json::exception&) {
    throw InputError(who + "a tensor's name or a metadata text is not UTF-8");
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');
  if (text.size() > kLongestHeader) throw InputError(who + "the header would be longer than the format allows");

  const uint64_t length = text.size();
  std::string bytes;
  bytes.reserve(8 + length + offset);
  bytes.append(reinterpret_cast<const char*>(&length), sizeof length);
  bytes += text;
  for (const auto& [name, tensor] : order) {
    bytes.append(reinterpret_cast<const char*>(tensor->bytes.data()), tensor->bytes.size());
  }
  write_file_atomically(path, bytes);
}

TensorFile load_safetensors(const std::filesystem::path& path) {
  const std::string who = path.string() + ":";
  const std::vector<uint8_t> bytes = read_file(path);
  uint64_t length = 0;
  if (bytes.size() < sizeof length) {
    refuse(who,
           "is cut short: " + std::to_string(bytes.size()) + " bytes, and a safetensors file has 8 before its header");
  }
  std::memcpy(&length, bytes.data(), sizeof length);
  if (length > kLongestHeader) {
    refuse(who, "is not a safetensors file: its header would be " + std::to_string(length) + " bytes long");
  }
  const uint64_t after_length = bytes.size() - sizeof length;
  if (length > after_length) {
    refuse(who, "is cut short: its header has " + std::to_string(length) + " bytes, and " +
                    std::to_string(after_length) + " are there");
  }
  const char* text = reinterpret_cast<const char*>(bytes.data() + sizeof length);
  const unordered_json header = parse_header(who, std::string_view(text, length));
  const uint8_t* data = bytes.data() + sizeof length + length;
  const uint64_t data_length = after_length - length;

  TensorFile file;
  file.path = path.string();
  std::vector<Entry> entries;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) refuse(who, "__metadata__ is not an object of texts");
      for (const auto& [key, entry] : value.items()) {
        if (!entry.is_string()) refuse(who, "__metadata__ '" + printable(key) + "' is not a text");
        file.metadata[key] = entry.get<std::string>();
      }
      continue;
    }
    Tensor& tensor = file.tensors[name];
    tensor.origin = who + " " + named(name);
    entries.push_back(read_entry(name, value, tensor));
  }

  // The format allows neither gaps nor shared bytes: in the order of their places, each tensor begins where the one
  // before it ends.
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  uint64_t reached = 0;
  for (const Entry& entry : entries) {
    const std::string& which = entry.tensor->origin;
    if (entry.begin < reached) refuse(which, "overlaps another tensor at byte " + std::to_string(entry.begin));
    if (entry.begin > reached) refuse(which, "begins after a hole at byte " + std::to_string(reached));
    if (entry.end > data_length) {
      refuse(which, "ends at byte " + std::to_string(entry.end) + " of the data, and the file is cut short: it has " +
                        std::to_string(data_length));
    }
    entry.tensor->bytes.assign(data + entry.begin, data + entry.end);
    reached = entry.end;
  }
  if (reached != data_length) {
    refuse(who, "has " + std::to_string(data_length - reached) + " bytes behind its last tensor");
  }
  return file;
}

}  // namespace baton
