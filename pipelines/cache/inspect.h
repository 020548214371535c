// pipelines/cache/inspect.h - flux-cache inspect: what a cache holds and who made it.
#pragma once
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "common/core/tool.h"
#include "pipelines/cache/contents.h"

namespace flux::cache {

struct InspectOptions {
  std::vector<std::string> folders;  // exactly one
  bool samples = false;              // list every sample
  bool recover = false;              // count what journals of a killed writer hold
};

void add_flags(InspectOptions& options, Tool& tool);
/// Throws UsageError unless one folder is given.
void check(const InspectOptions& options);

/// Tokens of the captions and what is cut off, at the lengths that FLUX is run with.
struct Truncation {
  struct Limit {
    const char* name;            // "clip_77"
    bool clip;                   // of CLIP's tokens, else of T5's
    int64_t length = 0;          // tokens that are read
    int64_t captions = 0;        // that have more
    int64_t used = 0, lost = 0;  // tokens, over all captions
  };
  std::vector<Limit> limits;               // clip_77, t5_256, t5_512
  std::vector<const ListedSample*> worst;  // the ten that lose most, none that loses nothing
};
/// `samples` must outlive the result.
Truncation truncation_of(const std::vector<ListedSample>& samples);

/// format schema_version kind complete num_samples num_items num_unwanted num_in_journals num_bytes
/// segments journals buckets|captions|truncation parameters weights tokenizers plan plan_digest
/// shard quarantined provenance problems; with options.samples `samples`: key, tensor_xxh3, path,
/// bucket, and of text caption, t5_tokens, t5_lost, clip_tokens, clip_lost.
nlohmann::json inspect_json(const Contents& contents, const InspectOptions& options);
/// The same for people; safe to print.
std::string inspect_text(const Contents& contents, const InspectOptions& options);

}  // namespace flux::cache
