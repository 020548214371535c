#include "common/engine/gradient_exchange.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "common/tensor/memory.h"

namespace flux::engine {

GradientExchange::Flat GradientExchange::take(std::span<Trainable> trainables) const {
  Flat flat;
  int64_t num = 0;
  for (size_t i = 0; i < trainables.size(); ++i) {
    if (!trainables[i].gradient.defined()) continue;
    flat.indices.push_back(i);
    num += trainables[i].gradient.numel();
  }
  if (flat.indices.empty()) return flat;
  const int64_t padded = (num + ranks_.world - 1) / ranks_.world * ranks_.world;
  const at::Device device = trainables[flat.indices[0]].gradient.device();
  flat.values = at::zeros({padded}, at::TensorOptions(at::kFloat).device(device));
  int64_t at = 0;
  for (const size_t i : flat.indices) {
    at::Tensor& gradient = trainables[i].gradient;
    flat.values.narrow(0, at, gradient.numel()).view(gradient.sizes()).copy_(gradient);
    at += gradient.numel();
    gradient = at::Tensor();
  }
  return flat;
}

void GradientExchange::put(const Flat& flat, std::span<Trainable> trainables) const {
  int64_t at = 0;
  for (const size_t i : flat.indices) {
    Trainable& t = trainables[i];
    t.gradient = flat.values.narrow(0, at, t.value.numel()).view(t.value.sizes());
    at += t.value.numel();
  }
}

at::Tensor GradientExchange::sum_of_parts(at::Tensor sum, const at::Tensor& received) const {
  const at::Tensor parts = received.view({ranks_.world, -1});
  for (int64_t rank = 0; rank < ranks_.world; ++rank) {
    if (sum.defined())
      sum.add_(parts[rank]);
    else
      sum = parts[rank].clone();
  }
  return sum;
}

at::Tensor GradientExchange::exchange(const at::Tensor& values) const {
  const at::Tensor received = at::empty_like(values);
  if (ranks_.group) ranks_.group->start_all_to_all(received, values);
  return received;
}

void GradientExchange::gather(const at::Tensor& all, const at::Tensor& own) const {
  if (ranks_.group) ranks_.group->all_gather(all, own);
}

void GradientExchange::collected(int64_t block, std::span<Trainable> trainables) {
  if (!ranks_.exact) return;
  const at::NoGradGuard no_grad;
  const MemoryScope scope(MemoryCause::kGradients);
  Flat flat = take(trainables);
  if (flat.indices.empty()) return;
  const at::Tensor received = exchange(flat.values);
  if (ranks_.group) ranks_.group->wait();
  Part& part = parts_[{block, flat.indices[0]}];
  part.sum = sum_of_parts(part.sum, received);
  part.flat = std::move(flat);
}

void GradientExchange::start(int64_t block, std::span<Trainable> trainables) {
  const at::NoGradGuard no_grad;
  const MemoryScope scope(MemoryCause::kGradients);
  if (ranks_.exact) {
    for (auto it = parts_.lower_bound({block, 0});
         it != parts_.end() && it->first.first == block;) {
      const Part part = std::move(parts_.extract(it++).mapped());
      gather(part.flat.values, part.sum);
      put(part.flat, trainables);
    }
    return;
  }
  finish();
  Flat flat = take(trainables);
  if (flat.indices.empty()) return;
  at::Tensor received = exchange(flat.values);
  started_ = Started{std::move(flat), std::move(received), trainables};
}

void GradientExchange::finish() {
  if (!started_) return;
  const at::NoGradGuard no_grad;
  const MemoryScope scope(MemoryCause::kGradients);
  const Started started = *std::exchange(started_, std::nullopt);
  if (ranks_.group) ranks_.group->wait();
  gather(started.flat.values, sum_of_parts({}, started.received));
  put(started.flat, started.trainables);
}

}  // namespace flux::engine
