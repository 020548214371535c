// Kinds vae, t5 and clip: the networks that the caches are made with.
#include <ATen/ops/cat.h>
#include <ATen/ops/exp.h>
#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <span>
#include <vector>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/core/text.h"
#include "common/models/clip/clip.h"
#include "common/models/t5/t5.h"
#include "common/models/vae/vae.h"
#include "common/tensor/tensor.h"
#include "pipelines/check/case.h"
#include "pipelines/check/transformer.h"

namespace flux::check {
namespace {

bool same_bytes(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.cpu().contiguous(), y = b.cpu().contiguous();
  const auto p = host_bytes(x), q = host_bytes(y);
  return x.scalar_type() == y.scalar_type() && x.sizes() == y.sizes() &&
         std::equal(p.begin(), p.end(), q.begin(), q.end());
}

/// layout.json: the file's tensors put under their diffusers names and shapes must come back under
/// ours.
void check_vae_layout(const Case& c, const TensorMap& bfl) {
  NetTensors net{c.folder, {}, "", {}, {}};
  const auto entries = nlohmann::json::parse(read_file(c.folder / "layout.json"));
  for (const auto& entry : entries) {
    const auto it = bfl.find(entry.at("bfl").get<std::string>());
    if (it == bfl.end()) continue;  // the other half of a file with one
    const at::Tensor tensor = it->second.reshape(entry.at("shape").get<std::vector<int64_t>>());
    const std::string hash = to_hex(sha256(host_bytes(tensor.contiguous())));
    if (hash != entry.at("sha256")) {
      c.report->verdict("layout " + it->first, false, "other bytes");
      continue;
    }
    net.tensors.emplace(entry.at("diffusers").get<std::string>(), tensor);
  }
  const TensorMap back = vae::canonical(net);
  for (const auto& entry : entries) {
    const std::string name = entry.at("bfl");
    if (!bfl.contains(name)) continue;
    const bool same =
        back.contains(name) && same_bytes(back.at(name), bfl.at(name)) &&
        back.at(name).sizes().vec() == entry.at("bfl_shape").get<std::vector<int64_t>>();
    c.report->verdict(
        "layout " + entry.at("diffusers").get<std::string>(), same, same ? "exact" : "not " + name);
  }
}

/// One image of vectors.safetensors; `p` is "image0." for one.
void check_image(const Case& c,
                 const TensorMap& v,
                 const std::string& p,
                 const std::optional<vae::Encoder>& encoder,
                 const std::optional<vae::Decoder>& decoder) {
  const auto has = [&](const char* name) { return v.contains(p + name); };
  const auto inner = [&](const char* name, const at::Tensor& got) {
    if (!c.bf16 && has(name)) c.report->compare(p + name, got, v.at(p + name), c.limits());
  };
  if (encoder && has("input")) {
    const vae::Posterior posterior = encoder->encode(c.on_device(v.at(p + "input")));
    // the bf16 limit is of mean and decoded image: what is made of them has other relative sizes
    if (has("mean")) c.output(p + "mean", posterior.mean, v.at(p + "mean"));
    inner("logvar", posterior.logvar);
    inner("latents_of_mean", vae::scale_latents(posterior.mean));
    if (has("noise")) {
      const at::Tensor sampled =
          posterior.mean + at::exp(posterior.logvar / 2) * c.on_device(v.at(p + "noise"));
      inner("sampled", sampled);
      inner("latents", vae::scale_latents(sampled));
    }
  }
  if (decoder && has("latents") && has("decoded")) {
    c.output(p + "decoded",
             decoder->decode(vae::unscale_latents(c.on_device(v.at(p + "latents")))),
             v.at(p + "decoded"));
  }
}

}  // namespace

void check_vae(const Case& c) {
  const std::string bfl_file = "weights_bfl.safetensors",
                    diffusers_file = "weights_diffusers.safetensors";
  const bool from_diffusers =
      !c.has(bfl_file) && !c.json.contains("model") && c.has(diffusers_file);
  const auto path = c.required("model", from_diffusers ? diffusers_file : bfl_file);
  const TensorMap weights = vae::canonical(take_net(read_weights(path), NetKind::kAutoEncoder));
  const vae::Config config = vae::Config::from_weights(weights, path);
  if (!c.bf16 && c.has("layout.json")) check_vae_layout(c, weights);
  if (!c.bf16 && !from_diffusers && c.has(diffusers_file)) {
    for (const auto& [name, tensor] :
         vae::canonical(take_net(read_weights(c.folder / diffusers_file), NetKind::kAutoEncoder))) {
      const bool same = weights.contains(name) && same_bytes(tensor, weights.at(name));
      c.report->verdict("diffusers " + name, same, same ? "exact" : "not equal");
    }
  }
  std::optional<vae::Encoder> encoder;
  std::optional<vae::Decoder> decoder;
  if (config.has_encoder) encoder = vae::Encoder::load(weights, config, c.dtype(), c.device);
  if (config.has_decoder) decoder = vae::Decoder::load(weights, config, c.dtype(), c.device);
  if (!c.has("vectors.safetensors")) return;
  const TensorMap v = c.read_tensors("vectors.safetensors");
  std::vector<std::string> images;  // "image0."
  for (const auto& [name, tensor] : v) {
    const std::string image = name.substr(0, name.find('.') + 1);
    if (images.empty() || images.back() != image) images.push_back(image);
  }
  for (const std::string& image : images) check_image(c, v, image, encoder, decoder);
  if (c.bf16 || !encoder || !c.has("encoder_taps.safetensors")) return;
  const TensorMap wanted = c.read_tensors("encoder_taps.safetensors");
  for (const std::string& image : images) {  // they are of the image whose moments they end in
    if (!v.contains(image + "input")) continue;
    TensorMap taps;
    encoder->encode(c.on_device(v.at(image + "input")), &taps);
    const auto out = wanted.find("tap.conv_out");
    if (out != wanted.end() && taps.at("conv_out").sizes() != out->second.sizes()) continue;
    for (const auto& [name, value] : taps) c.summary(wanted, "tap", name, value, c.limits(), false);
    return;
  }
  throw InputError(fmt::format(
      "{}: encoder_taps.safetensors belongs to no image of vectors.safetensors", c.title));
}

void check_t5(const Case& c) {
  const TensorMap v = c.read_tensors("vectors.safetensors");
  if (v.empty()) return;
  const auto path = c.required("model", "weights.safetensors");
  const TensorMap weights = t5::canonical(take_net(read_weights(path), NetKind::kT5));
  const t5::Config config = t5::Config::from_weights(weights, path);
  const auto encoder = t5::Encoder::load(weights, config, c.dtype(), c.device);
  for (const auto& [name, wanted] : v) {
    const size_t end = name.find('.');
    if (!name.ends_with(".output") || end == std::string::npos) continue;
    const std::string p = name.substr(0, end + 1);
    const at::Tensor mask =
        name == p + "masked.output" ? c.on_device(golden(v, p + "mask")) : at::Tensor();
    const at::Tensor output = encoder.encode(c.on_device(golden(v, p + "ids")), mask);
    c.output(name,
             output.narrow(1, 0, std::min(wanted.size(1), output.size(1))),
             wanted);  // masked: real tokens only
  }
  if (c.bf16) return;
  if (v.contains("bias.relative") && v.contains("bias.bucket")) {
    const at::Tensor relative = v.at("bias.relative").to(at::kLong).contiguous();
    std::vector<int64_t> buckets;
    for (const int64_t r :
         std::span(relative.const_data_ptr<int64_t>(), static_cast<size_t>(relative.numel()))) {
      buckets.push_back(t5::relative_bucket(r));
    }
    c.report->equal(
        "bias.bucket", from_values<int64_t>(buckets, relative.sizes()), v.at("bias.bucket"));
  }
  if (v.contains("bias.by_relative")) {  // relative = key - query from -(n-1) to n-1: the last row,
                                         // then the first
    const at::Tensor& wanted = v.at("bias.by_relative");
    const int64_t length = (wanted.size(1) + 1) / 2;
    const at::Tensor bias = t5::bias_of_length(encoder.position_bias, length, at::kFloat)[0]
                                .cpu();  // [heads, query, key]
    c.inner("bias.by_relative",
            at::cat({bias.select(1, length - 1), bias.select(1, 0).narrow(1, 1, length - 1)}, 1),
            wanted,
            c.limits());
  }
  if (v.contains("bias.corner")) {
    const at::Tensor& wanted = v.at("bias.corner");
    c.inner("bias.corner",
            t5::bias_of_length(encoder.position_bias, wanted.size(1), at::kFloat)[0],
            wanted,
            c.limits());
  }
}

void check_clip(const Case& c) {
  const TensorMap v = c.read_tensors("vectors.safetensors");
  if (v.empty()) return;
  const auto path = c.required("model", "weights.safetensors");
  const TensorMap weights = clip::canonical(take_net(read_weights(path), NetKind::kClip));
  const auto config =
      clip::Config::from_weights(weights, c.config.empty() ? nullptr : &c.config, path);
  const at::Tensor& ids = golden(v, "ids");
  const clip::Output output =
      clip::TextModel::load(weights, config, c.dtype(), c.device).encode(c.on_device(ids));
  if (v.contains("pooler_output")) c.output("pooler_output", output.pooled, v.at("pooler_output"));
  if (v.contains("last_hidden_state"))
    c.output("last_hidden_state", output.last_hidden_state, v.at("last_hidden_state"));
  if (v.contains("pool_position") && !c.bf16) {
    // the row of the states that the pooled embedding is
    const at::Tensor& position = v.at("pool_position");
    bool same = true;
    for (int64_t i = 0; i < position.numel(); ++i) {
      same =
          same && output.last_hidden_state[i][position[i].item<int64_t>()].equal(output.pooled[i]);
    }
    c.report->verdict("pool_position", same, same ? "exact" : "pooled at another position");
  }
}

}  // namespace flux::check
