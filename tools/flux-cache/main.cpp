// tools/flux-cache/main.cpp - looks into caches, checks, mends, merges, copies and exports them.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "common/core/tool.h"
#include "pipelines/cache/diff.h"
#include "pipelines/cache/export.h"
#include "pipelines/cache/inspect.h"
#include "pipelines/cache/maintain.h"
#include "pipelines/cache/stats.h"

namespace {

using flux::ExitCode;

// A report: several lines, escaped already; or one object.
void show_report(const flux::Tool& tool, const std::string& text, const nlohmann::json& object) {
  if (tool.json())
    tool.summary("", object);
  else
    std::puts(text.c_str());
}

ExitCode inspect(flux::Tool& tool) {
  flux::cache::InspectOptions opts;
  flux::cache::add_flags(opts, tool);
  if (!tool.parse()) return ExitCode::kOk;
  flux::cache::check(opts);
  const auto contents = flux::cache::look_into(opts.folders[0], opts.recover);
  show_report(
      tool, flux::cache::inspect_text(contents, opts), flux::cache::inspect_json(contents, opts));
  return ExitCode::kOk;
}

ExitCode diff(flux::Tool& tool) {
  flux::cache::DiffOptions opts;
  flux::cache::add_flags(opts, tool);
  if (!tool.parse()) return ExitCode::kOk;
  flux::cache::check(opts);
  flux::cache::Difference found;
  flux::cache::read_unchanged({opts.folders[0], opts.folders[1]}, [&] {
    found = flux::cache::diff(flux::cache::look_into(opts.folders[0], false),
                              flux::cache::look_into(opts.folders[1], false));
  });
  show_report(tool, flux::cache::diff_text(found), flux::cache::diff_json(found));
  return found.equal() ? ExitCode::kOk : ExitCode::kDiffers;
}

ExitCode stats(flux::Tool& tool) {
  flux::cache::StatsOptions opts;
  flux::cache::add_flags(opts, tool);
  if (!tool.parse()) return ExitCode::kOk;
  flux::cache::check(opts);
  flux::cache::Stats found;
  flux::cache::read_unchanged({opts.folders[0]}, [&] {
    found = flux::cache::stats(flux::cache::look_into(opts.folders[0], false));
  });
  show_report(tool, flux::cache::stats_text(found), flux::cache::stats_json(found));
  return ExitCode::kOk;
}

ExitCode export_to(flux::Tool& tool) {
  flux::cache::ExportOptions opts;
  flux::cache::add_flags(opts, tool);
  if (!tool.parse()) return ExitCode::kOk;
  flux::cache::check(opts);
  flux::cache::ExportReport report;
  flux::cache::read_unchanged({opts.folders[0]}, [&] {
    report = flux::cache::export_cache(flux::cache::look_into(opts.folders[0], false), opts);
  });
  tool.summary(report.line(), report.json());
  return ExitCode::kOk;
}

template <class Options, class Work>
ExitCode maintain(flux::Tool& tool, const Work& work) {
  Options opts;
  flux::cache::add_flags(opts, tool);
  if (!tool.parse()) return ExitCode::kOk;
  flux::cache::check(opts);
  const flux::cache::Report report = work(opts);
  show_report(tool, report.text, report.json);
  return report.exit_code;
}

ExitCode verify(flux::Tool& tool) {
  return maintain<flux::cache::VerifyOptions>(
      tool, [](const auto& opts) { return flux::cache::verify(opts); });
}

ExitCode repair(flux::Tool& tool) {
  return maintain<flux::cache::RepairOptions>(
      tool, [](const auto& opts) { return flux::cache::repair(opts); });
}

ExitCode merge(flux::Tool& tool) {
  return maintain<flux::cache::MergeOptions>(
      tool, [&](const auto& opts) { return flux::cache::merge(opts, tool); });
}

ExitCode gc(flux::Tool& tool) {
  return maintain<flux::cache::GcOptions>(tool,
                                          [](const auto& opts) { return flux::cache::gc(opts); });
}

ExitCode copy(flux::Tool& tool) {
  return maintain<flux::cache::CopyOptions>(
      tool, [](const auto& opts) { return flux::cache::copy(opts); });
}

}  // namespace

int main(int argc, char** argv) {
  return flux::run_tool("flux-cache",
                        argc,
                        argv,
                        "looks into caches, checks, mends, merges, copies and exports them",
                        {{"inspect", "what a cache holds and who made it", inspect},
                         {"verify", "are all checksums right", verify},
                         {"repair", "drop damaged samples and list them", repair},
                         {"diff", "in what two caches differ", diff},
                         {"merge", "one cache of the parts that several machines made", merge},
                         {"gc", "remove samples that no item wants", gc},
                         {"copy", "a cache on another disk", copy},
                         {"stats", "what the values look like, and how fast they are read", stats},
                         {"export", "each sample as a safetensors or npz file", export_to}});
}
