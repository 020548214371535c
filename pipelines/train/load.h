// pipelines/train/load.h - opens what a run needs, and refuses what does not fit together.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <future>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/data/batch_reader.h"
#include "common/data/prompts.h"
#include "common/data/training_data.h"
#include "common/engine/model_file.h"
#include "common/engine/plan.h"
#include "common/engine/trainer.h"
#include "pipelines/train/options.h"
#include "pipelines/train/validation.h"

namespace flux::train {

using GroupParts = std::vector<std::unique_ptr<dist::Group>>;

/// All that training holds in memory.
struct Session {
  Options options;
  c10::Device device{c10::DeviceType::CPU};
  at::ScalarType compute = at::kFloat;
  std::unique_ptr<TrainingData> data;
  std::unique_ptr<Prompts> prompts;  // of pictures on the way; null without --sample-every
  dit::Config config;
  /// The weights that the run begins with; of a resumed full fine-tuning, those of its checkpoint.
  std::shared_ptr<engine::ModelFile> file;
  GroupParts parts;  // of `group`; the trainer uses them
  std::unique_ptr<engine::Trainer> trainer;
  engine::MemoryPlan plan;
  std::shared_future<std::string>
      model_sha256;  // weights_sha256 of --model in hex, computed beside the training, in rank 0
  /// Of a LoRA without --no-tags: dataset_metadata(), read beside the training; empty where the cache could not be read.
  std::shared_future<std::map<std::string, std::string>> dataset_metadata;

  dist::Group* group = nullptr;  // of several ranks
  /// Whether this rank writes: files, progress, stdout.
  bool leads() const { return options.launch.rank == 0; }

  int64_t step = 0;       // updates made
  DataPosition position;  // of the next batch

  int64_t validation_batches = 0;  // that pass through the model at a time; 0: no validation
  std::optional<Validation>
      validation;                  // the newest; of the weights as they are if its step is `step`
  std::optional<Validation> best;  // of the checkpoint that is marked

  double guidance() const { return options.guidance.value_or(1); }
};

/// What the transformer computes in: kFloat or kBFloat16.
at::ScalarType compute_type(const Options& options, at::Device device);

/// The word of --precision that is in force: "f32" or "bf16".
std::string precision_word(at::ScalarType compute);

/// The attention kernel that the steps of this run take, for its record: see attention_backend().
std::string attention_word(const Session& session);

/// What the engine is told; residency is what the user fixed, else "all in memory".
engine::TrainerOptions trainer_options(const Options& options,
                                       at::Device device,
                                       at::ScalarType compute);

/// Gives `ranks` its groups: all, those that share a copy of trained weights, twice, and those that have the same part of
/// their copies. Called by all ranks together.
GroupParts join_parts(dist::Group& group, engine::Ranks& ranks);

/// Picks the device and opens the caches. Throws CacheError for caches that cannot be joined.
Session open_data(const Options& options);

/// Throws UsageError for a file of quantised weights that are to be trained.
void require_trainable(const Options& options, const engine::ModelFile& file);

/// Reads the model's header and plans what the run takes. `weights` is the file to begin with.
/// Throws CacheError naming each field and both values: a text cache of another width or length than
/// the model takes (512 tokens; 256 too for a model without guidance); latents of other channels.
/// Throws UsageError for --guidance with a model that has no such input; InputError for the model's
/// file; ResourceError if no setting fits the memory.
void open_model(Session& session, const std::filesystem::path& weights);

/// Loads what stays in memory and makes new adapters.
void load_model(Session& session);

/// Starts to compute Session::model_sha256 in another thread; a file of 24 GB takes a while the
/// first time.
void start_hashing(Session& session);

/// Starts to read Session::dataset_metadata in another thread.
void start_reading_captions(Session& session);

}  // namespace flux::train
