#include "pipelines/lora/options.h"

#include "common/core/error.h"
#include "common/models/lora/layouts.h"

namespace flux::lora_tools {

const Choices<OutDType>& out_dtypes() {
  static const Choices<OutDType> choices{{"auto", OutDType::kAuto},
                                         {"bf16", OutDType::kBF16},
                                         {"f16", OutDType::kF16},
                                         {"f32", OutDType::kF32}};
  return choices;
}

void add_output_flags(OutputOptions& o, Tool& tool, const std::string& otherwise) {
  tool.flag("out", o.out, "FILE", "LoRA to write");
  tool.flag("to", o.layout, lora::layout_words(), "layout of --out", otherwise);
  tool.flag("dtype",
            o.dtype,
            out_dtypes(),
            "of the matrices; auto: as they are, or float32 for those that it would change");
}

void check_output(const OutputOptions& o) {
  if (o.out.empty()) throw UsageError("--out is missing", "name the LoRA to write");
}

void add_rank_flags(RankRule& rule, Tool& tool, const std::string& rank_help) {
  tool.flag("rank", rule.rank, "R", rank_help, 1, 4096);
  tool.flag("sv-ratio",
            rule.sv_ratio,
            "X",
            "keep the singular values above the largest / X of a module",
            1,
            1e12);
  tool.flag("sv-frobenius",
            rule.sv_frobenius,
            "X",
            "keep the fewest that have this share of a module's Frobenius norm",
            0,
            1);
  tool.flag("sv-cumulative",
            rule.sv_cumulative,
            "X",
            "keep the fewest that have this share of the sum of a module's singular values",
            0,
            1);
}

void check_rank(const RankRule& rule) {
  if (rule.sv_ratio.has_value() + rule.sv_frobenius.has_value() + rule.sv_cumulative.has_value() >
      1)
    throw UsageError("more than one of --sv-ratio, --sv-frobenius, --sv-cumulative is given",
                     "choose one; --rank beside it is the most that stays");
}

}  // namespace flux::lora_tools
