// Kind optim: optimizers step by step, 8-bit codes, fp8, roundings, learning rates, clipping.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/optim/blockwise8.h"
#include "common/optim/ema.h"
#include "common/optim/optimizer.h"
#include "common/optim/rounding.h"
#include "common/tensor/tensor.h"
#include "common/train/gradient_clip.h"
#include "common/train/lr_schedule.h"
#include "pipelines/check/case.h"
#include "pipelines/check/lines.h"
#include "pipelines/check/quant.h"
#include "pipelines/check/transformer.h"

namespace flux::check {
namespace {

using nlohmann::json;

/// The value of `key`, or `fallback` where it is absent or null.
template <class T>
T setting(const json& object, const char* key, T fallback) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? fallback : it->get<T>();
}

double at_pair(const json& object, const char* key, size_t i, double fallback) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? fallback : it->at(i).get<double>();
}

/// How far tensors may be from the golden ones. `share` of the elements of all tensors of a file may
/// be further away, where a value on a midpoint was rounded to the other side.
struct Tolerance {
  double absolute = 0;    // largest difference
  double of_largest = 0;  // the same, relative to the tensor's largest magnitude
  double ulps = 0;        // of bfloat16
  double state_ulps = 0;  // of the largest magnitude, where that is more: of states
  double share = 0;
  int64_t last_step = 10;
};

struct Optimized {
  OptimizerOptions options;
  Tolerance tolerance;
  double learning_rate = 1e-3;
  bool plain = false;  // everything is bfloat16, and every operation rounded
  int64_t warmup = 0;  // of the learning rate, in steps
};

bool is_bf16(const at::Tensor& tensor) { return tensor.scalar_type() == at::kBFloat16; }

/// What a file of that name was made with: optim.json, or what the vectors' README says.
std::optional<Optimized> optimized_of(const std::string& file, const json& meta) {
  const auto adam = [&]<class Options>(Options o) {
    o.beta1 = at_pair(meta, "betas", 0, o.beta1);
    o.beta2 = at_pair(meta, "betas", 1, o.beta2);
    o.eps = setting(meta, "eps", o.eps);
    o.weight_decay = setting(meta, "weight_decay", o.weight_decay);
    return o;
  };
  const bool bf16 = file.find("bf16") != std::string::npos;
  const Tolerance rounded{.ulps = 1, .share = 1e-3};
  Optimized out;
  out.learning_rate = setting(meta, "lr", 1e-3);
  if (file.starts_with("adamw8bit_bnbcpu")) return std::nullopt;  // for information
  if (file.starts_with("adamw8bit")) {
    auto options = adam(AdamW8bitOptions{});
    options.min_8bit_size = setting(meta, "min_8bit_size", options.min_8bit_size);
    out.options = options;
    out.tolerance = bf16 ? rounded : Tolerance{.absolute = 1e-7, .share = 1e-3};
    return out;
  }
  if (file.starts_with("adamw_")) {
    out.options = adam(AdamWOptions{});
    out.tolerance = {.absolute = 2.5e-7};
    if (bf16) out.tolerance = {.ulps = 1, .share = 1e-3, .last_step = 3};
    out.plain = bf16;
    return out;
  }
  if (file.starts_with("adafactor")) {
    AdafactorOptions options;
    options.eps1 = at_pair(meta, "eps", 0, options.eps1);
    options.eps2 = at_pair(meta, "eps", 1, options.eps2);
    options.clip_threshold = setting(meta, "clip_threshold", options.clip_threshold);
    options.decay_rate = setting(meta, "decay_rate", options.decay_rate);
    options.weight_decay = setting(meta, "weight_decay", file.find("_wd_") == file.npos ? 0 : 0.01);
    if (const double beta1 = setting(meta, "beta1", file.find("beta1") == file.npos ? 0 : 0.9);
        beta1 > 0)
      options.beta1 = beta1;
    const bool relative = file.find("relative") != file.npos;
    options.scale_parameter = setting(meta, "scale_parameter", relative);
    options.relative_step = setting(meta, "relative_step", relative);
    options.warmup_init = setting(meta, "warmup_init", relative);
    out.options = options;
    out.tolerance = bf16 ? rounded : Tolerance{.of_largest = 1e-6};
    return out;
  }
  if (file.starts_with("lion")) {
    LionOptions options;
    options.beta1 = at_pair(meta, "betas", 0, options.beta1);
    options.beta2 = at_pair(meta, "betas", 1, options.beta2);
    options.weight_decay = setting(meta, "weight_decay", 0.01);
    out.options = options;
    out.learning_rate = setting(meta, "lr", 1e-4);
    out.plain = bf16;
    out.tolerance = {};
    // torch rounds products too in the elements that its vectors leave over, which adds up over steps
    if (bf16) out.tolerance.state_ulps = 1;
    return out;
  }
  if (file.starts_with("sgd")) {
    SgdOptions options;
    options.momentum = setting(meta, "momentum", 0.9);
    options.weight_decay = setting(meta, "weight_decay", 0.01);
    options.nesterov = setting(meta, "nesterov", file.find("nesterov") != file.npos);
    out.options = options;
    out.learning_rate = setting(meta, "lr", 1e-2);
    out.tolerance = {.of_largest = 1e-6};
    return out;
  }
  if (file.starts_with("schedulefree")) {
    auto options = adam(ScheduleFreeOptions{});
    options.weight_decay = setting(meta, "weight_decay", 0.01);
    options.r = setting(meta, "r", options.r);
    options.weight_lr_power = setting(meta, "weight_lr_power", options.weight_lr_power);
    out.options = options;
    out.learning_rate = setting(meta, "lr", 2.5e-3);
    out.warmup = setting(meta, "warmup_steps", int64_t{4});
    out.tolerance = {.absolute = 1e-6};
    return out;
  }
  if (file.starts_with("prodigy")) {
    const bool bias = file.find("bias") != file.npos;
    auto options = adam(ProdigyOptions{});
    options.weight_decay = setting(meta, "weight_decay", 0.01);
    options.d0 = setting(meta, "d0", bias ? 1e-4 : 1e-6);
    options.d_coef = setting(meta, "d_coef", options.d_coef);
    options.growth_rate = setting(meta, "growth_rate", bias ? 1.6 : options.growth_rate);
    options.use_bias_correction = setting(meta, "use_bias_correction", bias);
    options.safeguard_warmup = setting(meta, "safeguard_warmup", false);
    if (const double beta3 = setting(meta, "beta3", bias ? 0.98 : 0.0); beta3 > 0)
      options.beta3 = beta3;
    out.options = options;
    out.learning_rate = setting(meta, "lr", 1.0);
    out.tolerance = {.of_largest = 1e-5};
    return out;
  }
  return std::nullopt;
}

