// pipelines/train/validation.h - the losses of held-out samples, and which checkpoint has the lowest.
//
//   OUT/best.json   the numbers of the best checkpoint, {"checkpoint": "step-000500", "step": 500, "loss": ...}
//   OUT/best        a link to its folder, where the disk has links
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace flux::train {

struct Validation {
  int64_t step = 0;
  double loss = 0;                     // mean of `losses`
  std::vector<double> sigmas, losses;  // at each noise level, the mean over the samples
  int64_t samples = 0, seed = 0;       // held-out samples, --validation-seed
  double seconds = 0;

  /// As metrics.jsonl, state.json and best.json have it; from_object() of anything else gives nothing.
  nlohmann::json object() const;
  static std::optional<Validation> from_object(const nlohmann::json& object);
  /// Whether the losses of both are of the same samples, noise levels and noise.
  bool comparable(const Validation& other) const;
  /// For TensorBoard: "validation/loss", "validation/sigma_0.25", ...
  std::vector<std::pair<std::string, double>> curves() const;
};

/// The lowest loss among the checkpoints up to `last_step` whose losses are those of the newest one that has any, as their
/// state.json say; of equal ones the first. Nothing if none has any.
std::optional<Validation> best_checkpoint(const std::filesystem::path& run, int64_t last_step);

/// Writes best.json and the link, each under its name at once; without `best` both go. Throws ResourceError.
void mark_best(const std::filesystem::path& run, const std::optional<Validation>& best);

}  // namespace flux::train
