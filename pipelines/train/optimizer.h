// pipelines/train/optimizer.h - the optimizer that flags ask for.
#pragma once
#include <string>

#include "common/optim/optimizer.h"
#include "pipelines/train/options.h"

namespace flux::train {

/// Of --optimizer, --weight-decay and --optimizer-args ("beta2=0.99,eps=1e-6"). Throws UsageError for a name that the
/// optimizer does not have, naming the nearest, or a value that is none.
OptimizerOptions optimizer_options(const Options& options);
OptimizerPrecision optimizer_precision(const Options& options);
/// The name in sd-scripts' metadata: "AdamW8bit".
std::string optimizer_title(OptimizerKind kind);

}  // namespace flux::train
