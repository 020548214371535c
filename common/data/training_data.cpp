#include "common/data/training_data.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/core/rng.h"
#include "common/core/text.h"
#include "common/dataset/dataset.h"
#include "common/tensor/tensor.h"
#include "formats/cache/lock.h"
#include "formats/cache/reader.h"

namespace flux {
namespace {

using cache::IndexVariant;

constexpr int64_t kLatentChannels = 16;
constexpr int64_t kPixelsPerLatent = 8;

// What is kept of an item; a million of them are in memory.
struct Item {
  uint64_t key = 0;  // first bytes of its digest: names its random streams
  int64_t in_latents = 0, in_text = 0;
  size_t subset = 0;  // position in the plan
  uint32_t repeats = 1;
  bool regularization = false;
};

// Batches do not mix these: data set, rows and columns of the latents.
using Group = std::tuple<int64_t, uint32_t, uint32_t>;

uint64_t first_bytes(const Sha256Digest& digest) {
  uint64_t value = 0;
  for (size_t i = 0; i < 8; ++i) value = value << 8 | static_cast<uint64_t>(digest[i]);
  return value;
}

uint64_t visit_key(uint64_t item_key, int64_t repeat) {
  return item_key + static_cast<uint64_t>(repeat) * 0x9E3779B97F4A7C15ull;
}

constexpr double kWeightTolerance = 1e-6;

double total_weight(std::span<const IndexVariant> variants) {
  double sum = 0;
  for (const IndexVariant& variant : variants) sum += variant.weight;
  return sum;
}

// Throws CacheError if the weights of an item's variants are no probabilities.
void require_weights(const cache::Cache& cache, int64_t item) {
  const double sum = total_weight(cache.index().variants(item));
  if (std::abs(sum - 1) <= kWeightTolerance) return;
  throw CacheError(fmt::format("{}: the weights of the variants of {} sum to {}, not to 1",
                               show(cache.folder()),
                               show(std::string(cache.index().path(item))),
                               sum),
                   "make the cache anew");
}

// The variant that a uniform draw falls on; rounding may have made the weights' sum not exactly 1.
const IndexVariant& pick(std::span<const IndexVariant> variants, double draw) {
  const double sum = total_weight(variants);
  double below = 0;
  for (const IndexVariant& variant : variants) {
    below += variant.weight;
    if (draw * sum < below) return variant;
  }
  return variants.back();
}

template <class T>
void widen(const std::byte* bytes, std::span<float> out) {
  const auto* const values = reinterpret_cast<const T*>(bytes);
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(values[i]);
}

std::vector<float> to_floats(std::span<const std::byte> bytes, DType dtype) {
  std::vector<float> out(bytes.size() * 8 / static_cast<size_t>(dtype_bits(dtype)));
  switch (dtype) {
    case DType::kBF16:
      widen<at::BFloat16>(bytes.data(), out);
      break;
    case DType::kF16:
      widen<at::Half>(bytes.data(), out);
      break;
    default:
      widen<float>(bytes.data(), out);
      break;
  }
  return out;
}

std::span<std::byte> row_bytes(const at::Tensor& tensor, int64_t row) {
  const size_t size = static_cast<size_t>(tensor.stride(0) * tensor.element_size());
  return {static_cast<std::byte*>(tensor.data_ptr()) + static_cast<size_t>(row) * size, size};
}

double number(const cache::Manifest& manifest,
              const std::filesystem::path& folder,
              const char* name) {
  const auto found = manifest.recipe.parameters.find(name);
  if (found == manifest.recipe.parameters.end() || !found->is_number()) {
    throw CacheError(fmt::format("{}: parameters.{} is absent or not a number", show(folder), name),
                     "make the cache anew with flux-cache-latents");
  }
  return found->get<double>();
}

// Items by their digest, so that a rewritten index of the same content is the same data.
std::string content_digest(const cache::Cache& cache) {
  Sha256 hash;
  hash.add_field(cache.manifest().plan_digest)
      .add_field(cache::canonical_json(cache.manifest().recipe.parameters));
  const cache::Index& index = cache.index();
  std::vector<int64_t> order(static_cast<size_t>(index.num_items()));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return index.item(a).item < index.item(b).item;
  });
  for (const int64_t i : order) {
    hash.add(index.item(i).item).add_u64(index.item(i).repeats).add_u64(index.item(i).flags);
    for (const IndexVariant& variant : index.variants(i)) {
      hash.add(variant.key).add(std::as_bytes(std::span(&variant.weight, 1)));
    }
  }
  return to_hex(hash.digest());
}

}  // namespace

