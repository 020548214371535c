// pipelines/train/report.h - report.html of a run folder: one file that needs nothing else.
#pragma once
#include <filesystem>
#include <string>

#include "pipelines/train/load.h"

namespace flux::train {

/// Writes OUT/report.html from metrics.jsonl, the session, and the pictures in OUT/samples: curves, loss by noise level,
/// data set, truncated captions, planned and measured memory, settings, provenance. No address of the network is in it,
/// and a policy in it forbids any. Call it when the hash of the model is known. Throws ResourceError.
void write_report(const Session& session);

}  // namespace flux::train
