// tools/flux-check/main.cpp - does this build, on this device, compute what the reference does?
#include <cstdio>

#include "common/core/tool.h"
#include "pipelines/check/options.h"
#include "pipelines/check/run.h"

int main(int argc, char** argv) {
  return flux::run_tool("flux-check", argc, argv, [](flux::Tool& tool) {
    flux::check::Options opts;
    flux::check::add_flags(opts, tool);
    if (!tool.parse()) return flux::ExitCode::kOk;
    flux::check::check(opts);
    const auto report = flux::check::run(opts, [&](const std::string& line) {
      if (!tool.json()) std::puts(line.c_str());  // escaped already; one line a tensor
    });
    tool.summary(report.line(), report.json());
    return report.exit_code();
  });
}
