#include "common/image/bucket.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <string>

#include "common/core/error.h"

namespace flux::image {
namespace {

std::string show(Size size) {
  return std::to_string(size.width) + "x" + std::to_string(size.height);
}

int64_t down(int64_t value, int64_t steps) { return value - value % steps; }
int64_t round_half_up(double value) { return static_cast<int64_t>(value + 0.5); }

// Source: kohya-ss/sd-scripts, library/model_util.py (make_bucket_resolutions).
std::vector<Size> kohya_buckets(const BucketOptions& o) {
  const int64_t area = o.resolution.width * o.resolution.height;
  std::set<Size> found;
  const int64_t side = down(static_cast<int64_t>(std::sqrt(static_cast<double>(area))), o.steps);
  found.insert({side, side});
  for (int64_t width = o.min_side; width <= o.max_side; width += o.steps) {
    const int64_t height = std::min(o.max_side, down(area / width, o.steps));
    if (height < o.min_side) continue;
    found.insert({width, height});
    found.insert({height, width});
  }
  return {found.begin(), found.end()};
}

std::vector<Size> equal_area_buckets(const BucketOptions& o) {
  const int64_t area = o.resolution.width * o.resolution.height;
  std::set<Size> found;
  for (int64_t width = o.min_side; width <= o.max_side; width += o.steps) {
    const int64_t height = down(area / width + o.steps / 2, o.steps);
    if (height < o.min_side || height > o.max_side) continue;
    found.insert({width, height});
    found.insert({height, width});
  }
  if (found.empty())
    found.insert({down(o.resolution.width, o.steps), down(o.resolution.height, o.steps)});
  return {found.begin(), found.end()};
}

// |log(ratio of a) - log(ratio of b)| as a fraction, so that no libm decides: the larger cross
// product over the smaller.
struct RatioError {
  __extension__ typedef unsigned __int128 Wide;
  Wide high, low;
  RatioError(Size a, Size b) {
    const auto x = static_cast<Wide>(a.width) * static_cast<Wide>(b.height);
    const auto y = static_cast<Wide>(a.height) * static_cast<Wide>(b.width);
    high = std::max(x, y), low = std::min(x, y);
  }
  bool operator<(const RatioError& other) const { return high * other.low < other.high * low; }
};

Size nearest_kohya(Size image, const std::vector<Size>& buckets) {
  if (std::binary_search(buckets.begin(), buckets.end(), image)) return image;
  const double ratio = static_cast<double>(image.width) / static_cast<double>(image.height);
  const auto error = [ratio](Size b) {
    return std::abs(static_cast<double>(b.width) / static_cast<double>(b.height) - ratio);
  };
  return *std::min_element(
      buckets.begin(), buckets.end(), [&](Size a, Size b) { return error(a) < error(b); });
}

Size nearest_log_ratio(Size image, const std::vector<Size>& buckets, int64_t area) {
  if (std::binary_search(buckets.begin(), buckets.end(), image)) return image;
  return *std::min_element(buckets.begin(), buckets.end(), [&](Size a, Size b) {
    const RatioError of_a(image, a), of_b(image, b);
    if (of_a < of_b || of_b < of_a) return of_a < of_b;
    return std::abs(a.width * a.height - area) < std::abs(b.width * b.height - area);
  });
}

Placement cover(Size image, Size bucket) {
  const auto w = static_cast<double>(image.width), h = static_cast<double>(image.height);
  const auto bw = static_cast<double>(bucket.width), bh = static_cast<double>(bucket.height);
  const double scale = w / h > bw / bh ? bh / h : bw / w;
  Placement out;
  out.resized = {round_half_up(w * scale), round_half_up(h * scale)};
  out.bucket = bucket;
  return out;
}

// sd-scripts' bucket_no_upscale: a larger picture shrinks to about the area, a smaller one keeps
// its size.
Placement shrink_kohya(Size image, int64_t area, int64_t steps) {
  const auto to_steps = [steps](double x) { return down(round_half_up(x), steps); };
  Placement out;
  out.resized = image;
  if (image.width * image.height > area) {
    const double ratio = static_cast<double>(image.width) / static_cast<double>(image.height);
    const double ideal_width = std::sqrt(static_cast<double>(area) * ratio);
    const auto width = static_cast<double>(to_steps(ideal_width));
    const auto height = static_cast<double>(to_steps(static_cast<double>(area) / ideal_width));
    const auto height_for_width = static_cast<double>(to_steps(width / ratio));
    const auto width_for_height = static_cast<double>(to_steps(height * ratio));
    if (height_for_width == 0 || height == 0) {
      out.resized = {};
    } else if (std::abs(width / height_for_width - ratio) <
               std::abs(width_for_height / height - ratio)) {
      out.resized = {static_cast<int64_t>(width), round_half_up(width / ratio)};
    } else {
      out.resized = {round_half_up(height * ratio), static_cast<int64_t>(height)};
    }
  }
  out.bucket = {down(out.resized.width, steps), down(out.resized.height, steps)};
  return out;
}

}  // namespace

Buckets::Buckets(const BucketOptions& options) : options_(options) {
  auto& o = options_;
  if (o.resolution.width < 1 || o.resolution.height < 1 || o.steps < 1) {
    throw std::invalid_argument("Buckets: resolution " + show(o.resolution) + ", steps " +
                                std::to_string(o.steps));
  }
  if (!o.enabled) {
    list_ = {o.resolution};
    return;
  }
  o.min_side = down(o.min_side, o.steps);
  o.max_side = down(o.max_side + o.steps - 1, o.steps);
  if (std::min(o.resolution.width, o.resolution.height) < o.min_side ||
      std::max(o.resolution.width, o.resolution.height) > o.max_side) {
    throw std::invalid_argument("Buckets: resolution " + show(o.resolution) + " outside sides " +
                                std::to_string(o.min_side) + " to " + std::to_string(o.max_side));
  }
  if (o.min_side < 1) o.min_side = o.steps;
  if (o.profile == Profile::kDefault) {
    list_ = equal_area_buckets(o);
  } else if (!o.no_upscale) {
    list_ = kohya_buckets(o);
  }
}

Placement Buckets::place(Size image) const {
  const auto& o = options_;
  const int64_t area = o.resolution.width * o.resolution.height;
  Placement out;
  if (!o.enabled) {
    out = cover(image, o.resolution);
  } else if (o.profile == Profile::kKohya) {
    out = o.no_upscale ? shrink_kohya(image, area, o.steps)
                       : cover(image, nearest_kohya(image, list_));
  } else {
    out = cover(image, nearest_log_ratio(image, list_, area));
    if (o.no_upscale && (out.resized.width > image.width || out.resized.height > image.height)) {
      out.resized = image;
      out.bucket = {down(image.width, o.steps), down(image.height, o.steps)};
    }
  }
  if (out.bucket.width < 1 || out.bucket.height < 1 || out.resized.width < out.bucket.width ||
      out.resized.height < out.bucket.height) {
    throw InputError("a picture of " + show(image) +
                         " pixels is too small or too narrow for buckets in steps of " +
                         std::to_string(o.steps) + " without upscaling",
                     "leave the picture out, or allow upscaling (bucket_no_upscale = false)");
  }
  out.crop_x = (out.resized.width - out.bucket.width) / 2;
  out.crop_y = (out.resized.height - out.bucket.height) / 2;
  return out;
}

}  // namespace flux::image
