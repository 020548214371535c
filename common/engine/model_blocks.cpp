#include "common/engine/model_blocks.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "common/core/hash.h"
#include "common/core/progress.h"
#include "common/engine/file_arena.h"
#include "common/engine/share_layout.h"
#include "common/models/flux/names.h"
#include "common/tensor/memory.h"

namespace flux::engine {
namespace {

std::span<std::byte> bytes_of(const at::Tensor& record) {
  return {static_cast<std::byte*>(record.mutable_data_ptr()), record.nbytes()};
}

/// One thread alone would wait for the disk, or for the fresh pages that it fills.
void read_on_all_threads(const ModelFile& file, int64_t block, std::span<std::byte> to) {
  constexpr int64_t kPartBytes = int64_t{8} << 20;
  const auto parts = file.parts(block, kPartBytes);
  at::parallel_for(0, std::ssize(parts), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [offset, bytes] = parts[static_cast<size_t>(i)];
      file.read(block, offset, to.subspan(static_cast<size_t>(offset), static_cast<size_t>(bytes)));
    }
  });
}

}  // namespace

struct ModelBlocks::Home {
  std::string prefix;                 // "double_blocks.3."
  RecordLayout layout;                // of its weights
  at::Tensor record;                  // while the block is there
  Lease lease;                        // of a streamed one
  std::vector<Trainable> trainables;  // if weights are trained, in the order of the layout
  Share share;                        // of ranks that share them
  at::Tensor part;                    // this rank's, while it is there
  Lease part_lease;                   // of a streamed one
  size_t first_entry = 0;             // of states that stream
  bool has_gradients = false;         // that were put away and wait
  bool gradients_taken = false;       // since the block was entered
};

ModelBlocks::ModelBlocks(const dit::Config& config,
                         std::shared_ptr<ModelFile> file,
                         const Optimizer& optimizer,
                         const ModelOptions& options)
    : config_(config),
      file_(std::move(file)),
      optimizer_(optimizer),
      options_(options),
      num_blocks_(config.num_double_blocks + config.num_single_blocks),
      resident_(options.resident_blocks < 0 ? num_blocks_
                                            : std::min(options.resident_blocks, num_blocks_)),
      weights_(dit::empty_weights(config)),
      homes_(static_cast<size_t>(num_blocks_)) {
  if (options.train_weights && options.base)
    throw std::invalid_argument("quantised weights cannot be trained");
  if (shared() && !options.train_weights)
    throw std::invalid_argument("ranks share out weights that are trained");
  make_outer();
  for (int64_t block = 0; block < num_blocks_; ++block) make_home(block);
  make_store();
  if (shared()) make_gather_store();
}

ModelBlocks::~ModelBlocks() = default;

bool ModelBlocks::is_plan() const { return options_.device.is_meta(); }

std::vector<at::Tensor> ModelBlocks::new_states(const at::Tensor& value, int64_t offset) {
  const MemoryScope scope(MemoryCause::kOptimizer);
  std::vector<at::Tensor> states;
  for (const StateTensor& state :
       optimizer_.state_layout(value.sizes(), value.scalar_type(), offset)) {
    const auto options = value.options().dtype(state.dtype);
    const bool elsewhere = state.on_host && value.is_cuda();
    states.push_back(at::zeros(state.shape, elsewhere ? options.device(at::kCPU) : options));
    if (!state.on_host) continue;
    const auto bytes = static_cast<int64_t>(states.back().nbytes());
    host_state_bytes_ += (bytes + kMemoryGranule - 1) / kMemoryGranule * kMemoryGranule;
    host_copy_bytes_ = std::max(host_copy_bytes_, static_cast<int64_t>(value.nbytes()));
  }
  return states;
}

void ModelBlocks::make_outer() {
  const MemoryScope scope(MemoryCause::kWeights);
  std::map<std::string, std::vector<int64_t>> shapes;
  for (auto& [name, shape] : dit::tensor_shapes(config_)) shapes[name] = shape;
  dit::for_each_tensor(weights_, [&](const std::string& name, at::Tensor& tensor) {
    if (name.find("_blocks.") != std::string::npos) return;
    const auto options = at::TensorOptions().dtype(options_.compute);
    if (is_plan()) {
      tensor = at::empty(shapes.at(name), options.device(options_.device));
    } else {
      tensor = at::empty(shapes.at(name), options);
      file_->read_tensor(name, tensor);
      tensor = tensor.to(options_.device);
    }
    if (!options_.train_weights) return;
    tensor.requires_grad_(true);
    outer_.push_back({name, tensor, new_states(tensor.detach()), next_id_++});
  });
}

