#include "pipelines/lora/resize.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <algorithm>

#include "common/core/error.h"
#include "common/core/progress.h"
#include "pipelines/lora/lora_file.h"
#include "pipelines/lora/svd.h"

namespace flux::lora_tools {
namespace {

/// In the dtype that the module has, unless another is asked for.
void resize_module(lora::Module& module, const ResizeOptions& options, double& error) {
  const auto type = module.down.scalar_type();
  const at::Tensor before = module.down;
  reduce(module, options.rank, error);
  if (module.down.is_same(before) || options.output.dtype != OutDType::kAuto) return;
  module.down = module.down.to(type);
  module.up = module.up.to(type);
}

}  // namespace

void add_flags(ResizeOptions& o, Tool& tool) {
  tool.about("Writes a LoRA with fewer ranks: of each module the largest singular values.",
             "flux-lora resize lora.safetensors --rank 8 --out small.safetensors");
  tool.arguments(o.files, "FILE", "LoRA in any layout");
  add_rank_flags(o.rank, tool, "most ranks of a module");
  add_output_flags(o.output, tool, "as the file has it");
}

void check(const ResizeOptions& o) {
  if (o.files.size() != 1)
    throw UsageError(fmt::format("{} files given, expected one", o.files.size()),
                     "flux-lora resize lora.safetensors --rank 8 --out small.safetensors");
  check_output(o.output);
  check_rank(o.rank);
  if (!o.rank.rank && !o.rank.has_threshold())
    throw UsageError("--rank is missing",
                     "give --rank, --sv-ratio, --sv-frobenius or --sv-cumulative");
}

WriteReport resize(const ResizeOptions& options) {
  const LoraInput input(options.files[0]);
  const lora::AdapterFile& file = input.adapters();
  const lora::Layout layout = options.output.layout.value_or(file.layout());
  LoraOutput output(options.output, layout, file.config(), {input.path()});
  const int64_t total = std::ssize(file.targets()) + std::ssize(file.text_modules());
  Progress progress("resize", "modules", total);
  std::vector<int64_t> ranks;
  double error = 0;
  int64_t done = 0;
  for (const lora::Target& target : file.targets()) {
    lora::Entry entry = input.entry(target.path);
    if (entry.module.down.defined()) {
      resize_module(entry.module, options, error);
      ranks.push_back(entry.module.rank());
    }
    output.write(entry);
    input.release();
    progress.update(++done);
  }
  for (const auto& text : file.text_modules()) {
    lora::Module module{text.path, text.down, text.up, text.alpha};
    resize_module(module, options, error);
    ranks.push_back(module.rank());
    output.write(lora::TextModule{text.encoder, text.path, module.down, module.up, module.alpha});
    progress.update(++done);
  }
  for (const auto& [name, tensor] : file.replaced()) output.write_replaced(name, tensor);
  for (const auto& [name, tensor] : file.embeddings()) output.write_embedding(name, tensor);
  lora::Metadata metadata = kept_metadata(input.metadata());
  set_rank(metadata, ranks);
  output.commit(std::move(metadata));
  WriteReport report{.file = options.output.out,
                     .layout = std::string(lora::layout_name(layout)),
                     .modules = static_cast<size_t>(total),
                     .tensors = output.num_tensors(),
                     .bytes = static_cast<int64_t>(output.bytes()),
                     .seconds = progress.seconds(),
                     .error = error};
  if (!ranks.empty()) {
    const auto [low, high] = std::ranges::minmax(ranks);
    report.ranks = {low, high};
  }
  return report;
}

}  // namespace flux::lora_tools
