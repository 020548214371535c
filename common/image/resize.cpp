#include <opencv2/imgproc.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <numbers>
#include <stdexcept>
#include <string>

#include "common/core/error.h"
#include "common/image/image.h"

namespace flux::image {
namespace {

constexpr int kPrecisionBits = 22;  // of Pillow's fixed-point coefficients for 8-bit pixels

double lanczos3(double x) {
  const auto sinc = [](double v) {
    return v == 0 ? 1.0 : std::sin(v * std::numbers::pi) / (v * std::numbers::pi);
  };
  return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0.0;
}
double box(double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }

/// Which input samples make one output sample, and with what weight.
struct Taps {
  int64_t first;
  std::vector<int32_t> weights;
};

// Taps of outputs begin .. begin + count - 1 when `in` samples become `out`. Source: Pillow's
// documented resampling: support grows with the scale when shrinking; a window ends at the
// picture's edge and is normalised there.
std::vector<Taps> make_taps(
    int64_t in, int64_t out, int64_t begin, int64_t count, Interpolation kind) {
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double stretch = std::max(scale, 1.0);
  const double support = (kind == Interpolation::kBox ? 0.5 : 3.0) * stretch;
  std::vector<Taps> all(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const double center = (static_cast<double>(begin + i) + 0.5) * scale;
    const auto first = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    const auto last = std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), in);
    std::vector<double> weights;
    double sum = 0;
    for (int64_t k = first; k < last; ++k) {
      const double x = (static_cast<double>(k) - center + 0.5) * (1.0 / stretch);
      weights.push_back(kind == Interpolation::kBox ? box(x) : lanczos3(x));
      sum += weights.back();
    }
    auto& taps = all[static_cast<size_t>(i)];
    taps.first = first;
    for (double w : weights) {
      if (sum != 0) w /= sum;
      taps.weights.push_back(
          static_cast<int32_t>((w < 0 ? -0.5 : 0.5) + w * (1 << kPrecisionBits)));
    }
  }
  return all;
}

uint8_t to_u8(int32_t sum) {
  return static_cast<uint8_t>(std::clamp(sum >> kPrecisionBits, 0, 255));
}

// One pass along x or y: `stride` is the distance between neighbouring samples in bytes.
template <int kChannels>
void apply(const Taps& taps, const uint8_t* in, int64_t stride, uint8_t* out) {
  int32_t sum[kChannels];
  std::fill_n(sum, kChannels, 1 << (kPrecisionBits - 1));
  in += taps.first * stride;
  for (const int32_t weight : taps.weights) {
    for (int c = 0; c < kChannels; ++c) sum[c] += in[c] * weight;
    in += stride;
  }
  for (int c = 0; c < kChannels; ++c) out[c] = to_u8(sum[c]);
}

/// A picture of kChannels samples a pixel, [height, width, kChannels].
template <int kChannels>
struct Pixels {
  const uint8_t* data;
  Size size;
  int64_t stride() const { return kChannels * size.width; }
};

template <int kChannels>
std::vector<uint8_t> allocate(Size size) {
  return std::vector<uint8_t>(static_cast<size_t>(kChannels * size.width * size.height));
}

// The window of the scaled picture that `p` cuts out, without making the rest of it.
template <int kChannels>
std::vector<uint8_t> resample(Pixels<kChannels> image, const Placement& p, Interpolation kind) {
  const Size window = p.bucket;
  auto wide = allocate<kChannels>({window.width, image.size.height});
  const auto wide_stride = kChannels * window.width;
  if (p.resized.width == image.size.width) {
    for (int64_t row = 0; row < image.size.height; ++row) {
      std::memcpy(&wide[row * wide_stride],
                  &image.data[row * image.stride() + kChannels * p.crop_x],
                  static_cast<size_t>(wide_stride));
    }
  } else {
    const auto taps = make_taps(image.size.width, p.resized.width, p.crop_x, window.width, kind);
    for (int64_t row = 0; row < image.size.height; ++row) {
      for (int64_t i = 0; i < window.width; ++i) {
        apply<kChannels>(taps[static_cast<size_t>(i)],
                         &image.data[row * image.stride()],
                         kChannels,
                         &wide[row * wide_stride + kChannels * i]);
      }
    }
  }
  auto out = allocate<kChannels>(window);
  if (p.resized.height == image.size.height) {
    std::memcpy(out.data(), &wide[p.crop_y * wide_stride], out.size());
    return out;
  }
  const auto taps = make_taps(image.size.height, p.resized.height, p.crop_y, window.height, kind);
  for (int64_t row = 0; row < window.height; ++row) {
    for (int64_t i = 0; i < window.width; ++i) {
      apply<kChannels>(taps[static_cast<size_t>(row)],
                       &wide[kChannels * i],
                       wide_stride,
                       &out[row * wide_stride + kChannels * i]);
    }
  }
  return out;
}

