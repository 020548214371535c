#include "common/image/encode.h"

#include <fmt/format.h>
// jpeglib.h needs FILE
#include <cstdio>
// and that before it
#include <jpeglib.h>
#include <png.h>
#include <webp/encode.h>

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux::image {
namespace {

using Bytes = std::vector<std::byte>;

void append(Bytes& out, const void* data, size_t size) {
  const auto* first = static_cast<const std::byte*>(data);
  out.insert(out.end(), first, first + size);
}
void append_big(Bytes& out, uint32_t value, int bytes) {
  for (int i = bytes - 1; i >= 0; --i) out.push_back(static_cast<std::byte>(value >> (8 * i)));
}
void append_little(Bytes& out, uint32_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out.push_back(static_cast<std::byte>(value >> (8 * i)));
}

bool is_ascii(const std::string& text) {
  return std::ranges::all_of(text, [](char c) { return static_cast<unsigned char>(c) < 128; });
}

void require_sides(const Rgb& image, int64_t most, const char* format) {
  const auto [width, height] = image.size;
  if (width >= 1 && height >= 1 && width <= most && height <= most) return;
  throw InputError(fmt::format(
      "a picture of {}x{} pixels, {} holds sides of 1 to {}", width, height, format, most));
}

struct PngWriter {
  png_structp png = nullptr;
  png_infop info = nullptr;
  Bytes out;
  char message[200] = "";
  bool no_memory = false;
  ~PngWriter() { png_destroy_write_struct(&png, &info); }
};

[[noreturn]] void png_failed(png_structp png, png_const_charp text) {
  auto& writer = *static_cast<PngWriter*>(png_get_error_ptr(png));
  std::snprintf(writer.message, sizeof writer.message, "PNG: %s", text);
  std::longjmp(png_jmpbuf(png), 1);
}

// An exception must not pass through libpng's C.
void png_put(png_structp png, png_bytep data, size_t size) {
  auto& writer = *static_cast<PngWriter*>(png_get_io_ptr(png));
  try {
    append(writer.out, data, size);
    return;
  } catch (const std::bad_alloc&) {
    writer.no_memory = true;
  }
  png_error(png, "no memory");
}

Bytes encode_png(const Rgb& image, const EncodeOptions& options) {
  require_sides(image, 0x7FFFFFFF, "PNG");
  PngWriter writer;
  std::vector<png_text> texts;
  for (const auto& [keyword, text] : options.texts) {
    png_text entry{};
    const bool ascii = is_ascii(text);
    entry.compression = ascii ? PNG_TEXT_COMPRESSION_NONE : PNG_ITXT_COMPRESSION_NONE;
    entry.key = const_cast<char*>(keyword.c_str());
    entry.text = const_cast<char*>(text.c_str());
    (ascii ? entry.text_length : entry.itxt_length) = text.size();
    entry.lang = const_cast<char*>("");
    entry.lang_key = const_cast<char*>("");
    texts.push_back(entry);
  }
  writer.png = png_create_write_struct(
      PNG_LIBPNG_VER_STRING, &writer, png_failed, [](png_structp, png_const_charp) {});
  if (writer.png) writer.info = png_create_info_struct(writer.png);
  if (!writer.info) throw ResourceError("PNG: no memory");
  if (setjmp(png_jmpbuf(writer.png)) != 0) {
    if (writer.no_memory) throw ResourceError(writer.message);
    throw InputError(writer.message);
  }
  png_set_write_fn(writer.png, &writer, png_put, [](png_structp) {});
  png_set_user_limits(writer.png, 0x7FFFFFFF, 0x7FFFFFFF);
  png_set_IHDR(writer.png,
               writer.info,
               static_cast<png_uint_32>(image.size.width),
               static_cast<png_uint_32>(image.size.height),
               8,
               PNG_COLOR_TYPE_RGB,
               PNG_INTERLACE_NONE,
               PNG_COMPRESSION_TYPE_DEFAULT,
               PNG_FILTER_TYPE_DEFAULT);
  png_set_sRGB(writer.png, writer.info, PNG_sRGB_INTENT_PERCEPTUAL);
  if (!texts.empty())
    png_set_text(writer.png, writer.info, texts.data(), static_cast<int>(texts.size()));
  png_write_info(writer.png, writer.info);
  const auto row = static_cast<size_t>(image.size.width) * 3;
  for (int64_t y = 0; y < image.size.height; ++y)
    png_write_row(writer.png, image.data.data() + static_cast<size_t>(y) * row);
  png_write_end(writer.png, writer.info);
  return std::move(writer.out);
}

struct JpegWriter {
  jpeg_compress_struct jpeg{};
  jpeg_error_mgr errors{};
  std::jmp_buf jump{};
  char message[JMSG_LENGTH_MAX + 8] = "";
  unsigned char* out = nullptr;
  unsigned long size = 0;
  ~JpegWriter() {
    jpeg_destroy_compress(&jpeg);
    std::free(out);
  }
};

[[noreturn]] void jpeg_failed(j_common_ptr jpeg) {
  auto& writer = *static_cast<JpegWriter*>(jpeg->client_data);
  char text[JMSG_LENGTH_MAX];
  jpeg->err->format_message(jpeg, text);
  std::snprintf(writer.message, sizeof writer.message, "JPEG: %s", text);
  std::longjmp(writer.jump, 1);
}

Bytes encode_jpeg(const Rgb& image, const EncodeOptions& options) {
  require_sides(image, JPEG_MAX_DIMENSION, "JPEG");
  Bytes exif;
  if (!options.texts.empty()) {
    append(exif, "Exif\0", 6);
    const Bytes block = exif_comment(options.texts.front().second);
    exif.insert(exif.end(), block.begin(), block.end());
  }
  constexpr size_t kMostOfMarker = 65533;
  if (exif.size() > kMostOfMarker)
    throw InputError(fmt::format("text of {} bytes, a JPEG's EXIF holds {}",
                                 options.texts.front().second.size(),
                                 kMostOfMarker));
  JpegWriter writer;
  writer.jpeg.err = jpeg_std_error(&writer.errors);
  writer.errors.error_exit = jpeg_failed;
  writer.jpeg.client_data = &writer;
  if (setjmp(writer.jump) != 0) throw InputError(writer.message);
  jpeg_create_compress(&writer.jpeg);
  writer.jpeg.client_data = &writer;
  jpeg_mem_dest(&writer.jpeg, &writer.out, &writer.size);
  writer.jpeg.image_width = static_cast<JDIMENSION>(image.size.width);
  writer.jpeg.image_height = static_cast<JDIMENSION>(image.size.height);
  writer.jpeg.input_components = 3;
  writer.jpeg.in_color_space = JCS_RGB;
  jpeg_set_defaults(&writer.jpeg);
  jpeg_set_quality(&writer.jpeg, options.quality, TRUE);
  writer.jpeg.optimize_coding = TRUE;
  constexpr int kFullColours = 90;  // from this quality on colours have all pixels
  if (options.quality >= kFullColours)
    writer.jpeg.comp_info[0].h_samp_factor = writer.jpeg.comp_info[0].v_samp_factor = 1;
  jpeg_start_compress(&writer.jpeg, TRUE);
  if (!exif.empty())
    jpeg_write_marker(&writer.jpeg,
                      JPEG_APP0 + 1,
                      reinterpret_cast<const JOCTET*>(exif.data()),
                      static_cast<unsigned>(exif.size()));
  const auto row = static_cast<size_t>(image.size.width) * 3;
  while (writer.jpeg.next_scanline < writer.jpeg.image_height) {
    auto* line = const_cast<JSAMPLE*>(image.data.data() + writer.jpeg.next_scanline * row);
    jpeg_write_scanlines(&writer.jpeg, &line, 1);
  }
  jpeg_finish_compress(&writer.jpeg);
  Bytes out;
  append(out, writer.out, writer.size);
  return out;
}

void append_chunk(Bytes& out, const char* name, const std::byte* data, size_t size) {
  append(out, name, 4);
  append_little(out, static_cast<uint32_t>(size), 4);
  append(out, data, size);
  if (size % 2 != 0) out.push_back(std::byte{0});
}

/// The container with an EXIF chunk. Source: RFC 9649, section 2.7.
Bytes with_exif(const uint8_t* file, size_t size, const Rgb& image, const Bytes& exif) {
  constexpr size_t kRiffHead = 12;  // "RIFF", size, "WEBP"; the picture's chunk behind it
  Bytes chunks;
  append(chunks, "WEBP", 4);
  Bytes extended;
  constexpr uint32_t kHasExif = 0x08;
  append_little(extended, kHasExif, 4);
  append_little(extended, static_cast<uint32_t>(image.size.width - 1), 3);
  append_little(extended, static_cast<uint32_t>(image.size.height - 1), 3);
  append_chunk(chunks, "VP8X", extended.data(), extended.size());
  append(chunks, file + kRiffHead, size - kRiffHead);
  append_chunk(chunks, "EXIF", exif.data(), exif.size());
  Bytes out;
  append(out, "RIFF", 4);
  append_little(out, static_cast<uint32_t>(chunks.size()), 4);
  out.insert(out.end(), chunks.begin(), chunks.end());
  return out;
}

Bytes encode_webp(const Rgb& image, const EncodeOptions& options) {
  require_sides(image, WEBP_MAX_DIMENSION, "WebP");
  uint8_t* data = nullptr;
  const auto width = static_cast<int>(image.size.width),
             height = static_cast<int>(image.size.height);
  constexpr int kLossless = 100;
  const size_t size =
      options.quality == kLossless
          ? WebPEncodeLosslessRGB(image.data.data(), width, height, 3 * width, &data)
          : WebPEncodeRGB(image.data.data(),
                          width,
                          height,
                          3 * width,
                          static_cast<float>(options.quality),
                          &data);
  const std::unique_ptr<uint8_t, decltype(&WebPFree)> file(data, WebPFree);
  if (size == 0) throw ResourceError("WebP: no memory to encode the picture");
  if (options.texts.empty()) {
    Bytes out;
    append(out, data, size);
    return out;
  }
  return with_exif(data, size, image, exif_comment(options.texts.front().second));
}

/// UTF-8 as UTF-16, big-endian; what is not UTF-8 was refused before.
void append_utf16(Bytes& out, const std::string& text) {
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    const size_t length = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    uint32_t code = length == 1 ? lead : lead & (0x7Fu >> length);
    for (size_t j = 1; j < length; ++j)
      code = code << 6 | (static_cast<unsigned char>(text[i + j]) & 0x3Fu);
    i += length;
    if (code < 0x10000) {
      append_big(out, code, 2);
    } else {
      append_big(out, 0xD800 + ((code - 0x10000) >> 10), 2);
      append_big(out, 0xDC00 + ((code - 0x10000) & 0x3FF), 2);
    }
  }
}

}  // namespace