/// Judges all tensors of a file.
class Judge {
 public:
  Judge(const Case& c, std::string file, Tolerance tolerance)
      : c_(c), file_(std::move(file)), tolerance_(tolerance) {}

  void add(const std::string& name, const at::Tensor& got, const at::Tensor& golden) {
    if (got.numel() != golden.numel()) {
      c_.report->verdict(file_ + " " + name,
                         false,
                         fmt::format("shape {}, golden {}", shape_text(got), shape_text(golden)));
      return;
    }
    const at::Tensor exact = golden.to(at::kDouble).flatten(),
                     off = (got.detach().cpu().to(at::kDouble).flatten() - exact).abs();
    const double largest = exact.abs().max().item<double>();
    at::Tensor limit = at::full_like(exact, tolerance_.absolute + tolerance_.of_largest * largest);
    // moments are sums of numbers of their own size
    if (!name.starts_with("p/") && tolerance_.of_largest == 0)
      limit = at::full_like(exact, 1e-6 * largest);
    if (is_bf16(golden)) {
      const at::Tensor exponent = at::floor(at::log2(exact.abs().clamp_min(1e-38)));
      limit = tolerance_.ulps * at::exp2(exponent - 7);
      if (!name.starts_with("p/")) {
        limit = limit.clamp_min(tolerance_.state_ulps *
                                std::exp2(std::floor(std::log2(std::max(largest, 1e-38))) - 7));
      }
    }
    const int64_t beyond = at::logical_not(off <= limit).sum().item<int64_t>();
    num_ += off.numel();
    num_beyond_ += beyond;
    const bool ok = beyond == 0 || tolerance_.share > 0;
    c_.report->verdict(file_ + " " + name,
                       ok && !off.isnan().any().item<bool>(),
                       fmt::format("max {:.1e} of {:.1e}{}",
                                   off.max().item<double>(),
                                   limit.max().item<double>(),
                                   beyond == 0 ? "" : fmt::format(", {} beyond", beyond)));
  }
  void finish() const {
    if (tolerance_.share == 0 || num_ == 0) return;
    c_.report->verdict(
        file_,
        static_cast<double>(num_beyond_) <= tolerance_.share * static_cast<double>(num_),
        fmt::format("{} of {} elements beyond, {:.2g} % allowed",
                    num_beyond_,
                    num_,
                    100 * tolerance_.share));
  }

