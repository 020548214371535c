#include <lcms2.h>
#include <libexif/exif-data.h>

#include <cstring>
#include <memory>

#include "common/image/raw.h"

namespace flux::image {
namespace {

struct CloseProfile {
  void operator()(void* profile) const { cmsCloseProfile(profile); }
};
struct DeleteTransform {
  void operator()(void* transform) const { cmsDeleteTransform(transform); }
};
using Profile_ = std::unique_ptr<void, CloseProfile>;
using Transform = std::unique_ptr<void, DeleteTransform>;

// Whether an RGB transform leaves all of a 9x9x9 grid where it is, give or take rounding.
bool is_identity(void* transform) {
  std::vector<uint8_t> grid, out;
  for (int r = 0; r <= 8; ++r) {
    for (int g = 0; g <= 8; ++g) {
      for (int b = 0; b <= 8; ++b) {
        for (const int v : {r, g, b}) grid.push_back(static_cast<uint8_t>(v * 255 / 8));
      }
    }
  }
  out.resize(grid.size());
  cmsDoTransform(transform, grid.data(), out.data(), static_cast<cmsUInt32Number>(grid.size() / 3));
  for (size_t i = 0; i < grid.size(); ++i) {
    if (out[i] > grid[i] + 1 || grid[i] > out[i] + 1) return false;
  }
  return true;
}

}  // namespace

std::vector<uint8_t> icc_to_srgb(std::span<const uint8_t> icc,
                                 std::span<const uint8_t> samples,
                                 int64_t channels) {
  const Profile_ profile(
      cmsOpenProfileFromMem(icc.data(), static_cast<cmsUInt32Number>(icc.size())));
  if (!profile) throw InputError("the embedded colour profile (ICC) is damaged");
  const auto space = cmsGetColorSpace(profile.get());
  const auto wanted = channels == 1   ? cmsSigGrayData
                      : channels == 4 ? cmsSigCmykData
                                      : cmsSigRgbData;
  std::vector<uint8_t> expanded;
  if (channels == 1 &&
      space == cmsSigRgbData) {  // a grey picture with an RGB profile: common, and well defined
    expanded.reserve(samples.size() * 3);
    for (const auto v : samples) expanded.insert(expanded.end(), 3, v);
    samples = expanded;
    channels = 3;
  } else if (space != wanted) {
    throw InputError(
        "the embedded colour profile (ICC) is for another colour model than the picture's");
  }
  const Profile_ srgb(cmsCreate_sRGBProfile());
  const auto type = channels == 1 ? TYPE_GRAY_8 : channels == 4 ? TYPE_CMYK_8 : TYPE_RGB_8;
  const Transform transform(cmsCreateTransform(profile.get(),
                                               type,
                                               srgb.get(),
                                               TYPE_RGB_8,
                                               INTENT_RELATIVE_COLORIMETRIC,
                                               cmsFLAGS_BLACKPOINTCOMPENSATION | cmsFLAGS_NOCACHE));
  if (!transform) throw InputError("the embedded colour profile (ICC) cannot be converted to sRGB");
  if (channels == 3 && is_identity(transform.get())) return expanded;
  const auto count = samples.size() / static_cast<size_t>(channels);
  std::vector<uint8_t> rgb(count * 3);
  cmsDoTransform(transform.get(), samples.data(), rgb.data(), static_cast<cmsUInt32Number>(count));
  return rgb;
}

int exif_orientation(Bytes tiff_block) {
  std::vector<unsigned char> block{'E', 'x', 'i', 'f', 0, 0};  // libexif wants the JPEG form
  const auto* bytes = reinterpret_cast<const unsigned char*>(tiff_block.data());
  block.insert(block.end(), bytes, bytes + tiff_block.size());
  const std::unique_ptr<ExifData, decltype(&exif_data_unref)> data(exif_data_new(),
                                                                   exif_data_unref);
  if (!data) return 1;
  exif_data_unset_option(data.get(), EXIF_DATA_OPTION_FOLLOW_SPECIFICATION);
  exif_data_load_data(data.get(), block.data(), static_cast<unsigned>(block.size()));
  const ExifEntry* entry = exif_content_get_entry(data->ifd[EXIF_IFD_0], EXIF_TAG_ORIENTATION);
  if (entry == nullptr || entry->format != EXIF_FORMAT_SHORT || entry->size < 2) return 1;
  const int value = exif_get_short(entry->data, exif_data_get_byte_order(data.get()));
  return value >= 1 && value <= 8 ? value : 1;
}

}  // namespace flux::image
