#include "common/engine/gradient_exchange.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

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

/// Gradients as they lie in the record, elements [begin, begin + to.numel()) of it; where none are, `to` stays.
void copy_range(std::span<const Trainable> trainables,
                const Share& share,
                int64_t begin,
                const at::Tensor& to) {
  const int64_t end = begin + to.numel();
  for (size_t i = 0; i < trainables.size(); ++i) {
    const auto [first, count] = share.tensors[i];
    const int64_t from = std::max(begin, first), until = std::min(end, first + count);
    if (from >= until || !trainables[i].gradient.defined()) continue;
    to.narrow(0, from - begin, until - from)
        .copy_(trainables[i].gradient.reshape({-1}).narrow(0, from - first, until - from));
  }
}

}  // namespace

GradientExchange::Flat GradientExchange::take(std::span<Trainable> trainables) const {
  Flat flat;
  int64_t num = 0;
  for (size_t i = 0; i < trainables.size(); ++i) {
    if (!trainables[i].gradient.defined()) continue;
    flat.indices.push_back(i);
    num += trainables[i].gradient.numel();
  }
  if (flat.indices.empty()) return flat;
  const at::Device device = trainables[flat.indices[0]].gradient.device();
  flat.values =
      at::zeros({round_up(num, ranks_.world)}, at::TensorOptions(at::kFloat).device(device));
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

/// What comes back has a row for each rank.
at::Tensor GradientExchange::start_to_send(const at::Tensor& values) const {
  const at::Tensor received = at::empty_like(values);
  if (ranks_.group) ranks_.group->start_all_to_all(received, values);
  return received.view({ranks_.world, -1});
}

void GradientExchange::gather(const at::Tensor& all, const at::Tensor& own) const {
  if (ranks_.group) ranks_.group->all_gather(all, own);
}

/// Takes the gradients, and adds what all ranks have of this rank's part of them to `sum`.
void GradientExchange::add_shared(std::span<Trainable> trainables,
                                  const Share& share,
                                  at::Tensor& sum) const {
  const auto reached =
      std::ranges::find_if(trainables, [](const Trainable& t) { return t.gradient.defined(); });
  if (reached == trainables.end()) return;
  const at::TensorOptions options = reached->gradient.options().dtype(at::kFloat);
  const bool first = !sum.defined();
  if (first) sum = at::empty({share.elements}, options);
  const int64_t world = ranks_.shard_world;
  const int64_t most = std::min(share.elements, std::max<int64_t>(1, piece_ / world));
  for (int64_t begin = 0; begin < share.elements; begin += most) {
    const int64_t count = std::min(most, share.elements - begin);
    const at::Tensor sent = at::zeros({world, count}, options);
    for (int64_t rank = 0; rank < world; ++rank)
      copy_range(trainables, share, rank * share.elements + begin, sent[rank]);
    const at::Tensor received = at::empty_like(sent);
    if (ranks_.shard) {
      ranks_.shard->start_all_to_all(received, sent);
      ranks_.shard->wait();
    }
    const at::Tensor piece = sum.narrow(0, begin, count);
    const at::Tensor before = first ? at::Tensor() : piece;
    at::Tensor after;
    if (ranks_.exact)
      after = sum_of_rows(before, in_order(received));
    else
      after = over_replicas(sum_of_rows(before, received));
    if (first) piece.copy_(after);
  }
  for (Trainable& t : trainables) t.gradient = at::Tensor();
}

/// Of what came, a row for every rank of the run, in their order.
at::Tensor GradientExchange::in_order(const at::Tensor& received) const {
  if (ranks_.num_replicas() == 1) return received;
  const at::Tensor all = at::empty({ranks_.num_replicas(), received.numel()}, received.options());
  if (ranks_.replica) ranks_.replica->all_gather(all.view({-1}), received.view({-1}));
  return all.view({ranks_.world, -1});
}

/// The sum over all copies.
at::Tensor GradientExchange::over_replicas(const at::Tensor& piece) const {
  const int64_t copies = ranks_.num_replicas();
  if (copies == 1) return piece;
  const at::Tensor all = at::zeros({round_up(piece.numel(), copies)}, piece.options());
  all.narrow(0, 0, piece.numel()).copy_(piece);
  const at::Tensor received = at::empty_like(all);
  if (ranks_.replica) {
    ranks_.replica->start_all_to_all(received, all);
    ranks_.replica->wait();
  }
  const at::Tensor sum = sum_of_rows({}, received.view({copies, -1}));
  if (ranks_.replica) ranks_.replica->all_gather(all, sum);
  return all.narrow(0, 0, piece.numel());
}

void GradientExchange::collected(int64_t block,
                                 std::span<Trainable> trainables,
                                 const Share* share) {
  if (!ranks_.exact) return;
  const at::NoGradGuard no_grad;
  const MemoryScope scope(MemoryCause::kGradients);
  if (share) return add_shared(trainables, *share, parts_[{block, 0}].sum);
  Flat flat = take(trainables);
  if (flat.indices.empty()) return;
  const at::Tensor received = start_to_send(flat.values);
  if (ranks_.group) ranks_.group->wait();
  Part& part = parts_[{block, flat.indices[0]}];
  part.sum = sum_of_rows(part.sum, received);
  part.flat = std::move(flat);
}

void GradientExchange::start(int64_t block, std::span<Trainable> trainables, Share* share) {
  const at::NoGradGuard no_grad;
  const MemoryScope scope(MemoryCause::kGradients);
  if (share) {
    at::Tensor sum;
    if (!ranks_.exact)
      add_shared(trainables, *share, sum);
    else if (auto part = parts_.extract({block, 0}))
      sum = part.mapped().sum;
    if (!sum.defined()) return;
    for (size_t i = 0; i < share->owned.size(); ++i)
      share->owned[i].gradient = sum.narrow(0, share->begins[i], share->counts[i]);
    return;
  }
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
  at::Tensor received = start_to_send(flat.values);
  started_ = Started{std::move(flat), std::move(received), trainables};
}

void GradientExchange::finish() {
  if (!started_) return;
  const at::NoGradGuard no_grad;
  const MemoryScope scope(MemoryCause::kGradients);
  const Started started = *std::exchange(started_, std::nullopt);
  if (ranks_.group) ranks_.group->wait();
  gather(started.flat.values, sum_of_rows({}, started.received));
  put(started.flat, started.trainables);
}

}  // namespace flux::engine
