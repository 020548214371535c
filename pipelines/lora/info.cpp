#include "pipelines/lora/info.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/text.h"
#include "common/tensor/tensor.h"
#include "pipelines/lora/lora_file.h"
#include "pipelines/lora/svd.h"

namespace flux::lora_tools {
namespace {

using nlohmann::json;

std::string kind_of(const lora::Entry& entry) {
  std::string kind;
  const auto add = [&](const char* word) { kind += (kind.empty() ? "" : "+") + std::string(word); };
  if (entry.module.down.defined()) add(entry.module.mix.defined() ? "lokr" : "lora");
  if (entry.module.magnitude.defined()) add("dora");
  if (entry.diff.defined()) add("diff");
  if (entry.bias.defined()) add("bias");
  return kind;
}

json describe(const LoraInput& input) {
  const lora::AdapterFile& file = input.adapters();
  json modules = json::array();
  std::map<std::string, int64_t> ranks, dtypes;
  int64_t num_parameters = 0;
  double squares = 0;
  for (const lora::Target& target : file.targets()) {
    cancel::check();
    const lora::Entry entry = input.entry(target.path);
    double norm = 0;
    json module{
        {"path", target.path}, {"kind", kind_of(entry)}, {"in", target.in}, {"out", target.out}};
    if (entry.module.down.defined()) {
      ++ranks[std::to_string(target.rank)];
      norm = delta_norm(entry.module);
      module["rank"] = target.rank;
      module["alpha"] = target.alpha;
      module["scale"] = entry.module.scale();
    }
    if (entry.diff.defined()) {
      const double diff = to_dtype(entry.diff, at::kFloat).to(at::kDouble).norm().item<double>();
      norm = std::hypot(norm, diff);
    }
    module["norm"] = norm;
    squares += norm * norm;
    for (const at::Tensor& tensor : file.sources(target.path)) {
      ++dtypes[std::string(dtype_name(dtype_of(tensor)))];
      num_parameters += tensor.numel();
    }
    modules.push_back(std::move(module));
    input.release();
  }
  json text{{"clip", 0}, {"t5", 0}};
  for (const auto& module : file.text_modules()) {
    auto& count = text[module.encoder == lora::TextModule::Encoder::kClip ? "clip" : "t5"];
    count = count.get<int64_t>() + 1;
    ++ranks[std::to_string(module.down.size(0))];
    for (const at::Tensor* tensor : {&module.down, &module.up}) {
      ++dtypes[std::string(dtype_name(dtype_of(*tensor)))];
      num_parameters += tensor->numel();
    }
  }
  json metadata = json::object();
  for (const auto& [key, value] : input.metadata()) metadata[printable(key)] = printable(value);
  const dit::Config& c = file.config();
  return {{"file", printable(input.path().native())},
          {"layout", lora::layout_name(file.layout())},
          {"model",
           {{"hidden", c.hidden},
            {"mlp", c.mlp},
            {"double_blocks", c.num_double_blocks},
            {"single_blocks", c.num_single_blocks}}},
          {"targets", modules.size()},
          {"ranks", ranks},
          {"dtypes", dtypes},
          {"parameters", num_parameters},
          {"norm", std::sqrt(squares)},
          {"text_encoders", text},
          {"replaced", file.replaced().size()},
          {"embeddings", file.embeddings().size()},
          {"modules", modules},
          {"metadata", metadata}};
}

/// The path with * for the number of its block.
std::string without_block(const std::string& path) {
  auto parts = split(path, '.');
  if (parts.size() > 2 && parts[0].ends_with("_blocks")) parts[1] = "*";
  return fmt::format("{}", fmt::join(parts, "."));
}

std::string counts(const json& by_name, const char* unit) {
  std::string out;
  for (const auto& [name, count] : by_name.items())
    out += fmt::format("{}{}{} x {}", out.empty() ? "" : ", ", unit, name, count.dump());
  return out.empty() ? "none" : out;
}

/// "4" or "2 to 16".
std::string range(const std::set<double>& values) {
  if (values.empty()) return "-";
  return values.size() == 1 ? fmt::format("{:g}", *values.begin())
                            : fmt::format("{:g} to {:g}", *values.begin(), *values.rbegin());
}

}  // namespace

void add_flags(InfoOptions& options, Tool& tool) {
  tool.about("Says what LoRA files adapt: layout, layers, ranks, norms, metadata.",
             "flux-lora info lora.safetensors");
  tool.arguments(options.files, "FILE...", "LoRA in any layout");
}

void check(const InfoOptions& options) {
  if (options.files.empty()) throw UsageError("no file given", "flux-lora info lora.safetensors");
}

InfoReport info(const InfoOptions& options) {
  InfoReport report;
  for (const std::string& path : options.files) report.files.push_back(describe(LoraInput(path)));
  return report;
}

std::string InfoReport::text() const {
  std::string out;
  for (const json& file : files) {
    out += fmt::format("{}: LoRA of a FLUX transformer\n  layout      {}\n",
                       file["file"].get<std::string>(),
                       file["layout"].get<std::string>());
    out += fmt::format(
        "  targets     {} ({})\n  dtypes      {}\n  parameters  {}\n  norm        {:.6g}\n",
        file["targets"].dump(),
        counts(file["ranks"], "rank "),
        counts(file["dtypes"], ""),
        file["parameters"].dump(),
        file["norm"].get<double>());
    for (const auto& [encoder, count] : file["text_encoders"].items())
      if (count != 0) out += fmt::format("  {:<10}  {} modules\n", encoder, count.dump());
    for (const char* what : {"replaced", "embeddings"})
      if (file[what] != 0) out += fmt::format("  {:<10}  {} tensors\n", what, file[what].dump());

    struct Group {
      int64_t count = 0;
      std::set<double> ranks, alphas;
      std::set<std::string> kinds;
      double sum = 0, most = 0;
    };
    std::map<std::string, Group> groups;
    std::vector<std::string> order;
    for (const json& module : file["modules"]) {
      const std::string name = without_block(module["path"]);
      if (!groups.contains(name)) order.push_back(name);
      Group& group = groups[name];
      ++group.count;
      group.kinds.insert(module["kind"]);
      if (module.contains("rank")) {
        group.ranks.insert(module["rank"].get<double>());
        group.alphas.insert(module["alpha"].get<double>());
      }
      const double norm = module["norm"];
      group.sum += norm;
      group.most = std::max(group.most, norm);
    }
    if (!order.empty())
      out += fmt::format("  {:<34} {:>5}  {:<6} {:>9} {:>9} {:>11} {:>11}\n",
                         "layer",
                         "count",
                         "kind",
                         "rank",
                         "alpha",
                         "mean norm",
                         "largest");
    for (const std::string& name : order) {
      const Group& group = groups[name];
      out += fmt::format("  {:<34} {:>5}  {:<6} {:>9} {:>9} {:>11.5g} {:>11.5g}\n",
                         name,
                         group.count,
                         fmt::format("{}", fmt::join(group.kinds, ",")),
                         range(group.ranks),
                         range(group.alphas),
                         group.sum / static_cast<double>(group.count),
                         group.most);
    }
    if (!file["metadata"].empty()) out += "  metadata\n";
    for (const auto& [key, value] : file["metadata"].items())
      out += fmt::format("    {} = {}\n", key, shortened(value.get<std::string>(), 200));
  }
  if (!out.empty()) out.pop_back();
  return out;
}

}  // namespace flux::lora_tools
