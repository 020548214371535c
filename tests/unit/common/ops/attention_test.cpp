#include "common/ops/attention.h"

#include <gtest/gtest.h>

#include <cmath>

#include "common/ops/op.h"
#include "tests/support/golden.h"

namespace flux {
namespace {

at::Tensor plain(const at::Tensor& q,
                 const at::Tensor& k,
                 const at::Tensor& v,
                 const at::Tensor& mask) {
  const auto t = [](const at::Tensor& x) { return x.to(at::kDouble).transpose(1, 2); };
  auto scores = t(q).matmul(t(k).transpose(2, 3)) / std::sqrt(static_cast<double>(q.size(3)));
  scores = scores.masked_fill(mask.logical_not().unsqueeze(1).unsqueeze(1), -INFINITY);
  return scores.softmax(-1).matmul(t(v)).transpose(1, 2).flatten(2);
}

TEST(Attention, EqualsTheFormWithAScoreMatrix) {
  at::manual_seed(1);
  const auto q = at::randn({2, 70, 3, 32}), k = at::randn({2, 90, 3, 32}),
             v = at::randn({2, 90, 3, 32});
  auto mask = at::ones({2, 90}, at::kBool);
  EXPECT_LT(test::relative_error(attention(q, k, v), plain(q, k, v, mask)), 1e-6);
  mask[0].narrow(0, 40, 20).fill_(false);
  mask[1].narrow(0, 1, 89).fill_(false);
  EXPECT_LT(test::relative_error(attention(q, k, v, mask), plain(q, k, v, mask)), 1e-6);
  const auto half = attention(q.to(at::kBFloat16), k.to(at::kBFloat16), v.to(at::kBFloat16), mask);
  EXPECT_LT(test::relative_error(half, plain(q, k, v, mask)), 0.01);
}

TEST(Attention, MaskedKeysGetNoGradient) {
  at::manual_seed(2);
  const auto q = at::randn({1, 8, 2, 16}), k = at::randn({1, 8, 2, 16}).requires_grad_(),
             v = at::randn({1, 8, 2, 16});
  auto mask = at::ones({1, 8}, at::kBool);
  mask[0][3].fill_(false);
  attention(q, k, v, mask).pow(2).sum().backward();
  EXPECT_EQ(k.grad().select(1, 3).abs().max().item<float>(), 0);
  EXPECT_GT(k.grad().select(1, 4).abs().max().item<float>(), 0);
}

TEST(Attention, OnMetaMakesShapesForwardAndBackward) {
  const auto q = at::empty({2, 7, 3, 16}, at::kMeta).requires_grad_();
  const auto k = at::empty({2, 9, 3, 16}, at::kMeta);
  const auto out =
      attention(q, k, k, at::empty({2, 9}, at::TensorOptions(at::kMeta).dtype(at::kBool)));
  EXPECT_EQ(out.sizes(), (at::IntArrayRef{2, 7, 48}));
  out.sum().backward();
  EXPECT_EQ(q.grad().sizes(), q.sizes());
}

TEST(Attention, TellsTheKernelForTheRecordOfARun) {
  const auto meta = at::empty({0}, at::TensorOptions(at::kMeta).dtype(at::kBFloat16));
  EXPECT_EQ(attention_backend(at::empty({0}), true), "flash-cpu");
  EXPECT_EQ(attention_backend(meta, false), "flash-cpu");
  plan_kernels_for(at::kCUDA);
  EXPECT_EQ(attention_backend(meta, false), "flash");
  EXPECT_EQ(attention_backend(meta, true), "efficient");
  EXPECT_EQ(attention_backend(meta.to(at::kFloat), false), "efficient");
  set_attention_backend(AttentionBackend::kCudnn);
  EXPECT_EQ(attention_backend(meta, true), "cudnn");
  set_attention_backend(AttentionBackend::kFlash);
  plan_kernels_for(at::kCPU);
}

TEST(Attention, NamesWhatDoesNotFit) {
  const auto q = at::zeros({1, 4, 2, 8});
  EXPECT_THROW(attention(q, q.narrow(2, 0, 1), q), std::invalid_argument);
  EXPECT_THROW(attention(q, q, q, at::ones({1, 4})), std::invalid_argument);
  EXPECT_THROW(attention(q, q, q, at::ones({1, 5}, at::kBool)), std::invalid_argument);
}

}  // namespace
}  // namespace flux
