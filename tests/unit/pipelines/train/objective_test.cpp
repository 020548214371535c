// Every option of noise, loss and learning rate, through the run it is for.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <set>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "common/data/training_data.h"
#include "common/models/flux/packing.h"
#include "common/train/flow_loss.h"
#include "common/train/flow_matching.h"
#include "pipelines/train/run.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/tiny_flux.h"
#include "tests/support/training_caches.h"

namespace flux::train {
namespace {

// Caches with loss masks and a model; runs of them.
class Objective : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new test::TemporaryFolder;
    test::TrainingCaches caches;
    caches.items = {{.name = "a.png", .rows = 4, .columns = 4, .masked = true},
                    {.name = "b.png", .rows = 4, .columns = 4, .masked = true},
                    {.name = "c.png", .rows = 4, .columns = 4, .masked = true}};
    caches.write(folder_->path());
    test::write_tiny_flux(*folder_ / "flux.safetensors", true);
  }
  static void TearDownTestSuite() {
    delete folder_;
    folder_ = nullptr;
  }

  static Options options(const std::filesystem::path& out) {
    Options o;
    o.latents = *folder_ / "latents";
    o.text = *folder_ / "text";
    o.model = *folder_ / "flux.safetensors";
    o.out = out;
    o.rank = 4;
    o.max_steps = 1;
    o.batch_size = 3;
    o.lr.learning_rate = 1e-3;
    o.seed = 5;
    o.device = DeviceChoice::kCpu;
    o.reader_threads = 1;
    o.command_line = "flux-train --test";
    return o;
  }

  /// The loss of the first step.
  static double loss(const std::function<void(Options&)>& change) {
    test::TemporaryFolder folder;
    Options o = options(folder / "run");
    change(o);
    return *run(o).loss_first;
  }

  static test::TemporaryFolder* folder_;
};
test::TemporaryFolder* Objective::folder_ = nullptr;

using Change = std::pair<const char*, std::function<void(Options&)>>;

