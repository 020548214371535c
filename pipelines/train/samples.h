// pipelines/train/samples.h - pictures that a run samples on its way, for people to see what it learns.
#pragma once
#include "common/engine/sampler.h"
#include "pipelines/train/load.h"

namespace flux::train {

/// Opens the prompts of --sample-every and checks them against the model; does nothing without that. Throws CacheError;
/// UsageError for --sample-guidance with a model that has no such input.
void open_samples(Session& session);
/// What is sampled at a time, for the plan; nothing without --sample-every.
std::optional<engine::SampleShape> sample_shape(const Session& session);
/// If step session.step is one to sample at, and its file is not there yet: OUT/samples/step-000500.h5, by the weights as
/// they would be saved. After a signal there is no file: a resumed run makes it. Changes nothing of the training. Called by
/// all ranks, which share the work; rank 0 writes the file, which has the bits of one rank's. Returns
/// whether the step is one to sample at.
bool sample_if_due(Session& session);

}  // namespace flux::train
