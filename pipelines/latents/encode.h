// pipelines/latents/encode.h - pictures decoded in threads, encoded in batches, handed on.
#pragma once
#include <cstdint>
#include <vector>

#include "common/dataset/dataset.h"
#include "common/models/vae/vae.h"
#include "pipelines/latents/options.h"
#include "pipelines/latents/scan.h"
#include "pipelines/stage/sink.h"
#include "pipelines/stage/times.h"

namespace flux::latents {

struct Encoded {
  int64_t num_samples = 0;
  std::vector<stage::Failure> failures;
};

/// Encodes `samples` and hands them to `sink`. Pictures are decoded ahead in threads; batches hold
/// one bucket, and their size changes no bits. A picture that cannot be decoded, that is not the one
/// that was scanned, or whose latents are not finite is a failure and stops nothing. Throws what
/// `sink` throws; OutOfMemory if memory does not suffice for one sample.
Encoded encode_samples(const dataset::Resolved& resolved,
                       std::vector<Sample> samples,
                       const vae::Encoder& encoder,
                       at::Device device,
                       const Options& options,
                       stage::StageTimes& times,
                       stage::Sink& sink);

/// What a segment's tables say of a sample.
cache::SampleInfo info_of(const Sample& sample, const std::string& path);

/// [32, h, w] mean then log-variance, or [16, h, w] one sample, in float32.
/// The sample is mean + exp(logvar / 2) * normal, keyed by (seed, key): the same whatever else is
/// encoded.
at::Tensor stored_latents(const vae::Posterior& posterior,
                          int64_t index,
                          Store store,
                          int64_t seed,
                          const Sha256Digest& key);

}  // namespace flux::latents
