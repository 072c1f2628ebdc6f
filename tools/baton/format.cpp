#include "tools/baton/format.h"

#include <CLI/CLI.hpp>
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

double number(const json& value) { return value.is_number() ? value.get<double>() : NAN; }

std::string print(const std::string& format, double value) {
  char text[64];
  snprintf(text, sizeof text, format.c_str(), value);
  return text;
}

std::string group_digits(int64_t n) {
  std::string text = std::to_string(n < 0 ? -n : n);
  for (int at = int(text.size()) - 3; at > 0; at -= 3) text.insert(size_t(at), ",");
  return (n < 0 ? "-" : "") + text;
}

// line: the line break and the blanks of this level.
void print(std::string& text, const json& j, const std::string& line) {
  if (!j.is_structured() || j.empty()) {
    text += one_line(j);
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
    if (j.is_object()) text += one_line(key) + ": ";
    print(text, value, inner);
  }
  if (!flat) text += line;
  text += j.is_array() ? "]" : "}";
}

}  // namespace

const json& entry(const json& object, const std::string& path) {
  static const json none;
  if (path.empty()) return object;
  const json::json_pointer pointer("/" + path);
  return object.contains(pointer) ? object[pointer] : none;
}

double number_in(const json& object, const std::string& path) { return number(entry(object, path)); }

std::string text_in(const json& object, const std::string& path) {
  const json& found = entry(object, path);
  return found.is_string() ? found.get<std::string>() : "";
}

std::string format_value(const json& value, const std::string& format) {
  if (format.empty()) return value.is_string() ? value.get<std::string>() : value.dump();
  const double x = number(value);
  if (std::isnan(x)) return "-";
  if (format == "g") return print("%.3g", x);
  if (format == "%") return print("%.2f %%", 100 * x);
  if (format[0] == '.') return print("%" + format + "f", x);
  if (!(std::abs(x) < 1e15)) return "-";
  const int64_t n = std::llround(x);
  return group_digits(n) + (format == "," ? "" : " " + format + (n == 1 ? "" : "s"));
}

std::string fill(const json& object, const std::string& text) {
  std::string filled;
  size_t at = 0;
  for (size_t open; (open = text.find('{', at)) != std::string::npos;) {
    const size_t close = text.find('}', open), colon = std::min(text.find(':', open), close);
    const std::string format = colon < close ? text.substr(colon + 1, close - colon - 1) : "";
    filled += text.substr(at, open - at) + format_value(entry(object, text.substr(open + 1, colon - open - 1)), format);
    at = close + 1;
  }
  return filled + text.substr(at);
}

std::string printable(const std::string& text) {
  std::string shown = json::parse(one_line(text)).get<std::string>();
  for (char& c : shown)
    if (uint8_t(c) < 0x20 || c == 0x7F) c = '?';
  return shown;
}

std::string align_table(const TextRows& rows) { return align(rows, true); }
std::string align_list(const TextRows& rows) { return align(rows, false); }

std::string table(const json& rows, const std::string& columns) {
  TextRows cells(rows.size() + 1);
  for (const std::string& column : CLI::detail::split(columns, ';')) {
    const size_t first = column.find_first_not_of(' '), equals = column.find('='), open = column.find('{');
    const std::string path = column.substr(open + 1, column.find_first_of(":}", open) - open - 1);
    const json::json_pointer value("/" + path);
    if (std::none_of(rows.begin(), rows.end(), [&](const json& row) { return row.contains(value); })) continue;
    cells[0].push_back(column.substr(first, equals - first));
    for (size_t r = 0; r < rows.size(); r++) cells[r + 1].push_back(fill(rows[r], column.substr(equals + 1)));
  }
  return align_table(cells);
}

std::string list(const json& object, const std::string& text) {
  TextRows rows;
  for (const std::string& line : CLI::detail::split(text, '\n')) {
    rows.emplace_back();
    for (const std::string& cell : CLI::detail::split(line, '|')) rows.back().push_back(fill(object, cell));
  }
  return align_list(rows);
}

json first_rows(const json& rows, size_t most, const std::function<bool(const json&, const json&)>& before) {
  std::vector<json> sorted(rows.begin(), rows.end());
  std::stable_sort(sorted.begin(), sorted.end(), before);
  sorted.resize(std::min(most, sorted.size()));
  return sorted;
}

std::string one_line(const json& j) { return j.dump(-1, ' ', false, json::error_handler_t::replace); }

std::string json_text(const json& j) {
  std::string text;
  print(text, j, "\n");
  return text;
}

}  // namespace baton
