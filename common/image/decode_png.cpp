#include <png.h>

#include <cstdio>
#include <cstring>

#include "common/image/raw.h"

namespace flux::image {
namespace {

struct Reader {
  png_structp png = nullptr;
  png_infop info = nullptr;
  Escape escape;
  Bytes rest;
  ~Reader() { png_destroy_read_struct(&png, &info, nullptr); }
};

[[noreturn]] void on_error(png_structp png, png_const_charp text) {
  auto& reader = *static_cast<Reader*>(png_get_error_ptr(png));
  std::snprintf(reader.escape.message, sizeof reader.escape.message, "PNG: %s", text);
  std::longjmp(reader.escape.jump, 1);
}

// Warnings are about odd but harmless chunks; damage is an error, as set by png_set_crc_action.
void on_warning(png_structp, png_const_charp) {}

void read_bytes(png_structp png, png_bytep out, size_t count) {
  auto& reader = *static_cast<Reader*>(png_get_io_ptr(png));
  if (count > reader.rest.size()) png_error(png, "the file is truncated");
  std::memcpy(out, reader.rest.data(), count);
  reader.rest = reader.rest.subspan(count);
}

// The EXIF block, wherever it stands: it may follow the pixels.
Bytes find_exif(Bytes file) {
  const auto number = [&](size_t at) {
    size_t value = 0;
    for (size_t i = 0; i < 4; ++i) value = value << 8 | static_cast<size_t>(file[at + i]);
    return value;
  };
  for (size_t at = 8; at + 12 <= file.size();) {
    const size_t length = number(at);
    if (length > file.size() - at - 12) break;
    if (std::memcmp(file.data() + at + 4, "eXIf", 4) == 0) return file.subspan(at + 8, length);
    at += 12 + length;
  }
  return {};
}

uint64_t big_endian(Bytes bytes) {
  uint64_t value = 0;
  for (const std::byte byte : bytes.first(4)) value = value << 8 | std::to_integer<uint64_t>(byte);
  return value;
}

}  // namespace

Raw decode_png(Bytes file, Extent extent, Profile profile) {
  Raw raw;
  Reader reader;
  reader.rest = file;
  run_escapable(reader.escape, [&] {
    reader.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &reader, on_error, on_warning);
    reader.info = reader.png == nullptr ? nullptr : png_create_info_struct(reader.png);
  });
  if (reader.info == nullptr) throw ResourceError("no memory to read a PNG file");
  const png_structp png = reader.png;
  const png_infop info = reader.info;
  run_escapable(reader.escape, [&] {
    png_set_read_fn(png, &reader, read_bytes);
    png_set_crc_action(png, PNG_CRC_ERROR_QUIT, PNG_CRC_ERROR_QUIT);
    png_set_user_limits(
        png, PNG_UINT_31_MAX, PNG_UINT_31_MAX);  // check_size has the limit on pixels
    png_read_info(png, info);
  });
  raw.size = {png_get_image_width(png, info), png_get_image_height(png, info)};
  check_size(raw.size);
  raw.orientation = exif_orientation(find_exif(file));
  if (extent == Extent::kHeader) return raw;

  const bool grey = (png_get_color_type(png, info) & PNG_COLOR_MASK_COLOR) == 0;
  const bool wide = png_get_bit_depth(png, info) == 16;
  const bool grey16_only = wide && png_get_color_type(png, info) == PNG_COLOR_TYPE_GRAY;
  run_escapable(reader.escape, [&] {
    png_set_expand(png);  // palette to RGB, 1 to 4 bits to 8, transparent colours to alpha
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
  });
  const bool alpha = (png_get_color_type(png, info) & PNG_COLOR_MASK_ALPHA) != 0;
  raw.kind = grey    ? (alpha ? Raw::Kind::kGreyAlpha : Raw::Kind::kGrey)
             : alpha ? Raw::Kind::kRgba
                     : Raw::Kind::kRgb;
  const auto row_bytes = static_cast<size_t>(raw.size.width * raw.channels() * (wide ? 2 : 1));
  if (png_get_rowbytes(png, info) != row_bytes) throw InputError("PNG: unexpected row size");
  std::vector<uint8_t> samples(row_bytes * static_cast<size_t>(raw.size.height));
  std::vector<png_bytep> rows(static_cast<size_t>(raw.size.height));
  for (size_t y = 0; y < rows.size(); ++y) rows[y] = samples.data() + y * row_bytes;
  png_bytepp const row_pointers = rows.data();
  run_escapable(reader.escape, [&] {
    png_read_image(png, row_pointers);
    png_read_end(png, info);
  });

  if (wide) {
    raw.allocate();
    // Pillow reads 16-bit grey as whole numbers and clips them when it makes RGB of them.
    const bool clip = profile == Profile::kKohya && grey16_only;
    for (size_t i = 0; i < raw.data.size(); ++i) {
      const uint32_t value = samples[2 * i] * 256u + samples[2 * i + 1];
      raw.data[i] = clip ? static_cast<uint8_t>(value > 255 ? 255 : value) : narrow(value, profile);
    }
  } else {
    raw.data = std::move(samples);
  }
  png_charp name = nullptr;
  png_bytep icc = nullptr;
  png_uint_32 icc_bytes = 0;
  int compression = 0;
  if (png_get_iCCP(png, info, &name, &compression, &icc, &icc_bytes) != 0)
    raw.icc.assign(icc, icc + icc_bytes);
  return raw;
}

// APNG: a chunk acTL, whose first number counts the frames, before the first IDAT.
bool png_is_animated(Bytes file) {
  constexpr size_t kSignature = 8, kChunkHead = 8, kChecksum = 4;
  const auto is = [&](size_t at, const char* name) {
    return std::memcmp(file.data() + at + 4, name, 4) == 0;
  };
  for (size_t at = kSignature; at + kChunkHead + kChecksum <= file.size();) {
    if (is(at, "IDAT")) return false;
    if (is(at, "acTL")) return big_endian(file.subspan(at + kChunkHead)) > 1;
    const uint64_t length = big_endian(file.subspan(at));
    if (length > file.size() - at) return false;
    at += kChunkHead + length + kChecksum;
  }
  return false;
}

}  // namespace flux::image
