// The transformer against the reference vectors of tests/golden/models/flux; limits as in its
// case.json.
#include "common/models/flux/transformer.h"

#include <gtest/gtest.h>

#include "common/models/flux/load.h"
#include "common/models/flux/packing.h"
#include "tests/support/flux_cases.h"
#include "tests/support/golden.h"

namespace flux::dit {
namespace {

constexpr double kRelative = 2e-6, kRelativeGradient = 5e-6, kRelativeBf16 = 0.02;

Model model(at::ScalarType type = at::kFloat, const char* file = "flux/weights_bfl.safetensors") {
  return load_model(test::golden_models() / file, type);
}

at::Tensor run(const Model& m, const Inputs& inputs, const Tap& tap = {}) {
  at::NoGradGuard no_grad;
  return forward(m.config, m.weights, inputs, tap);
}

TEST(Transformer, EqualsTheReferenceAtEveryTap) {
  const auto vectors = test::golden("models/flux/forward_two.safetensors");
  int num_taps = 0;
  const auto out =
      run(model(), test::flux_inputs(vectors), [&](std::string_view name, const at::Tensor& value) {
        const auto expected = vectors.at("tap." + std::string(name));
        EXPECT_LT(test::relative_error(value.view(expected.sizes()), expected), kRelative) << name;
        ++num_taps;
      });
  EXPECT_LT(test::relative_error(out, vectors.at("output")), kRelative);
  EXPECT_EQ(num_taps, 15);
}

TEST(Transformer, TakesAnyShapeOfImageAndText) {
  const auto vectors = test::golden("models/flux/forward_one.safetensors");
  auto inputs = test::flux_inputs(vectors);
  EXPECT_LT(test::relative_error(run(model(), inputs), vectors.at("output")), kRelative);
  // the input file's tokens are the packed latents, and its ids ours
  EXPECT_TRUE(at::equal(pack_latents(vectors.at("input.latents")), inputs.img));
  const auto latents = vectors.at("input.latents");
  EXPECT_TRUE(at::equal(image_ids(latents.size(2), latents.size(3)), inputs.img_ids));
  // ids of each sample
  inputs.img_ids = inputs.img_ids.unsqueeze(0);
  inputs.txt_ids = inputs.txt_ids.unsqueeze(0);
  EXPECT_LT(test::relative_error(run(model(), inputs), vectors.at("output")), kRelative);
}

TEST(Transformer, DiffusersWeightsGiveTheReferencesOutput) {
  const auto vectors = test::golden("models/flux/forward_diffusers.safetensors");
  const auto inputs = test::flux_inputs(test::golden("models/flux/forward_two.safetensors"));
  EXPECT_LT(
      test::relative_error(run(model(at::kFloat, "flux/weights_diffusers.safetensors"), inputs),
                           vectors.at("output")),
      kRelative);
}

TEST(Transformer, Bfloat16StaysWithinItsLimit) {
  for (const char* name : {"one", "two"}) {
    const auto vectors = test::golden(std::string("models/flux/forward_") + name + ".safetensors");
    const auto out = run(model(at::kBFloat16), test::flux_inputs(vectors));
    EXPECT_EQ(out.scalar_type(), at::kBFloat16);
    EXPECT_LT(test::relative_error(out, vectors.at("output")), kRelativeBf16) << name;
  }
}

TEST(Transformer, MaskedTextEqualsTheReferenceAndCutText) {
  const auto vectors = test::golden("models/flux/forward_two.safetensors");
  auto inputs = test::flux_inputs(vectors);
  inputs.text_mask = vectors.at("mask.text");
  const auto out = run(model(), inputs);
  EXPECT_LT(test::relative_error(out, vectors.at("mask.output")), kRelative);
  EXPECT_LT(test::relative_error(out, vectors.at("mask.output_trimmed")), kRelative);
  EXPECT_GT(test::relative_error(out, vectors.at("output")), 1e-3);
}

TEST(Transformer, GradientsEqualTheReference) {
  const auto vectors = test::golden("models/flux/gradients_two.safetensors");
  auto inputs = test::flux_inputs(test::golden("models/flux/forward_two.safetensors"));
  auto m = model();
  for (auto* input : {&inputs.img, &inputs.txt, &inputs.y})
    *input = input->clone().requires_grad_();
  for_each_tensor(m.weights, [](const std::string&, at::Tensor& tensor) {
    tensor = tensor.clone().requires_grad_();
  });
  const auto loss = (forward(m.config, m.weights, inputs) - vectors.at("target")).pow(2).mean();
  EXPECT_LT(test::relative_error(loss, vectors.at("loss")), 1e-6);
  loss.backward();

  EXPECT_LT(test::relative_error(inputs.img.grad(), vectors.at("grad_input.img")),
            kRelativeGradient);
  EXPECT_LT(test::relative_error(inputs.txt.grad(), vectors.at("grad_input.txt")),
            kRelativeGradient);
  EXPECT_LT(test::relative_error(inputs.y.grad(), vectors.at("grad_input.y")), kRelativeGradient);
  double squares = 0;
  for_each_tensor(m.weights, [&](const std::string& name, at::Tensor& tensor) {
    const auto grad = tensor.grad();
    ASSERT_TRUE(grad.defined()) << name;
    squares += grad.to(at::kDouble).pow(2).sum().item<double>();
    const auto whole = vectors.find("grad." + name);
    if (whole != vectors.end()) {
      EXPECT_LT(test::relative_error(grad, whole->second), kRelativeGradient) << name;
    } else {
      const auto expected = vectors.at("grad_samples." + name);
      const double largest = vectors.at("grad_stats." + name)[2].item<double>();
      EXPECT_LT(test::largest_error(test::samples(grad), expected), 1e-5 * largest) << name;
    }
  });
  EXPECT_NEAR(std::sqrt(squares) / vectors.at("grad_norm").item<double>(), 1, 1e-5);
}

TEST(Transformer, RunsOnMetaForwardAndBackward) {
  auto m = model();
  for_each_tensor(m.weights,
                  [](const std::string&, at::Tensor& t) { t = t.to(at::kMeta).requires_grad_(); });
  auto inputs = test::flux_inputs(test::golden("models/flux/forward_two.safetensors"));
  for (auto* input : {&inputs.img,
                      &inputs.txt,
                      &inputs.y,
                      &inputs.timestep,
                      &inputs.guidance,
                      &inputs.img_ids,
                      &inputs.txt_ids})
    *input = input->to(at::kMeta);
  const auto out = forward(m.config, m.weights, inputs);
  EXPECT_EQ(out.sizes(), (at::IntArrayRef{2, 24, 64}));
  out.pow(2).mean().backward();
  EXPECT_TRUE(m.weights.single_blocks[0].query_scale.grad().defined());
}

TEST(Transformer, NamesWhatDoesNotFit) {
  const auto m = model();
  auto inputs = test::flux_inputs(test::golden("models/flux/forward_two.safetensors"));
  auto wrong = inputs;
  wrong.y = wrong.y.narrow(1, 0, 79);
  EXPECT_THROW(run(m, wrong), std::invalid_argument);
  wrong = inputs;
  wrong.guidance = at::Tensor();
  EXPECT_THROW(run(m, wrong), std::invalid_argument);
  wrong = inputs;
  wrong.img_ids = wrong.img_ids.narrow(0, 0, 23);
  EXPECT_THROW(run(m, wrong), std::invalid_argument);
}

TEST(RopeTable, TextIsNotTurned) {
  const auto rope = rope_table(Config(), text_ids(3));
  EXPECT_EQ(rope.cos.sizes(), (at::IntArrayRef{1, 3, 64}));
  EXPECT_TRUE(at::equal(rope.cos, at::ones({1, 3, 64})));
  EXPECT_TRUE(at::equal(rope.sin, at::zeros({1, 3, 64})));
}

TEST(Sinusoid, EqualsTheReference) {
  const auto vectors = test::golden("models/ops/vectors.safetensors");
  const auto expected = vectors.at("sinusoid.output");
  EXPECT_LT(test::relative_error(sinusoid(vectors.at("sinusoid.t"), expected.size(1)), expected),
            1e-6);
}

}  // namespace
}  // namespace flux::dit
