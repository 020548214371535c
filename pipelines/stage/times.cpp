#include "pipelines/stage/times.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace flux::stage {

StageTime& StageTimes::add(std::string name, int num_threads) {
  if (stages_.empty()) start_ = std::chrono::steady_clock::now();
  return stages_.emplace_back(std::move(name), num_threads);
}

nlohmann::json StageTimes::seconds() const {
  nlohmann::json out = nlohmann::json::object();
  for (const StageTime& stage : stages_)
    out[stage.name()] = std::round(stage.busy_seconds() * 1e6) / 1e6;
  return out;
}

namespace {

double seconds_a_thread(const StageTime& stage) {
  return stage.busy_seconds() / stage.num_threads();
}

}  // namespace

std::string StageTimes::limit() const {
  const auto busiest = std::ranges::max_element(stages_, {}, seconds_a_thread);
  return busiest == stages_.end() ? std::string() : busiest->name();
}

std::string StageTimes::progress() const {
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
  std::string shares;
  for (const StageTime& stage : stages_) {
    const double share = elapsed.count() > 0 ? seconds_a_thread(stage) / elapsed.count() : 0;
    shares += fmt::format("{}{} {:.0f}%", shares.empty() ? "" : ", ", stage.name(), 100 * share);
  }
  return fmt::format("limited by {} ({})", limit(), shares);
}

}  // namespace flux::stage
