// Kind data-images: what sd-scripts and Pillow decode.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <memory>
#include <string>
#include <utility>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/image/image.h"
#include "formats/safetensors/reader.h"
#include "pipelines/check/case.h"
#include "pipelines/check/data.h"
#include "pipelines/check/lines.h"

namespace flux::check {
using Json = nlohmann::json;
namespace {

std::string hash_of(const image::Rgb& picture) {
  return to_hex(sha256(std::as_bytes(std::span(picture.data))));
}

/// PNG with 16 bits a colour, of which Pillow keeps the high byte.
bool is_wide_colour(std::string_view file) {
  return file.starts_with("\x89PNG") && file.size() > 25 && file[24] == 16 && file[25] != 0;
}

struct PictureLimits {
  double max = 0, mean = 0;
};

/// One form of a picture: as sd-scripts or a careful reader decodes it.
void check_form(const Case& c,
                const std::string& name,
                const Json& golden,
                std::string_view file,
                const image::DecodeOptions& options,
                const safetensors::Tensor* pixels,
                const PictureLimits& within) {
  image::Rgb got;
  try {
    got = image::decode(as_bytes(file), options);
  } catch (const InputError& error) {
    return c.report->verdict(name, false, fmt::format("refused: {}", first_line(error.what())));
  }
  const image::Size size{golden.at("width"), golden.at("height")},
      head = image::read_header(as_bytes(file)).decoded_size(options.profile);
  if (got.size != size || head != size) {
    return c.report->verdict(name,
                             false,
                             fmt::format("{}x{}, its head {}x{}, golden {}x{}",
                                         got.size.width,
                                         got.size.height,
                                         head.width,
                                         head.height,
                                         size.width,
                                         size.height));
  }
  const std::string sha256 = golden.at("sha256");
  if (golden.contains("mean") && !has_mean(got, golden["mean"], within.mean))
    return c.report->verdict(name, false, "another mean");
  if (pixels == nullptr) {
    if (within.max > 0)  // not to the bit, and nothing else to compare with
      return c.report->verdict(name, true, fmt::format("mean within {}", within.mean));
    const bool same = hash_of(got) == sha256;
    return c.report->verdict(name, same, same ? "exact" : "another SHA-256");
  }
  const auto wanted = rgb_of(*pixels);
  if (wanted.size != size || hash_of(wanted) != sha256)
    return c.report->verdict(name, false, "its SHA-256 and its tensor do not agree");
  if (golden.contains("mean") && !has_mean(wanted, golden["mean"], 0))
    return c.report->verdict(name, false, "its mean and its tensor do not agree");
  const auto errors = pixel_errors(got, wanted);
  c.report->verdict(
      name,
      errors.max <= within.max && errors.mean <= within.mean,
      fmt::format(
          "max {} of {}  mean {:.3f} of {}", errors.max, within.max, errors.mean, within.mean));
}

void check_picture(const Case& c, const Json& golden, const safetensors::File* pixels) {
  const std::string name = golden.at("file");
  if (!c.has(name)) return;
  const std::string file = read_file(c.folder / name);
  if (golden.contains("bytes") && golden["bytes"] != file.size())
    return c.report->verdict(
        name, false, fmt::format("{} bytes, golden {}", file.size(), golden["bytes"].dump()));
  if (golden.value("refuse", false)) {
    for (const auto profile : {Profile::kDefault, Profile::kKohya}) {
      std::string note = "accepted";
      try {
        image::decode(as_bytes(file), {profile});
      } catch (const InputError& error) {
        note = fmt::format("refused: {}", first_line(error.what()));
      }
      c.report->verdict(
          name + (profile == Profile::kKohya ? " kohya" : " default"), note != "accepted", note);
    }
    return;
  }
  const bool lossless = golden.at("lossless");
  PictureLimits within;
  if (!lossless) within = {limit_or(c, "lossy", "max", 3), limit_or(c, "lossy", "mean", 0.5)};
  if (lossless && is_wide_colour(file))
    within = {limit_or(c, "sixteen", "max", 1), limit_or(c, "sixteen", "mean", 1)};
  constexpr std::array<uint8_t, 3> kBlack{0, 0, 0};
  const std::pair<const char*, image::DecodeOptions> kForms[] = {
      {"kohya", {.profile = Profile::kKohya}},
      {"proper", {}},
      {"over_white", {}},
      {"over_black", {.background = kBlack}}};
  const auto has_form = [&](const auto& form) { return golden.contains(form.first); };
  if (std::none_of(std::begin(kForms), std::end(kForms), has_form))
    return c.report->verdict(name, false, "no outcome is recorded");
  for (const auto& [form, options] : kForms) {
    if (!golden.contains(form)) continue;
    const auto find = [&](const std::string& key) {
      return pixels == nullptr ? nullptr : pixels->find(key);
    };
    const auto* tensor = find(fmt::format("{}/{}", form, name));
    if (tensor == nullptr) tensor = find("kohya/" + name);  // kept only where it differs
    check_form(c, fmt::format("{} {}", name, form), golden[form], file, options, tensor, within);
  }
  const auto header = image::read_header(as_bytes(file));
  const std::string container = golden.value("container", "");
  if (golden.contains("frames") &&  // pages of a TIFF are no animation
      (container == "GIF" || container == "PNG" || container == "WEBP")) {
    const bool several = golden["frames"] > 1;
    c.report->verdict(
        name + " frames", header.animated == several, header.animated ? "several" : "one");
  }
  if (golden.contains("exif_orientation")) {
    const auto& stored = golden["exif_orientation"];
    const bool valid = stored.is_number_integer() && stored >= 1 && stored <= 8;
    c.report->verdict(name + " exif_orientation",
                      header.orientation == (valid ? stored.get<int>() : 1),
                      fmt::format("{}, golden {}", header.orientation, stored.dump()));
  }
}

}  // namespace

void check_images(const Case& c) {
  const auto json = read_object(c.required("expected", "expected.json"));
  std::shared_ptr<const safetensors::File> pixels;
  if (c.has("decoded.safetensors"))
    pixels = safetensors::File::open(c.folder / "decoded.safetensors");
  for (const auto& golden : json.at("images")) check_picture(c, golden, pixels.get());
}

}  // namespace flux::check
