#include <opencv2/core/utils/logger.hpp>
#include <opencv2/imgcodecs.hpp>

#include <cstring>
#include <new>
#include <string>

#include "common/image/raw.h"

namespace flux::image {
namespace {

uint64_t number(Bytes file, uint64_t offset, uint64_t count, bool big_endian = false) {
  if (offset > file.size() || count > file.size() - offset)
    throw InputError("the file is truncated");
  uint64_t value = 0;
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t at = big_endian ? offset + i : offset + count - 1 - i;
    value = value << 8 | static_cast<uint64_t>(file[at]);
  }
  return value;
}

// Pixels as OpenCV finds them, channels in RGB order.
Raw decode_with_opencv(Bytes file, const char* type, Size size, Profile profile, bool keep_alpha) {
  [[maybe_unused]] static const auto quiet =
      cv::utils::logging::setLogLevel(cv::utils::logging::LOG_LEVEL_SILENT);
  cv::Mat mat;
  try {
    const cv::Mat bytes(
        1, static_cast<int>(file.size()), CV_8UC1, const_cast<std::byte*>(file.data()));
    mat = cv::imdecode(bytes, cv::IMREAD_UNCHANGED);
  } catch (const cv::Exception& error) {
    if (error.code == cv::Error::StsNoMem) throw std::bad_alloc();
    throw InputError(std::string(type) + ": " + error.err);
  }
  if (mat.empty() || mat.cols != size.width || mat.rows != size.height) {
    throw InputError(std::string(type) + ": truncated, corrupt or of a kind that is not read");
  }
  const int channels = mat.channels();
  if ((mat.depth() != CV_8U && mat.depth() != CV_16U) ||
      (channels != 1 && channels != 3 && channels != 4)) {
    throw InputError(std::string(type) + ": only 1, 3 or 4 channels of 8 or 16 bits are read");
  }
  Raw raw;
  raw.size = size;
  raw.kind = channels == 1                 ? Raw::Kind::kGrey
             : channels == 4 && keep_alpha ? Raw::Kind::kRgba
                                           : Raw::Kind::kRgb;
  raw.allocate();
  const bool wide = mat.depth() == CV_16U;
  const bool clip =
      wide && channels == 1 && profile == Profile::kKohya;  // as Pillow: see decode_png
  uint8_t* out = raw.data.data();
  for (int y = 0; y < mat.rows; ++y) {
    const auto* row8 = mat.ptr<uint8_t>(y);
    const auto* row16 = mat.ptr<uint16_t>(y);
    const auto sample = [&](int i) -> uint8_t {
      if (!wide) return row8[i];
      return clip ? static_cast<uint8_t>(row16[i] > 255 ? 255 : row16[i])
                  : narrow(row16[i], profile);
    };
    for (int x = 0; x < mat.cols; ++x) {
      if (channels == 1) {
        *out++ = sample(x);
        continue;
      }
      for (int c = 2; c >= 0; --c) *out++ = sample(x * channels + c);
      if (raw.kind == Raw::Kind::kRgba) *out++ = sample(x * channels + 3);
    }
  }
  return raw;
}

// What is needed of the first picture of a TIFF file. Source: TIFF 6.0.
struct TiffHeader {
  uint64_t width = 0, height = 0, bits = 1, photometric = 99, orientation = 1;
  bool extra_is_alpha = false;
};

TiffHeader read_tiff_header(Bytes file, std::vector<uint8_t>& icc) {
  const bool big = file.size() > 0 && static_cast<char>(file[0]) == 'M';
  if (number(file, 2, 2, big) != 42) throw InputError("TIFF: BigTIFF is not read");
  const uint64_t directory = number(file, 4, 4, big);
  const uint64_t entries = number(file, directory, 2, big);
  TiffHeader header;
  std::vector<uint64_t> offsets, counts;
  for (uint64_t i = 0; i < entries; ++i) {
    const uint64_t entry = directory + 2 + 12 * i;
    const uint64_t tag = number(file, entry, 2, big), type = number(file, entry + 2, 2, big);
    const uint64_t count = number(file, entry + 4, 4, big);
    const uint64_t width = type == 3 ? 2 : type == 4 ? 4 : 1;  // short, long, else bytes
    const uint64_t data = count * width <= 4 ? entry + 8 : number(file, entry + 8, 4, big);
    const auto value = [&](uint64_t at = 0) { return number(file, data + at * width, width, big); };
    switch (tag) {
      case 256:
        header.width = value();
        break;
      case 257:
        header.height = value();
        break;
      case 258:
        header.bits = value();
        break;
      case 262:
        header.photometric = value();
        break;
      case 274:
        header.orientation = value();
        break;
      case 338:
        header.extra_is_alpha = value() == 1 || value() == 2;
        break;
      case 273:
      case 324:
        for (uint64_t k = 0; k < count; ++k) offsets.push_back(value(k));
        break;
      case 279:
      case 325:
        for (uint64_t k = 0; k < count; ++k) counts.push_back(value(k));
        break;
      case 34675:
        for (uint64_t k = 0; k < count; ++k)
          icc.push_back(static_cast<uint8_t>(number(file, data + k, 1)));
        break;
      default:
        break;
    }
  }
  // libtiff fills what is missing with black
  for (size_t k = 0; k < offsets.size() && k < counts.size(); ++k) {
    if (offsets[k] > file.size() || counts[k] > file.size() - offsets[k])
      throw InputError("TIFF: the file is truncated");
  }
  return header;
}

}  // namespace