 private:
  const Case& c_;
  std::string file_;
  Tolerance tolerance_;
  int64_t num_ = 0, num_beyond_ = 0;
};

std::vector<at::Tensor> zero_states(const Optimizer& optimizer, const at::Tensor& parameter) {
  std::vector<at::Tensor> states;
  for (const StateTensor& state :
       optimizer.state_layout(parameter.sizes(), parameter.scalar_type()))
    states.push_back(at::zeros(state.shape, parameter.options().dtype(state.dtype)));
  return states;
}

/// bfloat16 of float32 with the random numbers given, uint16.
at::Tensor rounded_with(const at::Tensor& values, const at::Tensor& random) {
  const at::Tensor host = values.cpu().contiguous(), bits = random.contiguous();
  at::Tensor out = at::empty_like(host, at::kBFloat16);
  const float* const from = host.const_data_ptr<float>();
  const auto* const r = static_cast<const uint16_t*>(bits.const_data_ptr());
  auto* const to = static_cast<uint16_t*>(out.data_ptr());
  for (int64_t i = 0; i < host.numel(); ++i) to[i] = round_stochastic(from[i], r[i]);
  return out;
}

/// The gradient of tensor i in step t: the file's own, or the one all share; undefined where there is none.
at::Tensor gradient_of(const TensorMap& inputs, const TensorMap& v, int64_t t, size_t i) {
  const std::string name = fmt::format("g/{}/{}", t, i);
  if (const auto own = v.find(name); own != v.end()) return own->second;
  const auto shared = inputs.find(name);
  return shared == inputs.end() ? at::Tensor() : shared->second;
}

void check_optimizer(const Case& c,
                     const TensorMap& inputs,
                     const std::string& file,
                     const Optimized& what) {
  const TensorMap v = c.read_tensors(file + ".safetensors");
  if (v.empty()) return;
  Judge judge(c, file, what.tolerance);
  const bool bits_given = v.contains("bits/1/0");
  const auto kept = v.contains("p/1/0") && is_bf16(v.at("p/1/0")) ? at::kBFloat16 : at::kFloat;
  const auto optimizer = make_optimizer(
      what.options,
      {.weights = WeightMode::kNearest, .states = what.plain ? at::kBFloat16 : at::kFloat});
  std::vector<Slot> slots;
  for (size_t i = 0; inputs.contains(fmt::format("p0/{}", i)); ++i) {
    Slot& slot = slots.emplace_back();
    slot.parameter = inputs.at(fmt::format("p0/{}", i)).to(c.device, kept, false, /*copy=*/true);
    // rounded below, with the bits given
    if (bits_given) slot.parameter = slot.parameter.to(at::kFloat);
    slot.states = zero_states(*optimizer, slot.parameter);
  }
  for (int64_t t = 1; t <= what.tolerance.last_step; ++t) {
    for (size_t i = 0; i < slots.size(); ++i) {
      const at::Tensor gradient = gradient_of(inputs, v, t, i);
      if (!gradient.defined()) return judge.finish();
      slots[i].gradient = c.on_device(gradient.to(kept));
    }
    StepScalars step;
    step.step = t;
    step.learning_rate = what.learning_rate;
    if (t < what.warmup)
      step.learning_rate *= static_cast<double>(t) / static_cast<double>(what.warmup);
    optimizer->begin_step(step);
    if (optimizer->two_phase()) {
      for (const Slot& slot : slots) optimizer->observe(slot, step);
      optimizer->end_observe();
    }
    for (size_t i = 0; i < slots.size(); ++i) {
      Slot& slot = slots[i];
      optimizer->step(slot, step);
      const std::string at_step = fmt::format("{}/{}", t, i);
      at::Tensor p = slot.parameter;
      if (bits_given) {
        p = c.on_device(rounded_with(slot.parameter, golden(v, "bits/" + at_step)));
        slot.parameter = p.to(at::kFloat);
      }
      const auto compare = [&](const std::string& name, const at::Tensor& got) {
        if (const auto it = v.find(name); it != v.end()) judge.add(name, got, it->second);
      };
      compare("p/" + at_step, p);
      compare("x/" + at_step, optimizer->evaluation_weights(slot));
      const auto layout =
          optimizer->state_layout(slot.parameter.sizes(), slot.parameter.scalar_type());
      for (size_t s = 0; s < layout.size(); ++s)
        compare("s/" + at_step + "/" + layout[s].name, slot.states[s]);
    }
    if (const auto d = v.find(fmt::format("d/{}", t)); d != v.end()) {
      const double wanted = d->second.item<double>(),
                   off = std::abs(optimizer->numbers().at("d") - wanted) / wanted;
      c.report->judge(file + " " + d->first, {off, off}, {std::nullopt, 1e-5});
    }
  }
  judge.finish();
}

