// Names of settings, as the programs' options and result files spell them.
#pragma once
#include <string>

#include "engine/error.h"
#include "trainers/incremental.h"

namespace baton {

// steps: the caller says how long the schedule's steps are, so that "steps" is one of the names.
inline Schedule schedule_of(const std::string& name, bool steps = false) {
  if (name == "constant") return Schedule::constant;
  if (name == "linear") return Schedule::linear;
  if (name == "cosine") return Schedule::cosine;
  if (steps && name == "steps") return Schedule::steps;
  throw InputError("unknown schedule '" + name + "': constant, linear" + (steps ? ", cosine or steps" : " or cosine"));
}
inline const char* name_of(Schedule s) {
  return s == Schedule::constant ? "constant"
         : s == Schedule::linear ? "linear"
         : s == Schedule::cosine ? "cosine"
                                 : "steps";
}
inline ScaleRule scale_rule_of(const std::string& name) {
  if (name == "adam") return ScaleRule::adam;
  if (name == "natural") return ScaleRule::natural;
  throw InputError("unknown scale rule '" + name + "': adam or natural");
}
inline const char* name_of(ScaleRule r) { return r == ScaleRule::adam ? "adam" : "natural"; }

inline FlowKind flow_kind_of(const std::string& name) {
  if (name == "realnvp") return FlowKind::gated;
  if (name == "affine") return FlowKind::affine;
  if (name == "planar") return FlowKind::planar;
  throw InputError("unknown flow '" + name + "': realnvp (gated), affine or planar");
}
inline const char* name_of(FlowKind k) {
  return k == FlowKind::gated ? "realnvp" : k == FlowKind::affine ? "affine" : "planar";
}
inline Family family_of(const std::string& name) {
  for (Family f : {Family::point, Family::gaussian, Family::channel, Family::multiplicative})
    if (name == name_of(f)) return f;
  throw InputError("unknown method '" + name + "': ft, ffg, cfg or mnf");
}

}  // namespace baton
