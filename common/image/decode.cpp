#include <algorithm>
#include <cmath>
#include <new>
#include <string>

#include "common/core/text.h"
#include "common/image/raw.h"

namespace flux::image {
namespace {

bool starts_with(Bytes file, std::string_view magic, size_t offset = 0) {
  return file.size() >= offset + magic.size() &&
         std::equal(
             magic.begin(), magic.end(), reinterpret_cast<const char*>(file.data()) + offset);
}

Raw decode_any(Bytes file, Extent extent, Profile profile) {
  using namespace std::string_view_literals;
  if (file.empty()) throw InputError("the file is empty");
  if (starts_with(file, "\xFF\xD8\xFF"sv)) return decode_jpeg(file, extent);
  if (starts_with(file, "\x89PNG\r\n\x1A\n"sv)) return decode_png(file, extent, profile);
  if (starts_with(file, "RIFF"sv) && starts_with(file, "WEBP"sv, 8))
    return decode_webp(file, extent);
  if (starts_with(file, "GIF87a"sv) || starts_with(file, "GIF89a"sv))
    return decode_gif(file, extent);
  if (starts_with(file, "BM"sv) && file.size() >= 26) return decode_bmp(file, extent);
  if (starts_with(file, "II\x2A\0"sv) || starts_with(file, "MM\0\x2A"sv) ||
      starts_with(file, "II\x2B\0"sv) || starts_with(file, "MM\0\x2B"sv)) {
    return decode_tiff(file, extent, profile);
  }
  if (starts_with(file, "ftyp"sv, 4))
    throw InputError("AVIF and HEIC are not read", "convert the picture to PNG or JPEG");
  if (starts_with(file, "\xFF\x0A"sv) || starts_with(file, "\0\0\0\x0CJXL "sv)) {
    throw InputError("JPEG XL is not read", "convert the picture to PNG or JPEG");
  }
  if (starts_with(file, "version https://git-lfs"sv))
    throw InputError("a Git LFS pointer, not the picture itself");
  throw InputError("not a picture that is read here (JPEG, PNG, WebP, BMP, TIFF, GIF)");
}

// Colours without alpha, [H, W, 3].
std::vector<uint8_t> to_rgb(const Raw& raw, bool use_icc) {
  const auto pixels = static_cast<size_t>(raw.size.width * raw.size.height);
  const auto channels = static_cast<size_t>(raw.channels());
  const bool alpha = raw.kind == Raw::Kind::kGreyAlpha || raw.kind == Raw::Kind::kRgba;
  const size_t colors = channels - (alpha ? 1 : 0);
  std::vector<uint8_t> samples;
  if (alpha) {
    samples.resize(pixels * colors);
    for (size_t i = 0; i < pixels; ++i)
      std::copy_n(&raw.data[i * channels], colors, &samples[i * colors]);
  }
  const auto& plain = alpha ? samples : raw.data;
  if (use_icc && !raw.icc.empty()) {
    auto converted = icc_to_srgb(raw.icc, plain, static_cast<int64_t>(colors));
    if (!converted.empty()) return converted;
  }
  if (colors == 3) return plain;
  std::vector<uint8_t> rgb(pixels * 3);
  for (size_t i = 0; i < pixels; ++i) {
    if (colors == 1) {
      std::fill_n(&rgb[3 * i], 3, plain[i]);
      continue;
    }
    // Inks without a profile, as Pillow mixes them: light = paper - ink * paper / 255, rounded.
    const int paper = 255 - plain[4 * i + 3];
    for (size_t c = 0; c < 3; ++c) {
      const int product = plain[4 * i + c] * paper + 128;
      rgb[3 * i + c] =
          static_cast<uint8_t>(std::clamp(paper - ((product >> 8) + product) / 256, 0, 255));
    }
  }
  return rgb;
}

void composite(const Raw& raw,
               const std::array<uint8_t, 3>& background,
               std::vector<uint8_t>& rgb) {
  const auto channels = static_cast<size_t>(raw.channels());
  for (size_t i = 0; i < rgb.size() / 3; ++i) {
    const double alpha = raw.data[i * channels + channels - 1] / 255.0;
    for (size_t c = 0; c < 3; ++c) {
      rgb[3 * i + c] = static_cast<uint8_t>(
          std::floor(rgb[3 * i + c] * alpha + background[c] * (1.0 - alpha) + 0.5));
    }
  }
}

std::vector<uint8_t> alpha_of(const Raw& raw) {
  const auto channels = static_cast<size_t>(raw.channels());
  std::vector<uint8_t> alpha(raw.data.size() / channels);
  for (size_t i = 0; i < alpha.size(); ++i) alpha[i] = raw.data[i * channels + channels - 1];
  return alpha;
}

// EXIF 2.3, tag 274: where row 0 and column 0 of the stored picture belong. Pixels of kChannels.
template <int kChannels>
std::vector<uint8_t> orient(std::vector<uint8_t> pixels, Size size, int orientation) {
  if (orientation == 1) return pixels;
  const auto [width, height] = size;
  const bool turn = orientation >= 5;
  const Size turned = turn ? Size{height, width} : size;
  const bool mirror_x =
      orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool mirror_y =
      orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  std::vector<uint8_t> out(pixels.size());
  uint8_t* to = out.data();
  for (int64_t y = 0; y < turned.height; ++y) {
    for (int64_t x = 0; x < turned.width; ++x, to += kChannels) {
      int64_t from_x = turn ? y : x, from_y = turn ? x : y;
      if (mirror_x) from_x = width - 1 - from_x;
      if (mirror_y) from_y = height - 1 - from_y;
      std::copy_n(
          &pixels[static_cast<size_t>(kChannels * (from_y * width + from_x))], kChannels, to);
    }
  }
  return out;
}

}  // namespace

void check_size(Size size) {
  if (size.width < 1 || size.height < 1) {
    throw InputError("its head is damaged: it says " + std::to_string(size.width) + "x" +
                     std::to_string(size.height) + " pixels");
  }
  if (size.width > kMaxPixels / size.height) {
    throw InputError("a picture of " + std::to_string(size.width) + "x" +
                     std::to_string(size.height) + " pixels is above the limit of " +
                     std::to_string(kMaxPixels) + " pixels");
  }
}

Header read_header(Bytes file) {
  const bool animated = starts_with(file, "GIF8")      ? gif_is_animated(file)
                        : starts_with(file, "RIFF")    ? webp_is_animated(file)
                        : starts_with(file, "\x89PNG") ? png_is_animated(file)
                                                       : false;
  const auto raw = decode_any(file, Extent::kHeader, Profile::kDefault);
  return {raw.size, raw.orientation, animated};
}

Rgb decode(Bytes file, const DecodeOptions& options) try {
  const bool proper = options.profile == Profile::kDefault;
  const auto raw = decode_any(file, Extent::kAll, options.profile);
  const bool has_alpha = raw.kind == Raw::Kind::kGreyAlpha || raw.kind == Raw::Kind::kRgba;
  Rgb image{raw.size, to_rgb(raw, proper)};
  if (has_alpha && options.alpha) image.alpha = alpha_of(raw), image.straight = !proper;
  if (!proper) return image;
  if (has_alpha) composite(raw, options.background, image.data);
  image.data = orient<3>(std::move(image.data), raw.size, raw.orientation);
  if (!image.alpha.empty())
    image.alpha = orient<1>(std::move(image.alpha), raw.size, raw.orientation);
  image.size = Header{raw.size, raw.orientation}.decoded_size(options.profile);
  return image;
} catch (const std::bad_alloc&) {
  throw ResourceError("not enough memory to decode a picture", "use a smaller picture, or a machine with more memory");
}

}  // namespace flux::image
