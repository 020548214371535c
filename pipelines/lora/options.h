// pipelines/lora/options.h - what verbs of flux-lora that write a LoRA are asked for. No LibTorch.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "common/core/tool.h"

namespace flux::lora {
enum class Layout;
}

namespace flux::lora_tools {

/// The dtypes that --dtype knows.
enum class OutDType { kAuto, kBF16, kF16, kF32 };
const Choices<OutDType>& out_dtypes();

/// What all verbs that write a LoRA are asked for.
struct OutputOptions {
  std::filesystem::path out{};
  std::optional<lora::Layout> layout{};
  OutDType dtype = OutDType::kAuto;
};
/// --out, --to, --dtype.
///   otherwise  what layout it is without --to
void add_output_flags(OutputOptions& options, Tool& tool, const std::string& otherwise);
/// Throws UsageError without --out.
void check_output(const OutputOptions& options);

/// How many singular values stay: the fewest that satisfy the given threshold, at most `rank`, at least one. The
/// thresholds are those of sd-scripts' resize_lora.py.
struct RankRule {
  std::optional<int64_t> rank{};
  std::optional<double> sv_ratio{};       // s_i > s_0 / sv_ratio
  std::optional<double> sv_frobenius{};   // share of the Frobenius norm that stays
  std::optional<double> sv_cumulative{};  // share of the sum of singular values

  bool has_threshold() const { return sv_ratio || sv_frobenius || sv_cumulative; }
};
/// --rank, --sv-ratio, --sv-frobenius, --sv-cumulative.
void add_rank_flags(RankRule& rule, Tool& tool, const std::string& rank_help);
/// Throws UsageError for two thresholds.
void check_rank(const RankRule& rule);

}  // namespace flux::lora_tools