void ModelBlocks::make_home(int64_t block) {
  Home& home = homes_[static_cast<size_t>(block)];
  home.prefix = block_prefix(config_, block);
  home.layout = block_layout(config_, block, options_.compute, options_.base);
  home.first_entry = entries_.size();
  if (options_.train_weights) {
    std::vector<std::vector<int64_t>> shapes;
    for (const Slice& weight : home.layout.slices()) {
      home.trainables.push_back({home.prefix + weight.name, {}, {}, next_id_++});
      shapes.push_back(weight.shape);
    }
    if (shared()) {
      const auto [world, rank, group] = options_.sharing;
      home.layout = shared_layout(home.layout, world);
      home.share = make_share(home.layout, home.trainables, world, rank);
      shapes.clear();
      for (const int64_t count : home.share.counts) shapes.push_back({count});
    }
    for (size_t i = 0; i < shapes.size(); ++i) {
      if (!states_stream(block)) break;
      const auto& shape = shapes[i];
      const int64_t offset = shared() ? home.share.owned[i].offset : 0;
      StateEntry entry;
      for (const auto& state : optimizer_.state_layout(shape, options_.compute, offset))
        entry.states.add(state.name, state.shape, state.dtype);
      if (options_.keep_gradients && !is_resident(block))
        entry.gradient.add(
            "gradient", shape, options_.several_micro_batches ? at::kFloat : options_.compute);
      entries_.push_back(std::move(entry));
    }
  }
  if (!is_resident(block)) return;
  const MemoryScope scope(MemoryCause::kWeights);
  const auto bytes = at::TensorOptions().dtype(at::kByte);
  at::Tensor& staying = shared() ? home.part : home.record;
  if (is_plan()) {
    staying = at::empty({part_bytes(block)}, bytes.device(options_.device));
  } else {
    staying = at::empty({part_bytes(block)}, bytes);
    if (shared())
      read_part(block, bytes_of(staying));
    else
      read_on_all_threads(*file_, block, bytes_of(staying));
    staying = staying.to(options_.device);
  }
  shared() ? bind_owned(block, staying) : bind(block);
  if (states_stream(block)) return;
  for (Trainable& trainable : owned(block))
    trainable.states = new_states(trainable.value.detach(), trainable.offset);
}

/// Of the record, what this rank holds; all of it if ranks share nothing.
int64_t ModelBlocks::part_bytes(int64_t block) const {
  return homes_[static_cast<size_t>(block)].layout.bytes() / options_.sharing.world;
}

void ModelBlocks::read_part(int64_t block, std::span<std::byte> to) const {
  const Home& home = homes_[static_cast<size_t>(block)];
  constexpr int64_t kPieceBytes = int64_t{8} << 20;
  struct Piece {
    int64_t from, to, bytes;
  };
  std::vector<Piece> pieces;
  const auto size = static_cast<int64_t>(c10::elementSize(options_.compute));
  for (size_t i = 0; i < home.share.owned.size(); ++i) {
    const Trainable& owned = home.share.owned[i];
    const RecordLayout& file = file_->layout(block);
    const Slice& slice = file.slices()[*file.find(owned.name.substr(home.prefix.size()))];
    // between slices there is room up to their alignment, here and there
    const int64_t bytes =
        (home.share.counts[i] * size + kSliceAlignment - 1) / kSliceAlignment * kSliceAlignment;
    for (int64_t done = 0; done < bytes; done += kPieceBytes)
      pieces.push_back({slice.offset + owned.offset * size + done,
                        home.share.begins[i] * size + done,
                        std::min(kPieceBytes, bytes - done)});
  }
  at::parallel_for(0, std::ssize(pieces), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[static_cast<size_t>(i)];
      file_->read(block,
                  piece.from,
                  to.subspan(static_cast<size_t>(piece.to), static_cast<size_t>(piece.bytes)));
    }
  });
}

