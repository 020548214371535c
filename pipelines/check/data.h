// pipelines/check/data.h - what the kinds about data share: members of a recorded object, pictures.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "common/image/bucket.h"
#include "common/image/image.h"
#include "formats/safetensors/reader.h"
#include "pipelines/check/case.h"

namespace flux::check {

/// How `ours` and what was recorded differ: the first member in which they do, "" if they agree.
/// Members that only one of them has are not compared. With `needs_one`, having none in common is a
/// difference too, so that nothing passes unseen.
std::string difference(const nlohmann::json& ours,
                       const nlohmann::json& golden,
                       bool needs_one = true);

std::string first_line(const std::string& text);
/// limits.PART.NAME of case.json, else `fallback`.
double limit_or(const Case& c, const char* part, const char* name, double fallback);
/// Batches of one bucket: the last may be smaller.
int64_t num_batches(int64_t visits, int64_t batch_size);

/// [width, height].
image::Size size_of(const nlohmann::json& json);
nlohmann::json json_of(image::Size size);
/// "none", "area" or "lanczos": how the rule of sd-scripts scales.
const char* filter_of(image::Size from, image::Size to);

/// Throws InputError if the tensor is not u8 [height, width, 3].
image::Rgb rgb_of(const safetensors::Tensor& tensor);
struct PixelErrors {
  int max = 0;
  double mean = 0;
};
/// Of two pictures of one size.
PixelErrors pixel_errors(const image::Rgb& got, const image::Rgb& golden);
/// Whether the mean of each colour is what was recorded, to four decimals, within `tolerance`.
bool has_mean(const image::Rgb& picture, const nlohmann::json& mean, double tolerance);

}  // namespace flux::check