TEST_F(Objective, EveryOptionOfNoiseAndLossChangesTheLoss) {
  using enum TimestepSampling;
  using enum WeightingScheme;
  const auto sigma = [](Options& o) { o.timesteps.sampling = kSigma; };
  const auto logit = [](Options& o) {
    o.timesteps.sampling = kSigma;
    o.timesteps.weighting = kLogitNormal;
  };
  const auto mode = [](Options& o) {
    o.timesteps.sampling = kSigma;
    o.timesteps.weighting = kMode;
  };
  const auto huber = [](Options& o) { o.loss.type = LossType::kHuber; };
  const auto noise = [](Options& o) { o.ip_noise_gamma = 0.5; };
  const auto plain = [](Options&) {};
  const std::vector<std::tuple<const char*, std::function<void(Options&)>, Change>> cases{
      {"flux_shift", plain, {"uniform", [](Options& o) { o.timesteps.sampling = kUniform; }}},
      {"flux_shift", plain, {"sigmoid", [](Options& o) { o.timesteps.sampling = kSigmoid; }}},
      {"flux_shift", plain, {"shift", [](Options& o) { o.timesteps.sampling = kShift; }}},
      {"flux_shift", plain, {"sigma", sigma}},
      {"flux_shift", plain, {"scale", [](Options& o) { o.timesteps.sigmoid_scale = 2; }}},
      {"sigma", sigma, {"shift", [](Options& o) { o.timesteps.discrete_flow_shift = 1; }}},
      {"sigma", sigma, {"logit_normal", logit}},
      {"sigma", sigma, {"mode", mode}},
      {"logit", logit, {"mean", [](Options& o) { o.timesteps.logit_mean = 1; }}},
      {"logit", logit, {"std", [](Options& o) { o.timesteps.logit_std = 2; }}},
      {"mode", mode, {"scale", [](Options& o) { o.timesteps.mode_scale = 0.5; }}},
      {"raw", plain, {"sqrt", [](Options& o) { o.timesteps.weighting = kSigmaSqrt; }}},
      {"raw", plain, {"cosmap", [](Options& o) { o.timesteps.weighting = kCosmap; }}},
      {"raw", plain, {"min", [](Options& o) { o.timesteps.min_timestep = 600; }}},
      {"raw", plain, {"max", [](Options& o) { o.timesteps.max_timestep = 400; }}},
      {"raw", plain, {"stratified", [](Options& o) { o.timesteps.stratified = true; }}},
      {"raw",
       plain,
       {"sigma_scaled", [](Options& o) { o.loss.prediction = Prediction::kSigmaScaled; }}},
      {"guidance 1", plain, {"guidance", [](Options& o) { o.guidance = 3.5; }}},
      {"l2", plain, {"l1", [](Options& o) { o.loss.type = LossType::kL1; }}},
      {"l2", plain, {"huber", huber}},
      {"l2", plain, {"smooth_l1", [](Options& o) { o.loss.type = LossType::kSmoothL1; }}},
      {"huber",
       huber,
       {"exponential", [](Options& o) { o.loss.huber_schedule = HuberSchedule::kExponential; }}},
      {"huber", huber, {"snr", [](Options& o) { o.loss.huber_schedule = HuberSchedule::kSnr; }}},
      {"huber", huber, {"c", [](Options& o) { o.loss.huber_c = 0.3; }}},
      {"huber", huber, {"scale", [](Options& o) { o.loss.huber_scale = 2; }}},
      {"masks", plain, {"off", [](Options& o) { o.masked_loss = MaskedLoss::kOff; }}},
      {"masks",
       plain,
       {"renormalised", [](Options& o) { o.masked_loss = MaskedLoss::kRenormalised; }}},
      {"no text mask", plain, {"on", [](Options& o) { o.text_mask = TextMask::kOn; }}},
      {"posterior", plain, {"mean", [](Options& o) { o.posterior = Posterior::kMean; }}},
      {"no input noise", plain, {"noise", noise}},
      {"noise", noise, {"random", [](Options& o) { o.ip_noise_gamma_random_strength = true; }}}};
  for (const auto& [base, set, change] : cases) {
    SCOPED_TRACE(fmt::format("{} against {}", base, change.first));
    const double before = loss(set), after = loss([&](Options&o) {
                                       set(o);
                                       change.second(o);
                                     });
    EXPECT_GT(std::abs(after - before), 1e-4 * before);
  }
}

TEST_F(Objective, AutomaticMasksAreThoseThatOnUses) {
  EXPECT_EQ(loss([](Options&) {}), loss([](Options& o) { o.masked_loss = MaskedLoss::kOn; }));
  EXPECT_EQ(loss([](Options&) {}), loss([](Options& o) { o.text_mask = TextMask::kOff; }));
}

TEST_F(Objective, MasksThatAreNotThereAreRefused) {
  test::TemporaryFolder folder;
  test::TrainingCaches caches;
  caches.items = {{.name = "a.png", .rows = 4, .columns = 4}};
  caches.write(folder.path());
  Options o = options(folder / "run");
  o.latents = folder / "latents", o.text = folder / "text";
  for (const MaskedLoss wanted : {MaskedLoss::kOn, MaskedLoss::kRenormalised}) {
    o.masked_loss = wanted;
    try {
      run(o);
      FAIL();
    } catch (const UsageError& error) {
      EXPECT_THAT(error.what(), testing::HasSubstr("--masked-loss has no effect"));
    }
  }
}

