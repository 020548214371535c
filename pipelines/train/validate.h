// pipelines/train/validate.h - the loss of samples that are never trained on.
#pragma once
#include <cstdint>
#include <optional>

#include "pipelines/train/load.h"
#include "pipelines/train/validation.h"

namespace flux::train {

/// Whether this run computes such losses: it holds out samples, and may.
bool validates(const Session& session);

/// How many batches may pass through the model at a time with the run's plan: as many as hold no more memory than a step.
/// Where that is none, the plan grows to what one takes. Needs Session::plan and Session::config.
///   wanted, shape  as the plan was made for
void plan_validation(Session& session,
                     const engine::TrainerOptions& wanted,
                     const engine::StepShape& shape);

/// The loss of the held-out samples at each noise level, by the weights as they are. Noise, captions and latents are the
/// same at every call. Changes nothing that training sees. Nothing if a signal came meanwhile. Called by all ranks, which
/// share the work; each has the bits that one would have. Throws CommonFailure naming the samples whose loss is not
/// finite; what TrainingData::load_held_out() throws.
std::optional<Validation> validate(Session& session);

}  // namespace flux::train
