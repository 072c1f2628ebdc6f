// Results as text: templates that name the values of a JSON object, tables, and JSON that a person can read.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "engine/io/runlog.h"

namespace baton {

// The value at a path such as "sigma/least" in an object; null where it has none. "" is the object itself.
const json& entry(const json& object, const std::string& path);
double number_in(const json& object, const std::string& path);     // NaN where it is no number
std::string text_in(const json& object, const std::string& path);  // "" where it is no text

// The text with a value of the object in place of every {path}: {kind} as it is, {loss:.4} with so many decimals,
// {accuracy:%} as "99.31 %", {kl:g} with three digits as "1.2e-05", {steps:,} as "1,234,567", {stages:stage} as
// "1 stage" or "1,200 stages". What is no number is "-" in all of these but the first.
std::string fill(const json& object, const std::string& text);
std::string format_value(const json& value, const std::string& format);  // of one: ".4", "%", ...

// A text that somebody else wrote, such as a file's name, made fit for JSON and for a terminal: valid UTF-8 without
// control characters.
std::string printable(const std::string&);

// Columns as wide as their widest cell, two blanks apart. align_table(): only the first column is left-aligned.
using TextRows = std::vector<std::vector<std::string>>;
std::string align_table(const TextRows&);
std::string align_list(const TextRows&);
// The rows of a JSON array. columns: "layer={layer}; mean |mean|={mean_absolute:g}", headings and cells for fill(). A
// column is left out where no row has its value.
std::string table(const json& rows, const std::string& columns);
// A template of lines, their cells parted by '|'.
std::string list(const json& object, const std::string& text);

// The `most` first rows in the order of `before`.
json first_rows(const json& rows, size_t most, const std::function<bool(const json&, const json&)>& before);

std::string json_text(const json&);  // two blanks a level, lists of numbers on one line
std::string one_line(const json&);   // bytes that are not UTF-8 are replaced, as a path may have them

}  // namespace baton