void ModelBlocks::make_store() {
  if (resident_ == num_blocks_ && entries_.empty()) return;
  std::vector<int64_t> bytes;
  for (int64_t block = 0; block < num_blocks_; ++block) bytes.push_back(stored_bytes(block));
  std::ranges::copy(StateStream::record_bytes(entries_), std::back_inserter(bytes));
  const bool host = options_.stream_from == StreamFrom::kHost;
  if (is_plan())
    store_ = std::make_shared<PlannedStore>(bytes, options_.train_weights);
  else if (!options_.train_weights && !host)
    store_ = file_;
  else if (host)
    store_ = std::make_shared<MemoryStore>(bytes, MemoryStore::Pin::kIfPossible);
  else
    store_ = std::make_shared<FileArena>(options_.scratch, bytes, options_.access);
  if (!entries_.empty())
    states_ = std::make_unique<StateStream>(
        store_, num_blocks_, entries_, options_.device, options_.lookahead);
  if (!is_plan() && store_ != file_ && resident_ < num_blocks_) fill_store();
}

/// With weights; states are zero.
void ModelBlocks::fill_store() {
  Progress progress("copying weights", "blocks", num_blocks_ - resident_);
  int64_t largest = 0;
  for (int64_t block = resident_; block < num_blocks_; ++block)
    largest = std::max(largest, stored_bytes(block));
  const HostMemory buffer(largest, MemoryCause::kRing);
  for (int64_t block = resident_; block < num_blocks_; ++block) {
    const std::span<std::byte> weights(buffer.data(), static_cast<size_t>(stored_bytes(block)));
    if (shared())
      read_part(block, weights);
    else
      file_->read(block, weights);
    store_->write(block, weights);
    progress.update(block - resident_ + 1);
  }
}

void ModelBlocks::make_gather_store() {
  std::vector<at::Tensor> staying;
  std::vector<int64_t> bytes, streamed;
  for (int64_t block = 0; block < num_blocks_; ++block) {
    staying.push_back(homes_[static_cast<size_t>(block)].part);
    bytes.push_back(part_bytes(block));
    if (!is_resident(block)) streamed.push_back(block);
  }
  gather_ =
      std::make_shared<GatherStore>(store_, std::move(staying), std::move(bytes), options_.sharing);
  if (streamed.empty()) return;
  RingOptions options = ring_options();
  options.repeats = false;
  part_ring_ = std::make_unique<Ring>(store_, options_.device, std::move(streamed), options);
}

ModelBlocks::Home* ModelBlocks::home_of(const std::string& path) {
  const auto home =
      std::ranges::find_if(homes_, [&](const Home& h) { return path.starts_with(h.prefix); });
  return home == homes_.end() ? nullptr : &*home;
}

void ModelBlocks::train(const lora::Adapters& adapters, const AdapterDropout* dropout) {
  if (options_.stream_adapters && resident_ < num_blocks_)
    adapters_ = std::make_unique<AdapterStream>(
        num_blocks_,
        AdapterStreamOptions{.device = options_.device,
                             .from = options_.stream_from,
                             .lookahead = options_.lookahead,
                             .access = options_.access,
                             .scratch = options_.scratch,
                             .keep_gradients = options_.keep_gradients});
  std::map<std::string, Linear*> layers;
  dit::for_each_linear(weights_,
                       [&](const std::string& path, Linear& layer) { layers[path] = &layer; });
  lora::Adapters staying;
  const MemoryScope scope(MemoryCause::kWeights);
  for (lora::Module module : adapters.modules) {
    Home* home = home_of(module.path);
    auto& trainables = home ? home->trainables : outer_;
    if (home && adapters_ && !is_resident(home - homes_.data())) {
      adapters_->add(
          home - homes_.data(), module, *layers.at(module.path), optimizer_, trainables, next_id_);
      continue;
    }
    for (size_t part = 0; part < kAdapterParts.size(); ++part) {
      at::Tensor& tensor = *module.parts()[part];
      if (!tensor.defined()) continue;
      tensor = tensor.to(options_.device).requires_grad_(true);
      count_as(tensor, MemoryCause::kWeights);
      trainables.push_back({module.path + "." + kAdapterParts[part],
                            tensor,
                            new_states(tensor.detach()),
                            next_id_++});
    }
    staying.modules.push_back(std::move(module));
  }
  lora::attach(staying, weights_);
  for (const lora::Module& module : adapters.modules) {
    LowRank& layer = layers.at(module.path)->lora;
    layer.dropout = dropout;
    layer.module = xxh3_64(as_bytes(module.path));
  }
  if (adapters_ && adapters_->empty()) adapters_.reset();
  if (adapters_) {
    adapters_->start();
    adapters_->set_schedule(step_cycle());
  }
  if (std::ranges::any_of(adapters.modules,
                          [](const lora::Module& m) { return m.magnitude.defined(); }))
    set_magnitudes();
}

