// pipelines/train/ranks.h - several processes that train one run together.
#pragma once
#include <memory>
#include <optional>

#include "common/core/error.h"
#include "common/dist/group.h"
#include "pipelines/train/load.h"

namespace flux::train {

/// Meets the other ranks and says which this is; null where there is one only. The others' logs begin with warnings.
/// Throws what dist::Group::join() throws.
std::unique_ptr<dist::Group> join_ranks(const Options& options);

/// That all ranks are the same program, with the same options, caches, model and step. Throws UsageError naming the first
/// rank that is not, the field and both values, in every rank.
void require_same_ranks(const Session& session);

/// The exit code that a signal to any rank asks for; called by all ranks together.
std::optional<ExitCode> agreed_stop(const Session& session);

}  // namespace flux::train
