// pipelines/train/save.h - a session to a checkpoint and back.
#pragma once
#include <cstdint>
#include <filesystem>

#include "formats/checkpoint/checkpoint.h"
#include "pipelines/train/load.h"

namespace flux::train {

/// Writes OUT/step-NNNNNN: lora.safetensors or model.safetensors for others to use, state.safetensors (what else the
/// training needs: float32 adapters, states of the optimizer), state.json; with --ema-decay ema.safetensors, the averaged
/// weights as the first file has the others. Blocks that stream are written one at a time.
/// Waits for the model's hash. Throws ResourceError if the disk is full; older checkpoints stay.
/// Called by all ranks. Where they share the weights each writes its parts into rank 0's files, and a failure in one is one
/// in all (together()); else rank 0 alone writes. The bytes are the same for any number of ranks. Returns the folder in
/// rank 0.
std::filesystem::path save(Session& session);

/// Of state.safetensors and a full fine-tuning's weights: nearly all that save() writes.
uint64_t checkpoint_bytes(const Session& session);

/// The weights that a checkpoint of a full fine-tuning goes on with, by its folder.
std::filesystem::path weights_in(const std::filesystem::path& checkpoint);

/// Where a checkpoint goes on. Throws CacheError if state.json lacks it.
DataPosition position_of(const checkpoint::Checkpoint& checkpoint);

/// Before the model is loaded: throws CacheError naming what differs between a run and the
/// checkpoint it would go on from, and both values: an option that decides the weights, the
/// precision, a cache's content; or a position beyond the data.
void require_same_run(const Session& session, const checkpoint::Checkpoint& checkpoint);

/// Throws CacheError if the weights of --model are not those that the run began with, naming both hashes; in rank 0 only.
/// Waits for the model's hash.
void require_same_model(const Session& session, const checkpoint::Checkpoint& checkpoint);

/// Takes adapters, states, step and position from a checkpoint; weights were loaded from weights_of(). Results then are those of a run
/// that was never stopped. Throws CacheError if the model's weights are others (naming both
/// hashes), or the state file is damaged.
void restore(Session& session, const checkpoint::Checkpoint& checkpoint);

}  // namespace flux::train
