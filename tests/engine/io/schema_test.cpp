#include "engine/io/schema.h"

#include <limits>

#include "tests/support/messages.h"

namespace baton::test {
namespace {

const Schema schema{
    whole_option("flow_steps", 2, {0, 8}, "steps of the flow"),
    by_replica(number_option("lr", 1e-3, positive, "step size")),
    flag_option("masked", false, "some weights are pruned"),
    choice_option("flow", "realnvp", {"realnvp", "affine", "planar"}, "kind of flow"),
    wholes_option("hidden", {400, 400}, {1, 1000}, "widths"),
};

const Option& option(const char* name) { return *find_option(schema, name); }

std::string checked(const char* name, const json& value) {
  return refusal([&] { check_option(option(name), value, "it"); });
}
std::string parsed(const char* name, const std::string& text) {
  return refusal([&] { parse_option(option(name), text, "--it"); });
}
const std::string fits = nothing_refused;

TEST(Schema, OptionsAreFoundAndDescribed) {
  EXPECT_EQ(find_option(schema, "steps"), nullptr);
  EXPECT_EQ(option("lr").standard, 1e-3);
  EXPECT_TRUE(option("lr").by_replica);
  EXPECT_FALSE(option("flow").by_replica);
  EXPECT_EQ(option_flag(option("flow_steps")), "--flow-steps");
  EXPECT_EQ(describe_option(option("flow_steps")), "a whole number from 0 to 8");
  EXPECT_EQ(describe_option(option("lr")), "a number above 0");
  EXPECT_EQ(describe_option(option("masked")), "true or false");
  EXPECT_EQ(describe_option(option("flow")), "realnvp, affine or planar");
  EXPECT_EQ(describe_option(option("hidden")), "whole numbers from 1 to 1000, separated by commas");
  EXPECT_EQ(describe_option(number_option("x", 0, {}, "")), "a number");
  EXPECT_EQ(describe_option(number_option("x", 0, not_negative, "")), "a number of at least 0");
  EXPECT_EQ(describe_option(number_option("x", 0.1, {0, 1, true}, "")), "a number above 0 and up to 1");
}

TEST(Schema, TypesAndBoundsAreChecked) {
  for (const json& value : {json(0), json(8)}) EXPECT_EQ(checked("flow_steps", value), fits);
  for (const json& value : {json(-1), json(9), json(2.5), json(2.0), json("2"), json(true), json(), json::array({2})})
    EXPECT_NE(checked("flow_steps", value), fits) << value;
  for (const json& value : {json(1), json(1e-30), json(0.5)}) EXPECT_EQ(checked("lr", value), fits);
  for (const json& value : {json(0), json(-1e-9), json("1"), json(false), json(std::numeric_limits<double>::infinity()),
                            json(std::numeric_limits<double>::quiet_NaN())})
    EXPECT_NE(checked("lr", value), fits) << value;
  EXPECT_EQ(checked("masked", true), fits);
  for (const json& value : {json(1), json("true"), json()}) EXPECT_NE(checked("masked", value), fits) << value;
  EXPECT_EQ(checked("flow", "planar"), fits);
  for (const json& value : {json("Planar"), json(""), json(0)}) EXPECT_NE(checked("flow", value), fits) << value;
  for (const json& value : {json::array(), json({1, 1000})}) EXPECT_EQ(checked("hidden", value), fits);
  for (const json& value : {json({1, 1001}), json({0}), json({1.5}), json({"1"}), json(5)})
    EXPECT_NE(checked("hidden", value), fits) << value;
}

TEST(Schema, MessagesSayWhatWasGivenAndWhatIsExpected) {
  EXPECT_EQ(checked("flow_steps", 9), "it is 9; expected a whole number from 0 to 8");
  EXPECT_EQ(checked("flow", "gated"), "it is 'gated'; expected realnvp, affine or planar");
  EXPECT_EQ(parsed("lr", "fast"), "--it is 'fast'; expected a number above 0");
  EXPECT_EQ(parsed("lr", "-1"), "--it is -1.0; expected a number above 0");
  EXPECT_EQ(parsed("masked", "yes"), "--it is 'yes'; expected true or false");
}

TEST(Schema, TextsAreParsed) {
  const auto parse = [](const char* name, const std::string& text) { return parse_option(option(name), text, "it"); };
  EXPECT_EQ(parse("flow_steps", "3"), 3);
  EXPECT_TRUE(parse("flow_steps", "3").is_number_integer());
  for (const char* text : {"1e-3", ".001", "0.001"}) EXPECT_EQ(parse("lr", text), 1e-3) << text;
  EXPECT_EQ(parse("lr", "5."), 5.0);
  EXPECT_EQ(parse("masked", "true"), true);
  EXPECT_EQ(parse("flow", "affine"), "affine");
  EXPECT_EQ(parse("hidden", "30,20"), json({30, 20}));
  EXPECT_EQ(parse("hidden", "30"), json::array({30}));
  for (const char* text : {"", " ", "3 steps", "3,4", "1e400"})
    for (const char* name : {"flow_steps", "lr", "masked", "flow"}) EXPECT_NE(parsed(name, text), fits) << text;
  for (const char* text : {"30,", "30;20", "a", "30,,20"}) EXPECT_NE(parsed("hidden", text), fits) << text;
}

TEST(Schema, WhatIsLeftOutHasTheStandardValue) {
  const json all = complete_options(schema, {{"lr", 0.1}, {"hidden", {5}}}, "mnf");
  EXPECT_EQ(all, json({{"flow_steps", 2}, {"lr", 0.1}, {"masked", false}, {"flow", "realnvp"}, {"hidden", {5}}}));
  EXPECT_EQ(complete_options(schema, all, "mnf"), all);
  EXPECT_EQ(complete_options(schema, json::object(), "mnf").size(), schema.size());
  const auto completed = [](const json& given) { return refusal([&] { complete_options(schema, given, "mnf"); }); };
  EXPECT_EQ(completed({{"steps", 3}}), "mnf has no option 'steps'");
  EXPECT_EQ(completed({{"flow", 3}}), "mnf: 'flow' is 3; expected realnvp, affine or planar");
}

}  // namespace
}  // namespace baton::test
