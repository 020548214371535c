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

std::vector<Form> forms() {
  return {{.dora = true},
          {.algorithm = Algorithm::kLokr, .factor = 8},
          {.algorithm = Algorithm::kLokr, .dora = true}};
}

TEST(Factorized, IsThatOfLycoris) {
  const auto expect = [](int64_t size, int64_t factor, int64_t small, int64_t large) {
    EXPECT_EQ(factorized(size, factor), (std::pair{small, large})) << size << ' ' << factor;
  };
  // by lycoris.functional.factorization
  expect(3072, -1, 48, 64);
  expect(9216, -1, 96, 96);
  expect(12288, -1, 96, 128);
  expect(3072, 8, 8, 384);
  expect(3072, 10, 8, 384);
  expect(3072, 5, 4, 768);
  expect(127, -1, 1, 127);
  expect(12, 4, 3, 4);  // 4 is not below the other one
}

TEST(Forms, HaveTheirPartsAndTheBitsOfTheBaseAtTheStart) {
  for (const auto type : {at::kFloat, at::kBFloat16})
    for (const Form& form : forms()) {
      auto m = model(type);
      const auto base = run(m);
      const auto targets = with_rank(all_targets(m.config), 4, 2);
      const auto set = make_adapters(targets, 1, form);
      EXPECT_EQ(set.num_parameters(), num_parameters(targets, form));
      attach(set, m.weights);
      dit::for_each_linear(m.weights,
                           [&](const std::string&, Linear& layer) { set_magnitude(layer, type); });
      EXPECT_TRUE(at::equal(run(m), base));
    }
}

TEST(Forms, ComeBackFromTheirFilesAndMergeAsTheyAct) {
  for (const Form& form : forms()) {
    auto attached = model(), merged = model();
    auto set = make_adapters(with_rank(default_targets(attached.config), 8, 2), 1, form);
    bool whole = false, ranked = false;
    at::manual_seed(2);
    attach(set, attached.weights);
    dit::for_each_linear(attached.weights, [&](const std::string&, Linear& layer) {
      set_magnitude(layer, at::kFloat);
    });
    for (auto& module : set.modules) {
      (module.up.defined() ? module.up : module.down).normal_(0, 0.02);
      (module.up.defined() ? ranked : whole) = true;
      if (module.magnitude.defined()) module.magnitude.mul_(at::rand_like(module.magnitude) + 0.5);
    }
    EXPECT_EQ(whole && ranked, form.algorithm == Algorithm::kLokr);
    const auto file = to_kohya(set, at::kFloat);
    const auto again = from_tensors(file, {}, attached.config);
    ASSERT_EQ(again.modules.size(), set.modules.size());
    for (size_t i = 0; i < set.modules.size(); ++i) {
      EXPECT_EQ(again.modules[i].scale(), set.modules[i].scale());
      for (size_t part = 0; part < kAdapterParts.size(); ++part) {
        const at::Tensor &a = *again.modules[i].parts()[part], &b = *set.modules[i].parts()[part];
        ASSERT_EQ(a.defined(), b.defined());
        if (a.defined()) {
          EXPECT_TRUE(at::equal(a, b)) << kAdapterParts[part];
        }
      }
    }
    merge(again, merged.weights);
    EXPECT_LT(test::relative_error(run(merged), run(attached)), kRelative);
    if (form.dora) {
      EXPECT_THROW(attach(set, attached.weights, 0.5), std::invalid_argument);
    }
  }
}

TEST(Forms, AreNamedAsLycorisNamesThem) {
  const auto config = model().config;
  const auto names = [&](const Form& form, int64_t rank) {
    const auto targets = with_rank({default_targets(config)[1]}, rank, 1);
    std::set<std::string> out;
    for (const auto& [name, tensor] : to_kohya(make_adapters(targets, 1, form), at::kBFloat16)) {
      const bool magnitude = name.ends_with("dora_scale");
      EXPECT_EQ(tensor.scalar_type(), magnitude ? at::kFloat : at::kBFloat16) << name;
      if (magnitude) {
        EXPECT_EQ(tensor.sizes().vec(), (std::vector<int64_t>{targets[0].out, 1}));
      }
      out.insert(name.substr(name.find('.')));
    }
    return out;
  };
  using Set = std::set<std::string>;
  EXPECT_EQ(names({.dora = true}, 4),
            (Set{".alpha", ".dora_scale", ".lora_down.weight", ".lora_up.weight"}));
  EXPECT_EQ(names({.algorithm = Algorithm::kLokr, .factor = 4}, 2),
            (Set{".alpha", ".lokr_w1", ".lokr_w2_a", ".lokr_w2_b"}));
  EXPECT_EQ(names({.algorithm = Algorithm::kLokr, .factor = 4}, 4096),
            (Set{".alpha", ".lokr_w1", ".lokr_w2"}));
}

TEST(Forms, MergeAtAStrengthGoesThatFarFromTheBase) {
  auto base = model(), full = model(), half = model();
  auto set = make_adapters(with_rank({default_targets(base.config)[1]}, 4, 4), 1, {.dora = true});
  set.modules[0].up.fill_(0.01);
  merge(set, full.weights);
  merge(set, half.weights, 0.5);
  const auto of = [&](dit::Model& m) {
    return dit::named_tensors(m.weights).at(set.modules[0].path + ".weight");
  };
  EXPECT_GT((of(full) - of(base)).abs().max().item<float>(), 0);
  EXPECT_TRUE((of(half) - of(base)).mul(2).allclose(of(full) - of(base), 1e-4, 1e-6));
}

TEST(LimitNorm, HoldsForKroneckerProducts) {
  for (const bool whole : {false, true}) {
    Module module{"x", at::randn({whole ? 6 : 3, 10}), whole ? at::Tensor() : at::randn({6, 3}), 6};
    module.mix = at::randn({2, 4});
    const auto delta = [&] {
      return at::kron(module.mix, whole ? module.down : module.up.mm(module.down)) * module.scale();
    };
    const auto before = delta();
    EXPECT_GT(before.norm().item<double>(), 1);
    limit_norm(module, 0.5);
    EXPECT_NEAR(delta().norm().item<double>(), 0.5, 1e-5);
    EXPECT_TRUE(delta().allclose(before * (0.5 / before.norm())));
    const auto copy = module.mix.clone();
    limit_norm(module, 1);
    EXPECT_TRUE(at::equal(module.mix, copy));
  }
}

}  // namespace
}  // namespace flux::lora