void ModelBlocks::attach(const lora::Adapters& adapters, double multiplier) {
  const MemoryScope scope(MemoryCause::kWeights);
  lora::Adapters here;
  bool magnitudes = false;
  for (lora::Module module : adapters.modules) {
    // the products are of that type anyhow; norms are not
    const auto type = module.magnitude.defined() ? at::kFloat : options_.compute;
    for (at::Tensor* part : module.parts())
      if (part->defined())
        *part = part->to(options_.device, type, /*non_blocking=*/false, /*copy=*/true).contiguous();
    magnitudes = magnitudes || module.magnitude.defined();
    here.modules.push_back(std::move(module));
  }
  bool first = true;
  dit::for_each_linear(weights_, [&](const std::string&, Linear& layer) {
    first = first && !layer.lora.down.defined() && layer.added.empty();
  });
  if (first && (!magnitudes || multiplier == 1))
    lora::attach(here, weights_, multiplier);
  else
    lora::attach_beside(here, weights_, multiplier);
}

/// DoRA starts from the weights, so that streamed ones are read once.
void ModelBlocks::set_magnitudes() {
  std::map<int64_t, std::vector<Linear*>> layers;
  dit::for_each_linear(weights_, [&](const std::string& path, Linear& layer) {
    const Home* home = home_of(path);
    layers[home ? home - homes_.data() : -1].push_back(&layer);
  });
  const auto set = [&](int64_t block) {
    for (const Linear* layer : layers[block]) lora::set_magnitude(*layer, options_.compute);
    return true;
  };
  set(-1);
  pass(set);
}

int64_t ModelBlocks::first_trained() const {
  if (!outer_.empty()) return -1;
  int64_t block = 0;
  while (block < num_blocks_ && homes_[static_cast<size_t>(block)].trainables.empty()) ++block;
  return block;
}

void ModelBlocks::set_tensors(int64_t block, const std::function<at::Tensor(size_t slice)>& value) {
  Home& home = homes_[static_cast<size_t>(block)];
  const auto slice = [&](const std::string& name) {
    return home.layout.find(std::string_view(name).substr(home.prefix.size()));
  };
  const auto set = [&](const std::string& name, at::Tensor& tensor) {
    if (options_.base && is_quantized_name(name)) return;
    tensor = value(*slice(name));
  };
  const auto set_quantized = [&](const std::string& path, Linear& layer) {
    const std::string name = path + ".weight";
    if (!options_.base || !is_quantized_name(name)) return;
    layer.quantized = {*options_.base, value(*slice(name)), value(*slice(scale_name(name)))};
  };
  const auto all = [&](auto& of_kind) {
    dit::for_each_tensor(of_kind, home.prefix, set);
    dit::for_each_linear(of_kind, home.prefix, set_quantized);
  };
  if (block < config_.num_double_blocks)
    all(weights_.double_blocks[static_cast<size_t>(block)]);
  else
    all(weights_.single_blocks[static_cast<size_t>(block - config_.num_double_blocks)]);
}

void ModelBlocks::bind(int64_t block) {
  Home& home = homes_[static_cast<size_t>(block)];
  if (options_.train_weights)
    for (size_t i = 0; i < home.trainables.size(); ++i)
      home.trainables[i].value = home.layout.view(home.record, i).requires_grad_(true);
  set_tensors(block, [&](size_t slice) {
    return options_.train_weights ? home.trainables[slice].value
                                  : home.layout.view(home.record, slice);
  });
}

Share* ModelBlocks::share(int64_t block) {
  return shared() ? &homes_[static_cast<size_t>(block)].share : nullptr;
}

void ModelBlocks::bind_owned(int64_t block, const at::Tensor& part) {
  Share& share = homes_[static_cast<size_t>(block)].share;
  for (size_t i = 0; i < share.owned.size(); ++i)
    share.owned[i].value = owned_view(share, i, part, options_.compute);
}

void ModelBlocks::unbind_owned(int64_t block) {
  for (Trainable& trainable : owned(block)) {
    trainable.value.reset();
    trainable.gradient.reset();
  }
}

