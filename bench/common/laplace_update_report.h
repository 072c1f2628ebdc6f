// What laplace_update prints of its results.
#pragma once
#include "trainers/last_layer/update_study.h"

namespace baton {

// Tables of the updates of one set: accuracy and time by method and number of new samples.
std::string format_updates(const json& updates, const std::string& set, const UpdateStudyOptions&);
// Sentences on the implicit step after a base of so many samples, beside retraining.
std::string describe_updates(const json& updates, const std::string& set, const UpdateStudyOptions&, int base);
// A sentence on sequential selection beside top-b: the largest difference over the points of the curve, its mean and
// standard error over seeds.
std::string describe_active(const json& active, const std::string& set, const std::string& acquisition);

}  // namespace baton
