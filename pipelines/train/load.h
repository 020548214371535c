// pipelines/train/load.h - opens what a run needs, and refuses what does not fit together.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <future>
#include <memory>
#include <string>
#include <vector>

#include "common/data/batch_reader.h"
#include "common/data/training_data.h"
#include "common/models/flux/load.h"
#include "common/models/lora/lora.h"
#include "pipelines/train/options.h"

namespace flux::train {

/// A tensor that is trained, and the moments of AdamW; all float32 on the device.
struct Parameter {
  std::string name;  // "double_blocks.0.img_attn.qkv.down"
  at::Tensor value;  // requires grad
  at::Tensor exp_avg, exp_avg_sq;
};

/// All that training holds in memory.
struct Session {
  Options options;
  c10::Device device{c10::DeviceType::CPU};
  at::ScalarType compute = at::kFloat;
  std::unique_ptr<TrainingData> data;
  dit::Model model;  // with the adapters attached
  lora::Adapters adapters;
  std::vector<Parameter> parameters;  // in the order of the adapters: down, up
  std::shared_future<std::string>
      model_sha256;  // weights_sha256 in hex, computed beside the training

  int64_t step = 0;       // updates made
  DataPosition position;  // of the next batch

  double guidance() const { return options.guidance.value_or(1); }
};

/// The word of --precision that is in force: "f32" or "bf16".
std::string precision_word(at::ScalarType compute);

/// Picks the device and opens the caches. Throws CacheError for caches that cannot be joined.
Session open_data(const Options& options);

/// Loads the transformer, makes new adapters and attaches them.
/// Throws CacheError naming each field and both values: a text cache of another width or length than
/// the model takes (512 tokens; 256 too for a model without guidance); latents of other channels.
/// Throws UsageError for --guidance with a model that has no such input; InputError for the model's
/// file.
void load_model(Session& session);

/// Starts to compute Session::model_sha256 in another thread; a file of 24 GB takes a while the
/// first time.
void start_hashing(Session& session);

}  // namespace flux::train
