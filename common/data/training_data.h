// common/data/training_data.h - a latents and a text cache joined: which samples there are, and
// what a visit of one yields.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "formats/cache/manifest.h"

namespace flux {

struct DataOptions {
  uint64_t seed = 0;
  int64_t batch_size = 0;        // 0: what the plan says for each of its data sets
  int64_t accumulation = 1;      // batches an update, see epoch_batches()
  bool sample_posterior = true;  // draw latents anew at each visit; false: their mean
  double prior_loss_weight = 1;  // of regularisation images
  /// Attention leaves out padding; nothing: as the text cache was made.
  std::optional<bool> text_mask{};
  bool loss_masks = true;  // use those that the latents cache holds
  double input_noise = 0;  // see Batch::input_noise
  /// Its strength is uniform in [0, input_noise), drawn for each visit.
  bool random_input_noise = false;
  /// Holds out about this share of the items by a hash of their paths, so that more items move none and an image at several
  /// resolutions is held out at all of them; at least one, none of regularisation. Only for caches that hold out none.
  double validation_split = 0;
  uint64_t validation_seed = 0;    // of that, and of what held-out items draw
  int64_t validation_samples = 0;  // held-out items that are read, the first by hash; 0: all
};

/// Sets the random draws of a held-out item apart from those of visits.
inline constexpr int64_t kHeldOutEpoch = -1;

/// One use of an item in an epoch.
struct Visit {
  int64_t item = 0;    // below num_items()
  int64_t repeat = 0;  // below the item's repeats
};

/// What one training step reads; all tensors on the CPU.
struct Batch {
  int64_t epoch = 0, index = 0;  // from 0; `index` within the epoch
  at::Tensor latents;            // [B, 16, H/8, W/8] float32, shifted and scaled
  at::Tensor noise;              // the same shape, standard normal, float32
  at::Tensor
      input_noise;  // noise + DataOptions::input_noise * another such draw; undefined if that is 0
  /// [B, L, X] in the cache's dtype; L is the cache's, or with a mask what the longest text of the batch has
  at::Tensor prompt_embedding;
  at::Tensor pooled_embedding;  // [B, V] in the cache's dtype
  at::Tensor text_mask;  // [B, L] bool, true = real token; undefined unless DataOptions::text_mask
  at::Tensor loss_mask;  // [B, 1, H/8, W/8] float32 in [0, 1], how much each latent pixel counts;
                         // ones for samples without a mask; undefined if the batch has none
  at::Tensor loss_weight;          // [B] float32: 1, or prior_loss_weight
  std::vector<uint64_t> visits;    // [B] names each visit's random streams: item and repeat
  std::vector<std::string> names;  // [B] for messages: path of the image in its subset

  int64_t size() const { return static_cast<int64_t>(visits.size()); }
};

/// What a batch holds, without reading it.
struct BatchOutline {
  int64_t epoch = 0;
  int64_t height = 0, width = 0;  // of its latents
  std::vector<uint64_t> visits;   // as Batch::visits
  int64_t size() const { return static_cast<int64_t>(visits.size()); }
};

/// One size that is trained at, in pixels, and its visits an epoch.
struct BucketVisits {
  int64_t width = 0, height = 0, visits = 0;
  bool operator==(const BucketVisits&) const = default;
};

/// What is trained on of one subset of the data set.
struct SubsetItems {
  int64_t subset = 0, dataset = 0, items = 0, visits = 0;  // visits an epoch
  bool regularization = false;
  bool operator==(const SubsetItems&) const = default;
};

/// The join of two caches (design: the trainer reads no data set file). Every random choice is a
/// stateless draw keyed by (seed, purpose, epoch, item and repeat), so a batch is the same whoever
/// loads it and whatever was loaded before.
class TrainingData {
 public:
  /// Opens both caches, marks them as being read while this lives (cache::ReaderLock), and joins
  /// them by item. Items quarantined in either are left out, as are
  /// held-out validation items; both are counted. Throws UsageError for a validation_split of caches that hold out items
  /// already; CacheError: a cache is absent or damaged,
  /// the plans differ, items are in one of them only (their number and five names), the weights of
  /// an item's variants do not sum to 1, nothing is left to train on, a subset drops captions but there is no empty one.
  TrainingData(const std::filesystem::path& latents,
               const std::filesystem::path& text,
               const DataOptions& options);
  ~TrainingData();
  TrainingData(const TrainingData&) = delete;
  TrainingData& operator=(const TrainingData&) = delete;

  const cache::Manifest& latents_manifest() const;
  const cache::Manifest& text_manifest() const;
  int64_t num_items() const;
  int64_t num_visits() const;     // an epoch
  int64_t num_batches() const;    // an epoch: ceil(visits / batch size) of each bucket
  int64_t largest_batch() const;  // samples of the largest batch of an epoch
  /// Tokens of the longest text that a batch may hold: with a mask, of those that are cached, which takes a look at every
  /// segment; else, and of more than 100,000 items, the cache's length.
  int64_t longest_text() const;
  int64_t num_regularization() const;
  int64_t num_quarantined() const;
  int64_t num_validation() const;  // held out
  int64_t num_held_out() const;    // those of them that are read
  bool has_text_mask() const;      // batches have one
  bool has_loss_masks() const;     // some batches may have one
  /// By width, then height.
  std::vector<BucketVisits> buckets() const;
  /// Every subset of the plan, in its order.
  std::vector<SubsetItems> subsets() const;
  /// Hex digests of all that batches take from each cache: its parameters, plan, items and samples.
  std::string latents_digest() const;
  std::string text_digest() const;

  /// The batches of an epoch in their order. Each holds visits of one data set and one bucket. `accumulation` batches are
  /// formed and ordered as one and then cut, so that batches of 2 in updates of 2 are batches of 4, halved.
  std::vector<std::vector<Visit>> epoch_batches(int64_t epoch) const;
  BatchOutline outline(int64_t epoch, const std::vector<Visit>& visits) const;
  /// Reads one batch; safe from any thread, without LibTorch's thread pool. Throws CacheError if a
  /// segment is damaged.
  Batch load(int64_t epoch, int64_t index, const std::vector<Visit>& visits) const;

  /// Of the held-out items that are read, as buckets().
  std::vector<BucketVisits> held_out_buckets() const;
  /// Batches of them, each of one data set and bucket, none larger than largest_batch().
  int64_t num_held_out_batches() const;
  int64_t held_out_batch_size(int64_t index) const;
  /// The same at every call, of every `seed`: the mean of the latents, one caption, which is never dropped. Without noise and
  /// loss_weight. Throws as load().
  Batch load_held_out(int64_t index) const;
  /// For Batch::noise of such a batch: fixed by validation_seed, the item and `number`.
  at::Tensor held_out_noise(const Batch& batch, int64_t number) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace flux
