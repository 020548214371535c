// common/image/raw.h - a decoded picture before it is made RGB; for this folder's decoders only.
#pragma once
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "common/core/error.h"
#include "common/image/image.h"

namespace flux::image {

using Bytes = std::span<const std::byte>;

/// 8-bit samples as a decoder gives them, [height, width, channels].
struct Raw {
  enum class Kind { kGrey, kGreyAlpha, kRgb, kRgba, kCmyk };  // cmyk: 255 = full ink
  Kind kind = Kind::kRgb;
  Size size;
  std::vector<uint8_t> data{};
  std::vector<uint8_t> icc{};  // embedded profile, empty = none
  int orientation = 1;         // EXIF: 1 to 8

  int64_t channels() const {
    constexpr int64_t kChannels[] = {1, 2, 3, 4, 4};
    return kChannels[static_cast<int>(kind)];
  }
  /// Allocates after the limit was checked.
  void allocate() { data.resize(static_cast<size_t>(size.width * size.height * channels())); }
};

/// How much of a file to read; `kHeader` leaves data and icc empty.
enum class Extent { kHeader, kAll };

Raw decode_jpeg(Bytes file, Extent extent);
Raw decode_png(Bytes file, Extent extent, Profile profile);
Raw decode_webp(Bytes file, Extent extent);
Raw decode_gif(Bytes file, Extent extent);
Raw decode_bmp(Bytes file, Extent extent);
Raw decode_tiff(Bytes file, Extent extent, Profile profile);

/// Whether a file of that type has several frames; false if it is damaged before that shows.
bool png_is_animated(Bytes file);
bool webp_is_animated(Bytes file);
bool gif_is_animated(Bytes file);

/// Throws InputError if a side is 0 or the picture is above kMaxPixels.
void check_size(Size size);
/// The orientation of an EXIF block without its "Exif\0\0"; 1 if there is none or it is broken.
int exif_orientation(Bytes tiff_block);
/// Grey, RGB or CMYK samples (no alpha) to sRGB through an ICC profile. `channels` 1, 3 or 4.
/// Throws InputError: a profile that lcms2 cannot use. Returns nothing if the profile is sRGB
/// itself (no value changes by more than 1).
std::vector<uint8_t> icc_to_srgb(std::span<const uint8_t> icc,
                                 std::span<const uint8_t> samples,
                                 int64_t channels);

/// 16-bit to 8-bit: nearest (default), or the high byte (kohya).
inline uint8_t narrow(uint32_t value, Profile profile) {
  return static_cast<uint8_t>(profile == Profile::kKohya ? value >> 8 : (value + 128) / 257);
}

/// Where C libraries that leave by longjmp come back to. `call` may hold no object with a
/// destructor.
struct Escape {
  std::jmp_buf jump;
  char message[256] = "";
};
template <class F>
void run_escapable(Escape& escape, F call) {
  if (setjmp(escape.jump) != 0) throw InputError(escape.message);  // NOLINT(cert-err52-cpp)
  call();
}

}  // namespace flux::image
