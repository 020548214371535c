// pipelines/check/run.h - flux-check: finds reference cases and runs each through the production
// code.
#pragma once
#include "pipelines/check/options.h"
#include "pipelines/check/report.h"

namespace flux::check {

/// Cases in the order of the folders given, then of their names; every case is run, whatever
/// earlier ones did. A case that holds nothing to check fails. Throws InputError: a folder that is
/// not there or holds no case.
Report run(const Options& options, Report::Print print);

}  // namespace flux::check
