#include <png.h>
#include <zlib.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <optional>

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

uint64_t big_endian(Bytes bytes) {
  uint64_t value = 0;
  for (const std::byte byte : bytes.first(4)) value = value << 8 | std::to_integer<uint64_t>(byte);
  return value;
}

constexpr size_t kSignature = 8, kChunkHead = 8, kChecksum = 4;

// What the first chunk of this name holds, if it comes before one of the name `before`.
std::optional<Bytes> find_chunk(Bytes file, const char* name, const char* before = "IEND") {
  for (size_t at = kSignature; at + kChunkHead + kChecksum <= file.size();) {
    const uint64_t length = big_endian(file.subspan(at));
    if (length > file.size() - at - kChunkHead - kChecksum) break;
    const auto is = [&](const char* other) {
      return std::memcmp(file.data() + at + 4, other, 4) == 0;
    };
    if (is(name)) return file.subspan(at + kChunkHead, length);
    if (is(before)) break;
    at += kChunkHead + length + kChecksum;
  }
  return std::nullopt;
}

// The colour profile. libpng passes over one that it does not like, and over an RGB profile of a grey picture: colours
// would be wrong and nobody would know. Throws InputError if what is there is not a compressed profile.
std::vector<uint8_t> read_icc(Bytes file) {
  constexpr size_t kLimit = size_t{64} << 20;
  const auto chunk = find_chunk(file, "iCCP", "IDAT");
  if (!chunk) return {};
  // a name that ends in a zero byte, the number of the compression method, the compressed profile
  const auto name_end = std::ranges::find(*chunk, std::byte{0});
  const auto start = static_cast<size_t>(name_end - chunk->begin()) + 2;
  const bool known = start < chunk->size() && (*chunk)[start - 1] == std::byte{0};
  std::vector<uint8_t> icc;
  int code = Z_DATA_ERROR;
  if (known) {
    const auto packed = chunk->subspan(start);
    do {
      icc.resize(std::clamp<size_t>(4 * packed.size(), 2 * icc.size() + 4096, kLimit));
      auto size = static_cast<uLongf>(icc.size());
      code = uncompress(icc.data(),
                        &size,
                        reinterpret_cast<const Bytef*>(packed.data()),
                        static_cast<uLong>(packed.size()));
      if (code == Z_OK) icc.resize(size);
    } while (code == Z_BUF_ERROR && icc.size() < kLimit);
  }
  if (code == Z_MEM_ERROR) throw ResourceError("no memory to read a colour profile");
  if (code != Z_OK || icc.empty()) throw InputError("the embedded colour profile (ICC) is damaged");
  return icc;
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
  raw.orientation =
      exif_orientation(find_chunk(file, "eXIf").value_or(Bytes{}));  // may follow the pixels
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
  if (profile == Profile::kDefault) raw.icc = read_icc(file);
  return raw;
}

// APNG: a chunk acTL, whose first number counts the frames, before the first IDAT.
bool png_is_animated(Bytes file) {
  const auto control = find_chunk(file, "acTL", "IDAT");
  return control && control->size() >= 4 && big_endian(*control) > 1;
}

}  // namespace flux::image
