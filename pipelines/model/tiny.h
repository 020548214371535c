// pipelines/model/tiny.h - flux-model tiny: small random models that the whole chain accepts, for
// tests and the demo.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "common/core/tool.h"
#include "pipelines/model/geometry.h"

namespace flux::model {

struct TinyOptions {
  std::filesystem::path out{};
  int64_t seed = 0;
  std::filesystem::path t5_tokenizer{};    // empty: the project's own small vocabulary
  std::filesystem::path clip_tokenizer{};  // empty: the same
  std::optional<Geometry> geometry{};      // one large file instead
  std::string depth{};                     // of it, "19,38"; empty: as published
};

void add_flags(TinyOptions& options, Tool& tool);
/// Throws UsageError if --out is missing, or flags contradict each other.
void check(const TinyOptions& options);

/// What to write when options.geometry is given.
GeometryOptions geometry_options(const TinyOptions& options);

struct TinyReport {
  std::filesystem::path out;
  int64_t flux_parameters = 0, ae_parameters = 0, t5_parameters = 0, clip_parameters = 0;
  std::string line() const;
  nlohmann::json json() const;
};

/// Writes flux.safetensors, ae.safetensors, t5.safetensors, clip.safetensors and the tokenizers'
/// files below `out`: tokenizers/t5/spiece.model and tokenizers/clip/{vocab.json,merges.txt} (or
/// tokenizer.json where that was given). Names, ratios and dtypes are those of the published files
/// (BFL and Hugging Face names without prefix, heads of 128, MLP ratio 4, 16 latent channels,
/// stride 8, guidance; BF16, autoencoder F32); embeddings are as long as the vocabularies. The same
/// seed gives the same bytes on any machine; another seed changes weight values only. Throws
/// InputError if a given tokenizer cannot be read, ResourceError if writing fails.
TinyReport tiny(const TinyOptions& options);

}  // namespace flux::model