struct TrainingData::State {
  State(const std::filesystem::path& latents_folder,
        const std::filesystem::path& text_folder,
        const DataOptions& opts)
      : options(opts),
        latents_lock(latents_folder),
        text_lock(text_folder),
        latents(latents_folder, cache::Kind::kLatents),
        text(text_folder, cache::Kind::kText) {}

  void join();
  void find_empty_caption();
  void count_batches();
  Group group(const Item& item) const;
  int64_t batch_size(int64_t dataset) const;
  const IndexVariant& text_variant(const Item& item, int64_t epoch, uint64_t visit) const;
  void draw_latents(std::span<const float> stored,
                    int64_t epoch,
                    uint64_t visit,
                    std::span<float> out) const;
  void perturb_noise(int64_t epoch,
                     uint64_t visit,
                     std::span<const float> noise,
                     std::span<float> out) const;

  DataOptions options;
  cache::ReaderLock latents_lock, text_lock;  // taken before the manifests are read
  cache::Cache latents, text;
  dataset::Plan plan;
  std::vector<Item> items;  // sorted by digest, so that the caches' order changes nothing
  std::map<Group, int64_t> group_visits;
  int64_t largest_batch = 0;
  int64_t num_visits = 0, num_batches = 0, num_regularization = 0, num_quarantined = 0,
          num_validation = 0;
  int64_t empty_caption = -1;  // item of the text cache
  double shift = 0, scale = 1;
  bool masked = false;        // attention leaves out padding
  bool stores_masks = false;  // some latents have a mask
};

