#include "pipelines/check/data.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux::check {
using Json = nlohmann::json;

std::string difference(const Json& ours, const Json& golden, bool needs_one) {
  std::string out;
  bool compared = false;
  for (const auto& [key, value] : ours.items()) {
    const auto it = golden.find(key);
    if (it == golden.end()) continue;
    compared = true;
    if (*it == value) continue;
    if (!out.empty()) return out + ", ...";
    out = fmt::format("{} {}, golden {}", key, value.dump(), it->dump());
  }
  return compared || !needs_one ? out : "nothing is recorded that could be compared";
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

double limit_or(const Case& c, const char* part, const char* name, double fallback) {
  const auto pointer = Json::json_pointer(fmt::format("/limits/{}/{}", part, name));
  const auto value = c.json.contains(pointer) ? c.json.at(pointer) : Json();
  return value.is_number() ? value.get<double>() : fallback;
}

int64_t num_batches(int64_t visits, int64_t batch_size) {
  return (visits + batch_size - 1) / batch_size;
}

image::Size size_of(const Json& json) { return {json.at(0), json.at(1)}; }
Json json_of(image::Size size) { return {size.width, size.height}; }

const char* filter_of(image::Size from, image::Size to) {
  if (from == to) return "none";
  const auto kind = image::choose_interpolation(image::Interpolation::kAuto, from, to);
  return kind == image::Interpolation::kArea ? "area" : "lanczos";
}

image::Rgb rgb_of(const safetensors::Tensor& t) {
  if (t.shape.size() != 3 || t.shape[2] != 3 ||
      t.bytes.size() != static_cast<size_t>(3 * t.shape[0] * t.shape[1]))
    throw InputError(fmt::format("tensor {}: not u8 [height, width, 3]", printable(t.name)));
  const auto* bytes = reinterpret_cast<const uint8_t*>(t.bytes.data());
  return {{t.shape[1], t.shape[0]}, {bytes, bytes + t.bytes.size()}};
}

PixelErrors pixel_errors(const image::Rgb& got, const image::Rgb& golden) {
  PixelErrors out;
  for (size_t i = 0; i < got.data.size(); ++i) {
    const int error = std::abs(int{got.data[i]} - int{golden.data[i]});
    out.max = std::max(out.max, error), out.mean += error;
  }
  out.mean /= static_cast<double>(std::max<size_t>(1, got.data.size()));
  return out;
}

bool has_mean(const image::Rgb& picture, const Json& mean, double tolerance) {
  for (size_t c = 0; c < 3; ++c) {
    double sum = 0;
    for (size_t i = c; i < picture.data.size(); i += 3) sum += picture.data[i];
    const double golden = mean.at(c);
    if (!(std::abs(sum / static_cast<double>(picture.data.size() / 3) - golden) <=
          tolerance + 1e-4))
      return false;
  }
  return true;
}

}  // namespace flux::check
