// pipelines/text/run.h - captions of a data set, or prompts -> prompt and pooled embeddings ->
// cache.
#pragma once
#include "pipelines/stage/report.h"
#include "pipelines/text/options.h"

namespace flux::text {

/// Encodes the captions that the data set (or prompt file) needs and the folder does not hold, and
/// publishes the cache. Throws UsageError, InputError (captions, weights, tokenizers), CacheError
/// (the folder), ResourceError, Interrupted.
stage::Report run(const Options& options);

}  // namespace flux::text
