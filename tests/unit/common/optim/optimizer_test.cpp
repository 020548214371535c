#include "common/optim/optimizer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "common/core/rng.h"
#include "common/optim/ema.h"
#include "common/optim/norm.h"
#include "common/optim/rounding.h"
#include "tests/support/golden.h"

namespace flux {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

std::vector<at::Tensor> zeros(const Optimizer& optimizer, const at::Tensor& p, int64_t offset = 0) {
  std::vector<at::Tensor> states;
  for (const StateTensor& state : optimizer.state_layout(p.sizes(), p.scalar_type(), offset))
    states.push_back(at::zeros(state.shape, p.options().dtype(state.dtype)));
  return states;
}

Slot slot_of(const Optimizer& optimizer, const at::Tensor& p) {
  Slot slot;
  slot.parameter = p.clone();
  slot.states = zeros(optimizer, p);
  return slot;
}

/// A step of all parameters, as a training loop makes it.
void whole_step(Optimizer& optimizer, const std::vector<Slot*>& slots, const StepScalars& step) {
  optimizer.begin_step(step);
  if (optimizer.two_phase()) {
    for (const Slot* slot : slots) optimizer.observe(*slot, step);
    optimizer.end_observe();
  }
  for (const Slot* slot : slots) optimizer.step(*slot, step);
}

/// Gradients of `steps` steps, equal for equal seeds.
void run(Optimizer& optimizer, Slot& slot, int64_t steps, at::ScalarType gradients) {
  for (int64_t t = 1; t <= steps; ++t) {
    at::manual_seed(static_cast<uint64_t>(100 + t));
    slot.gradient = (at::randn(slot.parameter.sizes()) * 0.01).to(gradients);
    whole_step(optimizer, {&slot}, {.step = t, .learning_rate = 1e-3, .seed = 9});
  }
}

const std::vector<std::pair<std::string, OptimizerOptions>> kKinds{
    {"adamw", AdamWOptions{}},
    {"adamw8bit", AdamW8bitOptions{}},
    {"adafactor", AdafactorOptions{}},
    {"adafactor with beta1",
     AdafactorOptions{.beta1 = 0.9, .weight_decay = 0.01, .scale_parameter = true}},
    {"lion", LionOptions{.weight_decay = 0.01}},
    {"prodigy", ProdigyOptions{.d0 = 1e-3}},
    {"schedulefree", ScheduleFreeOptions{.weight_decay = 0.01}},
    {"sgd", SgdOptions{.weight_decay = 0.01, .nesterov = true}},
};
constexpr WeightMode kModes[] = {
    WeightMode::kStochastic, WeightMode::kNearest, WeightMode::kKahan, WeightMode::kMaster};

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() &&
         std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
}

