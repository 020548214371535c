#include "common/models/vae/norm_swish.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "common/models/vae/norm_swish_cpu.h"

namespace flux::vae {
namespace {

constexpr int64_t kChunkPixels =
    1024;  // one task of a pass; fixed, so that sums do not depend on the number of threads
constexpr int64_t kPiecePixels = 16 * kChunkPixels;  // read at a time
constexpr int64_t kFloatPixels = 32;  // summed in float32 before they go into a double

template <class T>
float first_value(T x) {
  if constexpr (sizeof(T) == 2)
    return static_cast<float>(c10::BFloat16(x, c10::BFloat16::from_bits()));
  else
    return x;
}

template <class T>
const T* values_of(const at::Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

/// Adds the moments of some whole chunks of pixels, the last of which may be shorter.
///   sums   sums, then squares, of each channel
template <class T>
void add_moments(const T* x,
                 int64_t pixels,
                 const std::vector<float>& shift,
                 std::vector<double>& sums) {
  const size_t width = shift.size();
  const auto channels = static_cast<int64_t>(width);
  const int64_t chunks = (pixels + kChunkPixels - 1) / kChunkPixels;
  std::vector<double> partial(static_cast<size_t>(chunks) * 2 * width);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(width), square(width);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      double* total = partial.data() + static_cast<size_t>(chunk) * 2 * width;
      const int64_t last = std::min(pixels, (chunk + 1) * kChunkPixels);
      for (int64_t i = chunk * kChunkPixels; i < last; i += kFloatPixels) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        std::fill(square.begin(), square.end(), 0.0f);
        add_moments_cpu(x + i * channels,
                        std::min(kFloatPixels, last - i),
                        channels,
                        shift.data(),
                        sum.data(),
                        square.data());
        for (size_t c = 0; c < width; ++c) {
          total[c] += static_cast<double>(sum[c]);
          total[width + c] += static_cast<double>(square[c]);
        }
      }
    }
  });
  for (size_t i = 0; i < partial.size(); ++i) sums[i % (2 * width)] += partial[i];
}

/// The mean and the factor of each channel; what the mean loses in float32 goes into `bias`.
///   x  of as many channels as weight and bias have
template <class T>
void find_factors(const Picture& x,
                  const std::vector<float>& weight,
                  std::vector<float>& mean,
                  std::vector<float>& scale,
                  std::vector<float>& bias) {
  const size_t width = weight.size();
  const int64_t pixels = x.height() * x.width();
  // moments of x - (first pixel), since those of x itself would cancel where a channel's mean is
  // far from zero
  std::vector<float> shift(width);
  at::Tensor buffer;
  const at::Tensor first_pixel = x.pixels(0, 1, buffer);
  std::transform(
      values_of<T>(first_pixel), values_of<T>(first_pixel) + width, shift.begin(), first_value<T>);
  std::vector<double> total(2 * width);
  // what is in memory in one go, what is not by pieces of whole chunks
  const int64_t piece = x.whole().defined() ? pixels : kPiecePixels;
  for (int64_t first = 0; first < pixels; first += piece) {
    const int64_t last = std::min(pixels, first + piece);
    const at::Tensor values = x.pixels(first, last, buffer);
    add_moments(values_of<T>(values), last - first, shift, total);
  }

  mean.resize(width);
  scale.resize(width);
  const auto count = static_cast<double>(pixels);
  const size_t group = width / static_cast<size_t>(kNormGroups);
  for (size_t first = 0; first < width; first += group) {
    double sum = 0, square = 0;
    for (size_t c = first; c < first + group; ++c)
      sum += total[c] + count * static_cast<double>(shift[c]);
    const double m = sum / (count * static_cast<double>(group));
    for (size_t c = first; c < first + group; ++c) {
      const double d = m - static_cast<double>(shift[c]);
      square += total[width + c] - 2 * d * total[c] + count * d * d;
    }
    const double variance = std::max(0.0, square / (count * static_cast<double>(group)));
    for (size_t c = first; c < first + group; ++c) {
      mean[c] = static_cast<float>(m);
      scale[c] =
          static_cast<float>(static_cast<double>(weight[c]) / std::sqrt(variance + kNormEpsilon));
      // what the mean loses in float32
      bias[c] +=
          static_cast<float>((static_cast<double>(mean[c]) - m) * static_cast<double>(scale[c]));
    }
  }
}

template <class T>
void compute_rows(const T* x,
                  int64_t pixels,
                  const std::vector<float>& mean,
                  const std::vector<float>& scale,
                  const std::vector<float>& bias,
                  T* out) {
  const auto channels = static_cast<int64_t>(mean.size());
  const int64_t chunks = (pixels + kChunkPixels - 1) / kChunkPixels;
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kChunkPixels, last = std::min(pixels, end * kChunkPixels);
    norm_swish_cpu(x + first * channels,
                   last - first,
                   channels,
                   mean.data(),
                   scale.data(),
                   bias.data(),
                   out + first * channels);
  });
}

std::vector<float> values(const at::Tensor& parameter) {
  const at::Tensor p = parameter.to(at::kFloat).contiguous();
  return {p.const_data_ptr<float>(), p.const_data_ptr<float>() + p.numel()};
}

}  // namespace

bool NormSwish::takes(const at::Tensor& x) {
  return x.is_cpu() && x.size(0) == 1 && x.is_contiguous(at::MemoryFormat::ChannelsLast) &&
         (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

NormSwish::NormSwish(Picture x, const at::Tensor& weight, const at::Tensor& bias)
    : x_(std::move(x)), bias_(values(bias)) {
  if (weight.scalar_type() == at::kFloat)
    find_factors<float>(x_, values(weight), mean_, scale_, bias_);
  else
    find_factors<uint16_t>(x_, values(weight), mean_, scale_, bias_);
}

void NormSwish::rows(int64_t first, int64_t last, const at::Tensor& out) const {
  const int64_t width = x_.width(), pixels = (last - first) * width;
  at::Tensor buffer;
  const at::Tensor in = x_.pixels(first * width, last * width, buffer);
  if (in.scalar_type() == at::kFloat)
    compute_rows(values_of<float>(in), pixels, mean_, scale_, bias_, out.mutable_data_ptr<float>());
  else
    compute_rows(values_of<uint16_t>(in),
                 pixels,
                 mean_,
                 scale_,
                 bias_,
                 static_cast<uint16_t*>(out.mutable_data_ptr()));
}

}  // namespace flux::vae
