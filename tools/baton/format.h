// Results as text: numbers, tables, and JSON that a person can read.
#pragma once
#include <string>
#include <vector>

#include "engine/io/runlog.h"

namespace baton {

using TextRows = std::vector<std::vector<std::string>>;
// Columns as wide as their widest cell, two blanks apart. table(): only the first column is left-aligned; list(): all.
std::string table(const TextRows&);
std::string list(const TextRows&);

std::string decimals(double value, int digits);        // "0.9931"; "-" for a NaN
std::string percent(double fraction, int digits = 2);  // "99.31 %"
std::string brief(double value);                       // three digits: "0.0123", "1.2e-05"; "-" for a NaN
std::string grouped(int64_t n);                        // "1,234,567"
std::string counted(double value);                     // the same, rounded; "-" for a NaN
std::string plural(int64_t n, const char* one);        // "1 stage", "1,200 stages"

// A text that somebody else wrote, such as a file's name, made fit for JSON and for a terminal: valid UTF-8 without
// control characters.
std::string printable(const std::string&);

// An entry of a JSON object that somebody's file holds. NaN, or an empty text: it is absent or of another type.
double number_in(const json& object, const std::string& key);
std::string text_in(const json& object, const std::string& key);

std::string json_text(const json&);  // two blanks a level, lists of numbers on one line

}  // namespace baton
