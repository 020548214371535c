// pipelines/text/encode.h - captions through CLIP, then through T5.
#pragma once
#include <c10/core/Device.h>

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <vector>

#include "pipelines/stage/sink.h"
#include "pipelines/stage/times.h"
#include "pipelines/text/memory.h"
#include "pipelines/text/nets.h"
#include "pipelines/text/options.h"

namespace flux::text {

/// A caption that the cache does not hold.
struct Job {
  Sha256Digest key{};
  std::string caption;
};
/// What is known of a caption before its tokens are.
cache::SampleInfo info_of(const Job& job);

/// What both nets did with the jobs.
struct Encoded {
  int64_t num_samples = 0;
  std::vector<stage::Failure> failures;  // embeddings that are not finite
};

c10::ScalarType torch_type(stage::Precision precision);

/// Encodes `jobs` and hands them to `sink`. CLIP's weights are released before T5's are loaded: both
/// arguments are used up. The bits of a caption depend neither on the others nor on the plan.
/// Throws what `sink` throws; OutOfMemory if memory does not suffice for one caption.
Encoded encode_captions(std::span<const Job> jobs,
                        ClipFiles clip,
                        T5Files t5,
                        const T5Plan& plan,
                        stage::Precision precision,
                        c10::Device device,
                        const Options& options,
                        stage::StageTimes& times,
                        stage::Sink& sink);

/// Tokens of one caption, with the end tokens.
struct CaptionTokens {
  int64_t t5 = 0, clip = 0;
};
std::vector<CaptionTokens> count_tokens(std::span<const std::string> captions,
                                        const ClipFiles& clip,
                                        const T5Files& t5);

/// How much of the captions is longer than what the nets read, and the ten that lose most:
/// captions, tokens used and lost at CLIP's 77 and at T5's 256 and 512.
nlohmann::json truncation_json(std::span<const std::string> captions,
                               std::span<const CaptionTokens> tokens);
/// The same for the log: one line a limit that cuts something off at `t5_length`, and the worst.
void log_truncation(const nlohmann::json& truncation, int64_t t5_length);

}  // namespace flux::text
