#include "pipelines/train/metadata.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/core/version.h"
#include "pipelines/train/lora_options.h"
#include "pipelines/train/optimizer.h"

namespace flux::train {
namespace {

// As Python prints a float: 1e-05, 4.0, 0.01.
std::string python_float(double value) { return nlohmann::json(value).dump(); }
std::string python_bool(bool value) { return value ? "True" : "False"; }

std::string utf8(const std::string& text) {
  return first_invalid_utf8(text) ? printable(text) : text;
}

}  // namespace

std::map<std::string, std::string> lora_metadata(const Session& s) {
  const Options& o = s.options;
  const TrainingData& data = *s.data;
  const nlohmann::json option = deciding_options(o);
  const auto chosen = [&](const char* name, const std::string& otherwise) {
    const auto found = option.find(name);
    if (found == option.end()) return otherwise;
    return found->is_string() ? found->get<std::string>() : found->dump();
  };
  nlohmann::json buckets = nlohmann::json::object();
  std::string resolution = "1024x1024";
  int64_t most = 0, number = 0;
  for (const auto& [width, height, visits] : data.buckets()) {
    buckets[std::to_string(number++)] = {{"resolution", {width, height}}, {"count", visits}};
    if (visits > most) {
      most = visits;
      resolution = fmt::format("{}x{}", width, height);
    }
  }
  // what made the file, without a path or a caption
  const nlohmann::json config{{"options", option},
                              {"precision", s.compute == at::kFloat ? "f32" : "bf16"},
                              {"latents_sha256", data.latents_digest()},
                              {"text_sha256", data.text_digest()},
                              {"commit", commit()}};
  const int64_t epochs = (o.max_steps + data.num_batches() - 1) / data.num_batches();
  const std::string variant = s.config.guidance ? "flux-1-dev" : "flux-1-schnell";
  std::map<std::string, std::string> out{
      {"ss_v2", "False"},
      {"ss_base_model_version", "flux1"},
      {"ss_model_type", "flux"},
      {"ss_network_module", network_module(o)},
      {"ss_network_dim", std::to_string(o.rank)},
      {"ss_network_alpha", python_float(o.effective_alpha())},
      {"ss_network_dropout", o.network_dropout > 0 ? python_float(o.network_dropout) : "None"},
      {"ss_network_args", network_args(o)},
      {"ss_scale_weight_norms",
       o.scale_weight_norms > 0 ? python_float(o.scale_weight_norms) : "None"},
      {"ss_output_name", "lora"},
      {"ss_learning_rate", python_float(o.lr.learning_rate)},
      {"ss_unet_lr", python_float(o.lr.learning_rate)},
      {"ss_text_encoder_lr", "None"},
      {"ss_lr_scheduler", chosen("lr-scheduler", "constant")},
      {"ss_lr_warmup_steps", std::to_string(o.effective_lr().num_warmup_steps)},
      {"ss_optimizer",
       fmt::format("{}(weight_decay={}{}{})",
                   optimizer_title(o.optimizer),
                   python_float(o.effective_weight_decay()),
                   o.optimizer_args.empty() ? "" : ",",
                   o.optimizer_args)},
      {"ss_max_grad_norm", python_float(o.max_grad_norm)},
      {"ss_gradient_accumulation_steps", std::to_string(o.gradient_accumulation)},
      {"ss_gradient_checkpointing",
       "False"},  // whatever is run again: it is not seen in the result
      {"ss_max_train_steps", std::to_string(o.max_steps)},
      {"ss_steps", std::to_string(s.step)},
      {"ss_num_epochs", std::to_string(epochs)},
      {"ss_epoch", std::to_string(s.position.epoch + (s.position.batch > 0 ? 1 : 0))},
      {"ss_num_train_images", std::to_string(data.num_items() - data.num_regularization())},
      {"ss_num_reg_images", std::to_string(data.num_regularization())},
      {"ss_num_batches_per_epoch", std::to_string(data.num_batches())},
      {"ss_total_batch_size", o.batch_size > 0 ? std::to_string(o.batch_size) : "None"},
      {"ss_bucket_info", nlohmann::json{{"buckets", buckets}}.dump()},
      {"ss_resolution", resolution},
      {"ss_cache_latents", "True"},
      {"ss_seed", std::to_string(o.seed)},
      {"ss_mixed_precision", s.compute == at::kFloat ? "no" : "bf16"},
      {"ss_full_fp16", "False"},
      {"ss_full_bf16", "False"},
      {"ss_fp8_base", python_bool(s.trainer->options().base == QuantFormat::kFp8)},
      {"ss_prior_loss_weight", python_float(o.prior_loss_weight)},
      {"ss_loss_type", chosen("loss-type", "l2")},
      {"ss_huber_schedule", chosen("huber-schedule", "None")},
      {"ss_huber_c", chosen("huber-c", "None")},
      {"ss_huber_scale", chosen("huber-scale", "None")},
      {"ss_masked_loss", python_bool(data.has_loss_masks())},
      {"ss_ip_noise_gamma", o.ip_noise_gamma > 0 ? python_float(o.ip_noise_gamma) : "None"},
      {"ss_ip_noise_gamma_random_strength", python_bool(o.ip_noise_gamma_random_strength)},
      {"ss_guidance_scale", python_float(s.guidance())},
      {"ss_timestep_sampling", chosen("timestep-sampling", "")},
      {"ss_sigmoid_scale", python_float(o.timesteps.sigmoid_scale)},
      {"ss_discrete_flow_shift", python_float(o.timesteps.discrete_flow_shift)},
      {"ss_weighting_scheme", chosen("weighting-scheme", "none")},
      {"ss_logit_mean", python_float(o.timesteps.logit_mean)},
      {"ss_logit_std", python_float(o.timesteps.logit_std)},
      {"ss_mode_scale", python_float(o.timesteps.mode_scale)},
      {"ss_model_prediction_type", chosen("model-prediction-type", "raw")},
      {"ss_apply_t5_attn_mask", python_bool(data.has_text_mask())},
      {"modelspec.sai_model_spec", "1.0.1"},
      {"modelspec.architecture", variant + "/lora"},
      {"modelspec.implementation", "https://github.com/black-forest-labs/flux"},
      {"modelspec.implementation_version", fmt::format("flux-stages {}", tool_version())},
      {"modelspec.title", "lora"},
      {"flux_stages.run", config.dump()},
      {"modelspec.resolution", resolution},
      {"modelspec.prediction_type", "raw"},
  };
  if (!o.no_tags) out["ss_sd_model_name"] = utf8(o.model.filename().native());
  if (s.dataset_metadata.valid()) out.merge(std::map(s.dataset_metadata.get()));
  return out;
}

std::map<std::string, std::string> model_metadata(const Session& s) {
  auto all = lora_metadata(s);
  std::map<std::string, std::string> out{{"format", "pt"}};
  for (const auto& [key, value] : all)
    if (key.starts_with("modelspec.") || key.starts_with("flux_stages.")) out[key] = value;
  out["modelspec.architecture"] = s.config.guidance ? "flux-1-dev" : "flux-1-schnell";
  out["modelspec.title"] = "model";
  return out;
}

std::map<std::string, std::string> averaged(std::map<std::string, std::string> metadata,
                                            const Session& session) {
  metadata["flux_stages.ema_decay"] = python_float(session.options.ema_decay);
  return metadata;
}

}  // namespace flux::train