void TrainingData::State::join() {
  std::unordered_map<Sha256Digest, int64_t, DigestHash> text_items;
  for (int64_t i = 0; i < text.index().num_items(); ++i) {
    const cache::IndexItem& item = text.index().item(i);
    if (!(item.flags & cache::kItemEmptyCaption)) text_items.emplace(item.item, i);
  }
  std::set<Sha256Digest> quarantined;
  for (const auto* manifest : {&latents.manifest(), &text.manifest()}) {
    for (const auto& bad : manifest->quarantined) quarantined.insert(bad.item);
  }
  num_quarantined = static_cast<int64_t>(quarantined.size());

  std::map<uint32_t, size_t> subsets;
  for (size_t i = 0; i < plan.subsets.size(); ++i)
    subsets[static_cast<uint32_t>(plan.subsets[i].index)] = i;
  std::vector<std::pair<Sha256Digest, Item>> joined;
  std::vector<std::string> latents_only, text_only;
  for (int64_t i = 0; i < latents.index().num_items(); ++i) {
    const cache::IndexItem& item = latents.index().item(i);
    if (quarantined.contains(item.item)) continue;
    const auto found = text_items.find(item.item);
    if (found == text_items.end()) {
      latents_only.push_back(show(std::string(latents.index().path(i))));
      continue;
    }
    const int64_t in_text = std::exchange(found->second, -1);
    if (in_text < 0) {
      throw CacheError(fmt::format("{}: its index holds item {} twice",
                                   show(latents.folder()),
                                   show(std::string(latents.index().path(i)))),
                       "make the cache anew");
    }
    if (item.flags & cache::kItemValidation) {
      ++num_validation;
      continue;
    }
    const auto subset = subsets.find(item.subset);
    if (subset == subsets.end()) {
      throw CacheError(fmt::format("{}: item {} is of subset {}, the plan has no such subset",
                                   show(latents.folder()),
                                   show(std::string(latents.index().path(i))),
                                   item.subset));
    }
    require_weights(latents, i);
    require_weights(text, in_text);
    const bool regularization = item.flags & cache::kItemRegularization;
    num_regularization += regularization;
    joined.push_back(
        {item.item,
         {first_bytes(item.item), i, in_text, subset->second, item.repeats, regularization}});
  }
  for (const auto& [digest, i] : text_items) {
    if (i >= 0 && !quarantined.contains(digest))
      text_only.push_back(show(std::string(text.index().path(i))));
  }
  std::sort(text_only.begin(), text_only.end());
  for (const auto& [names, has, lacks] :
       {std::tuple{&latents_only, &latents, &text}, {&text_only, &text, &latents}}) {
    if (names->empty()) continue;
    throw CacheError(fmt::format("{} {} of {} {} not in {}: {}",
                                 names->size(),
                                 names->size() == 1 ? "item" : "items",
                                 show(has->folder()),
                                 names->size() == 1 ? "is" : "are",
                                 show(lacks->folder()),
                                 join_some(*names)),
                     "run flux-cache-latents and flux-cache-text again on the same data set");
  }
  std::sort(
      joined.begin(), joined.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  items.reserve(joined.size());
  for (const auto& [digest, item] : joined) items.push_back(item);
  if (items.empty()) {
    throw CacheError(fmt::format(
        "{} and {} have no item to train on ({} quarantined, {} held out for validation)",
        show(latents.folder()),
        show(text.folder()),
        num_quarantined,
        num_validation));
  }
}

void TrainingData::State::find_empty_caption() {
  for (int64_t i = 0; i < text.index().num_items(); ++i) {
    if (text.index().item(i).flags & cache::kItemEmptyCaption) empty_caption = i;
  }
  for (const auto& subset : plan.subsets) {
    if (empty_caption < 0 &&
        (subset.caption_dropout_rate > 0 || subset.caption_dropout_every_n_epochs > 0)) {
      throw CacheError(fmt::format("{}: subset {} drops captions, but no empty caption is cached",
                                   show(text.folder()),
                                   subset.index),
                       "run flux-cache-text again on the data set");
    }
  }
}

Group TrainingData::State::group(const Item& item) const {
  const auto variants = latents.index().variants(item.in_latents);
  for (const IndexVariant& variant : variants) {
    if (variant.height != variants[0].height || variant.width != variants[0].width) {
      throw CacheError(fmt::format("{}: the variants of {} differ in size",
                                   show(latents.folder()),
                                   show(std::string(latents.index().path(item.in_latents)))));
    }
  }
  return {plan.subsets[item.subset].dataset, variants[0].height, variants[0].width};
}

int64_t TrainingData::State::batch_size(int64_t dataset) const {
  if (options.batch_size > 0) return options.batch_size;
  for (const auto& candidate : plan.datasets) {
    if (candidate.index == dataset) return std::max<int64_t>(candidate.batch_size, 1);
  }
  throw CacheError(fmt::format("{}: the plan has no data set {}", show(latents.folder()), dataset));
}

void TrainingData::State::count_batches() {
  for (const Item& item : items) group_visits[group(item)] += item.repeats;
  for (const auto& [group, visits] : group_visits) {
    const int64_t size = batch_size(std::get<0>(group));
    num_visits += visits;
    largest_batch = std::max(largest_batch, std::min(size, visits));
    num_batches += (visits + size - 1) / size;
  }
}

const IndexVariant& TrainingData::State::text_variant(const Item& item,
                                                      int64_t epoch,
                                                      uint64_t visit) const {
  const auto& subset = plan.subsets[item.subset];
  const auto at = static_cast<uint64_t>(epoch);
  // epochs are counted from 1 there, as in sd-scripts
  const bool whole_epoch = subset.caption_dropout_every_n_epochs > 0 &&
                           (epoch + 1) % subset.caption_dropout_every_n_epochs == 0;
  const bool dropped =
      whole_epoch || (subset.caption_dropout_rate > 0 &&
                      RandomStream(options.seed, Purpose::kCaptionDropout, at, visit).uniform(0) <
                          subset.caption_dropout_rate);
  return pick(text.index().variants(dropped ? empty_caption : item.in_text),
              RandomStream(options.seed, Purpose::kCaptionVariant, at, visit).uniform(0));
}

// `stored` is one sample, or mean and then log-variance.
void TrainingData::State::draw_latents(std::span<const float> stored,
                                       int64_t epoch,
                                       uint64_t visit,
                                       std::span<float> out) const {
  const size_t n = out.size();
  const bool draw = stored.size() == 2 * n && options.sample_posterior;
  const RandomStream stream(options.seed, Purpose::kPosterior, static_cast<uint64_t>(epoch), visit);
  for (size_t i = 0; i < n; ++i) {
    double value = stored[i];
    if (draw)
      value += std::exp(0.5 * std::clamp(static_cast<double>(stored[n + i]), -30.0, 20.0)) *
               stream.normal(i);
    out[i] = static_cast<float>((value - shift) * scale);
  }
}

void TrainingData::State::perturb_noise(int64_t epoch,
                                        uint64_t visit,
                                        std::span<const float> noise,
                                        std::span<float> out) const {
  const RandomStream stream(
      options.seed, Purpose::kInputNoise, static_cast<uint64_t>(epoch), visit);
  double strength = options.input_noise;
  if (options.random_input_noise) strength *= stream.uniform(noise.size());
  for (size_t i = 0; i < noise.size(); ++i)
    out[i] = static_cast<float>(noise[i] + strength * stream.normal(i));
}

TrainingData::TrainingData(const std::filesystem::path& latents,
                           const std::filesystem::path& text,
                           const DataOptions& options)
    : state_(std::make_unique<State>(latents, text, options)) {
  State& s = *state_;
  cache::require_joinable(s.latents.manifest(), show(latents), s.text.manifest(), show(text));
  const int64_t channels = s.latents.layout().channels;
  if (channels != kLatentChannels && channels != 2 * kLatentChannels) {
    throw CacheError(
        fmt::format("{}: latents of {} channels, FLUX has 16 (or 32: mean and log-variance)",
                    show(latents),
                    channels));
  }
  s.plan = dataset::parse_plan(s.latents.manifest().plan);
  s.shift = number(s.latents.manifest(), latents, "shift");
  s.scale = number(s.latents.manifest(), latents, "scale");
  s.masked = options.text_mask.value_or(
      s.text.manifest().recipe.parameters.value("pad_policy", "") == "masked");
  const auto& features = s.latents.manifest().required_features;
  s.stores_masks =
      std::find(features.begin(), features.end(), cache::kMasksFeature) != features.end();
  s.join();
  s.find_empty_caption();
  s.count_batches();
}

TrainingData::~TrainingData() = default;

const cache::Manifest& TrainingData::latents_manifest() const { return state_->latents.manifest(); }
const cache::Manifest& TrainingData::text_manifest() const { return state_->text.manifest(); }
int64_t TrainingData::num_items() const { return static_cast<int64_t>(state_->items.size()); }
int64_t TrainingData::num_visits() const { return state_->num_visits; }
int64_t TrainingData::num_batches() const { return state_->num_batches; }
int64_t TrainingData::largest_batch() const { return state_->largest_batch; }
int64_t TrainingData::num_regularization() const { return state_->num_regularization; }
int64_t TrainingData::num_quarantined() const { return state_->num_quarantined; }
int64_t TrainingData::num_validation() const { return state_->num_validation; }
bool TrainingData::has_text_mask() const { return state_->masked; }
bool TrainingData::has_loss_masks() const {
  return state_->stores_masks && state_->options.loss_masks;
}

std::vector<BucketVisits> TrainingData::buckets() const {
  std::map<std::pair<uint32_t, uint32_t>, int64_t> visits;
  for (const auto& [group, count] : state_->group_visits)
    visits[{std::get<2>(group), std::get<1>(group)}] += count;
  std::vector<BucketVisits> out;
  for (const auto& [size, count] : visits)
    out.push_back({size.first * kPixelsPerLatent, size.second * kPixelsPerLatent, count});
  return out;
}

std::vector<SubsetItems> TrainingData::subsets() const {
  std::vector<SubsetItems> out;
  for (const auto& subset : state_->plan.subsets)
    out.push_back({.subset = subset.index,
                   .dataset = subset.dataset,
                   .regularization = subset.is_reg});
  for (const Item& item : state_->items) {
    ++out[item.subset].items;
    out[item.subset].visits += item.repeats;
  }
  return out;
}

std::string TrainingData::latents_digest() const { return content_digest(state_->latents); }
std::string TrainingData::text_digest() const { return content_digest(state_->text); }

std::vector<std::vector<Visit>> TrainingData::epoch_batches(int64_t epoch) const {
  const State& s = *state_;
  std::vector<Visit> visits;
  visits.reserve(static_cast<size_t>(s.num_visits));
  for (size_t i = 0; i < s.items.size(); ++i) {
    for (int64_t repeat = 0; repeat < s.items[i].repeats; ++repeat)
      visits.push_back({static_cast<int64_t>(i), repeat});
  }
  const auto at = static_cast<uint64_t>(epoch);
  std::map<Group, std::vector<Visit>> filling;
  std::vector<std::pair<std::vector<Visit>, int64_t>> updates;  // with the size of their batches
  for (const uint64_t i :
       RandomStream(s.options.seed, Purpose::kShuffle, at, 0).permutation(visits.size())) {
    const Visit& visit = visits[i];
    const Group group = s.group(s.items[static_cast<size_t>(visit.item)]);
    auto& batch = filling[group];
    batch.push_back(visit);
    const int64_t size = s.batch_size(std::get<0>(group));
    if (static_cast<int64_t>(batch.size()) == size * s.options.accumulation)
      updates.emplace_back(std::exchange(batch, {}), size);
  }
  for (auto& [group, batch] : filling) {
    if (!batch.empty()) updates.emplace_back(std::move(batch), s.batch_size(std::get<0>(group)));
  }
  // else the partial ones would always come last
  std::vector<std::vector<Visit>> batches;
  batches.reserve(static_cast<size_t>(s.num_batches));
  for (const uint64_t i :
       RandomStream(s.options.seed, Purpose::kShuffle, at, 1).permutation(updates.size())) {
    const auto& [all, size] = updates[i];
    for (auto first = all.begin(); first != all.end();) {
      const auto last = first + std::min<int64_t>(size, all.end() - first);
      batches.emplace_back(first, last);
      first = last;
    }
  }
  return batches;
}

Batch TrainingData::State::read(int64_t epoch,
                                int64_t index,
                                std::span<const std::pair<const Item*, Draws>> samples) const {
  const auto b = static_cast<int64_t>(samples.size());
  const bool trains = epoch != kHeldOutEpoch;
  const auto [dataset, rows, columns] = group(*samples.front().first);
  const cache::Layout &of_latents = latents.layout(), &of_text = text.layout();
  const auto text_type = at::TensorOptions(*scalar_type(of_text.dtype));

  Batch batch;
  batch.epoch = epoch;
  batch.index = index;
  batch.latents = at::empty({b, kLatentChannels, rows, columns}, at::kFloat);
  batch.noise = at::empty({b, kLatentChannels, rows, columns}, at::kFloat);
  if (s.options.input_noise > 0) batch.input_noise = at::empty(batch.noise.sizes(), at::kFloat);
  batch.prompt_embedding = at::empty({b, text.t5_length, text.t5_width}, text_type);
  batch.pooled_embedding = at::empty({b, text.clip_width}, text_type);
  if (s.masked) batch.text_mask = at::empty({b, text.t5_length}, at::kBool);
  batch.loss_weight = at::empty({b}, at::kFloat);
  const int64_t elements = kLatentChannels * rows * columns;
  const auto sample_of = [&](const at::Tensor& tensor, int64_t row) {
    return std::span(tensor.mutable_data_ptr<float>() + row * elements,
                     static_cast<size_t>(elements));
  };
  std::vector<std::byte> unused_mask, stored(static_cast<size_t>(latents.channels * rows * columns *
                                                                 dtype_bits(latents.dtype) / 8));

  for (int64_t row = 0; row < b; ++row) {
    const Visit& visit = visits[static_cast<size_t>(row)];
    const Item& item = s.items[static_cast<size_t>(visit.item)];
    const uint64_t key = visit_key(item.key, visit.repeat);
    const auto at = static_cast<uint64_t>(epoch);

    const IndexVariant& form =
        pick(s.latents.index().variants(item.in_latents),
             RandomStream(s.options.seed, Purpose::kFlip, at, key).uniform(0));
    std::vector<std::span<std::byte>> tensors{stored};
    if (s.stores_masks && (s.latents.info(form).flags & cache::kSampleMasked)) {
      if (!batch.loss_mask.defined() && s.options.loss_masks)
        batch.loss_mask = at::ones({b, 1, rows, columns}, at::kFloat);
      if (!s.options.loss_masks) unused_mask.resize(static_cast<size_t>(rows * columns) * 4);
      tensors.push_back(s.options.loss_masks ? row_bytes(batch.loss_mask, row)
                                             : std::span<std::byte>(unused_mask));
    }
    s.latents.read_into(form, tensors);
    s.draw_latents(to_floats(stored, latents.dtype), epoch, key, sample_of(batch.latents, row));
    RandomStream(s.options.seed, Purpose::kNoise, at, key).fill_normal(sample_of(batch.noise, row));
    if (s.options.input_noise > 0)
      s.perturb_noise(epoch, key, sample_of(batch.noise, row), sample_of(batch.input_noise, row));

    const std::array<std::span<std::byte>, 2> embeddings{row_bytes(batch.prompt_embedding, row),
                                                         row_bytes(batch.pooled_embedding, row)};
    const cache::SampleInfo info = s.text.read_into(s.text_variant(item, epoch, key), embeddings);
    if (s.masked) {
      bool* const mask = batch.text_mask.mutable_data_ptr<bool>() + row * text.t5_length;
      for (int64_t token = 0; token < text.t5_length; ++token) mask[token] = token < info.t5_tokens;
    }
    batch.loss_weight.mutable_data_ptr<float>()[row] =
        static_cast<float>(item.regularization ? s.options.prior_loss_weight : 1);
    batch.visits.push_back(key);
    batch.names.emplace_back(s.latents.index().path(item.in_latents));
  }
  return batch;
}

}  // namespace flux