template <int kChannels>
std::vector<uint8_t> resize_with_opencv(Pixels<kChannels> image, Size size, int filter) {
  if (size.width > kMaxPixels / size.height)
    throw InputError("the picture is too long and narrow for its bucket");
  auto out = allocate<kChannels>(size);
  try {
    const cv::Mat in(static_cast<int>(image.size.height),
                     static_cast<int>(image.size.width),
                     CV_8UC(kChannels),
                     const_cast<uint8_t*>(image.data));
    cv::Mat to(
        static_cast<int>(size.height), static_cast<int>(size.width), CV_8UC(kChannels), out.data());
    cv::resize(in, to, to.size(), 0, 0, filter);
  } catch (const cv::Exception& error) {
    if (error.code == cv::Error::StsNoMem) throw std::bad_alloc();
    throw InputError("the picture cannot be scaled to " + std::to_string(size.width) + "x" +
                     std::to_string(size.height));
  }
  return out;
}

template <int kChannels>
std::vector<uint8_t> cut(Pixels<kChannels> image, const Placement& p) {
  auto out = allocate<kChannels>(p.bucket);
  const auto row_bytes = kChannels * p.bucket.width;
  for (int64_t row = 0; row < p.bucket.height; ++row) {
    std::memcpy(&out[row * row_bytes],
                &image.data[(p.crop_y + row) * image.stride() + kChannels * p.crop_x],
                static_cast<size_t>(row_bytes));
  }
  return out;
}

bool is_pillows(Interpolation kind) {
  return kind == Interpolation::kLanczos || kind == Interpolation::kBox;
}

template <int kChannels>
std::vector<uint8_t> resize_window(Pixels<kChannels> image,
                                   const Placement& p,
                                   Interpolation kind) {
  if (p.resized == image.size) return cut(image, p);
  kind = choose_interpolation(kind, image.size, p.resized);
  if (is_pillows(kind)) return resample(image, p, kind);
  const int filter = kind == Interpolation::kLinear    ? cv::INTER_LINEAR
                     : kind == Interpolation::kCubic   ? cv::INTER_CUBIC
                     : kind == Interpolation::kNearest ? cv::INTER_NEAREST
                                                       : cv::INTER_AREA;
  const auto scaled = resize_with_opencv(image, p.resized, filter);
  return cut(Pixels<kChannels>{scaled.data(), p.resized}, p);
}

// As Pillow scales RGBA: colours times alpha, scaled, and divided by the scaled alpha.
std::vector<uint8_t> resize_weighted(const Rgb& image, const Placement& p, Interpolation kind) {
  std::vector<uint8_t> weighted(4 * image.alpha.size());
  for (size_t i = 0; i < image.alpha.size(); ++i) {
    const int alpha = image.alpha[i];
    for (size_t c = 0; c < 3; ++c) {
      const int product = image.data[3 * i + c] * alpha + 128;
      weighted[4 * i + c] = static_cast<uint8_t>(((product >> 8) + product) >> 8);
    }
    weighted[4 * i + 3] = image.alpha[i];
  }
  const auto scaled = resample(Pixels<4>{weighted.data(), image.size}, p, kind);
  auto out = allocate<3>(p.bucket);
  for (size_t i = 0; i < out.size() / 3; ++i) {
    const int alpha = scaled[4 * i + 3];
    for (size_t c = 0; c < 3; ++c) {
      const int value = scaled[4 * i + c];
      out[3 * i + c] = static_cast<uint8_t>(
          alpha == 0 || alpha == 255 ? value : std::min(255 * value / alpha, 255));
    }
  }
  return out;
}

template <int kChannels>
void mirror(std::vector<uint8_t>& pixels, Size size) {
  for (int64_t row = 0; row < size.height; ++row) {
    uint8_t* left = &pixels[kChannels * row * size.width];
    uint8_t* right = left + kChannels * (size.width - 1);
    for (; left < right; left += kChannels, right -= kChannels)
      std::swap_ranges(left, left + kChannels, right);
  }
}

