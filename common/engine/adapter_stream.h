// common/engine/adapter_stream.h - adapters of streamed blocks with their states, which come and go with the block.
//
// For rank 16 the adapters of FLUX.1-dev, their gradients and AdamW's states are 1.1 GiB; streamed, two blocks' share.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "common/engine/block_loop.h"
#include "common/engine/choices.h"
#include "common/engine/record_file.h"
#include "common/engine/record_layout.h"
#include "common/engine/ring.h"
#include "common/models/lora/lora.h"
#include "common/optim/optimizer.h"

namespace flux::engine {

struct AdapterStreamOptions {
  at::Device device = at::kCPU;
  StreamFrom from = StreamFrom::kFile;  // kFile: a scratch file
  int64_t lookahead = 1;
  FileAccess access = kDefaultFileAccess;
  std::filesystem::path scratch{};  // folder
  bool keep_gradients = false;      // they leave with the block and wait
};

class AdapterStream {
 public:
  AdapterStream(int64_t num_blocks, const AdapterStreamOptions& options);

  /// Adds the adapter of `layer`, and its trainables behind those of earlier adapters of the block, with the next ids.
  void add(int64_t block,
           const lora::Module& module,
           Linear& layer,
           const Optimizer& optimizer,
           std::vector<Trainable>& trainables,
           uint64_t& next_id);
  /// Whether nothing was added.
  bool empty() const;
  /// Stores what was added. Throws what MemoryStore and FileArena throw.
  void start();

  /// What comes next; forgets what is there. Throws as Ring::set_schedule().
  void set_schedule(std::span<const int64_t> blocks);
  /// Waits for the block's adapters and puts them into their layers; a block without any does nothing. std::logic_error if
  /// another was to come.
  void enter(int64_t block, std::span<Trainable> trainables);
  /// Takes them out again. `changed`: they were updated. Gradients that are there are stored with them.
  void leave(int64_t block, std::span<Trainable> trainables, bool changed);
  bool is_there(int64_t block) const { return of(block).lease.position >= 0; }

  RingCounts counts() const { return ring_ ? ring_->counts() : RingCounts{}; }
  int64_t store_bytes() const;
  int64_t staging_bytes(at::Device device) const;
  bool in_host_memory() const { return options_.from == StreamFrom::kHost; }

 private:
  /// A trainable in its block's record.
  struct Slices {
    size_t value = 0, gradient = 0;
    std::vector<size_t> states;
  };
  struct Adapter {
    Linear* layer = nullptr;
    double scale = 1;
    lora::Module initial;                          // until start()
    std::vector<std::pair<size_t, Slices>> parts;  // with their places in kAdapterParts
  };
  struct OfBlock {
    RecordLayout layout;
    std::vector<Adapter> adapters;
    bool has_gradients = false;
    Lease lease{};
  };
  OfBlock& of(int64_t block) { return blocks_[static_cast<size_t>(block)]; }
  const OfBlock& of(int64_t block) const { return blocks_[static_cast<size_t>(block)]; }
  Slices add_slices(RecordLayout& layout,
                    const std::string& name,
                    const at::Tensor& value,
                    const Optimizer& optimizer) const;
  void bind(const OfBlock& of_block, const Slices& slices, Trainable& trainable) const;

  AdapterStreamOptions options_;
  RingOptions ring_options_;
  std::vector<OfBlock> blocks_;
  std::shared_ptr<RecordStore> store_;
  std::unique_ptr<Ring> ring_;
};

}  // namespace flux::engine
