// Blocks with several heads and several samples against the same formulas written out in float64.
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>

#include <cmath>

#include "common/models/flux/names.h"
#include "common/models/flux/packing.h"
#include "common/models/flux/transformer.h"
#include "tests/support/golden.h"

namespace flux::dit {
namespace {

Config small_config() {
  Config config;
  config.hidden = 96;
  config.num_heads = 3;
  config.mlp = 128;
  config.axes = {4, 14, 14};
  config.num_double_blocks = config.num_single_blocks = 1;
  return config;
}

/// Random leaves; the same numbers in every dtype.
Weights random_weights(const Config& config, at::ScalarType type) {
  const auto gen = at::make_generator<at::CPUGeneratorImpl>(4);
  auto weights = empty_weights(config);
  TensorMap tensors;
  for (const auto& [name, shape] : tensor_shapes(config))
    tensors[name] = at::randn(shape, gen).mul_(shape.size() == 2 ? 1.5 / std::sqrt(shape[1]) : 0.3);
  for_each_tensor(weights, [&](const std::string& name, at::Tensor& tensor) {
    tensor = tensors.at(name).to(type).requires_grad_();
  });
  return weights;
}

// The formulas of black-forest-labs/flux, src/flux/modules/layers.py, one operation a step.
struct Plain {
  Config config;
  Rope rope;

  static at::Tensor apply(const Linear& layer, const at::Tensor& x) {
    return x.matmul(layer.weight.t()) + layer.bias;
  }
  static at::Tensor modulated(const at::Tensor& x,
                              const at::Tensor& shift,
                              const at::Tensor& scale) {
    const auto centred = x - x.mean(-1, true);
    return (1 + scale) * centred * (centred.pow(2).mean(-1, true) + 1e-6).rsqrt() + shift;
  }
  static std::vector<at::Tensor> chunks(const Linear& layer, const at::Tensor& vec, int64_t n) {
    return apply(layer, vec * vec.sigmoid()).unsqueeze(1).chunk(n, -1);
  }
  static at::Tensor gelu(const at::Tensor& x) {
    return 0.5 * x * (1 + (std::sqrt(2 / M_PI) * (x + 0.044715 * x.pow(3))).tanh());
  }
  /// part 0 q, 1 k, 2 v of a qkv tensor as [B, heads, N, head].
  at::Tensor heads(const at::Tensor& qkv, int64_t part) const {
    return qkv.unflatten(-1, at::IntArrayRef{3, config.num_heads, -1})
        .select(2, part)
        .transpose(1, 2);
  }
  static at::Tensor normed(const at::Tensor& x, const at::Tensor& scale) {
    return x * (x.pow(2).mean(-1, true) + 1e-6).rsqrt() * scale;
  }
  at::Tensor rotated(const at::Tensor& x) const {
    const auto pairs = x.unflatten(-1, at::IntArrayRef{-1, 2});
    const auto a = pairs.select(-1, 0), b = pairs.select(-1, 1);
    const auto c = rope.cos.to(at::kDouble).unsqueeze(1), s = rope.sin.to(at::kDouble).unsqueeze(1);
    return at::stack({c * a - s * b, s * a + c * b}, -1).flatten(-2);
  }
  at::Tensor attend(const at::Tensor& q,
                    const at::Tensor& k,
                    const at::Tensor& v,
                    const at::Tensor& mask) const {
    auto scores = rotated(q).matmul(rotated(k).transpose(2, 3)) /
                  std::sqrt(static_cast<double>(config.head_dim()));
    scores = scores.masked_fill(mask.logical_not().unsqueeze(1).unsqueeze(1), -INFINITY);
    return scores.softmax(-1).matmul(v).transpose(1, 2).flatten(2);
  }

  Streams double_block(const DoubleBlock& w,
                       const Streams& in,
                       const at::Tensor& vec,
                       const at::Tensor& mask) const {
    std::vector<at::Tensor> q, k, v;
    const std::pair<const Stream*, at::Tensor> order[] = {{&w.txt, in.txt}, {&w.img, in.img}};
    for (const auto& [stream, x] : order) {
      const auto mod = chunks(stream->mod, vec, 6);
      const auto qkv = apply(stream->qkv, modulated(x, mod[0], mod[1]));
      q.push_back(normed(heads(qkv, 0), stream->query_scale));
      k.push_back(normed(heads(qkv, 1), stream->key_scale));
      v.push_back(heads(qkv, 2));
    }
    const auto out = attend(at::cat(q, 2), at::cat(k, 2), at::cat(v, 2), mask);
    at::Tensor result[2];
    int64_t first = 0;
    for (size_t i = 0; i < 2; ++i) {
      const auto& [stream, x] = order[i];
      const auto mod = chunks(stream->mod, vec, 6);
      const auto y = x + mod[2] * apply(stream->proj, out.narrow(1, first, x.size(1)));
      result[i] = y + mod[5] * apply(stream->mlp_out,
                                     gelu(apply(stream->mlp_in, modulated(y, mod[3], mod[4]))));
      first += x.size(1);
    }
    return {result[1], result[0]};
  }

