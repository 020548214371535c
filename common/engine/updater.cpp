#include "common/engine/updater.h"

#include <ATen/core/grad_mode.h>
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
  scalars_ = {step, learning_rate, 1, options_.seed};
  // while blocks wait for the step before, the optimizer is still at that one
  if (!gradients_wait()) optimizer_.begin_step(scalars_);
}

LoopHooks Updater::hooks() {
  std::function<void(int64_t, std::span<Trainable>)> collected;
  if (options_.exchange)
    collected = [this](int64_t block, std::span<Trainable> trainables) {
      options_.exchange->collected(block, trainables);
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
    optimizer_.average({t.value.detach(), {}, t.states, t.id}, scalars);
  };
  const bool changed = blocks_.for_each_trainable(block, [&](Trainable& t) {
    at::Tensor gradient = std::exchange(t.gradient, {});
    // none reaches the text half of the last double block of a model without single blocks
    if (!gradient.defined()) gradient = at::zeros_like(t.value);
    optimizer_.step({t.value.detach(), gradient.contiguous(), t.states, t.id},
                    scalars_of(t, scalars));
    if (!options_.after_update) average(t);
    return true;
  });
  if (changed && options_.after_update) {
    const auto updated = block < 0 ? blocks_.outer_trainables() : blocks_.trainables(block);
    options_.after_update(updated);
    for (const Trainable& t : updated) average(t);
  }
  return changed;
}

void Updater::add_norms(std::span<Trainable> trainables) {
  for (const Trainable& t : trainables)
    norms_[t.id] = t.gradient.defined() ? std::sqrt(sum_of_squares(t.gradient)) : 0;
}

double Updater::global_norm() const {
  double sum = 0;
  for (const auto& [id, norm] : norms_) sum += norm * norm;
  return std::sqrt(sum);
}

bool Updater::ready(int64_t block, std::span<Trainable> trainables) {
  if (options_.exchange) options_.exchange->start(block, trainables);
  if (sums_later(block)) {
    waiting_.push_back(block);
    return false;
  }
  if (options_.exchange) options_.exchange->finish();
  if (wants_norms()) add_norms(trainables);
  if (gradients_wait()) {
    waiting_.push_back(block);
    return false;
  }
  for (const Trainable& t : trainables)
    if (norms_.contains(t.id) && !std::isfinite(norms_.at(t.id)))
      throw NotFinite("the gradient of " + t.name);
  whole_ = false;
  return update(block, scalars_);
}

std::optional<double> Updater::finish() {
  if (options_.exchange) options_.exchange->finish();
  for (const int64_t block : waiting_)
    if (wants_norms() && sums_later(block))
      add_norms(block < 0 ? blocks_.outer_trainables() : blocks_.trainables(block));
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
    if (block >= 0 && !blocks_.trainables_stay(block)) return false;
    update(block, scalars_);
    return true;
  });
  return norm;
}

void Updater::update_in_two_phases() {
  std::vector<int64_t> staying, streamed;
  for (const int64_t block : std::exchange(waiting_, {}))
    (block < 0 || blocks_.trainables_stay(block) ? staying : streamed).push_back(block);
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
