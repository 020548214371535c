// Kind data-resize: pictures as sd-scripts scales and crops them.
#include <fmt/format.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "common/image/image.h"
#include "formats/safetensors/reader.h"
#include "pipelines/check/case.h"
#include "pipelines/check/data.h"
#include "pipelines/check/lines.h"

namespace flux::check {
using Json = nlohmann::json;
namespace {

void check_scaling(const Case& c, const Json& golden, const safetensors::File& tensors) {
  const auto id = golden.at("id").dump();
  const auto* source = tensors.find(id + "/src");
  if (source == nullptr) return;
  const auto picture = rgb_of(*source);
  const auto resized = size_of(golden.at("resized")), bucket = size_of(golden.at("bucket"));
  const int64_t num_before = c.report->num_in_case();
  const Json described{{"src", json_of(picture.size)}, {"rule", filter_of(picture.size, resized)}};
  if (golden.contains("src") || golden.contains("rule")) {
    const auto differs = difference(described, golden);
    c.report->verdict(id + "/rule", differs.empty(), differs);
  }
  // how far each may be off: builds of OpenCV differ by one in cubic, the rest is equal to the bit
  const auto compare = [&](const std::string& name, const image::Rgb& got, double fallback) {
    const auto* t = tensors.find(id + "/" + name);
    if (t == nullptr) return;
    const auto wanted = rgb_of(*t);
    const double limit = limit_or(c, name.c_str(), "max", fallback);
    if (got.size != wanted.size) return c.report->verdict(id + "/" + name, false, "another size");
    const int max = pixel_errors(got, wanted).max;
    c.report->verdict(id + "/" + name, max <= limit, fmt::format("max {} of {}", max, limit));
  };
  const image::Placement placement{
      resized, bucket, (resized.width - bucket.width) / 2, (resized.height - bucket.height) / 2};
  const auto out = image::place(picture, placement, image::Interpolation::kAuto);
  compare("out", out, 0);
  if (golden.contains("out_mean"))
    c.report->verdict(id + "/out_mean",
                      has_mean(out, golden["out_mean"], limit_or(c, "out_mean", "max", 0)),
                      golden["out_mean"].dump());
  const std::pair<const char*, image::Interpolation> kFilters[] = {
      {"cv2_linear", image::Interpolation::kLinear},
      {"cv2_cubic", image::Interpolation::kCubic},
      {"cv2_area", image::Interpolation::kArea},
      {"pil_lanczos", image::Interpolation::kLanczos},
      {"pil_box", image::Interpolation::kBox}};
  for (const auto& [name, kind] : kFilters) {
    if (tensors.find(id + "/" + name) == nullptr) continue;
    compare(
        name, image::resize(picture, resized, kind), kind == image::Interpolation::kCubic ? 1 : 0);
  }
  if (const auto* t = tensors.find(id + "/chw_float")) {
    std::vector<float> pixels(out.data.size());
    image::to_pixels(out, pixels);
    const bool same = t->bytes.size() == pixels.size() * sizeof(float) &&
                      std::memcmp(pixels.data(), t->bytes.data(), t->bytes.size()) == 0;
    c.report->verdict(id + "/chw_float", same, same ? "exact" : "not equal");
  }
  if (c.report->num_in_case() == num_before)
    c.report->verdict(id, false, "nothing is recorded that could be compared");
}

}  // namespace

void check_resize(const Case& c) {
  const auto json = read_object(c.required("index", "resize.json"));
  const auto tensors = safetensors::File::open(c.required("tensors", "resize.safetensors"));
  for (const auto& golden : json.at("cases")) check_scaling(c, golden, *tensors);
}

}  // namespace flux::check
