// tests/support/plain_plan.h - the plan of the simplest data set.
#pragma once
#include <nlohmann/json.hpp>

#include "common/dataset/dataset.h"

namespace flux::test {

/// One data set with one subset, all options as they are by default.
inline nlohmann::json plain_plan() {
  dataset::Resolved one;
  one.datasets.emplace_back();
  one.subsets.emplace_back();
  return dataset::plan_json(one);
}

}  // namespace flux::test
