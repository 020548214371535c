// Adapters on the transformer against the reference vectors of tests/golden/models/lora; limits as
// in its case.json.
#include "common/models/lora/lora.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "common/core/error.h"
#include "common/models/flux/load.h"
#include "common/models/flux/transformer.h"
#include "tests/support/flux_cases.h"
#include "tests/support/golden.h"

namespace flux::lora {
namespace {

constexpr double kRelative = 3e-6, kGradient = 1e-5, kMerged = 2e-7;

dit::Model model(at::ScalarType type = at::kFloat) {
  return dit::load_model(test::golden_models() / "flux/weights_bfl.safetensors", type);
}
dit::Inputs inputs() {
  return test::flux_inputs(test::golden("models/flux/forward_two.safetensors"));
}

Adapters adapters(const std::string& name, const dit::Config& config) {
  const auto file = read_weights(test::golden_models() / ("lora/" + name + ".safetensors"));
  return from_tensors(file.tensors, file.metadata, config);
}

at::Tensor run(const dit::Model& m) {
  at::NoGradGuard no_grad;
  return dit::forward(m.config, m.weights, inputs());
}

TEST(Targets, AreThoseOfSdScripts) {
  const dit::Config dev;
  const auto targets = default_targets(dev);
  EXPECT_EQ(targets.size(), 304u);
  EXPECT_EQ(make_adapters(with_rank({targets[0]}, 2, 1), 0).num_parameters(),
            2 * (targets[0].in + targets[0].out));
  int64_t sizes = 0;
  for (const auto& target : targets) sizes += target.in + target.out;
  EXPECT_EQ(sizes, 1558 * dev.hidden);
  EXPECT_EQ(all_targets(dev).size(),
            304u + 2 + 6 + 2);  // img_in, txt_in, three embedders, final layer
}

TEST(MakeAdapters, StartsAtZeroAndIsKeyedByModule) {
  const auto config = model().config;
  const auto targets = default_targets(config);
  const auto all = make_adapters(with_rank(targets, 4, 2), 5);
  const auto one = make_adapters(with_rank({targets[3]}, 4, 2), 5);
  EXPECT_TRUE(at::equal(one.modules[0].down, all.modules[3].down));
  EXPECT_FALSE(
      at::equal(all.modules[0].down, all.modules[5].down));  // the same shape, another module
  EXPECT_FALSE(at::equal(one.modules[0].down,
                         make_adapters(with_rank({targets[3]}, 4, 2), 6).modules[0].down));
  for (const auto& module : all.modules) {
    EXPECT_EQ(module.up.abs().max().item<float>(), 0) << module.path;
    const double bound = 1 / std::sqrt(static_cast<double>(module.down.size(1)));
    EXPECT_LE(module.down.abs().max().item<float>(), bound * 1.0001) << module.path;
    EXPECT_NEAR(module.down.std().item<double>(), bound / std::sqrt(3), 0.08 * bound)
        << module.path;
  }
}

TEST(Attach, WithUpsAtZeroTheOutputHasTheBitsOfTheBase) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    auto m = model(type);
    const auto base = run(m);
    attach(make_adapters(with_rank(all_targets(m.config), 4, 4), 1), m.weights);
    EXPECT_TRUE(m.weights.single_blocks[0].linear1.lora.down.defined());
    EXPECT_TRUE(at::equal(run(m), base));
    detach(m.weights);
    EXPECT_FALSE(m.weights.single_blocks[0].linear1.lora.down.defined());
  }
}

TEST(Attach, OutputsEqualTheReference) {
  const struct {
    const char *file, *vectors, *output;
  } cases[] = {{"kohya", "kohya_vectors", "output."},
               {"peft", "peft_vectors", "peft.output."},
               {"peft_metadata", "peft_vectors", "peft_metadata.output."},
               {"peft_as_kohya", "peft_vectors", "peft.output."}};
  for (const auto& c : cases) {
    auto m = model();
    const auto vectors = test::golden(std::string("models/lora/") + c.vectors + ".safetensors");
    for (const auto& [multiplier, text] : {std::pair{1.0, "1.0"}, {0.5, "0.5"}}) {
      attach(adapters(c.file, m.config), m.weights, multiplier);
      EXPECT_LT(test::relative_error(run(m), vectors.at(std::string(c.output) + text)), kRelative)
          << c.file << ' ' << text;
    }
  }
}

TEST(Attach, GradientsEqualTheReference) {
  auto m = model();
  auto set = adapters("kohya", m.config);
  for (auto& module : set.modules) {
    module.down = module.down.to(at::kFloat).requires_grad_();
    module.up = module.up.to(at::kFloat).requires_grad_();
  }
  attach(set, m.weights);
  const auto vectors = test::golden("models/lora/kohya_vectors.safetensors");
  const auto loss =
      (dit::forward(m.config, m.weights, inputs()) - vectors.at("target")).pow(2).mean();
  EXPECT_LT(test::relative_error(loss, vectors.at("loss")), 1e-6);
  loss.backward();
  auto grads = set;
  for (auto& module : grads.modules) {
    module.down = module.down.grad();
    module.up = module.up.grad();
  }
  for (const auto& [name, grad] : to_kohya(grads, at::kFloat)) {
    if (name.ends_with(".alpha")) continue;
    const double largest = vectors.at("grad_stats." + name)[2].item<double>();
    const auto whole = vectors.find("grad." + name);
    const auto error =
        whole != vectors.end()
            ? test::largest_error(grad, whole->second)
            : test::largest_error(test::samples(grad), vectors.at("grad_samples." + name));
    EXPECT_LT(error, kGradient * largest) << name;
  }
}

TEST(Merge, WeightsEqualTheReference) {
  auto m = model();
  const auto set = adapters("kohya", m.config);
  const auto before = m.weights.double_blocks[0].img.qkv.weight;
  const auto copy = before.clone();
  merge(set, m.weights);
  EXPECT_TRUE(at::equal(before, copy));  // others that share the tensor keep it
  const auto vectors = test::golden("models/lora/kohya_vectors.safetensors");
  const auto named = dit::named_tensors(m.weights);
  int num_checked = 0;
  for (const auto& [name, expected] : vectors) {
    if (!name.starts_with("merged_samples.")) continue;
    EXPECT_LT(test::relative_error(test::samples(named.at(name.substr(15))), expected), kMerged)
        << name;
    ++num_checked;
  }
  EXPECT_EQ(num_checked, static_cast<int>(set.modules.size()));
}

TEST(Merge, GivesTheOutputOfTheAttachedAdapter) {
  auto attached = model(), merged = model();
  const auto set = adapters("peft_metadata", attached.config);
  attach(set, attached.weights, 0.5);
  merge(set, merged.weights, 0.5);
  EXPECT_LT(test::relative_error(run(merged), run(attached)), kRelative);
}

TEST(Attach, NamesAModuleThatDoesNotFit) {
  auto m = model();
  const auto refusal = [&](const Adapters& set) -> std::string {
    try {
      attach(set, m.weights);
    } catch (const InputError& error) {
      return error.what();
    }
    return "accepted";
  };
  auto set = adapters("kohya", m.config);
  set.modules[0].down = set.modules[0].down.narrow(1, 0, 100);
  EXPECT_THAT(refusal(set), testing::HasSubstr("double_blocks.0.img_mod.lin"));
  m.weights.single_blocks.pop_back();
  EXPECT_THAT(refusal(adapters("kohya", m.config)), testing::HasSubstr("single_blocks.2"));
}

}  // namespace
}  // namespace flux::lora