void check_ema(const Case& c, const TensorMap& inputs, const std::string& file, const json& meta) {
  const TensorMap v = c.read_tensors(file + ".safetensors");
  const bool warmup = file == "ema_warmup", least = file == "ema_min";
  EmaOptions options;
  options.decay = setting(meta, "decay", warmup ? 0.9999 : least ? 0.95 : 0.999);
  options.min_decay = setting(meta, "min_decay", least ? 0.5 : 0.0);
  options.update_after_step = setting(meta, "update_after_step", int64_t{least ? 2 : 0});
  options.use_warmup = setting(meta, "use_ema_warmup", warmup);
  options.inv_gamma = setting(meta, "inv_gamma", options.inv_gamma);
  options.power = setting(meta, "power", warmup ? 0.75 : options.power);
  Judge judge(c, file, {.of_largest = 1e-6});
  for (int64_t t = 1; t <= 10; ++t) {
    const auto it = v.find(fmt::format("decay/{}", t));
    if (it == v.end()) continue;
    const double off = std::abs(ema_decay(options, t) - it->second.item<double>());
    c.report->judge(file + " " + it->first, {off, off}, {std::nullopt, 1e-12});
  }
  for (size_t i = 0; inputs.contains(fmt::format("p0/{}", i)); ++i) {
    const at::Tensor weights = c.on_device(inputs.at(fmt::format("p0/{}", i))).clone(),
                     average = weights.clone();
    for (int64_t t = 1; inputs.contains(fmt::format("g/{}/{}", t, i)); ++t) {
      weights.add_(c.on_device(inputs.at(fmt::format("g/{}/{}", t, i))), -0.1);
      ema_update(average, weights, ema_decay(options, t), 0, t, i);
      const auto it = v.find(fmt::format("ema/{}/{}", t, i));
      if (it != v.end()) judge.add(it->first, average, it->second);
    }
  }
}

std::span<const float> floats(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<float>(), static_cast<size_t>(tensor.numel())};
}

void check_blockwise8(const Case& c) {
  const TensorMap v = c.read_tensors("blockwise8.safetensors");
  for (const bool is_signed : {true, false}) {
    const std::string map = is_signed ? "signed" : "unsigned";
    if (const auto it = v.find(map); it != v.end())
      c.report->equal("blockwise8 " + map,
                      from_values<float>(map8(is_signed).values, std::vector<int64_t>{256}),
                      it->second);
    for (const auto& [name, x] : v) {
      if (!name.ends_with("/x")) continue;
      const std::string prefix = name.substr(0, name.size() - 1) + map;
      const at::Tensor values = (is_signed ? x : x.abs()).contiguous();
      std::vector<uint8_t> codes(static_cast<size_t>(values.numel()));
      std::vector<float> absmax((codes.size() + kBlock8 - 1) / kBlock8), decoded(codes.size());
      quantize8(floats(values), is_signed, codes, absmax);
      dequantize8(codes, absmax, is_signed, decoded);
      const auto compare = [&](const char* part, const at::Tensor& got) {
        if (const auto it = v.find(prefix + part); it != v.end())
          c.report->equal("blockwise8 " + prefix + part, got.view(it->second.sizes()), it->second);
      };
      const std::vector<int64_t> n{values.numel()};
      compare("/q", from_values<uint8_t>(codes, n));
      compare(
          "/absmax",
          from_values<float>(absmax, std::vector<int64_t>{static_cast<int64_t>(absmax.size())}));
      compare("/deq", from_values<float>(decoded, n));
    }
  }
}

