// pipelines/latents/encode.h - pictures decoded in threads, encoded in batches, handed to the
// cache.
#pragma once
#include <cstdint>
#include <vector>

#include "common/dataset/dataset.h"
#include "common/models/vae/vae.h"
#include "formats/cache/writer.h"
#include "pipelines/latents/options.h"
#include "pipelines/latents/scan.h"

namespace flux::latents {

/// A sample that could not be made.
struct Failure {
  Sha256Digest key{};
  std::string reason;
};

struct Encoded {
  int64_t num_samples = 0;
  std::vector<Failure> failures;
  double wait_seconds = 0;    // for pictures
  double encode_seconds = 0;  // in the net
  double write_seconds = 0;   // compression and disk
};

/// Encodes `samples`, of which none is in the cache yet, and adds them to it. A picture that cannot
/// be decoded, that is not the one that was scanned, or whose latents are not finite is a failure
/// and stops nothing. Throws Interrupted after sealing what is finished; ResourceError if memory
/// runs out or a write fails.
Encoded encode_samples(const dataset::Resolved& resolved,
                       std::vector<Sample> samples,
                       const vae::Encoder& encoder,
                       at::Device device,
                       const Options& options,
                       cache::Writer& writer);

/// [32, h, w] mean then log-variance, or [16, h, w] one sample, in float32.
/// The sample is mean + exp(logvar / 2) * normal, keyed by (seed, key): the same whatever else is
/// encoded.
at::Tensor stored_latents(const vae::Posterior& posterior,
                          int64_t index,
                          Store store,
                          int64_t seed,
                          const Sha256Digest& key);

}  // namespace flux::latents
