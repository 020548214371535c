// pipelines/text/encode.h - captions through CLIP, then through T5, into the cache.
#pragma once
#include <c10/core/Device.h>

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <vector>

#include "formats/cache/writer.h"
#include "pipelines/text/nets.h"
#include "pipelines/text/options.h"

namespace flux::text {

/// A caption that the cache does not hold.
struct Job {
  Sha256Digest key{};
  std::string caption;
};
/// A caption whose embeddings are not finite.
struct Failure {
  Sha256Digest key{};
  std::string reason;
};
struct Encoded {
  std::vector<Failure> failures;
  double clip_seconds = 0, t5_seconds = 0;  // loading included
};

/// Encodes `jobs` and adds them to the cache. CLIP's weights are released before T5's are loaded:
/// both arguments are used up. The bits of a caption depend neither on the others nor on the batch
/// size. Throws Interrupted after sealing what is finished; ResourceError if memory runs out or a
/// write fails.
Encoded encode_captions(std::span<const Job> jobs,
                        ClipFiles clip,
                        T5Files t5,
                        stage::Precision precision,
                        c10::Device device,
                        const Options& options,
                        cache::Writer& writer,
                        const cache::Layout& layout);

/// How much of the captions is longer than what the nets read.
struct Truncation {
  int64_t t5_captions = 0, t5_tokens_lost = 0,
          t5_longest = 0;  // longest: tokens with the end token
  int64_t clip_captions = 0, clip_tokens_lost = 0, clip_longest = 0;

  nlohmann::json json() const;
};
Truncation count_truncation(std::span<const std::string> captions,
                            const ClipFiles& clip,
                            const T5Files& t5,
                            int64_t t5_length_tokens);

}  // namespace flux::text
