// common/engine/model_blocks.h - a transformer whose first blocks stay in memory while the others stream.
//
// Double blocks come first and cost as much to compute as single ones with 2.4 times the bytes, so what memory there is
// goes to them.
//
// Ranks may share trained weights out (Sharing): then what is said here of a block's weights, states and gradients that wait
// is of this rank's part of them, which stays or streams, and all blocks come through the ring, put together from all
// ranks' parts.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "common/engine/adapter_stream.h"
#include "common/engine/block_loop.h"
#include "common/engine/choices.h"
#include "common/engine/gather_store.h"
#include "common/engine/model_file.h"
#include "common/engine/ring.h"
#include "common/engine/state_stream.h"
#include "common/models/lora/lora.h"
#include "common/optim/optimizer.h"

namespace flux::engine {

struct ModelOptions {
  at::ScalarType compute = at::kBFloat16;  // kFloat|kBFloat16: of weights and activations
  std::optional<QuantFormat> base{};       // how matrices of frozen blocks are held
  at::Device device = at::kCPU;
  bool train_weights = false;    // full fine-tuning
  int64_t resident_blocks = -1;  // the first blocks that stay in memory; -1: all
  std::vector<char>
      kept_graphs{};  // by block: whether it is not left at the turn-around; empty: none
  StreamFrom stream_from = StreamFrom::kFile;
  int64_t lookahead = 1;  // of the ring: 1 to 3
  FileAccess access = kDefaultFileAccess;
  std::filesystem::path scratch{};  // folder, for trained weights that stream from a file
  /// Trained blocks take their gradients along when they leave, for an update at their next visit; in float32 if
  /// steps have several micro-batches.
  bool keep_gradients = false, several_micro_batches = false;
  bool stream_adapters = false;  // those of streamed blocks come and go with them
  bool stream_states = false;    // of trained blocks that stay in memory too
  Sharing sharing{};             // of trained weights
};

class ModelBlocks final : public Blocks {
 public:
  /// `optimizer` makes the states of what is trained; it must outlive this. With a device of Meta nothing is read and
  /// `file` may be null: a plan. Throws what ModelFile, FileArena and Ring throw.
  ModelBlocks(const dit::Config& config,
              std::shared_ptr<ModelFile> file,
              const Optimizer& optimizer,
              const ModelOptions& options);
  ~ModelBlocks() override;

  /// Puts adapters into the model and trains them: they and their states stay in memory, on the device, but for those that
  /// stream. Parts of them are left out as `dropout` says, which must outlive this. Throws what AdapterStream throws.
  void train(const lora::Adapters& adapters, const AdapterDropout* dropout = nullptr);

  /// Puts frozen adapters into the model, on the device, each with its multiplier; may be called several times. Throws
  /// InputError, as lora::attach() does.
  void attach(const lora::Adapters& adapters, double multiplier);

  const dit::Weights& weights() const override { return weights_; }
  int64_t num_blocks() const { return num_blocks_; }
  bool is_resident(int64_t block) const { return block < resident_; }
  bool trainables_stay(int64_t block) const override {
    return is_resident(block) || !(options_.train_weights || adapters_);
  }
  /// The first block with something to train, -1 for what is outside; for LoopOptions.
  int64_t first_trained() const;

  Share* share(int64_t block) override;
  void enter(int64_t block) override;
  void leave(int64_t block, bool changed) override;
  void open(int64_t block, size_t i) override;
  void close(int64_t block, size_t i, bool changed) override;
  std::span<Trainable> trainables(int64_t block) override;
  std::span<Trainable> outer_trainables() override { return outer_; }
  void visit(std::span<const int64_t> blocks,
             const std::function<bool(int64_t block)>& work) override;
  void pass(const std::function<bool(int64_t block)>& work) override;

  /// Calls `work` with every trainable while it is there, with its states; it returns whether it changed it.
  void for_all_trainables(const std::function<bool(Trainable&)>& work);

  /// Of the rings; zeros without one.
  RingCounts ring_counts() const;
  bool streams() const { return store_ != nullptr || shared(); }
  /// Between the store and the rings in a step, once the first is over.
  struct Traffic {
    int64_t read = 0, written = 0;
  };
  Traffic bytes_per_step();
  /// Of weights that stream from host memory.
  int64_t host_store_bytes() const;
  /// Of states that stay in host memory whatever the device is (StateTensor::on_host), and of a copy of the largest
  /// parameter on its way to them.
  int64_t host_state_bytes() const { return host_state_bytes_; }
  int64_t host_copy_bytes() const { return host_copy_bytes_; }
  /// Host memory that streaming from `file` on `device` holds beside the ring.
  int64_t staging_bytes(const ModelFile& file, at::Device device) const;

 private:
  struct Home;  // a block's layout and tensors
  bool is_plan() const;
  bool shared() const { return options_.sharing.on(); }
  bool in_ring(int64_t block) const { return shared() || !is_resident(block); }
  bool states_stream(int64_t block) const {
    return options_.train_weights && (options_.stream_states || !is_resident(block));
  }
  void make_outer();
  void make_home(int64_t block);
  void make_store();
  void fill_store();
  void make_gather_store();
  void read_part(int64_t block, std::span<std::byte> to) const;
  void bind_owned(int64_t block, const at::Tensor& part);
  void unbind_owned(int64_t block);
  void put_gradients_away(int64_t block);
  void visit_owned(std::span<const int64_t> blocks, const std::function<bool(int64_t block)>& work);
  void begin_pass(std::vector<int64_t> cycle);
  std::vector<at::Tensor> new_states(const at::Tensor& value, int64_t offset = 0);
  Home* home_of(const std::string& path);
  void set_tensors(int64_t block, const std::function<at::Tensor(size_t slice)>& value);
  void bind(int64_t block);
  void unbind(int64_t block);
  void set_magnitudes();
  void abandon();
  void go_through(std::span<const int64_t> blocks,
                  bool with_weights,
                  const std::function<bool(int64_t block)>& work);
  std::vector<int64_t> step_cycle() const;
  std::vector<size_t> entries_from(int64_t block, bool ascending) const;
  RingOptions ring_options() const;
  RingOptions gather_options() const;
  int64_t stored_bytes(int64_t block) const;
  int64_t part_bytes(int64_t block) const;
  Ring& ring();

  dit::Config config_;
  std::shared_ptr<ModelFile> file_;
  const Optimizer& optimizer_;
  ModelOptions options_;
  int64_t num_blocks_ = 0, resident_ = 0;
  dit::Weights weights_;
  std::vector<Home> homes_;
  std::vector<Trainable> outer_;
  uint64_t next_id_ = 0;  // of a trainable
  int64_t host_state_bytes_ = 0, host_copy_bytes_ = 0;
  // by block; those that stay in memory have no bytes there; behind them states and gradients that wait
  std::shared_ptr<RecordStore> store_;
  std::vector<StateEntry> entries_;      // of trained blocks whose states stream
  std::unique_ptr<StateStream> states_;  // of them
  std::unique_ptr<AdapterStream> adapters_;
  std::vector<int64_t> visited_;         // in visit(): the blocks whose states stream, from here on
  std::unique_ptr<Ring> ring_;           // made at the first use, when it is known what is trained
  std::shared_ptr<GatherStore> gather_;  // of shared weights: what the ring reads
  int64_t to_come_ = 0;                  // through the ring, until that pass is over
  std::unique_ptr<Ring> part_ring_;      // of parts that stream, outside of steps
};

}  // namespace flux::engine
