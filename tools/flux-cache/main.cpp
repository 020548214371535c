// tools/flux-cache/main.cpp - looks into caches, checks, mends, merges, copies and exports them.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "common/core/tool.h"
#include "pipelines/cache/inspect.h"

namespace {

flux::ExitCode inspect(flux::Tool& tool) {
  flux::cache::InspectOptions opts;
  flux::cache::add_flags(opts, tool);
  if (!tool.parse()) return flux::ExitCode::kOk;
  flux::cache::check(opts);
  const auto contents = flux::cache::look_into(opts.folders[0], opts.recover);
  if (tool.json())
    tool.summary("", flux::cache::inspect_json(contents, opts));
  else
    std::puts(flux::cache::inspect_text(contents, opts).c_str());  // several lines, escaped already
  return flux::ExitCode::kOk;
}

}  // namespace

int main(int argc, char** argv) {
  return flux::run_tool("flux-cache",
                        argc,
                        argv,
                        "looks into caches, checks, mends, merges, copies and exports them",
                        {{"inspect", "what a cache holds and who made it", inspect}});
}
