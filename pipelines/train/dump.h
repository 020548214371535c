// pipelines/train/dump.h - a step whose loss or gradients were not finite, to a file.
#pragma once
#include <filesystem>
#include <span>

#include "common/engine/updater.h"
#include "common/train/flow_loss.h"
#include "pipelines/train/load.h"

namespace flux::train {

/// Writes OUT/not-finite-NNNNNN.safetensors, N the step that failed: all that its forward read, by micro-batch
/// ("0.latents", "0.noise", "0.sigma", "1.latents", ...), a LoRA's weights before it ("lora.*"), and as metadata
/// `flux_stages.step`, a JSON object: step, learning rate, reason, loss, options that decide the run, precision, seed,
/// hash of the model, where the weights are, and each sample's name, epoch, noise level and the number that its random
/// streams are keyed by beside seed and epoch. Throws ResourceError if the disk is full.
std::filesystem::path dump_step(Session& session,
                                std::span<const Batch> batches,
                                std::span<const FlowInputs> inputs,
                                const engine::NotFinite& reason);

}  // namespace flux::train
