#include "common/optim/adamw.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <vector>

#include "tests/support/golden.h"

namespace flux {
namespace {

struct State {
  at::Tensor p, m, v;
};

State start(const at::Tensor& p) { return {p.clone(), at::zeros_like(p), at::zeros_like(p)}; }

TEST(AdamW, EqualsTheReferenceInFloat32) {
  const TensorMap inputs = test::golden("optim/inputs.safetensors"),
                  wanted = test::golden("optim/adamw_fp32.safetensors");
  for (int i = 0; i < 6; ++i) {
    State s = start(inputs.at(fmt::format("p0/{}", i)));
    for (int t = 1; t <= 10; ++t) {
      SCOPED_TRACE(fmt::format("tensor {} step {}", i, t));
      adamw_step(s.p, inputs.at(fmt::format("g/{}/{}", t, i)).clone(), s.m, s.v, 1e-3, {}, t);
      if (const auto p = wanted.find(fmt::format("p/{}/{}", t, i)); p != wanted.end()) {
        EXPECT_LE(test::largest_error(s.p, p->second), 2.5e-7);
      }
      if (const auto m = wanted.find(fmt::format("s/{}/{}/exp_avg", t, i)); m != wanted.end()) {
        const at::Tensor& v = wanted.at(fmt::format("s/{}/{}/exp_avg_sq", t, i));
        EXPECT_LE(test::largest_error(s.m, m->second), 1e-6 * m->second.abs().max().item<double>());
        EXPECT_LE(test::largest_error(s.v, v), 1e-6 * v.abs().max().item<double>());
      }
    }
  }
}

TEST(AdamW, IsWithinAnUlpOfTheReferenceInBFloat16) {
  const TensorMap inputs = test::golden("optim/inputs.safetensors"),
                  wanted = test::golden("optim/adamw_bf16.safetensors");
  for (int i = 0; i < 6; ++i) {
    State s = start(inputs.at(fmt::format("p0/{}", i)).to(at::kBFloat16));
    for (int t = 1; t <= 3; ++t) {
      adamw_step(
          s.p, inputs.at(fmt::format("g/{}/{}", t, i)).to(at::kBFloat16), s.m, s.v, 1e-3, {}, t);
      const at::Tensor p = wanted.at(fmt::format("p/{}/{}", t, i)).to(at::kDouble);
      const at::Tensor ulp = at::exp2(at::floor(at::log2(p.abs().clamp_min(1e-30))) - 7);
      // a moment on the midpoint of two bfloat16 values may go either way, and moves a weight near
      // a power of two by two
      const at::Tensor error = (s.p.to(at::kDouble) - p).abs() / ulp;
      EXPECT_LE(error.max().item<double>(), 2) << "tensor " << i << " step " << t;
      EXPECT_LE((error > 1).sum().item<int64_t>(), p.numel() / 1000)
          << "tensor " << i << " step " << t;
    }
  }
}

TEST(AdamW, GivesTheSameBitsOnAnyNumberOfThreads) {
  const at::Tensor p = at::randn({300'001}), g = at::randn({300'001});
  State one = start(p), two = start(p);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  adamw_step(one.p, g, one.m, one.v, 1e-3, {}, 1);
  at::set_num_threads(2);
  adamw_step(two.p, g, two.m, two.v, 1e-3, {}, 1);
  at::set_num_threads(threads);
  EXPECT_TRUE(at::equal(one.p, two.p));
  EXPECT_TRUE(at::equal(one.v, two.v));
}

TEST(AdamW, DecaysWeightsWithoutGradient) {
  State s = start(at::full({5}, 2.0f));
  adamw_step(s.p, at::zeros({5}), s.m, s.v, 0.1, {.weight_decay = 0.5}, 1);
  EXPECT_FLOAT_EQ(s.p[3].item<float>(), 1.9f);
}

TEST(AdamW, RefusesOperandsThatDisagree) {
  const auto attempt = [](const at::Tensor& p, const at::Tensor& g, int64_t step) {
    adamw_step(p, g, at::zeros_like(p), at::zeros_like(p), 1e-3, {}, step);
  };
  EXPECT_THROW(attempt(at::zeros({4}), at::zeros({5}), 1), std::invalid_argument);
  EXPECT_THROW(attempt(at::zeros({4}), at::zeros({4}, at::kDouble), 1), std::invalid_argument);
  EXPECT_THROW(attempt(at::zeros({4}, at::kHalf), at::zeros({4}, at::kHalf), 1),
               std::invalid_argument);
  EXPECT_THROW(attempt(at::zeros({4, 4}).t(), at::zeros({4, 4}), 1), std::invalid_argument);
  EXPECT_THROW(attempt(at::zeros({4}), at::zeros({4}), 0), std::invalid_argument);
}

TEST(AdamW, ChangesNothingOnTheMetaDevice) {
  const at::Tensor p = at::empty({1 << 20, 1 << 10}, at::device(at::kMeta).dtype(at::kFloat));
  EXPECT_NO_THROW(adamw_step(p, p, p, p, 1e-3, {}, 1));
}

}  // namespace
}  // namespace flux
