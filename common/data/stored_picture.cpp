#include "common/data/stored_picture.h"

#include "common/models/vae/scale.h"

namespace flux {

samples::Record stored_picture(const at::Tensor& latents,
                               const Prompt& prompt,
                               int64_t index,
                               int64_t seed,
                               const std::string& negative) {
  const at::Tensor raw =
      (latents.to(at::kCPU, at::kFloat) / vae::kScale + vae::kShift).contiguous();
  return samples::prepare({.prompt = prompt.text,
                           .negative = negative,
                           .prompt_number = static_cast<uint64_t>(prompt.number),
                           .index = static_cast<uint64_t>(index),
                           .seed = static_cast<uint64_t>(seed),
                           .height = static_cast<uint32_t>(raw.size(2)),
                           .width = static_cast<uint32_t>(raw.size(3))},
                          {raw.const_data_ptr<float>(), static_cast<size_t>(raw.numel())});
}

}  // namespace flux
