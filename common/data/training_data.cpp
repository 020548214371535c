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

/// What names the random numbers of one use of an item.
struct Draws {
  uint64_t seed = 0, epoch = 0, visit = 0;
  RandomStream operator()(Purpose purpose) const { return {seed, purpose, epoch, visit}; }
};

// Batches do not mix these: data set, rows and columns of the latents.
using Group = std::tuple<int64_t, uint32_t, uint32_t>;

uint64_t first_bytes(const Sha256Digest& digest) {
  uint64_t value = 0;
  for (size_t i = 0; i < 8; ++i) value = value << 8 | static_cast<uint64_t>(digest[i]);
  return value;
}

/// Where in [0, 1) an item stands for a split by hash.
double split_place(uint64_t seed, std::string_view path) {
  return std::ldexp(static_cast<double>(first_bytes(
                        Sha256().add("held out").add_u64(seed).add_field(path).digest())),
                    -64);
}

uint64_t visit_key(uint64_t item_key, int64_t repeat) {
  return item_key + static_cast<uint64_t>(repeat) * 0x9E3779B97F4A7C15ull;
}

constexpr auto kHeldOut = static_cast<uint64_t>(kHeldOutEpoch);

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

std::vector<BucketVisits> by_size(const std::map<Group, int64_t>& group_visits) {
  std::map<std::pair<uint32_t, uint32_t>, int64_t> visits;
  for (const auto& [group, count] : group_visits)
    visits[{std::get<2>(group), std::get<1>(group)}] += count;
  std::vector<BucketVisits> out;
  for (const auto& [size, count] : visits)
    out.push_back({size.first * kPixelsPerLatent, size.second * kPixelsPerLatent, count});
  return out;
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
  void hold_out();
  const IndexVariant& text_variant(const Item& item, const Draws& draws) const;
  void draw_latents(std::span<const float> stored, const Draws& draws, std::span<float> out) const;
  void perturb_noise(const Draws& draws, std::span<const float> noise, std::span<float> out) const;
  /// What load() and load_held_out() return, of items with their draws.
  Batch read(int64_t epoch,
             int64_t index,
             std::span<const std::pair<const Item*, Draws>> samples) const;

  DataOptions options;
  cache::ReaderLock latents_lock, text_lock;  // taken before the manifests are read
  cache::Cache latents, text;
  dataset::Plan plan;
  std::vector<Item> items;     // sorted by digest, so that the caches' order changes nothing
  std::vector<Item> held_out;  // those that are read, sorted as they are
  std::vector<std::vector<const Item*>> held_out_batches;
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
  std::vector<std::pair<Sha256Digest, Item>> joined, apart;  // to train on, held out
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
    const bool validation = item.flags & cache::kItemValidation;
    num_regularization += regularization && !validation;
    (validation ? apart : joined)
        .push_back(
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
  for (auto& [from, to] : {std::pair{&joined, &items}, {&apart, &held_out}}) {
    std::sort(
        from->begin(), from->end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    to->reserve(from->size());
    for (const auto& [digest, item] : *from) to->push_back(item);
  }
  if (options.validation_split > 0) hold_out();
  num_validation = std::ssize(held_out);
  if (items.empty()) {
    throw CacheError(fmt::format(
        "{} and {} have no item to train on ({} quarantined, {} held out for validation)",
        show(latents.folder()),
        show(text.folder()),
        num_quarantined,
        num_validation));
  }
  if (options.validation_samples > 0 && num_validation > options.validation_samples)
    held_out.resize(static_cast<size_t>(options.validation_samples));
}

void TrainingData::State::hold_out() {
  if (!held_out.empty())
    throw UsageError(fmt::format("--validation-split has no effect: {} holds out {} items already",
                                 show(latents.folder()),
                                 held_out.size()),
                     "leave it out, or make the caches without validation_split");
  const auto place = [&](const Item& item) {
    return item.regularization
               ? 1.0
               : split_place(options.validation_seed, latents.index().path(item.in_latents));
  };
  double limit = options.validation_split;
  double lowest = 1;
  for (const Item& item : items) lowest = std::min(lowest, place(item));
  if (lowest >= limit && lowest < 1) limit = std::nextafter(lowest, 1.0);
  std::vector<Item> training;
  for (const Item& item : items) (place(item) < limit ? held_out : training).push_back(item);
  items = std::move(training);
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
  std::map<Group, std::vector<const Item*>> of_group;
  for (const Item& item : held_out) of_group[group(item)].push_back(&item);
  for (const auto& [group, all] : of_group) {
    const auto size = static_cast<size_t>(std::min(batch_size(std::get<0>(group)), largest_batch));
    for (size_t i = 0; i < all.size(); i += size)
      held_out_batches.emplace_back(
          all.begin() + static_cast<std::ptrdiff_t>(i),
          all.begin() + static_cast<std::ptrdiff_t>(std::min(i + size, all.size())));
  }
}

const IndexVariant& TrainingData::State::text_variant(const Item& item, const Draws& draws) const {
  const auto& subset = plan.subsets[item.subset];
  bool dropped = false;
  if (draws.epoch != kHeldOut) {
    // epochs are counted from 1 there, as in sd-scripts
    const bool whole_epoch =
        subset.caption_dropout_every_n_epochs > 0 &&
        (draws.epoch + 1) % static_cast<uint64_t>(subset.caption_dropout_every_n_epochs) == 0;
    dropped =
        whole_epoch || (subset.caption_dropout_rate > 0 &&
                        draws(Purpose::kCaptionDropout).uniform(0) < subset.caption_dropout_rate);
  }
  return pick(text.index().variants(dropped ? empty_caption : item.in_text),
              draws(Purpose::kCaptionVariant).uniform(0));
}

// `stored` is one sample, or mean and then log-variance.
void TrainingData::State::draw_latents(std::span<const float> stored,
                                       const Draws& draws,
                                       std::span<float> out) const {
  const size_t n = out.size();
  const bool draw = stored.size() == 2 * n && options.sample_posterior && draws.epoch != kHeldOut;
  const RandomStream stream = draws(Purpose::kPosterior);
  for (size_t i = 0; i < n; ++i) {
    double value = stored[i];
    if (draw)
      value += std::exp(0.5 * std::clamp(static_cast<double>(stored[n + i]), -30.0, 20.0)) *
               stream.normal(i);
    out[i] = static_cast<float>((value - shift) * scale);
  }
}

void TrainingData::State::perturb_noise(const Draws& draws,
                                        std::span<const float> noise,
                                        std::span<float> out) const {
  const RandomStream stream = draws(Purpose::kInputNoise);
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
int64_t TrainingData::longest_text() const {
  const State& s = *state_;
  constexpr int64_t kMostItems = 100'000;
  if (!s.masked || s.text.index().num_items() > kMostItems) return s.text.layout().t5_length;
  int64_t longest = 1;
  for (int64_t i = 0; i < s.text.index().num_items(); ++i)
    for (const IndexVariant& variant : s.text.index().variants(i))
      longest = std::max<int64_t>(longest, s.text.info(variant).t5_tokens);
  return longest;
}
int64_t TrainingData::num_regularization() const { return state_->num_regularization; }
int64_t TrainingData::num_quarantined() const { return state_->num_quarantined; }
int64_t TrainingData::num_validation() const { return state_->num_validation; }
int64_t TrainingData::num_held_out() const { return std::ssize(state_->held_out); }
bool TrainingData::has_text_mask() const { return state_->masked; }
bool TrainingData::has_loss_masks() const {
  return state_->stores_masks && state_->options.loss_masks;
}

std::vector<BucketVisits> TrainingData::buckets() const { return by_size(state_->group_visits); }

std::vector<SubsetItems> TrainingData::subsets() const {
  std::vector<SubsetItems> out;
  for (const auto& subset : state_->plan.subsets)
    out.push_back(
        {.subset = subset.index, .dataset = subset.dataset, .regularization = subset.is_reg});
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
  if (trains) batch.noise = at::empty({b, kLatentChannels, rows, columns}, at::kFloat);
  if (trains && options.input_noise > 0)
    batch.input_noise = at::empty(batch.noise.sizes(), at::kFloat);
  // what no sample of the batch attends to is left out: the same velocity, in less time
  int64_t length = masked ? 1 : of_text.t5_length;
  if (masked)
    for (const auto& [item, draws] : samples)
      length = std::max<int64_t>(length, text.info(text_variant(*item, draws)).t5_tokens);
  batch.prompt_embedding = at::empty({b, length, of_text.t5_width}, text_type);
  batch.pooled_embedding = at::empty({b, of_text.clip_width}, text_type);
  if (masked) batch.text_mask = at::empty({b, length}, at::kBool);
  if (trains) batch.loss_weight = at::empty({b}, at::kFloat);
  const int64_t elements = kLatentChannels * rows * columns;
  const auto sample_of = [&](const at::Tensor& tensor, int64_t row) {
    return std::span(tensor.mutable_data_ptr<float>() + row * elements,
                     static_cast<size_t>(elements));
  };
  std::vector<std::byte> unused_mask,
      stored(static_cast<size_t>(of_latents.channels * rows * columns *
                                 dtype_bits(of_latents.dtype) / 8));

  std::vector<std::byte> padded(masked ? static_cast<size_t>(of_text.t5_length * of_text.t5_width *
                                                             dtype_bits(of_text.dtype) / 8)
                                       : 0);

  for (int64_t row = 0; row < b; ++row) {
    const auto& [item, draws] = samples[static_cast<size_t>(row)];
    const IndexVariant& form =
        pick(latents.index().variants(item->in_latents), draws(Purpose::kFlip).uniform(0));
    std::vector<std::span<std::byte>> tensors{stored};
    if (stores_masks && (latents.info(form).flags & cache::kSampleMasked)) {
      if (!batch.loss_mask.defined() && options.loss_masks)
        batch.loss_mask = at::ones({b, 1, rows, columns}, at::kFloat);
      if (!options.loss_masks) unused_mask.resize(static_cast<size_t>(rows * columns) * 4);
      tensors.push_back(options.loss_masks ? row_bytes(batch.loss_mask, row)
                                           : std::span<std::byte>(unused_mask));
    }
    latents.read_into(form, tensors);
    draw_latents(to_floats(stored, of_latents.dtype), draws, sample_of(batch.latents, row));
    if (trains) draws(Purpose::kNoise).fill_normal(sample_of(batch.noise, row));
    if (batch.input_noise.defined())
      perturb_noise(draws, sample_of(batch.noise, row), sample_of(batch.input_noise, row));

    const std::span<std::byte> prompt = row_bytes(batch.prompt_embedding, row);
    const std::array<std::span<std::byte>, 2> embeddings{masked ? std::span(padded) : prompt,
                                                         row_bytes(batch.pooled_embedding, row)};
    const cache::SampleInfo info = text.read_into(text_variant(*item, draws), embeddings);
    if (masked) {
      std::copy_n(padded.begin(), prompt.size(), prompt.begin());
      bool* const mask = batch.text_mask.mutable_data_ptr<bool>() + row * length;
      for (int64_t token = 0; token < length; ++token) mask[token] = token < info.t5_tokens;
    }
    if (trains)
      batch.loss_weight.mutable_data_ptr<float>()[row] =
          static_cast<float>(item->regularization ? options.prior_loss_weight : 1);
    batch.visits.push_back(draws.visit);
    batch.names.emplace_back(latents.index().path(item->in_latents));
  }
  return batch;
}

BatchOutline TrainingData::outline(int64_t epoch, const std::vector<Visit>& visits) const {
  const State& s = *state_;
  const auto [dataset, rows, columns] = s.group(s.items[static_cast<size_t>(visits.at(0).item)]);
  BatchOutline out{.epoch = epoch, .height = rows, .width = columns, .visits = {}};
  for (const Visit& visit : visits)
    out.visits.push_back(visit_key(s.items[static_cast<size_t>(visit.item)].key, visit.repeat));
  return out;
}

Batch TrainingData::load(int64_t epoch, int64_t index, const std::vector<Visit>& visits) const {
  std::vector<std::pair<const Item*, Draws>> samples;
  for (const Visit& visit : visits) {
    const Item& item = state_->items[static_cast<size_t>(visit.item)];
    samples.emplace_back(
        &item,
        Draws{
            state_->options.seed, static_cast<uint64_t>(epoch), visit_key(item.key, visit.repeat)});
  }
  return state_->read(epoch, index, samples);
}

std::vector<BucketVisits> TrainingData::held_out_buckets() const {
  std::map<Group, int64_t> items;
  for (const Item& item : state_->held_out) ++items[state_->group(item)];
  return by_size(items);
}

int64_t TrainingData::num_held_out_batches() const { return std::ssize(state_->held_out_batches); }

int64_t TrainingData::held_out_batch_size(int64_t index) const {
  return std::ssize(state_->held_out_batches.at(static_cast<size_t>(index)));
}

Batch TrainingData::load_held_out(int64_t index) const {
  std::vector<std::pair<const Item*, Draws>> samples;
  for (const Item* item : state_->held_out_batches.at(static_cast<size_t>(index)))
    samples.emplace_back(item, Draws{state_->options.validation_seed, kHeldOut, item->key});
  return state_->read(kHeldOutEpoch, index, samples);
}

at::Tensor TrainingData::held_out_noise(const Batch& batch, int64_t number) const {
  const at::Tensor noise = at::empty(batch.latents.sizes(), at::kFloat);
  const int64_t elements = noise.numel() / batch.size();
  for (int64_t row = 0; row < batch.size(); ++row) {
    const Draws draws{state_->options.validation_seed,
                      kHeldOut,
                      visit_key(batch.visits[static_cast<size_t>(row)], number)};
    draws(Purpose::kNoise)
        .fill_normal(std::span(noise.mutable_data_ptr<float>() + row * elements,
                               static_cast<size_t>(elements)));
  }
  return noise;
}

}  // namespace flux