void ModelBlocks::unbind(int64_t block) {
  Home& home = homes_[static_cast<size_t>(block)];
  set_tensors(block, [](size_t) { return at::Tensor(); });
  if (options_.train_weights) {
    for (Trainable& trainable : home.trainables) {
      trainable.value.reset();
      trainable.gradient.reset();
    }
  }
  home.record.reset();
}

std::vector<int64_t> ModelBlocks::step_cycle() const {
  std::vector<int64_t> cycle;
  const int64_t first = shared() ? 0 : resident_;
  for (int64_t block = first; block < num_blocks_; ++block) cycle.push_back(block);
  for (int64_t block = num_blocks_; block-- > std::max(first, first_trained());)
    if (options_.kept_graphs.empty() || !options_.kept_graphs[static_cast<size_t>(block)])
      cycle.push_back(block);
  return cycle;
}

Ring& ModelBlocks::ring() {
  if (!ring_) ring_ = std::make_unique<Ring>(store_, options_.device, step_cycle(), ring_options());
  return *ring_;
}

/// Of weights that ranks share out: all of them read these blocks, in this order, and nothing beyond, for an update may
/// change them afterwards.
void ModelBlocks::begin_pass(std::vector<int64_t> cycle) {
  to_come_ = std::ssize(cycle);
  if (ring_) return ring_->set_schedule(std::move(cycle));
  ring_ = std::make_unique<Ring>(gather_, options_.device, std::move(cycle), gather_options());
}

void ModelBlocks::enter(int64_t block) {
  if (!in_ring(block)) return;
  Home& home = homes_[static_cast<size_t>(block)];
  if (shared() && to_come_ == 0) begin_pass(step_cycle());
  --to_come_;
  home.lease = ring().acquire();
  if (home.lease.index != block)
    throw std::logic_error(
        fmt::format("the ring is at block {}, the loop at {}", home.lease.index, block));
  home.record = home.lease.record;
  bind(block);
  if (shared() && !is_resident(block)) {
    const auto [world, rank, group] = options_.sharing;
    bind_owned(block, home.record.narrow(0, part_bytes(block) * rank, part_bytes(block)));
  }
  if (adapters_) adapters_->enter(block, home.trainables);
}

void ModelBlocks::put_gradients_away(int64_t block) {
  if (!states_ || !options_.keep_gradients || is_resident(block)) return;
  Home& home = homes_[static_cast<size_t>(block)];
  const auto mine = owned(block);
  const at::NoGradGuard no_grad;
  const bool fresh =
      std::ranges::any_of(mine, [](const Trainable& t) { return t.gradient.defined(); });
  if (fresh || std::exchange(home.gradients_taken, false)) home.has_gradients = fresh;
  for (size_t i = 0; fresh && i < mine.size(); ++i) {
    if (!states_->expects(home.first_entry + i, StateStream::Use::kPutAway))
      states_->expect(entries_from(block, /*ascending=*/false), StateStream::Use::kPutAway);
    states_->put_away(std::exchange(mine[i].gradient, {}));
  }
}

void ModelBlocks::leave(int64_t block, bool changed) {
  if (!in_ring(block)) return;
  Home& home = homes_[static_cast<size_t>(block)];
  put_gradients_away(block);
  if (adapters_) adapters_->leave(block, home.trainables, changed);
  unbind(block);
  if (shared() && !is_resident(block)) unbind_owned(block);
  ring().release(std::exchange(home.lease, {}),
                 changed && options_.train_weights && !is_resident(block));
}

/// The entries of blocks in the order of their numbers, or the reverse, from this block on: of all, but where the
/// gradients of some wait, whose turn it is: of those whose weights stream, or of those whose weights stay.
std::vector<size_t> ModelBlocks::entries_from(int64_t block, bool ascending) const {
  std::vector<int64_t> blocks = visited_;
  if (blocks.empty()) {
    for (int64_t b = 0; b < num_blocks_; ++b)
      if (options_.keep_gradients ? is_resident(b) == is_resident(block) : states_stream(b))
        blocks.push_back(b);
    if (!ascending) std::ranges::reverse(blocks);
    std::ranges::rotate(blocks, std::ranges::find(blocks, block));
  }
  std::vector<size_t> entries;
  for (const int64_t b : blocks) {
    const Home& home = homes_[static_cast<size_t>(b)];
    const size_t num = shared() ? home.share.owned.size() : home.trainables.size();
    for (size_t i = 0; i < num; ++i) entries.push_back(home.first_entry + i);
  }
  return entries;
}

