#include "pipelines/text/nets.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"

namespace flux::text {
namespace fs = std::filesystem;
namespace {

fs::path folder_of(const fs::path& weights) {
  std::error_code ignored;
  if (fs::is_directory(weights, ignored)) return weights;
  return weights.has_parent_path() ? weights.parent_path() : fs::path(".");
}

// The tokenizer that was given, or the first folder near the weights that holds one of `files`.
fs::path tokenizer_path(const fs::path& given,
                        const char* flag,
                        const fs::path& weights,
                        const char* diffusers_name,
                        const char* tiny_name,
                        const std::vector<std::string>& files) {
  if (!given.empty()) return given;
  const fs::path folder = folder_of(weights);
  const fs::path places[] = {
      folder / diffusers_name, folder / ".." / diffusers_name, folder / "tokenizers" / tiny_name};
  std::error_code ignored;
  for (const fs::path& place : places) {
    for (const std::string& file : files) {
      if (fs::exists(place / file, ignored)) return place;
    }
  }
  throw UsageError(
      fmt::format("{} is required: there is no {} beside {}", flag, diffusers_name, show(weights)),
      "it is a small file or folder of the model's distribution");
}

// CLIP's config.json beside the weights, if there is one; of other nets, or not JSON, it is none.
std::optional<nlohmann::json> config_beside(const fs::path& weights) {
  constexpr uint64_t kMaxBytes = 1 << 20;
  const fs::path file = folder_of(weights) / "config.json";
  std::error_code ignored;
  if (!fs::exists(file, ignored)) return std::nullopt;
  auto json = nlohmann::json::parse(read_file(file, kMaxBytes), nullptr, false);
  if (!clip::is_clip_config(json)) return std::nullopt;
  return json;
}

void require_rows(std::string_view net,
                  const fs::path& weights,
                  int64_t rows,
                  const fs::path& tokenizer,
                  int64_t vocab_size) {
  if (vocab_size <= rows) return;
  throw InputError(fmt::format("{}: has {} ids, but {} has {} rows for them in {}",
                               show(tokenizer),
                               vocab_size,
                               net,
                               rows,
                               show(weights)),
                   "give the tokenizer that belongs to these weights");
}

}  // namespace

ClipFiles read_clip(const Options& options) {
  const NetTensors net = take_net(read_weights(options.clip), NetKind::kClip);
  const fs::path path = tokenizer_path(options.clip_tokenizer,
                                       "--clip-tokenizer DIR",
                                       options.clip,
                                       "tokenizer",
                                       "clip",
                                       {"vocab.json", "tokenizer.json"});
  auto tokenizer = tokenizers::ClipTokenizer::load(path);
  TensorMap weights = clip::canonical(net);
  const auto json = config_beside(options.clip);
  const auto config = clip::Config::from_weights(weights, json ? &*json : nullptr, net.path);
  // the number of heads leaves no trace in the weights, so it would have to be part of a sample's
  // identity
  constexpr int64_t kHeadSize = 64;
  if (config.hidden != config.num_heads * kHeadSize) {
    throw InputError(fmt::format("{}: {} heads for a width of {}, CLIP-L's heads have {}",
                                 show(options.clip),
                                 config.num_heads,
                                 config.hidden,
                                 kHeadSize),
                     "check the config.json beside it");
  }
  require_rows("CLIP", options.clip, config.vocabulary, path, tokenizer.vocab_size());
  if (tokenizer.eos_id() != config.eos_id) {
    throw InputError(fmt::format("{}: its end token is {}, that of the weights in {} is {}",
                                 show(path),
                                 tokenizer.eos_id(),
                                 show(options.clip),
                                 config.eos_id),
                     "give the tokenizer that belongs to these weights");
  }
  const auto identity =
      remembered_weights_sha256(net.stamps, "clip", weights, options.encode.rehash);
  const std::string tokenizer_sha256 = to_hex(tokenizer.sha256());
  return {std::move(weights), config, std::move(tokenizer), to_hex(identity), tokenizer_sha256};
}

T5Files read_t5(const Options& options) {
  t5::File weights(options.t5);
  const fs::path path = tokenizer_path(options.t5_tokenizer,
                                       "--t5-tokenizer FILE",
                                       options.t5,
                                       "tokenizer_2",
                                       "t5",
                                       {"spiece.model", "tokenizer.json"});
  auto tokenizer = tokenizers::T5Tokenizer::load(path);
  require_rows("T5", options.t5, weights.config().vocabulary, path, tokenizer.vocab_size());
  const std::string identity = to_hex(weights.weights_sha256(options.encode.rehash));
  const std::string tokenizer_sha256 = to_hex(tokenizer.sha256());
  return {std::move(weights), std::move(tokenizer), identity, tokenizer_sha256};
}

}  // namespace flux::text