TEST_F(Objective, EveryScheduleSetsTheRateOfEveryStep) {
  using enum LrSchedule;
  const auto with = [](LrSchedule schedule) {
    Options o;
    o.lr.schedule = schedule;
    return o;
  };
  std::vector<Options> cases;
  for (const LrSchedule schedule : {kConstant,
                                    kConstantWithWarmup,
                                    kLinear,
                                    kCosine,
                                    kCosineWithRestarts,
                                    kPolynomial,
                                    kInverseSqrt,
                                    kCosineWithMinLr,
                                    kWarmupStableDecay,
                                    kPiecewiseConstant}) {
    Options o = with(schedule);
    o.lr.step_rules = "1:2,0.5:4,0.25";
    o.lr.power = 2;
    o.lr_cycles = 2;
    o.lr.min_lr_ratio = 0.1;
    o.lr.num_timescale_steps = 3;
    o.lr_warmup.share = 0.34;
    o.lr_decay.steps = 2;
    cases.push_back(o);
  }
  std::set<std::vector<double>> different;
  for (const Options& lr : cases) {
    test::TemporaryFolder folder;
    Options o = options(folder / "run");
    o.max_steps = 6;
    const double rate = o.lr.learning_rate;
    o.lr = lr.lr;
    o.lr.learning_rate = rate;
    o.lr_warmup = lr.lr_warmup, o.lr_decay = lr.lr_decay, o.lr_cycles = lr.lr_cycles;
    run(o);
    std::vector<double> got;
    for (const std::string& line : split(read_file(o.out / "metrics.jsonl"), '\n'))
      if (!line.empty()) got.push_back(nlohmann::json::parse(line)["learning_rate"]);
    std::vector<double> wanted;
    LrOptions full = o.lr;  // by hand: 34 % of 6 steps are 2
    full.num_steps = 6, full.num_warmup_steps = 2, full.num_decay_steps = 2, full.num_cycles = 2;
    full.lr_end = 1e-4;
    for (int64_t step = 0; step < 6; ++step) wanted.push_back(learning_rate(full, step));
    EXPECT_EQ(got, wanted) << static_cast<int>(o.lr.schedule);
    different.insert(got);
  }
  // cosine and cosine_with_min_lr are one once both have a smallest rate
  EXPECT_EQ(different.size(), cases.size() - 1);
}

at::Tensor normal(at::IntArrayRef shape, uint64_t number) {
  at::Tensor out = at::empty(shape, at::kFloat);
  RandomStream(3, Purpose::kNoise, number)
      .fill_normal({out.mutable_data_ptr<float>(), static_cast<size_t>(out.numel())});
  return out;
}

// Against the formulas of docs/training.md: the same loss as raw, and sigma^2 times it.
TEST(FlowLoss, PredictionTypesHaveConsistentTargets) {
  FlowStep step;
  step.sigma = at::tensor({0.3f, 0.8f});
  const at::Tensor latents = normal({2, 16, 4, 4}, 0), noise = normal({2, 16, 4, 4}, 1);
  step.noisy = noised_latents(latents, noise, step.sigma);
  step.target = velocity_target(latents, noise);
  const at::Tensor velocity = step.target + 0.1 * normal({2, 16, 4, 4}, 2);
  const auto loss = [&](Prediction kind, WeightingScheme scheme = WeightingScheme::kNone) {
    return flow_loss({.prediction = kind, .weighting = scheme}, step, velocity).item<double>();
  };
  const double raw = loss(Prediction::kRaw);
  EXPECT_NEAR(loss(Prediction::kAdditive), raw, 1e-6 * raw);
  EXPECT_NEAR(loss(Prediction::kSigmaScaled, WeightingScheme::kSigmaSqrt), raw, 1e-4 * raw);
  const at::Tensor each = (velocity - step.target).square().flatten(1).mean(1);
  const double scaled = (each * step.sigma.square()).mean().item<double>();
  EXPECT_NEAR(loss(Prediction::kSigmaScaled), scaled, 1e-4 * scaled);
  // a perfect velocity has no loss whatever is compared
  for (const Prediction kind : {Prediction::kRaw, Prediction::kAdditive, Prediction::kSigmaScaled})
    EXPECT_EQ(flow_loss({.prediction = kind}, step, step.target).item<double>(), 0);
}

