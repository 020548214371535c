// tools/flux-check/main.cpp - does this build, on this device, compute what the reference does?
#include <cstdio>

#include "common/core/log.h"
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
    const auto code = report.exit_code();
    if (code == flux::ExitCode::kInput && tool.json()) {  // some cases could not be judged
      flux::log::info("{}", report.line());
    } else {
      tool.summary(report.line(), report.json());
    }
    return code;
  });
}
