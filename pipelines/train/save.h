// pipelines/train/save.h - a session to a checkpoint and back.
#pragma once
#include <filesystem>

#include "formats/checkpoint/checkpoint.h"
#include "pipelines/train/load.h"

namespace flux::train {

/// Writes OUT/step-NNNNNN: lora.safetensors for others to use, state.safetensors (float32 adapters
/// and moments), state.json. Waits for the model's hash. Throws ResourceError if the disk is full;
/// older checkpoints stay.
std::filesystem::path save(const Session& session);

/// Where a checkpoint goes on. Throws CacheError if state.json lacks it.
DataPosition position_of(const checkpoint::Checkpoint& checkpoint);

/// Takes adapters, moments, step and position from a checkpoint. Results then are those of a run
/// that was never stopped. Throws CacheError naming what differs and both values: an option that
/// decides the weights, the precision, a cache's content, the model's weights; or a state file that
/// is damaged.
void restore(Session& session, const checkpoint::Checkpoint& checkpoint);

}  // namespace flux::train
