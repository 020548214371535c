#include "common/engine/updater.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/optim/norm.h"

namespace flux::engine {

Updater::Updater(Blocks& blocks, Optimizer& optimizer, UpdateOptions options)
    : blocks_(blocks), optimizer_(optimizer), options_(std::move(options)) {}

void Updater::begin(int64_t step, double learning_rate) {
  pending_scalars_ = scalars_;
  pending_ = std::exchange(waiting_, {});
  whole_ = pending_.empty();
  norms_.clear();
  squares_.clear();
  scalars_ = {step, learning_rate, 1, options_.seed};
  // while blocks wait for the step before, the optimizer is still at that one
  if (!gradients_wait()) optimizer_.begin_step(scalars_);
}

LoopHooks Updater::hooks() {
  std::function<void(int64_t, std::span<Trainable>)> collected;
  if (options_.exchange)
    collected = [this](int64_t block, std::span<Trainable> trainables) {
      options_.exchange->collected(block, trainables, share_of(block));
    };
  return {.before_forward = [this](int64_t block) { return before_forward(block); },
          .collected = std::move(collected),
          .ready = [this](int64_t block,
                          std::span<Trainable> trainables) { return ready(block, trainables); }};
}

double Updater::clip_scale(double norm) const {
  // torch.nn.utils.clip_grad_norm_
  return norm + 1e-6 > options_.max_norm ? options_.max_norm / (norm + 1e-6) : 1;
}

StepScalars Updater::scalars_of(const Trainable& trainable, StepScalars scalars) const {
  scalars.learning_rate *= trainable.lr_factor;
  if (options_.clip == ClipMode::kPerParameter)
    scalars.gradient_scale = clip_scale(norms_.at(trainable.id));
  return scalars;
}

bool Updater::update(int64_t block, StepScalars scalars) {
  const at::NoGradGuard no_grad;
  const auto average = [&](const Trainable& t) {
    optimizer_.average({t.value.detach(), {}, t.states, t.id, t.offset}, scalars);
  };
  const bool changed = blocks_.for_each_trainable(block, [&](Trainable& t) {
    at::Tensor gradient = std::exchange(t.gradient, {});
    // none reaches the text half of the last double block of a model without single blocks
    if (!gradient.defined()) gradient = at::zeros_like(t.value);
    optimizer_.step({t.value.detach(), gradient.contiguous(), t.states, t.id, t.offset},
                    scalars_of(t, scalars));
    if (!options_.after_update) average(t);
    return true;
  });
  if (changed && options_.after_update) {
    const auto updated = blocks_.owned(block);
    options_.after_update(updated);
    for (const Trainable& t : updated) average(t);
  }
  return changed;
}

void Updater::add_norms(int64_t block) {
  if (share_of(block)) return take_squares(block);
  for (const Trainable& t : blocks_.owned(block))
    norms_[t.id] = t.gradient.defined() ? std::sqrt(sum_of_squares(t.gradient)) : 0;
}

/// Every rank has the sums of squares of its parts of the record; all ranks add all of them in the record's order, which is
/// what one rank that has all does.
void Updater::take_squares(int64_t block) {
  const Share& share = *share_of(block);
  auto& sums = squares_[block];
  sums.assign(static_cast<size_t>(share.elements / kSquaresPart), 0);
  for (size_t i = 0; i < share.owned.size(); ++i)
    if (share.owned[i].gradient.defined())
      std::ranges::copy(squares_by_part(share.owned[i].gradient),
                        sums.begin() + share.begins[i] / kSquaresPart);
}

void Updater::add_shared_norms() {
  if (squares_.empty()) return;
  std::vector<double> own;
  for (const auto& [block, sums] : squares_) own.insert(own.end(), sums.begin(), sums.end());
  const auto world = static_cast<size_t>(options_.shard_world);
  std::vector<double> all(own.size() * world);
  const auto tensor = [](std::vector<double>& values) {
    return at::from_blob(values.data(), {static_cast<int64_t>(values.size())}, at::kDouble);
  };
  if (options_.shard) options_.shard->all_gather(tensor(all), tensor(own));
  size_t begin = 0;  // of the block's in each rank's
  for (const auto& [block, sums] : squares_) {
    const Share& share = *share_of(block);
    const auto square = [&](int64_t part) {
      const auto p = static_cast<size_t>(part), n = sums.size();
      return all[p / n * own.size() + begin + p % n];
    };
    const auto trainables = blocks_.trainables(block);
    for (size_t i = 0; i < trainables.size(); ++i) {
      const auto [first, count] = share.tensors[i];
      double sum = 0;
      for (int64_t part = first; part < first + count; part += kSquaresPart)
        sum += square(part / kSquaresPart);
      norms_[trainables[i].id] = std::sqrt(sum);
    }
    begin += sums.size();
  }
  squares_.clear();
}

double Updater::global_norm() const {
  double sum = 0;
  for (const auto& [id, norm] : norms_) sum += norm * norm;
  return std::sqrt(sum);
}

bool Updater::ready(int64_t block, std::span<Trainable> trainables) {
  if (options_.exchange) options_.exchange->start(block, trainables, share_of(block));
  if (sums_later(block)) {
    waiting_.push_back(block);
    return false;
  }
  if (options_.exchange) options_.exchange->finish();
  if (wants_norms()) add_norms(block);
  if (gradients_wait()) {
    waiting_.push_back(block);
    return false;
  }
  add_shared_norms();
  for (const Trainable& t : trainables)
    if (norms_.contains(t.id) && !std::isfinite(norms_.at(t.id)))
      throw NotFinite("the gradient of " + t.name);
  whole_ = false;
  return update(block, scalars_);
}

std::optional<double> Updater::finish() {
  if (options_.exchange) options_.exchange->finish();
  for (const int64_t block : waiting_)
    if (wants_norms() && sums_later(block)) add_norms(block);
  add_shared_norms();
  whole_ = true;
  std::optional<double> norm;
  if (!norms_.empty()) norm = global_norm();
  if (norm && !std::isfinite(*norm)) {
    waiting_.clear();
    throw NotFinite("the gradient norm");
  }
  if (!gradients_wait()) return norm;
  if (options_.clip == ClipMode::kGlobal) scalars_.gradient_scale = clip_scale(*norm);
  optimizer_.begin_step(scalars_);
  if (optimizer_.two_phase()) {
    update_in_two_phases();
    return norm;
  }
  std::erase_if(waiting_, [&](int64_t block) {
    if (!stays(block)) return false;
    update(block, scalars_);
    return true;
  });
  if (!waiting_.empty() && share_of(waiting_.front())) {
    whole_ = false;
    flush();
    whole_ = true;
  }
  return norm;
}

void Updater::abandon() {
  waiting_.clear();
  pending_.clear();
}

void Updater::update_in_two_phases() {
  std::vector<int64_t> staying, streamed;
  for (const int64_t block : std::exchange(waiting_, {}))
    (stays(block) ? staying : streamed).push_back(block);
  std::ranges::sort(streamed);
  const at::NoGradGuard no_grad;
  const auto observe = [&](int64_t block) {
    return blocks_.for_each_trainable(block, [&](Trainable& t) {
      if (!t.gradient.defined()) t.gradient = at::zeros_like(t.value);
      optimizer_.observe({t.value.detach(), t.gradient.contiguous(), t.states, t.id},
                         scalars_of(t, scalars_));
      return true;
    });
  };
  whole_ = false;
  for (const int64_t block : staying) observe(block);
  if (!streamed.empty()) blocks_.visit(streamed, observe);
  optimizer_.end_observe();
  for (const int64_t block : staying) update(block, scalars_);
  if (!streamed.empty())
    blocks_.visit(streamed, [&](int64_t block) { return update(block, scalars_); });
  whole_ = true;
}

bool Updater::before_forward(int64_t block) {
  if (std::erase(pending_, block) == 0) return false;
  update(block, pending_scalars_);
  whole_ = pending_.empty();
  return true;
}

void Updater::flush() {
  std::sort(waiting_.begin(), waiting_.end());
  blocks_.visit(waiting_, [this](int64_t block) { return update(block, scalars_); });
  waiting_.clear();
}

}  // namespace flux::engine
