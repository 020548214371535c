// Kinds timesteps and euler: noise levels, densities, weightings, losses, schedules, and a short
// sampling run.
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <fmt/format.h>

#include <functional>
#include <optional>
#include <regex>
#include <span>
#include <string>
#include <vector>

#include "common/models/flux/packing.h"
#include "common/tensor/tensor.h"
#include "common/train/euler.h"
#include "common/train/flow_matching.h"
#include "common/train/loss.h"
#include "common/train/sampler.h"
#include "common/train/timesteps.h"
#include "pipelines/check/case.h"
#include "pipelines/check/transformer.h"

namespace flux::check {
namespace {

template <class E>
std::optional<E> named(std::string_view word,
                       std::initializer_list<std::pair<std::string_view, E>> choices) {
  for (const auto& [name, value] : choices) {
    if (name == word) return value;
  }
  return std::nullopt;
}

std::optional<WeightingScheme> scheme_of(std::string_view word) {
  return named<WeightingScheme>(word,
                                {{"none", WeightingScheme::kNone},
                                 {"sigma_sqrt", WeightingScheme::kSigmaSqrt},
                                 {"cosmap", WeightingScheme::kCosmap},
                                 {"logit_normal", WeightingScheme::kLogitNormal},
                                 {"mode", WeightingScheme::kMode}});
}

std::vector<float> values_of(const at::Tensor& tensor) {
  const at::Tensor host = tensor.to(at::kFloat).contiguous();
  const float* const data = host.const_data_ptr<float>();
  return {data, data + host.numel()};
}

at::Tensor tensor_of(std::span<const float> values, const at::Tensor& like) {
  return from_values<float>(values, like.sizes());
}

/// Tensors whose whole name matches `pattern`: `compute` makes them with the production code, from
/// the parts of the name that the pattern captures.
struct Rule {
  std::regex pattern;
  std::function<at::Tensor(const std::smatch& parts, const at::Tensor& wanted)> compute;
  bool exact = false;
};

/// f(uniform draw, normal draw) for every draw.
at::Tensor per_draw(const TensorMap& v,
                    const at::Tensor& wanted,
                    const std::function<double(double, double)>& f) {
  const auto uniform = values_of(golden(v, "uniform_draws")),
             normal = values_of(golden(v, "normal_draws"));
  std::vector<float> out;
  for (size_t i = 0; i < std::min(uniform.size(), normal.size()); ++i)
    out.push_back(static_cast<float>(f(uniform[i], normal[i])));
  return tensor_of(out, wanted);
}

double number(const std::smatch& groups, size_t i, double fallback) {
  return groups[i].matched ? std::stod(groups[i]) : fallback;
}

std::vector<Rule> sigma_rules(const TensorMap& v) {
  std::vector<Rule> rules;
  rules.push_back(
      {std::regex(
           R"(sigma\.(uniform|sigmoid|shift|flux_shift)(?:\.scale(.+?))?(?:\.shift(.+?))?(?:\.latent(\d+)x(\d+))?)"),
       [&v](const std::smatch& g, const at::Tensor& wanted) {
         TimestepOptions options;
         options.sampling =
             *named<TimestepSampling>(g[1].str(),
                                      {{"uniform", TimestepSampling::kUniform},
                                       {"sigmoid", TimestepSampling::kSigmoid},
                                       {"shift", TimestepSampling::kShift},
                                       {"flux_shift", TimestepSampling::kFluxShift}});
         options.sigmoid_scale = number(g, 2, options.sigmoid_scale);
         options.discrete_flow_shift = number(g, 3, options.discrete_flow_shift);
         const int64_t tokens = g[4].matched ? std::stoll(g[4]) / 2 * (std::stoll(g[5]) / 2) : 0;
         return per_draw(
             v, wanted, [&](double u, double n) { return sampled_sigma(options, u, n, tokens); });
       }});
  rules.push_back({std::regex(R"(table\.shift(.+)\.(sigma|timestep))"),
                   [](const std::smatch& g, const at::Tensor& wanted) {
                     auto table = sigma_table(std::stod(g[1]));
                     if (g[2] == "timestep") {
                       for (float& sigma : table) sigma *= static_cast<float>(kSigmaTableRows);
                     }
                     return tensor_of(table, wanted);
                   }});
  const auto density = [](const std::smatch& g) {
    TimestepOptions options;
    options.sampling = TimestepSampling::kSigma;
    options.weighting = *scheme_of(g[1].str());
    options.logit_mean = number(g, 2, options.logit_mean);
    options.logit_std = number(g, 3, options.logit_std);
    options.mode_scale = number(g, 4, options.mode_scale);
    return options;
  };
  const std::string density_name =
      R"(density\.(none|logit_normal|mode)(?:\.mean(.+?))?(?:\.std(.+?))?(?:\.scale(.+?))?)";
  rules.push_back({std::regex(density_name + R"(\.u)"),
                   [&v, density](const std::smatch& g, const at::Tensor& wanted) {
                     const auto options = density(g);
                     return per_draw(v, wanted, [&](double u, double n) {
                       return sigma_table_position(options, u, n);
                     });
                   }});
  rules.push_back(
      {std::regex(density_name + R"(\.index)"),
       [&v, density](const std::smatch& g, const at::Tensor& wanted) {
         const auto options = density(g);
         const auto uniform = values_of(golden(v, "uniform_draws")),
                    normal = values_of(golden(v, "normal_draws"));
         at::Tensor rows = wanted.clone();  // negative: too near a step of the table to compare
         for (int64_t i = 0; i < wanted.numel(); ++i) {
           if (wanted[i].item<int64_t>() < 0) continue;
           const auto at = static_cast<size_t>(i);
           rows[i] = sigma_table_row(sigma_table_position(options, uniform.at(at), normal.at(at)));
         }
         return rows;
       },
       true});
  rules.push_back({std::regex(R"(mu\.value)"), [&v](const std::smatch&, const at::Tensor& wanted) {
                     std::vector<float> mu;
                     for (const float tokens : values_of(golden(v, "mu.tokens")))
                       mu.push_back(
                           static_cast<float>(flux_shift_mu(static_cast<int64_t>(tokens))));
                     return tensor_of(mu, wanted);
                   }});
  rules.push_back({std::regex(R"(schedule\.(\d+)x(\d+)\.steps(\d+)\.(shift|plain))"),
                   [](const std::smatch& g, const at::Tensor& wanted) {
                     const int64_t tokens = std::stoll(g[1]) / 16 * (std::stoll(g[2]) / 16);
                     return tensor_of(sampler_schedule(std::stoll(g[3]), tokens, g[4] == "shift"),
                                      wanted);
                   }});
  return rules;
}

std::optional<Prediction> prediction_of(std::string_view word) {
  return named<Prediction>(word,
                           {{"raw", Prediction::kRaw},
                            {"additive", Prediction::kAdditive},
                            {"sigma_scaled", Prediction::kSigmaScaled}});
}

std::vector<Rule> loss_rules(const TensorMap& v) {
  const auto p = [&v](const char* name) { return golden(v, std::string("prediction.") + name); };
  std::vector<Rule> rules;
  rules.push_back({std::regex(R"(weighting\.(none|sigma_sqrt|cosmap|logit_normal|mode))"),
                   [&v](const std::smatch& g, const at::Tensor&) {
                     return loss_weights(*scheme_of(g[1].str()), golden(v, "weighting.sigma"));
                   }});
  rules.push_back({std::regex(R"(prediction\.noisy)"), [p](const std::smatch&, const at::Tensor&) {
                     return noised_latents(p("latents"), p("noise"), p("sigma"));
                   }});
  rules.push_back({std::regex(R"(prediction\.target)"), [p](const std::smatch&, const at::Tensor&) {
                     return velocity_target(p("latents"), p("noise"));
                   }});
  rules.push_back({std::regex(R"(prediction\.(raw|additive|sigma_scaled))"),
                   [p](const std::smatch& g, const at::Tensor&) {
                     return model_prediction(
                         *prediction_of(g[1].str()), p("output"), p("noisy"), p("sigma"));
                   }});
  rules.push_back(
      {std::regex(
           R"(prediction\.(raw|additive|sigma_scaled)\.(none|sigma_sqrt|cosmap)\.(loss|loss_per_sample))"),
       [p](const std::smatch& g, const at::Tensor&) {
         LossOptions options;
         options.prediction = *prediction_of(g[1].str());
         options.weighting = *scheme_of(g[2].str());
         const at::Tensor each =
             loss_per_sample(options, p("output"), p("noisy"), p("target"), p("sigma"), {});
         return g[3] == "loss" ? each.mean() : each;
       }});
  rules.push_back(
      {std::regex(R"(loss\.(l1|l2|huber|smooth_l1)(?:\.(constant|exponential)\.per_sample)?)"),
       [p](const std::smatch& g, const at::Tensor& wanted) {
         LossOptions options;
         options.type = *named<LossType>(g[1].str(),
                                         {{"l1", LossType::kL1},
                                          {"l2", LossType::kL2},
                                          {"huber", LossType::kHuber},
                                          {"smooth_l1", LossType::kSmoothL1}});
         options.huber_schedule =
             g[2] == "exponential" ? HuberSchedule::kExponential : HuberSchedule::kConstant;
         const at::Tensor each = element_loss(options, p("output"), p("target"), p("sigma"), {});
         return wanted.dim() == 0 ? each.mean() : each;
       }});
  return rules;
}

}  // namespace

void check_timesteps(const Case& c) {
  const TensorMap v = c.read_tensors("vectors.safetensors");
  std::vector<Rule> rules = sigma_rules(v);
  for (Rule& rule : loss_rules(v)) rules.push_back(std::move(rule));
  for (const auto& [name, wanted] : v) {
    for (const Rule& rule : rules) {
      std::smatch groups;
      if (!std::regex_match(name, groups, rule.pattern)) continue;
      const at::Tensor got = rule.compute(groups, wanted);
      if (rule.exact)
        c.report->equal(name, got, wanted);
      else
        c.inner(name, got, wanted, c.limits());
    }
  }
}

void check_euler(const Case& c) {
  const TensorMap v = c.read_tensors("vectors.safetensors");
  if (v.empty()) return;
  const dit::Model model = load_transformer(c, c.required("model", "weights_bfl.safetensors"));
  const at::Tensor noise = c.on_device(golden(v, "input.noise"));
  const int64_t h = noise.size(2), w = noise.size(3);
  const auto sigmas = values_of(golden(v, "schedule"));
  if (c.config.contains("steps") && c.config.contains("shift")) {
    const auto schedule = sampler_schedule(
        c.config["steps"].get<int64_t>(), h / 2 * (w / 2), c.config["shift"].get<bool>());
    c.inner(
        "schedule",
        from_values<float>(schedule, std::vector<int64_t>{static_cast<int64_t>(schedule.size())}),
        v.at("schedule"),
        c.limits());
  }
  const dit::Inputs in = inputs_of(c, v);
  std::vector<std::vector<at::Tensor>> paths(sigmas.size() - 1);  // by step, of each picture
  for (int64_t b = 0; b < noise.size(0); ++b) {
    SampleInputs picture{.noise = noise.narrow(0, b, 1),
                         .prompt_embedding = in.txt.narrow(0, b, 1),
                         .pooled_embedding = in.y.narrow(0, b, 1)};
    if (in.text_mask) picture.text_mask = in.text_mask->narrow(0, b, 1);
    EulerOptions euler{.sigmas = sigmas};
    if (in.guidance.defined()) euler.guidance = in.guidance[b].item<double>();
    euler_sample(
        [&](std::span<const dit::Inputs> all) {
          std::vector<at::Tensor> velocities;
          for (const dit::Inputs& one : all) velocities.push_back(predict(model, one));
          return velocities;
        },
        euler,
        std::span(&picture, 1),
        [&](int64_t done, std::span<const at::Tensor> packed) {
          paths[static_cast<size_t>(done) - 1].push_back(dit::unpack_latents(packed[0], h, w));
        });
  }
  std::vector<at::Tensor> path;
  for (const auto& of_step : paths) path.push_back(at::cat(of_step));
  c.output("latents_after_step", at::stack(path), golden(v, "latents_after_step"));
}

}  // namespace flux::check
