// tools/flux-cache-latents/main.cpp - encodes a folder of images to VAE latents, once.
#include <nlohmann/json.hpp>

#include "common/core/tool.h"
#include "pipelines/latents/options.h"
#include "pipelines/latents/run.h"

int main(int argc, char** argv) {
  return flux::run_tool("flux-cache-latents", argc, argv, [](flux::Tool& tool) {
    flux::latents::Options opts;
    flux::latents::add_flags(opts, tool);
    if (!tool.parse()) return flux::ExitCode::kOk;  // --help and --version end here
    flux::latents::check(opts);
    const auto report = flux::latents::run(opts);
    tool.summary(report.line(), report.json());
    return report.exit_code;
  });
}
