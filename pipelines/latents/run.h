// pipelines/latents/run.h - images of a data set -> VAE latents -> cache.
#pragma once
#include "pipelines/latents/options.h"
#include "pipelines/stage/report.h"

namespace flux::latents {

/// Encodes what the data set needs and the folder does not hold, and publishes the cache.
/// Throws UsageError, InputError (data set, weights), CacheError (the folder), ResourceError,
/// Interrupted.
stage::Report run(const Options& options);

}  // namespace flux::latents