  at::Tensor single_block(const SingleBlock& w,
                          const at::Tensor& x,
                          const at::Tensor& vec,
                          const at::Tensor& mask) const {
    const auto mod = chunks(w.modulation, vec, 3);
    const auto z = apply(w.linear1, modulated(x, mod[0], mod[1]));
    const auto qkv = z.narrow(-1, 0, 3 * config.hidden),
               rest = z.narrow(-1, 3 * config.hidden, config.mlp);
    const auto out = attend(normed(heads(qkv, 0), w.query_scale),
                            normed(heads(qkv, 1), w.key_scale),
                            heads(qkv, 2),
                            mask);
    return x + mod[2] * apply(w.linear2, at::cat({out, gelu(rest)}, -1));
  }
};

class Blocks : public testing::Test {
 protected:
  Config config_ = small_config();
  Weights narrow_ = random_weights(config_, at::kFloat),
          wide_ = random_weights(config_, at::kDouble);
  Rope rope_ = rope_table(config_, at::cat({text_ids(5), image_ids(6, 4)}));
  at::Tensor mask_ = at::ones({2, 11}, at::kBool);
  Plain plain_{config_, rope_};

  void SetUp() override {
    at::manual_seed(9);
    mask_[1].narrow(0, 3, 2).fill_(false);
  }
  static at::Tensor leaf(const at::Tensor& t, at::ScalarType type) {
    return t.detach().to(type).requires_grad_();
  }
  /// Gradients of every weight that took part.
  template <class Block>
  static void expect_gradients(Block& block, Block& exact) {
    TensorMap expected;
    for_each_tensor(
        exact, "", [&](const std::string& name, at::Tensor& t) { expected[name] = t.grad(); });
    for_each_tensor(block, "", [&](const std::string& name, at::Tensor& t) {
      EXPECT_LT(test::relative_error(t.grad(), expected.at(name)), 5e-6) << name;
    });
  }
};

TEST_F(Blocks, DoubleBlockEqualsTheFormulas) {
  const auto img = at::randn({2, 6, 96}), txt = at::randn({2, 5, 96}), vec = at::randn({2, 96});
  const Streams in{leaf(img, at::kFloat), leaf(txt, at::kFloat)},
      exact_in{leaf(img, at::kDouble), leaf(txt, at::kDouble)};
  const auto v = leaf(vec, at::kFloat), exact_v = leaf(vec, at::kDouble);
  const auto out = double_block(narrow_.double_blocks[0], in, v, rope_, mask_);
  const auto exact = plain_.double_block(wide_.double_blocks[0], exact_in, exact_v, mask_);
  EXPECT_LT(test::relative_error(out.img, exact.img), 2e-6);
  EXPECT_LT(test::relative_error(out.txt, exact.txt), 2e-6);
  (out.img.pow(2).sum() + out.txt.sin().sum()).backward();
  (exact.img.pow(2).sum() + exact.txt.sin().sum()).backward();
  EXPECT_LT(test::relative_error(in.img.grad(), exact_in.img.grad()), 5e-6);
  EXPECT_LT(test::relative_error(in.txt.grad(), exact_in.txt.grad()), 5e-6);
  EXPECT_LT(test::relative_error(v.grad(), exact_v.grad()), 5e-6);
  expect_gradients(narrow_.double_blocks[0], wide_.double_blocks[0]);
}

TEST_F(Blocks, SingleBlockEqualsTheFormulas) {
  const auto x = at::randn({2, 11, 96}), vec = at::randn({2, 96});
  const auto in = leaf(x, at::kFloat), exact_in = leaf(x, at::kDouble), v = leaf(vec, at::kFloat),
             exact_v = leaf(vec, at::kDouble);
  const auto out = single_block(narrow_.single_blocks[0], in, v, rope_, mask_);
  const auto exact = plain_.single_block(wide_.single_blocks[0], exact_in, exact_v, mask_);
  EXPECT_LT(test::relative_error(out, exact), 2e-6);
  out.pow(2).sum().backward();
  exact.pow(2).sum().backward();
  EXPECT_LT(test::relative_error(in.grad(), exact_in.grad()), 5e-6);
  EXPECT_LT(test::relative_error(v.grad(), exact_v.grad()), 5e-6);
  expect_gradients(narrow_.single_blocks[0], wide_.single_blocks[0]);
}

TEST(Forward, AModelWithoutGuidanceReadsNone) {
  auto config = small_config();
  config.guidance = false;
  config.in_channels = config.out_channels = 8;
  config.prompt_dim = config.pooled_dim = 16;
  const auto weights = random_weights(config, at::kFloat);
  Inputs inputs;
  inputs.img = at::randn({1, 6, 8});
  inputs.txt = at::randn({1, 5, 16});
  inputs.y = at::randn({1, 16});
  inputs.timestep = at::full({1}, 0.5f);
  inputs.img_ids = image_ids(6, 4);
  inputs.txt_ids = text_ids(5);
  at::NoGradGuard no_grad;
  const auto out = forward(config, weights, inputs);
  EXPECT_EQ(out.sizes(), (at::IntArrayRef{1, 6, 8}));
  inputs.guidance = at::full({1}, 3.5f);
  EXPECT_TRUE(at::equal(forward(config, weights, inputs), out));
}

}  // namespace
}  // namespace flux::dit
