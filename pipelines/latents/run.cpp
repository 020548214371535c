#include "pipelines/latents/run.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <unordered_map>

#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/models/vae/vae.h"
#include "common/models/weights/weights.h"
#include "common/tensor/device.h"
#include "common/tensor/memory_errors.h"
#include "formats/cache/writer.h"
#include "pipelines/latents/encode.h"
#include "pipelines/latents/scan.h"
#include "pipelines/stage/finish.h"
#include "pipelines/stage/reproduce.h"

namespace flux::latents {
namespace {

/// The encoder half of the weights: tensors, sizes, and identity.
struct Weights {
  TensorMap encoder;
  vae::Config config;
  std::string sha256;
};

Weights read_weights_of(const Options& options) {
  const auto net = take_net(read_weights(options.ae), NetKind::kAutoEncoder);
  const auto canonical = vae::canonical(net);
  Weights weights;
  weights.encoder = vae::encoder_half(canonical, net.path);
  weights.config = vae::Config::from_weights(canonical, net.path);
  weights.sha256 = to_hex(
      remembered_weights_sha256(net.stamps, "vae.encoder", weights.encoder, options.encode.rehash));
  return weights;
}

std::string resolutions(const dataset::Resolved& resolved) {
  std::set<std::pair<int64_t, int64_t>> sizes;
  for (const auto& s : resolved.subsets) sizes.emplace(s.pixels.width, s.pixels.height);
  std::string text;
  for (const auto& [width, height] : sizes)
    text += fmt::format("{}{}x{}", text.empty() ? "" : ",", width, height);
  return text;
}

// As the dataset file says it, "auto" where it does not; empty if it nowhere does.
std::string interpolations(const dataset::Resolved& resolved) {
  std::set<std::string> names;
  for (const auto& s : resolved.subsets)
    names.insert(s.pixels.interpolation.empty() ? "auto" : s.pixels.interpolation);
  return names == std::set<std::string>{"auto"} ? "" : fmt::format("{}", fmt::join(names, ","));
}

cache::Recipe make_recipe(const Options& options,
                          const dataset::Resolved& resolved,
                          const KeyParameters& keys) {
  cache::Recipe recipe;
  recipe.kind = cache::Kind::kLatents;
  recipe.parameters = {{"dtype", keys.dtype},
                       {"channels", options.store == Store::kSample ? 16 : 32},
                       {"precision", keys.precision},
                       {"store", keys.store},
                       {"profile", keys.profile == Profile::kKohya ? "kohya" : "default"},
                       {"background", background_text(keys)},
                       {"resolution", resolutions(resolved)},
                       {"shift", vae::kShift},
                       {"scale", vae::kScale}};
  if (options.store == Store::kSample) recipe.parameters["seed"] = options.seed;
  if (const auto names = interpolations(resolved); !names.empty())
    recipe.parameters["resize_interpolation"] = names;
  recipe.weights = {{"ae", keys.weights_sha256}};
  return recipe;
}

// Bytes of the tensors of `samples`, uncompressed; of masks, which are mostly of one value, none.
double raw_bytes(std::span<const Sample> samples, const cache::Layout& layout) {
  double values = 0;
  for (const auto& s : samples) {
    const auto& bucket = s.placement.bucket;
    values += static_cast<double>(layout.channels * (bucket.height / 8) * (bucket.width / 8));
  }
  return values * static_cast<double>(dtype_bits(layout.dtype)) / 8;
}

}  // namespace

stage::Report run(const Options& options) {
  stage::Timing timing;
  const auto device = resolve_device(options.encode.device);
  const auto provenance = stage::begin("flux-cache-latents", options.command_line, device);
  const auto resolved = stage::resolve(options.data, options.width, options.height);
  use_huge_pages();
  auto weights = read_weights_of(options);
  const auto precision = stage::choose_precision(options.encode, stage::Precision::kF32);

  KeyParameters keys;
  keys.profile = resolved.profile;
  keys.background = options.background;
  keys.weights_sha256 = weights.sha256;
  keys.precision = stage::precision_word(precision);
  keys.dtype = cache::dtype_word(options.encode.dtype);
  keys.store = options.store == Store::kSample ? "sample" : "mean_logvar";
  keys.seed = options.seed;
  const auto recipe = make_recipe(options, resolved, keys);

  const auto layout = cache::layout_of(recipe.kind, recipe.parameters);
  std::optional<vae::Encoder> encoder;
  const auto encode =
      [&](std::vector<Sample> samples, stage::StageTimes& times, stage::Sink& sink) {
        const auto type = precision == stage::Precision::kF32 ? at::kFloat : at::kBFloat16;
        return with_memory_errors(
            "not enough memory to encode images",
            "use a smaller --resolution, --precision bf16, or --device cpu",
            [&] {
              if (!encoder)
                encoder = vae::Encoder::load(weights.encoder, weights.config, type, device);
              weights.encoder.clear();  // the mapped file counts as memory of this process
              return encode_samples(
                  resolved, std::move(samples), *encoder, device, options, times, sink);
            });
      };
  // Of FLUX's autoencoder it is known how well its latents compress, of others it is measured.
  const auto share = [&](const std::vector<Sample>& samples) {
    constexpr int64_t kFluxChannels = 128;
    const double known = stage::compressed_share(layout.dtype);
    if (weights.config.channels == kFluxChannels) return known;
    std::vector<Sample> few;
    for (const size_t place : stage::measured_places(samples.size())) few.push_back(samples[place]);
    stage::StageTimes uncounted;
    stage::Measurement measurement(layout);
    const auto encoded = encode(few, uncounted, measurement);
    if (!encoded.failures.empty()) return known;
    return static_cast<double>(measurement.compressed_bytes()) / raw_bytes(few, layout);
  };
  stage::Report report;
  report.noun = "images";
  if (options.encode.reproduce > 0) {
    stage::Reproduction reproduction(options.encode.out, recipe, options.encode.shard);
    auto samples = scan(resolved, keys, options.animated, options.encode.rehash).samples;
    std::vector<Sha256Digest> wanted;
    for (const auto& s : samples) wanted.push_back(s.key);
    const auto chosen = reproduction.choose(wanted, options.encode.reproduce);
    std::erase_if(samples,
                  [&](const Sample& s) { return !std::ranges::binary_search(chosen, s.key); });
    const auto encoded = encode(std::move(samples), timing.stages, reproduction);
    report.drift = reproduction.drift(encoded.failures);
    report.exit_code = report.drift->within() ? ExitCode::kOk : ExitCode::kDiffers;
    return report;
  }

  cache::Writer writer(options.encode.out,
                       recipe,
                       provenance,
                       {.shard = options.encode.shard, .verify_segments = options.encode.rehash});
  const auto plan = dataset::plan_json(resolved);
  stage::require_same_use(options.encode.out, writer.previous(), plan, options.encode.shard);
  auto wanted = scan(resolved, keys, options.animated, options.encode.rehash);
  std::unordered_map<Sha256Digest, const Sample*, DigestHash> by_key;
  for (const auto& s : wanted.samples) by_key.emplace(s.key, &s);

  cache::Publication publication;
  publication.items = std::move(wanted.items);
  publication.quarantined = std::move(wanted.quarantined);
  publication.plan = plan;
  publication.plan_digest = to_hex(dataset::plan_digest(publication.plan));
  stage::announce(writer,
                  writer.compare(publication.items,
                                 publication.plan,
                                 [&](const Sha256Digest& key) {
                                   const Sample& s = *by_key.at(key);
                                   return info_of(s, resolved.images[s.image].name);
                                 }),
                  report);
  std::erase_if(wanted.samples,
                [&](const Sample& s) { return !writer.wants(s.key) || writer.contains(s.key); });
  timing.before["scan"] = stage::monotonic_seconds() - timing.start_seconds;

  if (!wanted.samples.empty()) {
    report.predicted_bytes = stage::predict(writer,
                                            options.encode,
                                            std::ssize(wanted.samples),
                                            raw_bytes(wanted.samples, layout),
                                            share(wanted.samples));
    stage::fill(
        options.encode,
        writer,
        layout,
        timing,
        [&](stage::Sink& sink) { return encode(std::move(wanted.samples), timing.stages, sink); },
        publication,
        report);
  }
  stage::finish(options.encode, writer, publication, timing, report);
  return report;
}

}  // namespace flux::latents