Raw decode_bmp(Bytes file, Extent extent) {
  const uint64_t header_bytes = number(file, 14, 4);
  if (header_bytes != 12 && header_bytes < 40) throw InputError("BMP: the header is damaged");
  Size size;
  uint64_t bits = 0, compression = 0;
  if (header_bytes == 12) {
    size = {static_cast<int16_t>(number(file, 18, 2)), static_cast<int16_t>(number(file, 20, 2))};
    bits = number(file, 24, 2);
  } else {
    size = {static_cast<int32_t>(number(file, 18, 4)), static_cast<int32_t>(number(file, 22, 4))};
    bits = number(file, 28, 2);
    compression = number(file, 30, 4);
  }
  if (size.height < 0) size.height = -size.height;  // rows from the top
  check_size(size);
  const auto row_bytes = (static_cast<uint64_t>(size.width) * bits + 31) / 32 * 4;
  const bool packed = compression == 1 || compression == 2;
  if (!packed) {  // OpenCV leaves missing rows black
    (void)number(file, number(file, 10, 4) + row_bytes * static_cast<uint64_t>(size.height), 0);
  }
  if (extent == Extent::kHeader) return {.size = size};
  const bool alpha =
      bits == 32 && header_bytes >= 56 && compression == 3 && number(file, 66, 4) != 0;
  return decode_with_opencv(file, "BMP", size, Profile::kDefault, alpha);
}

Raw decode_tiff(Bytes file, Extent extent, Profile profile) {
  std::vector<uint8_t> icc;
  const auto header = read_tiff_header(file, icc);
  Size size{static_cast<int64_t>(header.width), static_cast<int64_t>(header.height)};
  check_size(size);
  if (header.orientation >= 5 && header.orientation <= 8)
    std::swap(size.width, size.height);  // OpenCV applies the tag
  if (header.photometric > 3) {
    throw InputError("TIFF: colour model " + std::to_string(header.photometric) +
                     " is not read (grey, RGB, palette are)");
  }
  if (header.bits != 1 && header.bits != 4 && header.bits != 8 && header.bits != 16) {
    throw InputError("TIFF: " + std::to_string(header.bits) +
                     " bits a sample are not read (1, 4, 8, 16 are)");
  }
  if (extent == Extent::kHeader) return {.size = size};
  auto raw = decode_with_opencv(file, "TIFF", size, profile, header.extra_is_alpha);
  raw.icc = std::move(icc);
  return raw;
}

}  // namespace flux::image
