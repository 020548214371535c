// The operations against vectors of the reference libraries (tests/golden/models/ops). Limits: its
// case.json.
#include <gtest/gtest.h>

#include "common/ops/attention.h"
#include "common/ops/modulate.h"
#include "common/ops/qk_norm_rope.h"
#include "tests/support/golden.h"

namespace flux {
namespace {

constexpr double kRelative = 1e-6;
constexpr double kGradient = 3e-6;

class GoldenOps : public testing::Test {
 protected:
  at::Tensor get(const std::string& name) { return vectors_.at(op_ + "." + name); }
  at::Tensor leaf(const std::string& name) { return get(name).clone().requires_grad_(); }
  /// Runs the backward of `output` and compares it and the gradients of `leaves`, a name each.
  void check(const at::Tensor& output,
             const std::vector<std::pair<std::string, at::Tensor>>& leaves) {
    EXPECT_LT(test::relative_error(output, get("output")), kRelative);
    output.backward(get("grad_output"));
    for (const auto& [name, tensor] : leaves)
      EXPECT_LT(test::relative_error(tensor.grad(), get("grad_" + name)), kGradient) << name;
  }
  TensorMap vectors_ = test::golden("models/ops/vectors.safetensors");
  std::string op_;
};

TEST_F(GoldenOps, LayerNorm) {
  op_ = "layer_norm_dit";
  const auto x = leaf("x");
  check(layer_norm(x), {{"x", x}});
}

TEST_F(GoldenOps, Modulate) {
  op_ = "modulate";
  const auto x = leaf("x"), shift = leaf("shift"), scale = leaf("scale");
  check(modulate(x, shift.unsqueeze(1), scale.unsqueeze(1)),
        {{"x", x}, {"shift", shift}, {"scale", scale}});
}

TEST_F(GoldenOps, GatedAdd) {
  op_ = "gated_add";
  const auto x = leaf("x"), y = leaf("y"), gate = leaf("gate");
  check(gated_residual(x, gate.unsqueeze(1), y), {{"x", x}, {"y", y}, {"gate", gate}});
}

TEST_F(GoldenOps, Attention) {
  for (const auto* name : {"attention", "attention_masked"}) {
    op_ = name;
    SCOPED_TRACE(op_);
    const auto q = leaf("q"), k = leaf("k"), v = leaf("v");
    std::optional<at::Tensor> mask;
    if (op_ == "attention_masked") mask = get("mask").to(at::kBool);
    const auto out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask);
    check(out.unflatten(2, at::IntArrayRef{q.size(1), -1}).transpose(1, 2),
          {{"q", q}, {"k", k}, {"v", v}});
  }
}

// rms_norm_qk has rows of scale 1, 30, 1e-3, 1e-4 and 0, where a wrong eps shows.
TEST_F(GoldenOps, RmsNormOfQueriesAndKeys) {
  op_ = "rms_norm_qk";
  const auto x = leaf("x"), weight = leaf("weight");
  const int64_t head = x.size(-1), rows = x.numel() / head;
  const auto flat = x.view({1, rows, head});
  const auto out = qk_norm_rope(at::cat({flat, flat.detach(), flat.detach()}, 2),
                                weight,
                                at::ones({head}),
                                at::ones({1, rows, head / 2}),
                                at::zeros({1, rows, head / 2}));
  check(out.q.view(x.sizes()), {{"x", x}, {"weight", weight}});
}

// A rotation keeps the length of a row, so the norm can be undone.
TEST_F(GoldenOps, Rotation) {
  op_ = "rope";
  const auto q = get("apply.q");  // [1, N, heads, head]
  const int64_t tokens = q.size(1), head = q.size(3);
  const auto flat = q.reshape({1, tokens, -1});
  const auto ones = at::ones({head});
  const auto out = qk_norm_rope(at::cat({flat, flat, flat}, 2),
                                ones,
                                ones,
                                get("cos").unsqueeze(0),
                                get("sin").unsqueeze(0),
                                0);
  const auto length = q.to(at::kDouble).pow(2).mean(-1, true).sqrt();
  EXPECT_LT(test::relative_error(out.q * length, get("apply.output")), kRelative);
}

}  // namespace
}  // namespace flux
