#include "pipelines/lora/convert.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "pipelines/lora/lora_file.h"

namespace flux::lora_tools {

void add_flags(ConvertOptions& options, Tool& tool) {
  tool.about("Writes a LoRA in another layout, with the same effect.",
             "flux-lora convert lora.safetensors --to diffusers --out lora-diffusers.safetensors");
  tool.arguments(options.files, "FILE", "LoRA in any layout");
  add_output_flags(options.output, tool, "as the file has it");
}

void check(const ConvertOptions& options) {
  if (options.files.size() != 1)
    throw UsageError(fmt::format("{} files given, expected one", options.files.size()),
                     "flux-lora convert lora.safetensors --to diffusers --out other.safetensors");
  check_output(options.output);
  if (!options.output.layout && options.output.dtype == OutDType::kAuto)
    throw UsageError("--to is missing", "say what to convert to: --to diffusers");
}

WriteReport convert(const ConvertOptions& options) {
  const LoraInput input(options.files[0]);
  const lora::AdapterFile& file = input.adapters();
  const lora::Layout layout = options.output.layout.value_or(file.layout());
  LoraOutput output(options.output, layout, file.config(), {input.path()});
  Progress progress("convert", "modules", std::ssize(file.targets()));
  int64_t done = 0;
  for (const lora::Target& target : file.targets()) {
    output.write(input.entry(target.path));
    input.release();
    progress.update(++done);
  }
  for (const auto& module : file.text_modules()) output.write(module);
  for (const auto& [name, tensor] : file.replaced()) output.write_replaced(name, tensor);
  if (!file.embeddings().empty() && layout != lora::Layout::kOneTrainer)
    log::warn("{}: {} embeddings are left out, the layout {} has none",
              show(input.path()),
              file.embeddings().size(),
              lora::layout_name(layout));
  else
    for (const auto& [name, tensor] : file.embeddings()) output.write_embedding(name, tensor);
  output.commit(kept_metadata(input.metadata()));
  return {.file = options.output.out,
          .layout = std::string(lora::layout_name(layout)),
          .modules = file.targets().size() + file.text_modules().size(),
          .tensors = output.num_tensors(),
          .bytes = static_cast<int64_t>(output.bytes()),
          .seconds = progress.seconds()};
}

std::string WriteReport::line() const {
  return fmt::format("wrote {} layout={} modules={} tensors={} bytes={}{}{} seconds={:.1f}",
                     show(file),
                     layout,
                     modules,
                     tensors,
                     bytes,
                     ranks ? fmt::format(" ranks={}..{}", ranks->first, ranks->second) : "",
                     error ? fmt::format(" largest_relative_error={:.3g}", *error) : "",
                     seconds);
}

nlohmann::json WriteReport::json() const {
  nlohmann::json out{{"file", printable(file.native())},
                     {"layout", layout},
                     {"modules", modules},
                     {"tensors", tensors},
                     {"bytes", bytes},
                     {"seconds", seconds}};
  if (error) out["largest_relative_error"] = *error;
  if (ranks) out["ranks"] = {ranks->first, ranks->second};
  return out;
}

}  // namespace flux::lora_tools
