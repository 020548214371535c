// common/image/encode.h - pictures to files, with text that other programs show.
#pragma once
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "common/image/image.h"

namespace flux::image {

enum class FileFormat { kPng, kJpeg, kWebp };
/// "png", "jpg", "webp".
const char* extension(FileFormat format);

struct EncodeOptions {
  FileFormat format = FileFormat::kPng;
  /// Of JPEG and WebP, 1 to 100; WebP's 100 loses nothing. PNG never does.
  int quality = 95;
  /// UTF-8 texts by keyword. PNG: each a tEXt chunk, or iTXt if it is not ASCII. JPEG and WebP: the first one as EXIF's
  /// UserComment.
  std::vector<std::pair<std::string, std::string>> texts{};
};

/// The file's bytes. Equal for equal arguments. Throws InputError for a picture that the format cannot hold (WebP and
/// JPEG: sides above 16383 and 65535), with the sizes; ResourceError if memory runs out.
std::vector<std::byte> encode(const Rgb& image, const EncodeOptions& options);

/// An EXIF block (TIFF, big-endian) whose UserComment is `text`: ASCII, or UTF-16.
std::vector<std::byte> exif_comment(const std::string& text);

}  // namespace flux::image
