#include "pipelines/stage/times.h"

#include <cmath>
#include <nlohmann/json.hpp>

namespace flux::stage {

StageTime& StageTimes::add(std::string name, int num_threads) {
  return stages_.emplace_back(std::move(name), num_threads);
}

nlohmann::json StageTimes::seconds() const {
  nlohmann::json out = nlohmann::json::object();
  for (const StageTime& stage : stages_)
    out[stage.name()] = std::round(stage.busy_seconds() * 1e6) / 1e6;
  return out;
}

std::string StageTimes::limit() const {
  const StageTime* busiest = nullptr;
  const auto share = [](const StageTime& s) { return s.busy_seconds() / s.num_threads(); };
  for (const StageTime& stage : stages_) {
    if (!busiest || share(stage) > share(*busiest)) busiest = &stage;
  }
  return busiest ? busiest->name() : std::string();
}

}  // namespace flux::stage