TEST(FlowLoss, InputNoiseChangesTheInputAndNotTheTarget) {
  const dit::Config config = test::tiny_flux_config();
  FlowInputs in{.latents = normal({2, 16, 4, 6}, 0),
                .noise = normal({2, 16, 4, 6}, 1),
                .sigma = at::tensor({0.3f, 0.8f}),
                .prompt_embedding = normal({2, 8, config.prompt_dim}, 2),
                .pooled_embedding = normal({2, config.pooled_dim}, 3)};
  const FlowStep plain = flow_step(config, in);
  in.input_noise = normal({2, 16, 4, 6}, 4);
  const FlowStep perturbed = flow_step(config, in);
  EXPECT_TRUE(at::equal(plain.target, perturbed.target));
  EXPECT_TRUE(at::equal(perturbed.noisy,
                        dit::pack_latents(noised_latents(in.latents, in.input_noise, in.sigma))));
  EXPECT_FALSE(at::equal(plain.noisy, perturbed.noisy));
}

TEST_F(Objective, InputNoiseHasTheStrengthAskedFor) {
  const auto batch = [&](double gamma, bool random, int64_t epoch = 0) {
    DataOptions o;
    o.seed = 5, o.batch_size = 3, o.input_noise = gamma, o.random_input_noise = random;
    const TrainingData data(*folder_ / "latents", *folder_ / "text", o);
    return data.load(epoch, 0, data.epoch_batches(0)[0]);
  };
  EXPECT_FALSE(batch(0, false).input_noise.defined());
  const Batch fixed = batch(0.5, false), random = batch(0.5, true);
  EXPECT_TRUE(at::equal(fixed.noise, batch(0, false).noise));
  const at::Tensor added = fixed.input_noise - fixed.noise;
  EXPECT_NEAR(added.std().item<double>(), 0.5, 0.05);
  // no copy of the noise itself
  EXPECT_LT(std::abs((added * fixed.noise).mean().item<double>()), 0.08);
  // the same draw, by a strength of each sample's own below gamma
  const at::Tensor ratio = ((random.input_noise - random.noise) / added).flatten(1);
  for (int64_t i = 0; i < 3; ++i) {
    const double strength = ratio[i].median().item<double>();
    EXPECT_GT(strength, 0);
    EXPECT_LT(strength, 1);
    EXPECT_LT((ratio[i] - strength).abs().median().item<double>(), 1e-4);
  }
  EXPECT_NE(ratio[0].median().item<double>(), ratio[1].median().item<double>());
  EXPECT_FALSE(at::equal(fixed.input_noise, batch(0.5, false, 1).input_noise));
}

TEST_F(Objective, TextAndLossMasksCanBeHadOrNot) {
  const auto batch = [&](std::optional<bool> text, bool loss) {
    DataOptions o;
    o.batch_size = 3, o.text_mask = text, o.loss_masks = loss;
    const TrainingData data(*folder_ / "latents", *folder_ / "text", o);
    EXPECT_EQ(data.has_text_mask(), text.value_or(false));
    EXPECT_EQ(data.has_loss_masks(), loss);
    return data.load(0, 0, data.epoch_batches(0)[0]);
  };
  EXPECT_FALSE(batch({}, true).text_mask.defined());
  const Batch on = batch(true, false);
  EXPECT_EQ(on.text_mask.sum().item<int64_t>(), 3 * 3);  // three live tokens a caption
  EXPECT_FALSE(on.loss_mask.defined());
  const Batch masked = batch(false, true);
  EXPECT_TRUE(masked.loss_mask.defined());
  EXPECT_TRUE(at::equal(masked.latents, on.latents));
}

TEST_F(Objective, StratifiedLevelsAreTheSameInMicroBatches) {
  const auto losses = [&](int64_t batch, int64_t accumulation) {
    test::TemporaryFolder folder;
    Options o = options(folder / "run");
    o.timesteps.stratified = true;
    o.batch_size = batch;
    o.gradient_accumulation = accumulation;
    return *run(o).loss_first;
  };
  // an epoch of three visits is one update either way
  EXPECT_NEAR(losses(3, 1), losses(1, 3), 1e-5 * losses(3, 1));
}

}  // namespace
}  // namespace flux::train
