// pipelines/model/random_scales.h - how large the random weights of each tensor are, so that signals
// keep their size through a net.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace flux::model {

/// Mean and standard deviation of a tensor's random values.
struct Scale {
  double mean = 0, deviation = 1;
};

// By canonical names (common/models/weights/weights.h).
Scale flux_scale(std::string_view name, const std::vector<int64_t>& shape);
Scale ae_scale(std::string_view name, const std::vector<int64_t>& shape);
Scale t5_scale(std::string_view name, const std::vector<int64_t>& shape);
Scale clip_scale(std::string_view name, const std::vector<int64_t>& shape);

}  // namespace flux::model
