// common/image/image.h - files to 8-bit RGB: decode, resize, crop, and the pixels a VAE reads.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/dataset/profile.h"

namespace flux::image {

/// Width and height in pixels.
struct Size {
  int64_t width = 0, height = 0;
  bool operator==(const Size&) const = default;
  auto operator<=>(const Size&) const = default;
};

/// 8-bit RGB, [height, width, 3], rows without padding.
struct Rgb {
  Size size;
  std::vector<uint8_t> data;
  std::vector<uint8_t> alpha{};  // [height, width], 255 = opaque; empty: not asked for, or none
  bool straight = false;         // colours are as stored beside `alpha`, not over a background
};

struct DecodeOptions {
  Profile profile = Profile::kDefault;
  std::array<uint8_t, 3> background{
      255, 255, 255};  // under transparent pixels, profile default only
  bool alpha = false;  // also give the alpha plane
};

/// The largest picture read: 178,956,970 pixels, where Pillow too refuses. Checked before anything
/// is allocated.
inline constexpr int64_t kMaxPixels = 178'956'970;

/// Decodes a whole file; its first bytes decide the type, never its name: JPEG, PNG, WebP, BMP,
/// TIFF, GIF. Of an animation the first frame. Any warning of a decoder about damaged data is an
/// error.
///
/// Profile default: EXIF orientation applied, alpha composited over the background, 16 bits scaled
/// to 8, an embedded ICC profile and CMYK converted to sRGB. Profile kohya: none of that; alpha
/// dropped, 16-bit grey clipped at 255, other 16-bit data cut to the high byte, as sd-scripts does
/// through Pillow.
///
/// The alpha plane is turned, and its 16 bits made 8, as the picture's are; a transparent colour of
/// a palette or of PNG's tRNS counts as alpha. In both profiles a picture without alpha has none.
///
/// Throws InputError with the reason, without a file name: not an image, a type not read,
/// truncated, corrupt, too large. Throws ResourceError if memory runs out.
Rgb decode(std::span<const std::byte> file, const DecodeOptions& options = {});

/// What the head of a file says; nothing is decoded.
struct Header {
  Size size;            // as stored
  int orientation = 1;  // EXIF, 1 to 8
  bool animated = false;  // GIF, WebP or PNG of several frames, of which decode() takes the first
  /// As decode() returns it.
  Size decoded_size(Profile profile) const {
    return profile == Profile::kDefault && orientation >= 5 ? Size{size.height, size.width} : size;
  }
};
/// Throws InputError where decode() would throw it for the head of the file.
Header read_header(std::span<const std::byte> file);

enum class Interpolation { kAuto, kLanczos, kBox, kArea, kLinear, kCubic, kNearest };
/// sd-scripts' words: empty = kAuto, lanczos, box, area, linear or bilinear, cubic or bicubic,
/// nearest. Throws std::invalid_argument.
Interpolation interpolation_from_name(std::string_view name);
/// One word each: "auto", "lanczos", "box", "area", "linear", "cubic", "nearest".
std::string_view interpolation_name(Interpolation interpolation);

/// What kAuto stands for: area averaging if both sides shrink or stay, else Lanczos.
Interpolation choose_interpolation(Interpolation interpolation, Size from, Size to);

/// Scales to `size`; nothing is done if the size is right. Lanczos and box are Pillow's (support 3 * max(1, 1/scale), 22-bit
/// coefficients, horizontal pass first, u8 between the passes), the rest OpenCV's. If `straight`,
/// Lanczos and box weight colours by alpha, as Pillow does with RGBA. The result has no alpha.
/// Throws std::invalid_argument if a side is below 1; InputError if OpenCV cannot do it;
/// ResourceError if memory runs out.
Rgb resize(const Rgb& image, Size size, Interpolation interpolation);

/// Where an image goes: scaled to `resized`, then `bucket` cut out at (crop_x, crop_y).
struct Placement {
  Size resized, bucket;
  int64_t crop_x = 0, crop_y = 0;
  bool operator==(const Placement&) const = default;
};

/// resize and crop in one step; `flip` mirrors left and right afterwards.
Rgb place(const Rgb& image,
          const Placement& placement,
          Interpolation interpolation,
          bool flip = false);

/// How much each latent pixel counts in the loss, [bucket height / 8, bucket width / 8] in [0, 1]:
/// `image.alpha`, which must not be empty, scaled, cut and mirrored as `place` does with the
/// picture, then the mean of each 8x8 block / 255. Throws std::invalid_argument if there is no alpha
/// or a side of the bucket is no multiple of 8; else as `place`.
std::vector<float> alpha_mask(const Rgb& image,
                              const Placement& placement,
                              Interpolation interpolation,
                              bool flip = false);

/// [3, H, W] float in [-1, 1]: (v / 255 - 0.5) / 0.5, each step rounded to float32. `out` has 3 *
/// width * height elements.
void to_pixels(const Rgb& image, std::span<float> out);

}  // namespace flux::image