TEST(Optimizer, GivesTheSameBitsOnAnyNumberOfThreads) {
  const int threads = at::get_num_threads();
  at::manual_seed(1);
  for (const auto& shape : {std::vector<int64_t>{530, 611}, {300'001}, {3, 41, 97}}) {
    const at::Tensor start = at::randn(shape).to(at::kBFloat16);
    for (const auto& [name, options] : kKinds) {
      for (const WeightMode mode : kModes) {
        const auto optimizer = make_optimizer(options, {.weights = mode});
        Slot one = slot_of(*optimizer, start), four = slot_of(*optimizer, start);
        at::set_num_threads(1);
        run(*optimizer, one, 2, at::kBFloat16);
        at::set_num_threads(4);
        run(*make_optimizer(options, {.weights = mode}), four, 2, at::kBFloat16);
        EXPECT_TRUE(same_bits(one.parameter, four.parameter)) << name;
        for (size_t i = 0; i < one.states.size(); ++i)
          EXPECT_TRUE(same_bits(one.states[i], four.states[i])) << name << " state " << i;
        EXPECT_FALSE(at::equal(one.parameter, start)) << name;
      }
    }
  }
  at::set_num_threads(threads);
}

TEST(Optimizer, UpdatesSlicesAsTheWhole) {
  at::manual_seed(2);
  const at::Tensor start = at::randn({10'240 + 77}).to(at::kBFloat16);
  for (const auto& [name, options] : kKinds) {
    if (name.starts_with("adafactor") || name == "prodigy") continue;
    const auto optimizer = make_optimizer(options);
    Slot whole = slot_of(*optimizer, start);
    whole.id = 5;
    run(*optimizer, whole, 1, at::kFloat);
    for (const int64_t middle :
         {5120, 10'240}) {  // also a rest that by itself were too small for 8 bits
      at::Tensor parts = start.clone();
      std::vector<at::Tensor> states;  // the slices', one behind the other
      for (const auto& [begin, end] :
           {std::pair<int64_t, int64_t>{0, middle}, {middle, start.numel()}}) {
        Slot slice;
        slice.parameter = parts.slice(0, begin, end);
        slice.gradient = whole.gradient.slice(0, begin, end);
        slice.states = zeros(*optimizer, slice.parameter, begin);
        slice.id = 5;
        slice.offset = begin;
        optimizer->step(slice, {.step = 1, .learning_rate = 1e-3, .seed = 9});
        for (size_t i = 0; i < slice.states.size(); ++i)
          if (begin == 0)
            states.push_back(slice.states[i]);
          else
            states.at(i) = at::cat({states[i], slice.states[i]});
      }
      EXPECT_TRUE(same_bits(parts, whole.parameter)) << name << " in two at " << middle;
      ASSERT_EQ(states.size(), whole.states.size()) << name;
      for (size_t i = 0; i < states.size(); ++i)
        EXPECT_TRUE(same_bits(states[i], whole.states[i]))
            << name << " state " << i << " in two at " << middle;
    }
  }
}

TEST(Optimizer, AdamWEqualsItsOpInFloat32) {
  at::manual_seed(3);
  const at::Tensor start = at::randn({41, 53});
  const auto optimizer = make_optimizer(AdamWOptions{.weight_decay = 0.1});
  Slot slot = slot_of(*optimizer, start);
  at::Tensor p = start.clone(), m = at::zeros_like(p), v = at::zeros_like(p);
  for (int64_t t = 1; t <= 3; ++t) {
    const at::Tensor g = at::randn({41, 53});
    slot.gradient = g;
    optimizer->step(slot, {.step = t, .learning_rate = 1e-2});
    adamw_step(p, g, m, v, 1e-2, {.weight_decay = 0.1}, t);
  }
  EXPECT_TRUE(same_bits(slot.parameter, p));
  EXPECT_TRUE(same_bits(slot.states[0], m));
  EXPECT_TRUE(same_bits(slot.states[1], v));
}

TEST(Optimizer, MasterWeightsAreThoseOfAFloat32Run) {
  at::manual_seed(4);
  const at::Tensor start = at::randn({64, 80}).to(at::kBFloat16);
  for (const auto& [name, options] : kKinds) {
    const auto optimizer = make_optimizer(options, {.weights = WeightMode::kMaster});
    Slot bf16 = slot_of(*optimizer, start), f32 = slot_of(*optimizer, start.to(at::kFloat));
    run(*optimizer, bf16, 3, at::kFloat);
    run(*make_optimizer(options), f32, 3, at::kFloat);
    EXPECT_TRUE(same_bits(bf16.states.back(), f32.parameter)) << name;
    EXPECT_TRUE(same_bits(bf16.parameter, f32.parameter.to(at::kBFloat16))) << name;
  }
}

TEST(Optimizer, SmallUpdatesAreKeptButInPlainRounding) {
  // 200 updates of 1e-4 on weights of 1, whose neighbours are 2^-8 and 2^-7 away
  for (const auto& [name, options] :
       {std::pair<std::string, OptimizerOptions>{"adamw", AdamWOptions{.weight_decay = 0}},
        {"adamw8bit", AdamW8bitOptions{.weight_decay = 0}},
        {"adafactor", AdafactorOptions{}}}) {
    for (const WeightMode mode : kModes) {
      const auto optimizer = make_optimizer(options, {.weights = mode});
      Slot slot = slot_of(*optimizer, at::ones({64, 128}, at::kBFloat16));
      slot.gradient = at::full({64, 128}, 0.5f);
      for (int64_t t = 1; t <= 200; ++t)
        optimizer->step(slot, {.step = t, .learning_rate = 1e-4, .seed = 1});
      const double moved = 1 - slot.parameter.to(at::kDouble).mean().item<double>();
      if (mode == WeightMode::kNearest)
        EXPECT_EQ(moved, 0) << name;
      else
        EXPECT_NEAR(moved, 0.02, mode == WeightMode::kStochastic ? 5e-4 : 2.1e-3) << name;
    }
  }
}

TEST(Optimizer, RoundsByTheProjectsStreamOfSeedStepAndParameter) {
  const auto optimizer = make_optimizer(AdamWOptions{}, {.weights = WeightMode::kStochastic}),
             exact = make_optimizer(AdamWOptions{});
  at::manual_seed(5);
  const at::Tensor start = at::randn({2077}).to(at::kBFloat16), g = at::randn({2077});
  Slot slot = slot_of(*optimizer, start), f32 = slot_of(*exact, start.to(at::kFloat));
  slot.gradient = f32.gradient = g;
  slot.id = 3;
  optimizer->step(slot, {.step = 1, .learning_rate = 1e-3, .seed = 77});
  exact->step(f32, {.step = 1, .learning_rate = 1e-3});
  const RandomStream words(77, Purpose::kStochasticRounding, 1, 3);
  const auto* const got = static_cast<const uint16_t*>(slot.parameter.const_data_ptr());
  for (int64_t i = 0; i < 2077; ++i) {
    const auto block = philox4x32({static_cast<uint32_t>(i / 8), 0, words.bits(2), words.bits(3)},
                                  {words.bits(0), words.bits(1)});
    const uint32_t random = block[static_cast<size_t>(i % 8 / 2)] >> (i % 2 * 16) & 0xFFFF;
    ASSERT_EQ(got[i], round_stochastic(f32.parameter[i].item<float>(), random)) << i;
  }
  Slot other = slot_of(*optimizer, start);
  other.gradient = g;
  other.id = 4;
  optimizer->step(other, {.step = 1, .learning_rate = 1e-3, .seed = 77});
  EXPECT_FALSE(at::equal(other.parameter, slot.parameter));
}

TEST(Optimizer, ScalesGradients) {
  at::manual_seed(6);
  const at::Tensor start = at::randn({70, 90}), g = at::randn({70, 90});
  for (const auto& [name, options] : kKinds) {
    const auto optimizer = make_optimizer(options);
    Slot by_scale = slot_of(*optimizer, start), by_hand = slot_of(*optimizer, start);
    by_scale.gradient = g;
    by_hand.gradient = g * 0.3f;
    whole_step(*make_optimizer(options),
               {&by_scale},
               {.step = 1, .learning_rate = 1e-3, .gradient_scale = 0.3});
    whole_step(*make_optimizer(options), {&by_hand}, {.step = 1, .learning_rate = 1e-3});
    EXPECT_TRUE(same_bits(by_scale.parameter, by_hand.parameter)) << name;
    EXPECT_TRUE(same_bits(by_scale.states[0], by_hand.states[0])) << name;
  }
}

TEST(Optimizer, KeepsMomentsInBfloat16WhereAsked) {
  const auto optimizer =
      make_optimizer(AdamWOptions{}, {.weights = WeightMode::kNearest, .states = at::kBFloat16});
  Slot slot = slot_of(*optimizer, at::ones({10}));
  EXPECT_EQ(slot.states[0].scalar_type(), at::kBFloat16);
  slot.gradient = at::full({10}, 0.5f);
  optimizer->step(slot, {.step = 1, .learning_rate = 1e-3});
  EXPECT_TRUE(at::equal(slot.states[0], at::full({10}, 0.05f).to(at::kBFloat16)));
}

TEST(Optimizer, ListsItsStates) {
  const auto names = [](const OptimizerOptions& options,
                        OptimizerPrecision precision,
                        std::vector<int64_t> shape,
                        at::ScalarType dtype) {
    std::string out;
    for (const StateTensor& s : make_optimizer(options, precision)->state_layout(shape, dtype))
      out += fmt::format("{} {} [{}];", s.name, c10::toString(s.dtype), fmt::join(s.shape, ","));
    return out;
  };
  EXPECT_EQ(names(AdamWOptions{}, {}, {2, 3}, at::kBFloat16),
            "exp_avg Float [2,3];exp_avg_sq Float [2,3];");
  EXPECT_EQ(names(AdamWOptions{}, {WeightMode::kKahan, at::kBFloat16}, {2}, at::kBFloat16),
            "exp_avg BFloat16 [2];exp_avg_sq BFloat16 [2];compensation BFloat16 [2];");
  EXPECT_EQ(names(AdamWOptions{}, {WeightMode::kKahan, at::kFloat}, {2}, at::kFloat),
            "exp_avg Float [2];exp_avg_sq Float [2];");
  EXPECT_EQ(names(AdamW8bitOptions{}, {WeightMode::kMaster, at::kFloat}, {64, 65}, at::kBFloat16),
            "state1 Byte [64,65];state2 Byte [64,65];absmax1 Float [17];absmax2 Float [17];master "
            "Float [64,65];");
  EXPECT_EQ(names(AdamW8bitOptions{}, {}, {4095}, at::kFloat),
            "state1 Float [4095];state2 Float [4095];");
  EXPECT_EQ(names(AdafactorOptions{}, {}, {5, 6}, at::kFloat),
            "exp_avg_sq_row Float [5];exp_avg_sq_col Float [6];");
  EXPECT_EQ(names(AdafactorOptions{.beta1 = 0.9},
                  {WeightMode::kNearest, at::kBFloat16},
                  {2, 5, 6},
                  at::kFloat),
            "exp_avg_sq_row Float [2,5];exp_avg_sq_col Float [2,6];exp_avg BFloat16 [2,5,6];");
  EXPECT_EQ(names(ProdigyOptions{}, {WeightMode::kNearest, at::kBFloat16}, {7}, at::kFloat),
            "exp_avg BFloat16 [7];exp_avg_sq BFloat16 [7];s Float [7];p0 Float [7];");
  EXPECT_EQ(names(ScheduleFreeOptions{}, {WeightMode::kNearest, at::kBFloat16}, {7}, at::kFloat),
            "z Float [7];exp_avg_sq Float [7];");
  EXPECT_EQ(names(LionOptions{}, {}, {7}, at::kFloat), "exp_avg Float [7];");
  EXPECT_EQ(names(SgdOptions{}, {}, {7}, at::kFloat), "momentum_buffer Float [7];");
  EXPECT_EQ(names(AdafactorOptions{}, {}, {7}, at::kFloat), "exp_avg_sq Float [7];");
}

TEST(Optimizer, RefusesSlotsThatDisagree) {
  const auto optimizer = make_optimizer(AdamWOptions{});
  const Slot good = [&] {
    Slot slot = slot_of(*optimizer, at::zeros({4, 4}));
    slot.gradient = at::zeros({4, 4});
    return slot;
  }();
  const StepScalars step{.step = 1, .learning_rate = 1e-3};
  EXPECT_NO_THROW(optimizer->step(good, step));
  const auto refused = [&](auto change, const std::string& text) {
    Slot slot = good;
    change(slot);
    EXPECT_THAT([&] { optimizer->step(slot, step); },
                ThrowsMessage<std::invalid_argument>(HasSubstr(text)));
  };
  refused(
      [](Slot& s) {
        s.gradient = at::zeros({4, 5});
      },
      "gradient has shape [4, 5], expected [4, 4]");
  refused([](Slot& s) { s.gradient = at::zeros({4, 4}, at::kDouble); }, "gradient is Double");
  refused(
      [](Slot& s) {
        s.gradient = at::zeros({4, 4}).t();
        s.gradient = at::zeros({8, 4}).slice(0, 0, 8, 2);
      },
      "gradient is not contiguous");
  refused([](Slot& s) { s.states.pop_back(); }, "1 states given, 2 expected");
  refused(
      [](Slot& s) {
        s.states[1] = at::zeros({4, 4}, at::kBFloat16);
      },
      "exp_avg_sq is BFloat16, expected Float");
  refused([](Slot& s) { s.offset = 256; }, "offset 256");
  EXPECT_THAT([&] { optimizer->step(good, {.step = 0, .learning_rate = 1}); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("steps count from 1")));
  EXPECT_THROW(make_optimizer(AdamWOptions{}, {.states = at::kHalf}), std::invalid_argument);
  EXPECT_THROW(make_optimizer(AdafactorOptions{.warmup_init = true}), std::invalid_argument);
}

TEST(Optimizer, ChangesNothingOnTheMetaDeviceAndTakesNoElements) {
  for (const auto& [name, options] : kKinds) {
    const auto optimizer = make_optimizer(options);
    Slot slot;
    slot.parameter = at::empty({1 << 20, 1 << 10}, at::device(at::kMeta).dtype(at::kBFloat16));
    slot.gradient = slot.parameter;
    slot.states = zeros(*optimizer, slot.parameter);
    EXPECT_NO_THROW(whole_step(*optimizer, {&slot}, {.step = 1, .learning_rate = 1e-3})) << name;
    Slot none = slot_of(*optimizer, at::zeros({0, 5}));
    none.gradient = at::zeros({0, 5});
    EXPECT_NO_THROW(
        whole_step(*make_optimizer(options), {&none}, {.step = 1, .learning_rate = 1e-3}))
        << name;
  }
}

TEST(Optimizer, GoesOnFromItsNumbersAndStates) {
  at::manual_seed(10);
  const at::Tensor start = at::randn({50, 60});
  for (const auto& [name, options] : kKinds) {
    const auto first = make_optimizer(options), second = make_optimizer(options);
    Slot straight = slot_of(*first, start), resumed = slot_of(*first, start);
    run(*first, straight, 4, at::kFloat);
    const auto other = make_optimizer(options);
    run(*other, resumed, 2, at::kFloat);
    second->set_numbers(other->numbers());
    for (int64_t t = 3; t <= 4; ++t) {
      at::manual_seed(static_cast<uint64_t>(100 + t));
      resumed.gradient = at::randn(start.sizes()) * 0.01;
      whole_step(*second, {&resumed}, {.step = t, .learning_rate = 1e-3, .seed = 9});
    }
    EXPECT_TRUE(same_bits(resumed.parameter, straight.parameter)) << name;
    EXPECT_EQ(second->numbers(), first->numbers()) << name;
  }
}

TEST(Prodigy, EstimatesFromAllParametersAndLeavesOutAStepWithoutGradients) {
  const auto optimizer = make_optimizer(ProdigyOptions{.d0 = 1e-3});
  at::manual_seed(11);
  Slot a = slot_of(*optimizer, at::randn({30})), b = slot_of(*optimizer, at::randn({40}));
  a.gradient = at::zeros({30});
  b.gradient = at::zeros({40});
  const at::Tensor before = a.parameter.clone();
  whole_step(*optimizer, {&a, &b}, {.step = 1, .learning_rate = 1});
  EXPECT_TRUE(at::equal(a.parameter, before));
  EXPECT_EQ(optimizer->numbers().at("k"), 0);
  for (int64_t t = 2; t <= 30; ++t) {  // towards zero, from afar
    a.gradient = a.parameter.clone();
    b.gradient = b.parameter.clone();
    whole_step(*optimizer, {&a, &b}, {.step = t, .learning_rate = 1});
  }
  EXPECT_EQ(optimizer->numbers().at("k"), 29);
  EXPECT_GT(optimizer->numbers().at("d"), 0.01);

  const auto master = make_optimizer(ProdigyOptions{}, {.weights = WeightMode::kMaster});
  Slot bf16 = slot_of(*master, at::ones({9}, at::kBFloat16));
  for (int64_t t = 1; t <= 2; ++t) {
    bf16.gradient = at::full({9}, t == 1 ? 0.0f : 1.0f);
    whole_step(*master, {&bf16}, {.step = t, .learning_rate = 1});
  }
  EXPECT_LT(test::largest_error(bf16.states.back(), at::ones({9})), 1e-4);
  EXPECT_THROW(make_optimizer(ProdigyOptions{.d0 = 0}), std::invalid_argument);
  EXPECT_THROW(make_optimizer(AdamWOptions{})->observe(a, {}), std::invalid_argument);
}

TEST(ScheduleFree, NeedsItsStepBegunAndAveragesAfterwards) {
  const auto optimizer = make_optimizer(ScheduleFreeOptions{});
  Slot slot = slot_of(*optimizer, at::full({4}, 1.0f));
  slot.gradient = at::full({4}, 0.5f);
  EXPECT_THROW(optimizer->step(slot, {.step = 1, .learning_rate = 0.1}), std::invalid_argument);
  for (int64_t t = 1; t <= 3; ++t) {
    optimizer->begin_step({.step = t, .learning_rate = 0.1});
    optimizer->step(slot, {.step = t, .learning_rate = 0.1});
  }
  // z goes down by 0.1 a step: 0.9, 0.8, 0.7, whose average is x; y = 0.1 z + 0.9 x
  EXPECT_LT(test::largest_error(slot.states[0], at::full({4}, 0.7)), 1e-5);
  EXPECT_LT(test::largest_error(optimizer->evaluation_weights(slot), at::full({4}, 0.8)), 1e-5);
  EXPECT_LT(test::largest_error(slot.parameter, at::full({4}, 0.79)), 1e-5);
}

TEST(Ema, FollowsInBFloat16WhatNearestRoundingWouldLose) {
  const at::Tensor weights = at::zeros({4096});
  at::Tensor average = at::ones({4096}, at::kBFloat16);
  for (int64_t t = 1; t <= 1000; ++t) ema_update(average, weights, 0.9995, 1, t, 0);
  EXPECT_NEAR(average.to(at::kDouble).mean().item<double>(), std::pow(0.9995, 1000), 5e-3);
  at::Tensor whole = at::ones({4096});
  ema_update(whole, at::full({4096}, 3.0f).to(at::kBFloat16), 0.75, 1, 1, 0);
  EXPECT_TRUE(at::equal(whole, at::full({4096}, 1.5f)));
  EXPECT_THROW(ema_update(whole, at::zeros({5}), 0.5, 1, 1, 0), std::invalid_argument);
  EXPECT_THROW(ema_update(whole, at::zeros({4096}, at::kDouble), 0.5, 1, 1, 0),
               std::invalid_argument);
}

/// D of step t with a decay of 0.7.
double decay_at(int64_t t) {
  return std::min(0.7, static_cast<double>(t) / static_cast<double>(9 + t));
}

TEST(Ema, IsKeptBesideTheStatesOfEveryOptimizer) {
  at::manual_seed(16);
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const at::Tensor start = at::randn({37, 150}).to(type);
    for (const auto& [name, options] : kKinds) {
      for (const WeightMode mode : kModes) {
        for (const auto kept : {at::kFloat, at::kBFloat16}) {
          SCOPED_TRACE(testing::Message() << name << " mode " << static_cast<int>(mode));
          const auto plain = make_optimizer(options, {.weights = mode}),
                     with = make_optimizer(options, {.weights = mode});
          with->keep_average({.decay = 0.7}, kept);
          Slot a = slot_of(*plain, start), b = slot_of(*with, start);
          ASSERT_EQ(b.states.size(), a.states.size() + 1);
          const StateTensor last = with->state_layout(start.sizes(), type).back();
          EXPECT_EQ(last.name, "ema");
          EXPECT_EQ(last.dtype, kept);
          EXPECT_TRUE(last.on_host);
          at::Tensor expected;
          for (int64_t t = 1; t <= 4; ++t) {
            const StepScalars step{.step = t, .learning_rate = 0.1, .seed = 9};
            a.gradient = b.gradient = at::randn(start.sizes());
            whole_step(*plain, {&a}, step);
            whole_step(*with, {&b}, step);
            with->average(b, step);
            // as precisely as weights are kept
            const bool master = type == at::kBFloat16 && mode == WeightMode::kMaster;
            const at::Tensor weights =
                (master && !plain->averages() ? a.states.back() : plain->evaluation_weights(a))
                    .to(at::kDouble);
            expected = t == 1 ? weights : at::lerp(expected, weights, 1 - decay_at(t));
          }
          EXPECT_TRUE(same_bits(a.parameter, b.parameter));
          EXPECT_TRUE(same_bits(plain->evaluation_weights(a), with->evaluation_weights(b)));
          for (size_t i = 0; i < a.states.size(); ++i)
            EXPECT_TRUE(same_bits(a.states[i], b.states[i])) << i;
          EXPECT_LT(test::largest_error(b.states.back(), expected),
                    kept == at::kFloat ? 1e-6 : 0.05);
          EXPECT_EQ(with->averaged_weights(b).scalar_type(), type);
          EXPECT_FALSE(at::equal(with->averaged_weights(b), b.parameter));
        }
      }
    }
  }
  EXPECT_THROW(make_optimizer(AdamWOptions{})->keep_average({}, at::kHalf), std::invalid_argument);
}

TEST(SumOfSquares, IsTheSameOnAnyNumberOfThreads) {
  at::manual_seed(12);
  const int threads = at::get_num_threads();
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const int64_t n : {0, 1, 17, 1024, 300'001}) {
      const at::Tensor x = at::randn({n}).to(type);
      at::set_num_threads(1);
      const double one = sum_of_squares(x);
      at::set_num_threads(4);
      EXPECT_EQ(sum_of_squares(x), one);
      const double wanted = x.to(at::kDouble).square().sum().item<double>();
      EXPECT_NEAR(one, wanted, 1e-6 * wanted);
    }
  }
  at::set_num_threads(threads);
  EXPECT_NEAR(sum_of_squares(at::full({6, 4}, 2.0f).t().slice(0, 0, 2)), 48, 1e-9);
  EXPECT_EQ(sum_of_squares(at::empty({1 << 30}, at::device(at::kMeta).dtype(at::kFloat))), 0);
}

/// Adafactor in double, as the formulas of adafactor.h say.
at::Tensor adafactor_by_formula(at::Tensor p,
                                const std::vector<at::Tensor>& gradients,
                                double rate) {
  at::Tensor rows, columns;
  p = p.to(at::kDouble);
  for (size_t t = 1; t <= gradients.size(); ++t) {
    const at::Tensor g = gradients[t - 1].to(at::kDouble), squares = g * g + 1e-30;
    const double beta2 = 1 - std::pow(static_cast<double>(t), -0.8);
    const at::Tensor row = squares.mean(-1), column = squares.mean(-2);
    rows = t == 1 ? row : rows * beta2 + row * (1 - beta2);
    columns = t == 1 ? column : columns * beta2 + column * (1 - beta2);
    at::Tensor u =
        g * (rows / rows.mean(-1, true)).rsqrt().unsqueeze(-1) * columns.unsqueeze(-2).rsqrt();
    u = u / std::max(1.0, u.square().mean().sqrt().item<double>());
    p = p - u * rate;
  }
  return p;
}

TEST(Adafactor, FollowsItsFormulasForMatricesOfAnyShape) {
  at::manual_seed(8);
  // the last is too wide for column sums aside, the one before has many matrices
  for (const auto& shape : {std::vector<int64_t>{1, 1},
                            {1, 700},
                            {700, 1},
                            {16, 17},
                            {1500, 33},
                            {33, 5000},
                            {7, 20, 30},
                            {3, 140'000}}) {
    const auto optimizer = make_optimizer(AdafactorOptions{});
    const at::Tensor start = at::randn(shape);
    Slot slot = slot_of(*optimizer, start);
    std::vector<at::Tensor> gradients;
    for (int64_t t = 1; t <= 3; ++t) {
      gradients.push_back(at::randn(shape) * at::randn({shape.back()}) * static_cast<double>(t));
      slot.gradient = gradients.back();
      optimizer->step(slot, {.step = t, .learning_rate = 0.01});
    }
    const at::Tensor wanted = adafactor_by_formula(start, gradients, 0.01);
    EXPECT_LT(test::largest_error(slot.parameter, wanted), 1e-6)
        << fmt::format("{}", fmt::join(shape, "x"));
  }
}

}  // namespace
}  // namespace flux
