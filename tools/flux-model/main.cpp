// tools/flux-model/main.cpp - what model files hold, models in fewer bits, and random ones for tests.
#include <cstdio>

#include "common/core/tool.h"
#include "pipelines/model/convert.h"
#include "pipelines/model/info.h"
#include "pipelines/model/tiny.h"

namespace {

flux::ExitCode tiny(flux::Tool& tool) {
  flux::model::TinyOptions opts;
  flux::model::add_flags(opts, tool);
  if (!tool.parse()) return flux::ExitCode::kOk;
  flux::model::check(opts);
  if (opts.geometry) {
    const auto written = flux::model::write_geometry(flux::model::geometry_options(opts));
    tool.summary(written.line(), written.json());
    return flux::ExitCode::kOk;
  }
  const auto report = flux::model::tiny(opts);
  tool.summary(report.line(), report.json());
  return flux::ExitCode::kOk;
}

flux::ExitCode info(flux::Tool& tool) {
  flux::model::InfoOptions opts;
  flux::model::add_flags(opts, tool);
  if (!tool.parse()) return flux::ExitCode::kOk;
  flux::model::check(opts);
  const auto report = flux::model::info(opts);
  if (tool.json())
    tool.summary("", {{"nets", report.nets}});
  else
    std::puts(report.text().c_str());  // several lines, escaped already
  return flux::ExitCode::kOk;
}

flux::ExitCode convert(flux::Tool& tool) {
  flux::model::ConvertOptions opts;
  flux::model::add_flags(opts, tool);
  if (!tool.parse()) return flux::ExitCode::kOk;
  flux::model::check(opts);
  const auto report = flux::model::convert(opts);
  tool.summary(report.line(), report.json());
  return flux::ExitCode::kOk;
}

}  // namespace

int main(int argc, char** argv) {
  return flux::run_tool("flux-model",
                        argc,
                        argv,
                        "looks into model files, quantises them, and makes random ones",
                        {{"info", "which nets a file holds, their sizes and identity", info},
                         {"convert", "write weights in another layout, dtype or number of files, or a transformer in 8 or 4 bits", convert},
                         {"tiny", "write small random models that the whole chain accepts", tiny}});
}
