#include "pipelines/latents/run.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <map>
#include <set>

#include "common/core/error.h"
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
  recipe.weights = {{"ae", keys.weights_sha256}};
  return recipe;
}

// Takes out the items that need a sample that could not be made.
void quarantine(const std::vector<Failure>& failures,
                const dataset::Resolved& resolved,
                Scan& wanted) {
  std::map<Sha256Digest, const std::string*> reasons;
  for (const auto& f : failures) reasons[f.key] = &f.reason;
  std::map<Sha256Digest, size_t> order;
  for (size_t i = 0; i < resolved.images.size(); ++i) order[resolved.images[i].item] = i;
  std::erase_if(wanted.items, [&](const cache::WantedItem& item) {
    for (const auto& v : item.variants) {
      const auto reason = reasons.find(v.key);
      if (reason == reasons.end()) continue;
      wanted.quarantined.push_back(
          stage::leave_out(item.item, item.subset, item.path, *reason->second));
      return true;
    }
    return false;
  });
  std::sort(wanted.quarantined.begin(),
            wanted.quarantined.end(),
            [&](const auto& a, const auto& b) { return order.at(a.item) < order.at(b.item); });
}

}  // namespace

stage::Report run(const Options& options) {
  const double start = stage::monotonic_seconds();
  const auto resolved = stage::resolve(options.data, options.width, options.height);
  use_huge_pages();
  const auto device = resolve_device(options.encode.device);
  const auto weights = read_weights_of(options);
  const auto precision = stage::choose_precision(
      options.encode, stage::previous_manifest(options.encode.out), stage::Precision::kF32);

  KeyParameters keys;
  keys.profile = resolved.profile;
  keys.background = options.background;
  keys.weights_sha256 = weights.sha256;
  keys.precision = stage::precision_word(precision);
  keys.dtype = cache::dtype_word(options.encode.dtype);
  keys.store = options.store == Store::kSample ? "sample" : "mean_logvar";
  keys.seed = options.seed;
  cache::Writer writer(options.encode.out,
                       make_recipe(options, resolved, keys),
                       stage::begin("flux-cache-latents", options.command_line, device));

  auto wanted = scan(resolved, keys, options.encode.rehash);
  cache::Publication publication;
  publication.plan = dataset::plan_json(resolved);
  publication.plan_digest = to_hex(dataset::plan_digest(publication.plan));
  stage::Report report;
  report.noun = "images";
  stage::announce(writer, writer.compare(wanted.items, publication.plan), report);
  std::erase_if(wanted.samples, [&](const Sample& s) { return writer.contains(s.key); });
  publication.stage_seconds["scan"] = stage::monotonic_seconds() - start;

  Encoded encoded;
  if (!wanted.samples.empty()) {
    const auto type = precision == stage::Precision::kF32 ? at::kFloat : at::kBFloat16;
    encoded = with_memory_errors(
        "not enough memory to encode images",
        "use a smaller --resolution or --batch-size, --precision bf16, or --device cpu",
        [&] {
          const auto encoder = vae::Encoder::load(weights.encoder, weights.config, type, device);
          return encode_samples(
              resolved, std::move(wanted.samples), encoder, device, options, writer);
        });
  }
  report.encoded = encoded.num_samples;
  report.changed = std::min(report.changed, report.encoded);
  quarantine(encoded.failures, resolved, wanted);

  publication.items = std::move(wanted.items);
  publication.quarantined = std::move(wanted.quarantined);
  publication.stage_seconds["wait_for_pictures"] = encoded.wait_seconds;
  publication.stage_seconds["encode"] = encoded.encode_seconds;
  publication.stage_seconds["write"] = encoded.write_seconds;
  stage::finish(writer, publication, options.encode.max_failed, start, report);
  return report;
}

}  // namespace flux::latents