const char* extension(FileFormat format) {
  return format == FileFormat::kPng ? "png" : format == FileFormat::kJpeg ? "jpg" : "webp";
}

std::vector<std::byte> exif_comment(const std::string& text) {
  Bytes comment;
  if (is_ascii(text) || first_invalid_utf8(text)) {
    append(comment, "ASCII\0\0", 8);
    const std::string shown = is_ascii(text) ? text : printable(text);
    append(comment, shown.data(), shown.size());
  } else {
    append(comment, "UNICODE", 8);
    append_utf16(comment, text);
  }
  constexpr uint16_t kExifIfd = 0x8769, kUserComment = 0x9286, kLong = 4, kUndefined = 7;
  constexpr uint32_t kHead = 8, kIfd = 2 + 12 + 4;  // one entry: count, entry, next
  Bytes out;
  append(out, "MM\0*", 4);
  append_big(out, kHead, 4);
  const auto ifd = [&](uint16_t tag, uint16_t type, uint32_t count, uint32_t value) {
    append_big(out, 1, 2);
    append_big(out, tag, 2);
    append_big(out, type, 2);
    append_big(out, count, 4);
    append_big(out, value, 4);
    append_big(out, 0, 4);
  };
  ifd(kExifIfd, kLong, 1, kHead + kIfd);
  ifd(kUserComment, kUndefined, static_cast<uint32_t>(comment.size()), kHead + 2 * kIfd);
  out.insert(out.end(), comment.begin(), comment.end());
  return out;
}

std::vector<std::byte> encode(const Rgb& image, const EncodeOptions& options) {
  try {
    switch (options.format) {
      case FileFormat::kPng:
        return encode_png(image, options);
      case FileFormat::kJpeg:
        return encode_jpeg(image, options);
      case FileFormat::kWebp:
        return encode_webp(image, options);
    }
  } catch (const std::bad_alloc&) {
    throw ResourceError("no memory to encode a picture");
  }
  return {};
}

}  // namespace flux::image