void ModelBlocks::open(int64_t block, size_t i) {
  if (block < 0 || !states_stream(block)) return;
  Home& home = homes_[static_cast<size_t>(block)];
  const bool waits = home.has_gradients;
  const auto use = waits ? StateStream::Use::kUpdateWithWaiting : StateStream::Use::kUpdate;
  // gradients that waited are taken by the forward, others by the backward
  if (!states_->expects(home.first_entry + i, use))
    states_->expect(entries_from(block, /*ascending=*/waits), use);
  auto opened = states_->open();
  Trainable& trainable = owned(block)[i];
  trainable.states = std::move(opened.states);
  if (waits) trainable.gradient = std::move(opened.gradient);
}

void ModelBlocks::close(int64_t block, size_t i, bool changed) {
  if (block < 0 || !states_stream(block)) return;
  Home& home = homes_[static_cast<size_t>(block)];
  Trainable& trainable = owned(block)[i];
  trainable.states.clear();
  // an update takes the gradient that waited, a look at it leaves it
  if (home.has_gradients && !trainable.gradient.defined()) home.gradients_taken = true;
  trainable.gradient.reset();
  states_->close(changed);
}

std::span<Trainable> ModelBlocks::trainables(int64_t block) {
  return homes_[static_cast<size_t>(block)].trainables;
}

void ModelBlocks::visit(std::span<const int64_t> blocks,
                        const std::function<bool(int64_t block)>& work) {
  if (shared()) return visit_owned(blocks, work);
  // frozen weights need not come for what is trained beside them
  go_through(blocks, !adapters_, work);
}

void ModelBlocks::visit_owned(std::span<const int64_t> blocks,
                              const std::function<bool(int64_t block)>& work) {
  abandon();
  if (ring_) ring_->flush();  // the store has this rank's parts as they are now
  std::vector<int64_t> streamed;
  for (const int64_t block : blocks) {
    if (!is_resident(block)) streamed.push_back(block);
    if (states_stream(block)) visited_.push_back(block);
  }
  struct Visit {
    std::vector<int64_t>& blocks;
    ~Visit() { blocks.clear(); }
  } const visit{visited_};
  if (!streamed.empty()) part_ring_->set_schedule(streamed);
  for (const int64_t block : blocks) {
    Home& home = homes_[static_cast<size_t>(block)];
    if (!is_resident(block)) {
      home.part_lease = part_ring_->acquire();
      bind_owned(block, home.part_lease.record);
    }
    const bool changed = work(block);
    put_gradients_away(block);
    if (!is_resident(block)) {
      unbind_owned(block);
      part_ring_->release(std::exchange(home.part_lease, {}), changed);
    }
    if (states_stream(block)) visited_.erase(visited_.begin());
  }
  if (!streamed.empty()) part_ring_->flush();
}

void ModelBlocks::pass(const std::function<bool(int64_t block)>& work) {
  std::vector<int64_t> blocks(static_cast<size_t>(num_blocks_));
  std::iota(blocks.begin(), blocks.end(), int64_t{0});
  if (!shared()) return go_through(blocks, true, work);
  abandon();
  begin_pass(blocks);
  for (const int64_t block : blocks) {
    enter(block);
    leave(block, work(block));
  }
}

void ModelBlocks::go_through(std::span<const int64_t> blocks,
                             bool with_weights,
                             const std::function<bool(int64_t block)>& work) {
  abandon();
  std::vector<int64_t> streamed, with_states;
  for (const int64_t block : blocks) {
    if (!is_resident(block)) streamed.push_back(block);
    if (states_stream(block)) with_states.push_back(block);
  }
  // what is only sampled with comes in that order anyhow, the first ones while the last ones compute
  const bool weights = with_weights && !streamed.empty() && streamed != step_cycle();
  if (weights) ring().set_schedule(streamed);
  if (adapters_) adapters_->set_schedule(streamed);
  struct Visit {
    std::vector<int64_t>& blocks;
    ~Visit() { blocks.clear(); }
  } const visit{visited_};
  visited_ = with_states;
  for (const int64_t block : blocks) {
    if (!with_weights && !is_resident(block)) {
      adapters_->enter(block, trainables(block));
      adapters_->leave(block, trainables(block), work(block));
      continue;
    }
    enter(block);
    leave(block, work(block));
    if (states_stream(block)) visited_.erase(visited_.begin());
  }
  if (weights) ring().set_schedule(step_cycle());
  if (adapters_) adapters_->set_schedule(step_cycle());
}