void check_rounding(const Case& c) {
  if (!c.has("bf16_rounding.json")) return;
  const json all = read_object(c.folder / "bf16_rounding.json");
  Tally nearest, stochastic;
  const auto same = [](uint16_t got, const std::string& wanted) {
    if (wanted == "nan") return (got & 0x7FFF) > 0x7F80;
    return got == std::stoul(wanted, nullptr, 16);
  };
  const auto random = all.value("random_bits", std::vector<uint32_t>{});
  for (const json& row : all.value("rows", json::array())) {
    const std::string name = row.at("fp32");
    const float value = float_of(static_cast<uint32_t>(std::stoul(name, nullptr, 16)));
    uint16_t bits = 0;
    round_to(value, &bits);
    if (row.contains("rne"))
      nearest.add(same(bits, row["rne"]),
                  name,
                  fmt::format("{:04x} for {}", bits, row["rne"].get<std::string>()));
    const auto wanted = row.value("sr_safe", std::vector<std::string>{});
    for (size_t i = 0; i < std::min(wanted.size(), random.size()); ++i) {
      bits = round_stochastic(value, random[i]);
      stochastic.add(same(bits, wanted[i]), name, fmt::format("{:04x} for {}", bits, wanted[i]));
    }
  }
  nearest.report(*c.report, "bf16_rounding rne", "values");
  stochastic.report(*c.report, "bf16_rounding sr_safe", "values");
}

void check_schedulers(const Case& c) {
  if (!c.has("schedulers.json")) return;
  int i = 0;
  for (const json& row :
       read_object(c.folder / "schedulers.json").value("schedulers", json::array())) {
    const std::string title = fmt::format("schedulers {} {}", i++, row.value("name", ""));
    const auto name = std::ranges::find(
        lr_schedules(), row.value("name", ""), &std::pair<std::string, LrSchedule>::first);
    if (name == lr_schedules().end()) {
      c.report->verdict(title, false, "no such schedule");
      continue;
    }
    const LrOptions options{
        .schedule = name->second,
        .learning_rate = row.at("base_lr"),
        .num_steps = row.at("total"),
        .num_warmup_steps = row.value("warmup", int64_t{0}),
        .num_cycles = row.value("num_cycles", 1.0),
        .power = row.value("power", 1.0),
        .lr_end = row.value("lr_end", 1e-7),
        .min_lr_ratio = row.value("min_lr_ratio", row.value("min_lr_rate", 0.0)),
        .num_decay_steps = row.value("decay_steps", int64_t{0}),
        .step_rules = row.value("step_rules", "")};
    double worst = 0;
    int64_t step = 0;
    for (const double wanted : row.at("lr")) {
      const double off = std::abs(learning_rate(options, step++) - wanted);
      // a cosine that returns to zero is zero but for the rounding of the whole rate
      worst = std::max(worst, off / std::max(std::abs(wanted), options.learning_rate));
    }
    c.report->judge(title, {worst, worst}, {std::nullopt, 1e-12});
  }
}

void check_clipping(const Case& c, const TensorMap& inputs, const json& meta) {
  const TensorMap v = c.read_tensors("clip_norm.safetensors");
  const auto norms = meta.value("total_norm", std::vector<double>{});
  Judge judge(c, "clip_norm", {.of_largest = 1e-6});
  for (int t = 1; inputs.contains(fmt::format("g/{}/0", t)); ++t) {
    std::vector<at::Tensor> gradients;
    for (int i = 0; inputs.contains(fmt::format("g/{}/{}", t, i)); ++i)
      gradients.push_back(c.on_device(inputs.at(fmt::format("g/{}/{}", t, i))).clone());
    const double norm = clip_global_norm(gradients, 1.0);
    if (static_cast<size_t>(t) <= norms.size()) {
      const double wanted = norms[static_cast<size_t>(t) - 1],
                   off = std::abs(norm - wanted) / wanted;
      c.report->judge(fmt::format("clip_norm total_norm/{}", t), {off, off}, {std::nullopt, 1e-6});
    }
    for (size_t i = 0; i < gradients.size(); ++i) {
      const auto it = v.find(fmt::format("clipped/{}/{}", t, i));
      if (it != v.end()) judge.add("p/" + it->first, gradients[i], it->second);
    }
  }
}

}  // namespace

void check_optim(const Case& c) {
  const at::NoGradGuard no_grad;
  const TensorMap inputs = c.read_tensors("inputs.safetensors");
  const json all = c.has("optim.json") ? read_object(c.folder / "optim.json") : json::object();
  const json files = all.value("files", json::object());
  for (const std::string& name : c.files("", ".safetensors")) {
    const std::string file = name.substr(0, name.size() - std::string_view(".safetensors").size());
    const json meta = files.value(file, json::object());
    if (const auto what = optimized_of(file, meta)) check_optimizer(c, inputs, file, *what);
    if (file == "clip_norm") check_clipping(c, inputs, meta);
    if (file.starts_with("ema_")) check_ema(c, inputs, file, meta);
  }
  check_blockwise8(c);
  check_fp8(c);
  check_rounding(c);
  check_schedulers(c);
}

}  // namespace flux::check
