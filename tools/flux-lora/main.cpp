// tools/flux-lora/main.cpp - looks into LoRA files, converts, merges, extracts, resizes and compares them.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "common/core/tool.h"
#include "pipelines/lora/check.h"
#include "pipelines/lora/convert.h"
#include "pipelines/lora/extract.h"
#include "pipelines/lora/info.h"
#include "pipelines/lora/merge.h"
#include "pipelines/lora/resize.h"

namespace {

using flux::ExitCode;

// A report: several lines, escaped already; or one object.
void show_report(const flux::Tool& tool, const std::string& text, const nlohmann::json& object) {
  if (tool.json())
    tool.summary("", object);
  else
    std::puts(text.c_str());
}

ExitCode info(flux::Tool& tool) {
  flux::lora_tools::InfoOptions opts;
  flux::lora_tools::add_flags(opts, tool);
  if (!tool.parse()) return ExitCode::kOk;
  flux::lora_tools::check(opts);
  const auto report = flux::lora_tools::info(opts);
  show_report(tool, report.text(), {{"files", report.files}});
  return ExitCode::kOk;
}

template <class Options, class Work>
ExitCode write(flux::Tool& tool, const Work& work) {
  Options opts;
  flux::lora_tools::add_flags(opts, tool);
  if (!tool.parse()) return ExitCode::kOk;
  flux::lora_tools::check(opts);
  const auto report = work(opts);
  tool.summary(report.line(), report.json());
  return ExitCode::kOk;
}

ExitCode convert(flux::Tool& tool) {
  return write<flux::lora_tools::ConvertOptions>(
      tool, [](const auto& opts) { return flux::lora_tools::convert(opts); });
}

ExitCode extract(flux::Tool& tool) {
  return write<flux::lora_tools::ExtractOptions>(
      tool, [](const auto& opts) { return flux::lora_tools::extract(opts); });
}

ExitCode resize(flux::Tool& tool) {
  return write<flux::lora_tools::ResizeOptions>(
      tool, [](const auto& opts) { return flux::lora_tools::resize(opts); });
}

ExitCode merge(flux::Tool& tool) {
  flux::lora_tools::MergeOptions opts;
  flux::lora_tools::add_flags(opts, tool);
  if (!tool.parse()) return ExitCode::kOk;
  flux::lora_tools::check(opts, tool);
  const auto finish = [&](const auto& report) { tool.summary(report.line(), report.json()); };
  if (opts.base.empty())
    finish(flux::lora_tools::merge_into_lora(opts));
  else
    finish(flux::lora_tools::merge_into_base(opts));
  return ExitCode::kOk;
}

ExitCode check(flux::Tool& tool) {
  flux::lora_tools::CheckOptions opts;
  flux::lora_tools::add_flags(opts, tool);
  if (!tool.parse()) return ExitCode::kOk;
  flux::lora_tools::check(opts);
  const auto report = flux::lora_tools::compare(opts);
  show_report(tool, report.text(), report.json());
  return report.equal() ? ExitCode::kOk : ExitCode::kDiffers;
}

}  // namespace

int main(int argc, char** argv) {
  return flux::run_tool(
      "flux-lora",
      argc,
      argv,
      "looks into LoRA files, converts, merges, extracts, resizes and compares them",
      {{"info", "what a file adapts, of which ranks and how much", info},
       {"convert", "the same LoRA in another layout", convert},
       {"merge", "LoRAs added to a model, or to one LoRA", merge},
       {"extract", "the difference of two models as a LoRA", extract},
       {"resize", "fewer ranks, by singular values", resize},
       {"check", "whether two files do the same", check}});
}