void check(const Placement& p) {
  if (p.resized.width < 1 || p.resized.height < 1)
    throw std::invalid_argument("resize: a side is below 1 pixel");
}

[[noreturn]] void out_of_memory(const Placement& p) {
  throw ResourceError("not enough memory to scale a picture to " + std::to_string(p.resized.width) +
                          "x" + std::to_string(p.resized.height),
                      "use a smaller picture, or a machine with more memory");
}

}  // namespace

Interpolation interpolation_from_name(std::string_view name) {
  if (name.empty()) return Interpolation::kAuto;
  if (name == "lanczos") return Interpolation::kLanczos;
  if (name == "box") return Interpolation::kBox;
  if (name == "area") return Interpolation::kArea;
  if (name == "linear" || name == "bilinear") return Interpolation::kLinear;
  if (name == "cubic" || name == "bicubic") return Interpolation::kCubic;
  if (name == "nearest") return Interpolation::kNearest;
  throw std::invalid_argument("unknown interpolation " + std::string(name));
}

std::string_view interpolation_name(Interpolation interpolation) {
  constexpr std::string_view kNames[] = {
      "auto", "lanczos", "box", "area", "linear", "cubic", "nearest"};
  return kNames[static_cast<int>(interpolation)];
}

Interpolation choose_interpolation(Interpolation kind, Size from, Size to) {
  if (kind != Interpolation::kAuto) return kind;
  return from.width >= to.width && from.height >= to.height ? Interpolation::kArea
                                                            : Interpolation::kLanczos;
}

Rgb resize(const Rgb& image, Size size, Interpolation interpolation) {
  return place(image, {size, size, 0, 0}, interpolation);
}

Rgb place(const Rgb& image,
          const Placement& placement,
          Interpolation interpolation,
          bool flip) try {
  check(placement);
  const auto kind = choose_interpolation(interpolation, image.size, placement.resized);
  const bool weighted = image.straight && is_pillows(kind) && placement.resized != image.size;
  Rgb out{placement.bucket,
          weighted ? resize_weighted(image, placement, kind)
                   : resize_window(Pixels<3>{image.data.data(), image.size}, placement, kind)};
  if (flip) mirror<3>(out.data, out.size);
  return out;
} catch (const std::bad_alloc&) {
  out_of_memory(placement);
}

std::vector<float> alpha_mask(const Rgb& image,
                              const Placement& placement,
                              Interpolation interpolation,
                              bool flip) try {
  constexpr int64_t kBlock = 8;  // pixels of the picture for one of its latents, along a side
  const auto [width, height] = placement.bucket;
  check(placement);
  if (image.alpha.empty()) throw std::invalid_argument("alpha_mask: the picture has no alpha");
  if (width % kBlock != 0 || height % kBlock != 0)
    throw std::invalid_argument("alpha_mask: a side of the bucket is no multiple of 8");
  auto alpha = resize_window(Pixels<1>{image.alpha.data(), image.size}, placement, interpolation);
  if (flip) mirror<1>(alpha, placement.bucket);
  std::vector<int32_t> sums(static_cast<size_t>(height / kBlock * (width / kBlock)));
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x)
      sums[static_cast<size_t>(y / kBlock * (width / kBlock) + x / kBlock)] +=
          alpha[static_cast<size_t>(y * width + x)];
  }
  std::vector<float> mask(sums.size());
  for (size_t i = 0; i < sums.size(); ++i)
    mask[i] = static_cast<float>(sums[i] / (255.0 * kBlock * kBlock));
  return mask;
} catch (const std::bad_alloc&) {
  out_of_memory(placement);
}

void to_pixels(const Rgb& image, std::span<float> out) {
  const auto count = static_cast<size_t>(image.size.width * image.size.height);
  if (out.size() != 3 * count)
    throw std::invalid_argument("to_pixels: the buffer has another size");
  float value[256];
  for (int v = 0; v < 256; ++v) value[v] = (static_cast<float>(v) / 255.0f - 0.5f) / 0.5f;
  for (size_t c = 0; c < 3; ++c) {
    for (size_t i = 0; i < count; ++i) out[c * count + i] = value[image.data[3 * i + c]];
  }
}

}  // namespace flux::image
