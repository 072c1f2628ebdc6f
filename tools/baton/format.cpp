#include "tools/baton/format.h"

#include <algorithm>
#include <cmath>

namespace baton {

namespace {

std::string align(const TextRows& rows, bool right) {
  std::vector<size_t> widths;
  for (const auto& row : rows)
    for (size_t c = 0; c < row.size(); c++) {
      if (c == widths.size()) widths.push_back(0);
      widths[c] = std::max(widths[c], row[c].size());
    }
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (size_t c = 0; c < row.size(); c++) {
      const std::string blanks(widths[c] - row[c].size(), ' ');
      line += (c ? "  " : "") + (c && right ? blanks + row[c] : row[c] + blanks);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string print(const char* format, double value) {
  char text[64];
  snprintf(text, sizeof text, format, value);
  return text;
}

std::string dump(const json& j) {
  return j.dump(-1, ' ', false, json::error_handler_t::replace);  // a path need not be UTF-8
}

// line: the line break and the blanks of this level.
void print(std::string& text, const json& j, const std::string& line) {
  if (!j.is_structured() || j.empty()) {
    text += dump(j);
    return;
  }
  const bool flat = j.is_array() && std::none_of(j.begin(), j.end(), [](const json& e) { return e.is_structured(); });
  const std::string inner = line + "  ";
  const char* between = "";
  text += j.is_array() ? "[" : "{";
  for (const auto& [key, value] : j.items()) {
    text += between;
    between = flat ? ", " : ",";
    if (!flat) text += inner;
    if (j.is_object()) text += dump(key) + ": ";
    print(text, value, inner);
  }
  if (!flat) text += line;
  text += j.is_array() ? "]" : "}";
}

}  // namespace

std::string table(const TextRows& rows) { return align(rows, true); }
std::string list(const TextRows& rows) { return align(rows, false); }

std::string decimals(double value, int digits) {
  return std::isnan(value) ? "-" : print(("%." + std::to_string(digits) + "f").c_str(), value);
}

std::string percent(double fraction, int digits) {
  return std::isnan(fraction) ? "-" : decimals(100 * fraction, digits) + " %";
}

std::string brief(double value) { return std::isnan(value) ? "-" : print("%.3g", value); }

std::string grouped(int64_t n) {
  std::string text = std::to_string(n < 0 ? -n : n);
  for (int at = int(text.size()) - 3; at > 0; at -= 3) text.insert(size_t(at), ",");
  return (n < 0 ? "-" : "") + text;
}

std::string counted(double value) {
  return std::isfinite(value) && std::abs(value) < 1e15 ? grouped(std::llround(value)) : "-";
}

std::string plural(int64_t n, const char* one) { return grouped(n) + " " + one + (n == 1 ? "" : "s"); }

std::string printable(const std::string& text) {
  std::string shown = json::parse(dump(text)).get<std::string>();
  for (char& c : shown)
    if (uint8_t(c) < 0x20 || c == 0x7F) c = '?';
  return shown;
}

double number_in(const json& object, const std::string& key) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  return found != object.end() && found->is_number() ? found->get<double>() : NAN;
}

std::string text_in(const json& object, const std::string& key) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

std::string json_text(const json& j) {
  std::string text;
  print(text, j, "\n");
  return text;
}

}  // namespace baton
