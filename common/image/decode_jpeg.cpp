#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <jpeglib.h>  // needs cstddef and cstdio before it

#include "common/image/raw.h"

namespace flux::image {
namespace {

// A progressive file may repeat scans without end, to waste the reader's time.
constexpr int kMaxScans = 500;

struct Reader {
  jpeg_decompress_struct info{};
  jpeg_error_mgr error{};
  jpeg_progress_mgr progress{};
  Escape escape;
  ~Reader() { jpeg_destroy_decompress(&info); }
};

[[noreturn]] void leave(j_common_ptr info) {
  auto& reader = *static_cast<Reader*>(info->client_data);
  char text[JMSG_LENGTH_MAX];
  info->err->format_message(info, text);
  std::snprintf(reader.escape.message, sizeof reader.escape.message, "JPEG: %s", text);
  std::longjmp(reader.escape.jump, 1);
}

// libjpeg only warns about damaged data and returns grey or garbled pixels for it.
void on_message(j_common_ptr info, int level) {
  if (level < 0) leave(info);
}

void on_progress(j_common_ptr info) {
  auto& reader = *static_cast<Reader*>(info->client_data);
  if (reader.info.input_scan_number <= kMaxScans) return;
  std::snprintf(
      reader.escape.message, sizeof reader.escape.message, "JPEG: more than %d scans", kMaxScans);
  std::longjmp(reader.escape.jump, 1);
}

}  // namespace

Raw decode_jpeg(Bytes file, Extent extent) {
  Raw raw;
  Reader reader;
  auto& info = reader.info;
  info.err = jpeg_std_error(&reader.error);
  info.client_data = &reader;
  reader.error.error_exit = leave;
  reader.error.emit_message = on_message;
  reader.progress.progress_monitor = on_progress;
  run_escapable(reader.escape, [&] {
    jpeg_create_decompress(&info);
    info.progress = &reader.progress;
    jpeg_mem_src(&info, reinterpret_cast<const unsigned char*>(file.data()), file.size());
    jpeg_save_markers(&info, JPEG_APP0 + 1, 0xFFFF);
    jpeg_save_markers(&info, JPEG_APP0 + 2, 0xFFFF);
    jpeg_read_header(&info, TRUE);
  });

  raw.size = {info.image_width, info.image_height};
  check_size(raw.size);
  const bool inks = info.jpeg_color_space == JCS_CMYK || info.jpeg_color_space == JCS_YCCK;
  raw.kind = inks                                     ? Raw::Kind::kCmyk
             : info.jpeg_color_space == JCS_GRAYSCALE ? Raw::Kind::kGrey
                                                      : Raw::Kind::kRgb;
  info.out_color_space = inks ? JCS_CMYK : raw.kind == Raw::Kind::kGrey ? JCS_GRAYSCALE : JCS_RGB;
  for (auto marker = info.marker_list; marker != nullptr; marker = marker->next) {
    if (marker->marker == JPEG_APP0 + 1 && marker->data_length > 6 &&
        std::memcmp(marker->data, "Exif\0", 6) == 0) {
      raw.orientation =
          exif_orientation(std::as_bytes(std::span(marker->data, marker->data_length)).subspan(6));
      break;
    }
  }
  if (extent == Extent::kHeader) return raw;
  JOCTET* icc = nullptr;
  unsigned icc_bytes = 0;
  run_escapable(reader.escape, [&] { jpeg_read_icc_profile(&info, &icc, &icc_bytes); });
  if (icc != nullptr) {
    raw.icc.assign(icc, icc + icc_bytes);
    std::free(icc);
  }

  raw.allocate();
  const auto row_bytes = static_cast<size_t>(raw.size.width * raw.channels());
  uint8_t* const pixels = raw.data.data();
  run_escapable(reader.escape, [&] {
    jpeg_start_decompress(&info);
    while (info.output_scanline < info.output_height) {
      JSAMPROW row = pixels + info.output_scanline * row_bytes;
      jpeg_read_scanlines(&info, &row, 1);
    }
    jpeg_finish_decompress(&info);
  });
  // Adobe's files, the only common ones with inks, store 255 - ink.
  if (inks && info.saw_Adobe_marker) {
    for (auto& sample : raw.data) sample = static_cast<uint8_t>(255 - sample);
  }
  return raw;
}

}  // namespace flux::image
