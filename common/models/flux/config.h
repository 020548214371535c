// common/models/flux/config.h - the shape of a FLUX transformer.
#pragma once
#include <array>
#include <cstdint>
#include <string>

namespace flux::dit {

/// Defaults are FLUX.1-dev; schnell has no guidance. Source: black-forest-labs/flux,
/// src/flux/util.py.
struct Config {
  int64_t in_channels = 64;  // of packed latents
  int64_t out_channels = 64;
  int64_t pooled_dim = 768;   // CLIP
  int64_t prompt_dim = 4096;  // T5
  int64_t hidden = 3072;
  int64_t mlp = 12288;
  int64_t num_heads = 24;
  int64_t num_double_blocks = 19;
  int64_t num_single_blocks = 38;
  int64_t sinusoid_dim = 256;
  std::array<int64_t, 3> axes{16, 56, 56};  // of each head's rotation: image index, row, column
  double theta = 10000;
  bool guidance = true;

  int64_t head_dim() const { return hidden / num_heads; }
  int64_t num_parameters() const;
  /// "FLUX transformer, 19 + 38 blocks, hidden 3072, guidance"
  std::string describe() const;
  bool operator==(const Config&) const = default;
};

}  // namespace flux::dit
