#include "common/engine/adapter_stream.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "common/engine/file_arena.h"

namespace flux::engine {

AdapterStream::AdapterStream(int64_t num_blocks, const AdapterStreamOptions& options)
    : options_(options), blocks_(static_cast<size_t>(num_blocks)) {
  ring_options_.lookahead = options.lookahead;
}

AdapterStream::Slices AdapterStream::add_slices(RecordLayout& layout,
                                                const std::string& name,
                                                const at::Tensor& value,
                                                const Optimizer& optimizer) const {
  const auto shape = value.sizes().vec();
  Slices slices;
  slices.value = layout.add(name, shape, value.scalar_type());
  for (const auto& state : optimizer.state_layout(shape, value.scalar_type()))
    slices.states.push_back(layout.add(state.name + ":" + name, state.shape, state.dtype));
  if (options_.keep_gradients)
    slices.gradient = layout.add("gradient:" + name, shape, value.scalar_type());
  return slices;
}

void AdapterStream::add(int64_t block,
                        const lora::Module& module,
                        Linear& layer,
                        const Optimizer& optimizer,
                        std::vector<Trainable>& trainables,
                        uint64_t& next_id) {
  OfBlock& b = of(block);
  Adapter adapter;
  adapter.layer = &layer;
  adapter.scale = module.scale();
  adapter.initial = module;
  for (size_t part = 0; part < kAdapterParts.size(); ++part) {
    const at::Tensor& value = *module.parts()[part];
    if (!value.defined()) continue;
    const std::string name = module.path + "." + kAdapterParts[part];
    adapter.parts.emplace_back(part, add_slices(b.layout, name, value, optimizer));
    trainables.push_back({name, {}, {}, next_id++});
  }
  b.adapters.push_back(std::move(adapter));
}

bool AdapterStream::empty() const {
  return std::ranges::all_of(blocks_, [](const OfBlock& b) { return b.adapters.empty(); });
}

void AdapterStream::start() {
  std::vector<int64_t> bytes;
  for (const OfBlock& b : blocks_) bytes.push_back(b.layout.bytes());
  if (options_.device.is_meta())
    store_ = std::make_shared<PlannedStore>(bytes, true);
  else if (in_host_memory())
    store_ = std::make_shared<MemoryStore>(bytes, MemoryStore::Pin::kIfPossible);
  else
    store_ = std::make_shared<FileArena>(options_.scratch, bytes, options_.access);
  for (int64_t block = 0; block < std::ssize(blocks_); ++block) {
    OfBlock& b = of(block);
    if (b.adapters.empty()) continue;
    if (!options_.device.is_meta()) {
      const at::Tensor record = at::zeros({b.layout.bytes()}, at::kByte);
      for (const Adapter& a : b.adapters)
        for (const auto& [part, slices] : a.parts)
          b.layout.view(record, slices.value).copy_(*a.initial.parts()[part]);
      store_->write(block,
                    {static_cast<const std::byte*>(record.const_data_ptr()), record.nbytes()});
    }
    for (Adapter& a : b.adapters) a.initial = {};
  }
}

void AdapterStream::set_schedule(std::span<const int64_t> blocks) {
  std::vector<int64_t> cycle;
  std::ranges::copy_if(blocks, std::back_inserter(cycle), [&](int64_t block) {
    return !of(block).adapters.empty();
  });
  if (cycle.empty()) return;
  if (ring_)
    ring_->set_schedule(std::move(cycle));
  else
    ring_ = std::make_unique<Ring>(store_, options_.device, std::move(cycle), ring_options_);
}

void AdapterStream::bind(const OfBlock& b, const Slices& slices, Trainable& trainable) const {
  trainable.value = b.layout.view(b.lease.record, slices.value).requires_grad_(true);
  for (const size_t state : slices.states)
    trainable.states.push_back(b.layout.view(b.lease.record, state));
  if (b.has_gradients) trainable.gradient = b.layout.view(b.lease.record, slices.gradient);
}

void AdapterStream::enter(int64_t block, std::span<Trainable> trainables) {
  OfBlock& b = of(block);
  if (b.adapters.empty()) return;
  b.lease = ring_->acquire();
  if (b.lease.index != block)
    throw std::logic_error(
        fmt::format("adapters of block {} came, of {} were expected", b.lease.index, block));
  size_t i = 0;
  for (const Adapter& a : b.adapters) {
    for (const auto& [part, slices] : a.parts) {
      Trainable& trainable = trainables[i++];
      bind(b, slices, trainable);
      *a.layer->lora.parts()[part] = trainable.value;
    }
    a.layer->lora.scale = a.scale;
  }
}

void AdapterStream::leave(int64_t block, std::span<Trainable> trainables, bool changed) {
  OfBlock& b = of(block);
  if (b.adapters.empty()) return;
  const at::NoGradGuard no_grad;
  b.has_gradients = options_.keep_gradients && std::ranges::any_of(trainables, [](const auto& t) {
                      return t.gradient.defined();
                    });
  size_t i = 0;
  for (const Adapter& a : b.adapters)
    for (const auto& [part, slices] : a.parts) {
      Trainable& t = trainables[i++];
      if (b.has_gradients) {
        const auto kept = b.layout.view(b.lease.record, slices.gradient);
        t.gradient.defined() ? kept.copy_(t.gradient) : kept.zero_();
      }
      t.value.reset();
      t.states.clear();
      t.gradient.reset();
      a.layer->lora.parts()[part]->reset();
    }
  ring_->release(std::exchange(b.lease, {}), changed || b.has_gradients);
}

int64_t AdapterStream::store_bytes() const {
  int64_t sum = 0;
  for (const OfBlock& b : blocks_) sum += b.layout.bytes();
  return sum;
}

int64_t AdapterStream::staging_bytes(at::Device device) const {
  return Ring::staging_bytes(*store_, device, ring_options_);
}

}  // namespace flux::engine
