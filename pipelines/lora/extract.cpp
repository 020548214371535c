#include "pipelines/lora/extract.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/engine/model_file.h"
#include "common/models/flux/names.h"
#include "pipelines/lora/lora_file.h"
#include "pipelines/lora/svd.h"

namespace flux::lora_tools {
namespace {

void require_plain(const engine::ModelFile& model) {
  if (model.quant())
    throw InputError(show(model.path()) + ": is quantised, its rounding would be in the LoRA",
                     "give the file that it was made of");
}

}  // namespace

void add_flags(ExtractOptions& o, Tool& tool) {
  tool.about("Makes a LoRA of the difference of two models.",
             "flux-lora extract --base flux1-dev.safetensors --tuned run/step-001000/"
             "model.safetensors --rank 64 --out extracted.safetensors");
  tool.flag("base", o.base, "FILE", "transformer that the LoRA is for");
  tool.flag("tuned", o.tuned, "FILE", "transformer that the LoRA should make of it");
  add_rank_flags(o.rank, tool, "most ranks of a module");
  add_output_flags(o.output, tool, "sd-scripts");
}

void check(const ExtractOptions& o) {
  if (o.base.empty()) throw UsageError("--base is missing", "name the transformer before training");
  if (o.tuned.empty())
    throw UsageError("--tuned is missing", "name the transformer after training");
  check_output(o.output);
  check_rank(o.rank);
}

WriteReport extract(const ExtractOptions& options) {
  const engine::ModelFile base(options.base, {.dtype = at::kBFloat16}),
      tuned(options.tuned, {.dtype = at::kBFloat16});
  require_plain(base);
  require_plain(tuned);
  if (base.config() != tuned.config())
    throw InputError(fmt::format("{} is a {}, {} is a {}",
                                 show(options.base),
                                 base.config().describe(),
                                 show(options.tuned),
                                 tuned.config().describe()),
                     "give two models of one shape");
  const lora::Layout layout = options.output.layout.value_or(lora::Layout::kSdScripts);
  LoraOutput output(options.output, layout, base.config(), {options.base, options.tuned});
  const auto shapes = dit::tensor_shapes(base.config());
  Progress progress("extract", "tensors", std::ssize(shapes));
  std::vector<int64_t> ranks;
  std::vector<std::string> left_out;
  double error = 0;
  int64_t done = 0;
  for (const auto& [name, shape] : shapes) {
    cancel::check();
    at::Tensor difference = at::empty(shape, at::kFloat);
    tuned.read_tensor(name, difference);
    {
      const at::Tensor before = at::empty(shape, at::kFloat);
      base.read_tensor(name, before);
      difference.sub_(before);
    }
    const double norm = difference.norm().item<double>();
    if (!std::isfinite(norm))
      throw InputError(
          fmt::format(
              "{}: {} is infinite or NaN in one of the two models", show(options.tuned), name),
          "the file is damaged, or the training failed");
    if (norm > 0 && shape.size() != 2) left_out.push_back(name);
    if (norm > 0 && shape.size() == 2) {
      const int64_t most = std::min({options.rank.rank.value_or(64), shape[0], shape[1]});
      const Svd svd = largest_singular_values(difference, most, name);
      const int64_t rank = choose_rank(options.rank, svd);
      error = std::max(error, relative_error(svd, rank));
      ranks.push_back(rank);
      lora::Entry entry;
      entry.module = pair_of(svd, rank, name.substr(0, name.rfind('.')));
      output.write(entry);
    }
    progress.update(++done);
  }
  if (ranks.empty())
    throw InputError(
        fmt::format("{} and {}: no matrix differs", show(options.base), show(options.tuned)),
        "give the models before and after training");
  if (!left_out.empty())
    log::warn("{} biases and norms differ, and are not in the LoRA: {}",
              left_out.size(),
              join_some(left_out, 3));
  lora::Metadata metadata{{"ss_base_model_version", "flux1"},
                          {"ss_model_type", "flux"},
                          {"ss_network_module", "networks.lora_flux"}};
  set_rank(metadata, ranks);
  output.commit(std::move(metadata));
  const auto [low, high] = std::ranges::minmax(ranks);
  return {.file = options.output.out,
          .layout = std::string(lora::layout_name(layout)),
          .modules = ranks.size(),
          .tensors = output.num_tensors(),
          .bytes = static_cast<int64_t>(output.bytes()),
          .seconds = progress.seconds(),
          .error = error,
          .ranks = std::pair(low, high)};
}

}  // namespace flux::lora_tools
