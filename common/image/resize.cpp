#include <opencv2/imgproc.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
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
void apply(const Taps& taps, const uint8_t* in, int64_t stride, uint8_t* out) {
  int32_t sum[3] = {
      1 << (kPrecisionBits - 1), 1 << (kPrecisionBits - 1), 1 << (kPrecisionBits - 1)};
  in += taps.first * stride;
  for (const int32_t weight : taps.weights) {
    for (int c = 0; c < 3; ++c) sum[c] += in[c] * weight;
    in += stride;
  }
  for (int c = 0; c < 3; ++c) out[c] = to_u8(sum[c]);
}

// The window at (x, y) of the picture scaled to `size`, without making the rest of it.
Rgb resample(const Rgb& image, Size size, int64_t x, int64_t y, Size window, Interpolation kind) {
  Rgb wide{{window.width, image.size.height}, {}};
  wide.data.resize(static_cast<size_t>(3 * wide.size.width * wide.size.height));
  const auto in_stride = 3 * image.size.width, wide_stride = 3 * window.width;
  if (size.width == image.size.width) {
    for (int64_t row = 0; row < image.size.height; ++row) {
      std::memcpy(&wide.data[row * wide_stride],
                  &image.data[row * in_stride + 3 * x],
                  static_cast<size_t>(wide_stride));
    }
  } else {
    const auto taps = make_taps(image.size.width, size.width, x, window.width, kind);
    for (int64_t row = 0; row < image.size.height; ++row) {
      for (int64_t i = 0; i < window.width; ++i) {
        apply(taps[static_cast<size_t>(i)],
              &image.data[row * in_stride],
              3,
              &wide.data[row * wide_stride + 3 * i]);
      }
    }
  }
  Rgb out{window, {}};
  out.data.resize(static_cast<size_t>(3 * window.width * window.height));
  if (size.height == image.size.height) {
    std::memcpy(out.data.data(), &wide.data[y * wide_stride], out.data.size());
    return out;
  }
  const auto taps = make_taps(image.size.height, size.height, y, window.height, kind);
  for (int64_t row = 0; row < window.height; ++row) {
    for (int64_t i = 0; i < window.width; ++i) {
      apply(taps[static_cast<size_t>(row)],
            &wide.data[3 * i],
            wide_stride,
            &out.data[row * wide_stride + 3 * i]);
    }
  }
  return out;
}

Rgb resize_with_opencv(const Rgb& image, Size size, int filter) {
  if (size.width > kMaxPixels / size.height)
    throw InputError("the picture is too long and narrow for its bucket");
  const cv::Mat in(static_cast<int>(image.size.height),
                   static_cast<int>(image.size.width),
                   CV_8UC3,
                   const_cast<uint8_t*>(image.data.data()));
  Rgb out{size, std::vector<uint8_t>(static_cast<size_t>(3 * size.width * size.height))};
  cv::Mat to(static_cast<int>(size.height), static_cast<int>(size.width), CV_8UC3, out.data.data());
  cv::resize(in, to, to.size(), 0, 0, filter);
  return out;
}

Rgb cut(const Rgb& image, int64_t x, int64_t y, Size window) {
  if (window == image.size) return image;
  Rgb out{window, std::vector<uint8_t>(static_cast<size_t>(3 * window.width * window.height))};
  for (int64_t row = 0; row < window.height; ++row) {
    std::memcpy(&out.data[3 * row * window.width],
                &image.data[3 * ((y + row) * image.size.width + x)],
                static_cast<size_t>(3 * window.width));
  }
  return out;
}

Rgb resize_window(const Rgb& image, const Placement& p, Interpolation kind) {
  if (p.resized.width < 1 || p.resized.height < 1)
    throw std::invalid_argument("resize: a side is below 1 pixel");
  if (p.resized == image.size) return cut(image, p.crop_x, p.crop_y, p.bucket);
  if (kind == Interpolation::kAuto) {
    const bool shrinks =
        image.size.width >= p.resized.width && image.size.height >= p.resized.height;
    kind = shrinks ? Interpolation::kArea : Interpolation::kLanczos;
  }
  int filter = cv::INTER_AREA;
  switch (kind) {
    case Interpolation::kAuto:
    case Interpolation::kArea:
      break;
    case Interpolation::kLinear:
      filter = cv::INTER_LINEAR;
      break;
    case Interpolation::kCubic:
      filter = cv::INTER_CUBIC;
      break;
    case Interpolation::kNearest:
      filter = cv::INTER_NEAREST;
      break;
    case Interpolation::kLanczos:
    case Interpolation::kBox:
      return resample(image, p.resized, p.crop_x, p.crop_y, p.bucket, kind);
  }
  return cut(resize_with_opencv(image, p.resized, filter), p.crop_x, p.crop_y, p.bucket);
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

Rgb resize(const Rgb& image, Size size, Interpolation interpolation) {
  return resize_window(image, {size, size, 0, 0}, interpolation);
}

Rgb place(const Rgb& image, const Placement& placement, Interpolation interpolation, bool flip) {
  auto out = resize_window(image, placement, interpolation);
  if (!flip) return out;
  for (int64_t row = 0; row < out.size.height; ++row) {
    uint8_t* left = &out.data[3 * row * out.size.width];
    uint8_t* right = left + 3 * (out.size.width - 1);
    for (; left < right; left += 3, right -= 3) std::swap_ranges(left, left + 3, right);
  }
  return out;
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
