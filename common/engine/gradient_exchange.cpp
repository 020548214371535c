#include "common/engine/gradient_exchange.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "common/tensor/memory.h"

namespace flux::engine {
namespace {

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

/// Row by row, in order, onto `sum` if there is one.
at::Tensor sum_of_rows(at::Tensor sum, const at::Tensor& rows) {
  for (int64_t row = 0; row < rows.size(0); ++row) {
    if (sum.defined())
      sum.add_(rows[row]);
    else
      sum = rows[row].clone();
  }
  return sum;
}

}  // namespace

GradientExchange::Flat GradientExchange::take(std::span<Trainable> trainables,
                                              const Share* share) const {
  Flat flat;
  int64_t num = 0;
  for (size_t i = 0; i < trainables.size(); ++i) {
    if (!trainables[i].gradient.defined()) continue;
    flat.indices.push_back(i);
    num += trainables[i].gradient.numel();
  }
  if (flat.indices.empty()) return flat;
  num = share ? share->elements * ranks_.shard_world : round_up(num, ranks_.world);
  const at::Device device = trainables[flat.indices[0]].gradient.device();
  flat.values = at::zeros({num}, at::TensorOptions(at::kFloat).device(device));
  int64_t at = 0;
  for (const size_t i : flat.indices) {
    at::Tensor& gradient = trainables[i].gradient;
    const int64_t begin = share ? share->tensors[i].begin : at;
    flat.values.narrow(0, begin, gradient.numel()).view(gradient.sizes()).copy_(gradient);
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

void GradientExchange::put_owned(const at::Tensor& part, Share& share) {
  for (size_t i = 0; i < share.owned.size(); ++i)
    share.owned[i].gradient = part.narrow(0, share.begins[i], share.counts[i]);
}

/// To each rank of those that share a copy (or of all) its part; what comes back has a row for each of them.
at::Tensor GradientExchange::send(const at::Tensor& values, const Share* share) const {
  const at::Tensor received = at::empty_like(values);
  dist::Group* const group = share ? ranks_.shard : ranks_.group;
  if (group) group->start_all_to_all(received, values);
  return received.view({share ? ranks_.shard_world : ranks_.world, -1});
}

/// Of what came, a row for every rank of the run, in their order.
at::Tensor GradientExchange::in_order(const at::Tensor& received, const Share* share) const {
  if (!share || ranks_.num_replicas() == 1) return received;
  const at::Tensor all = at::empty({ranks_.num_replicas(), received.numel()}, received.options());
  if (ranks_.replica) ranks_.replica->all_gather(all.view({-1}), received.view({-1}));
  return all.view({ranks_.world, -1});
}

/// The sum of the part over all copies.
at::Tensor GradientExchange::over_replicas(const at::Tensor& part) const {
  const int64_t copies = ranks_.num_replicas();
  if (copies == 1) return part;
  const at::Tensor all = at::zeros({round_up(part.numel(), copies)}, part.options());
  all.narrow(0, 0, part.numel()).copy_(part);
  const at::Tensor received = at::empty_like(all);
  if (ranks_.replica) {
    ranks_.replica->start_all_to_all(received, all);
    ranks_.replica->wait();
  }
  const at::Tensor sum = sum_of_rows({}, received.view({copies, -1}));
  if (ranks_.replica) ranks_.replica->all_gather(all, sum);
  return all.narrow(0, 0, part.numel());
}

void GradientExchange::gather(const at::Tensor& all, const at::Tensor& own) const {
  if (ranks_.group) ranks_.group->all_gather(all, own);
}

void GradientExchange::collected(int64_t block,
                                 std::span<Trainable> trainables,
                                 const Share* share) {
  if (!ranks_.exact) return;
  const at::NoGradGuard no_grad;
  const MemoryScope scope(MemoryCause::kGradients);
  Flat flat = take(trainables, share);
  if (flat.indices.empty()) return;
  const at::Tensor received = send(flat.values, share);
  dist::Group* const group = share ? ranks_.shard : ranks_.group;
  if (group) group->wait();
  Part& part = parts_[{block, flat.indices[0]}];
  part.sum = sum_of_rows(part.sum, in_order(received, share));
  if (share) flat.values = at::Tensor();
  part.flat = std::move(flat);
}

void GradientExchange::start(int64_t block, std::span<Trainable> trainables, Share* share) {
  const at::NoGradGuard no_grad;
  const MemoryScope scope(MemoryCause::kGradients);
  if (ranks_.exact) {
    for (auto it = parts_.lower_bound({block, 0});
         it != parts_.end() && it->first.first == block;) {
      const Part part = std::move(parts_.extract(it++).mapped());
      if (share) {
        put_owned(part.sum, *share);
        continue;
      }
      gather(part.flat.values, part.sum);
      put(part.flat, trainables);
    }
    return;
  }
  finish();
  Flat flat = take(trainables, share);
  if (flat.indices.empty()) return;
  at::Tensor received = send(flat.values, share);
  started_ = Started{std::move(flat), std::move(received), trainables, share};
}

void GradientExchange::finish() {
  if (!started_) return;
  const at::NoGradGuard no_grad;
  const MemoryScope scope(MemoryCause::kGradients);
  Started started = *std::exchange(started_, std::nullopt);
  dist::Group* const group = started.share ? ranks_.shard : ranks_.group;
  if (group) group->wait();
  if (started.share) {
    started.flat.values = at::Tensor();
    const at::Tensor sum = sum_of_rows({}, started.received);
    started.received = at::Tensor();
    put_owned(over_replicas(sum), *started.share);
    return;
  }
  gather(started.flat.values, sum_of_rows({}, started.received));
  put(started.flat, started.trainables);
}

}  // namespace flux::engine
