// common/models/vae/norm_swish_cpu.h - the two passes of GroupNorm + swish over pixels of
// `channels` values each (channels last). No torch here; bfloat16 values are their 16 bits. ATen's
// GroupNorm and SiLU take four passes.
#pragma once
#include <cstdint>

namespace flux::vae {

/// Adds to sum [channels] the x - shift of `pixels` pixels, and to square [channels] its square. In
/// float32, so for few pixels.
void add_moments_cpu(const float* x,
                     int64_t pixels,
                     int64_t channels,
                     const float* shift,
                     float* sum,
                     float* square);
void add_moments_cpu(const uint16_t* x,
                     int64_t pixels,
                     int64_t channels,
                     const float* shift,
                     float* sum,
                     float* square);

/// out = y sigmoid(y) with y = (x - mean) scale + bias; mean, scale and bias [channels]. The
/// exponential has 23 bits.
void norm_swish_cpu(const float* x,
                    int64_t pixels,
                    int64_t channels,
                    const float* mean,
                    const float* scale,
                    const float* bias,
                    float* out);
void norm_swish_cpu(const uint16_t* x,
                    int64_t pixels,
                    int64_t channels,
                    const float* mean,
                    const float* scale,
                    const float* bias,
                    uint16_t* out);

}  // namespace flux::vae