void ModelBlocks::for_all_trainables(const std::function<bool(Trainable&)>& work) {
  for_each_trainable(-1, work);
  std::vector<int64_t> streamed;
  for (int64_t block = 0; block < num_blocks_; ++block) {
    if (trainables_stay(block) && !states_stream(block))
      for_each_trainable(block, work);
    else
      streamed.push_back(block);
  }
  visit(streamed, [&](int64_t block) { return for_each_trainable(block, work); });
}

/// After a step that failed: leaves the block it was at.
void ModelBlocks::abandon() {
  to_come_ = 0;
  for (int64_t block = 0; block < num_blocks_; ++block) {
    Home& home = homes_[static_cast<size_t>(block)];
    const bool adapters_there = adapters_ && adapters_->is_there(block);
    if (home.lease.position < 0 && !adapters_there) continue;
    for (Trainable& trainable : home.trainables) trainable.gradient.reset();
    for (Trainable& trainable : owned(block)) trainable.gradient.reset();
    if (home.lease.position >= 0)
      leave(block, false);
    else
      adapters_->leave(block, home.trainables, false);
  }
}

RingCounts ModelBlocks::ring_counts() const {
  RingCounts sum;
  if (ring_) sum += ring_->counts();
  if (states_) sum += states_->counts();
  if (part_ring_) sum += part_ring_->counts();
  if (adapters_) sum += adapters_->counts();
  return sum;
}

int64_t ModelBlocks::stored_bytes(int64_t block) const {
  return is_resident(block) ? 0 : part_bytes(block);
}

ModelBlocks::Traffic ModelBlocks::bytes_per_step() {
  if (!streams()) return {};
  std::vector<int64_t> bytes;
  for (int64_t block = 0; block < num_blocks_; ++block) bytes.push_back(stored_bytes(block));
  Traffic traffic;
  if (shared()) {
    for (const int64_t block : step_cycle())
      traffic.read += (options_.sharing.world - 1) * part_bytes(block) + stored_bytes(block);
    if (options_.keep_gradients) traffic.read += std::reduce(bytes.begin(), bytes.end());
  } else if (resident_ < num_blocks_) {
    traffic.read = ring().plan().bytes_per_cycle(bytes, step_cycle().size());
  }
  if (adapters_) {
    traffic.read += 2 * adapters_->store_bytes();
    traffic.written += (options_.keep_gradients ? 2 : 1) * adapters_->store_bytes();
  }
  if (!options_.train_weights) return traffic;
  traffic.written = std::reduce(bytes.begin(), bytes.end());
  for (const int64_t record : StateStream::record_bytes(entries_)) {
    traffic.read += record;
    traffic.written += record;
  }
  return traffic;
}

int64_t ModelBlocks::host_store_bytes() const {
  if (!streams() || options_.stream_from != StreamFrom::kHost) return 0;
  int64_t sum = adapters_ ? adapters_->store_bytes() : 0;
  for (int64_t record = 0; store_ && record < store_->num_records(); ++record)
    sum += store_->record_bytes(record);
  return sum;
}

int64_t ModelBlocks::staging_bytes(const ModelFile& file, at::Device device) const {
  const bool from_file = !options_.train_weights && options_.stream_from == StreamFrom::kFile;
  if (shared() && !store_) return Ring::staging_bytes(*gather_, device, gather_options());
  const RecordStore& store = from_file ? static_cast<const RecordStore&>(file) : *store_;
  int64_t weights =
      resident_ < num_blocks_ ? Ring::staging_bytes(store, device, ring_options()) : 0;
  if (shared()) weights += Ring::staging_bytes(*gather_, device, gather_options());
  return weights + (states_ ? Ring::staging_bytes(store, device, states_->ring_options()) : 0) +
         (adapters_ ? adapters_->staging_bytes(device) : 0);
}

RingOptions ModelBlocks::ring_options() const {
  RingOptions options;
  options.lookahead = options_.lookahead;
  return options;
}

/// Ranks gather one record after the other, in the same order.
RingOptions ModelBlocks::gather_options() const {
  RingOptions options = ring_options();
  options.repeats = false;
  options.read_threads = 1;
  return options;
}

}  // namespace flux::engine
