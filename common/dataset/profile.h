// common/dataset/profile.h - whose rules a dataset is read by.
#pragma once

namespace flux {

/// `kDefault`: EXIF applied, alpha composited, 16-bit scaled, CMYK and ICC to sRGB, log-ratio
/// buckets of equal area, byte order marks stripped, more file types. `kKohya`: what sd-scripts
/// does with the same files, pixel by pixel.
enum class Profile { kDefault, kKohya };

}  // namespace flux
