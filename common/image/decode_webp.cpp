#include <webp/decode.h>
#include <webp/demux.h>

#include <cstring>
#include <memory>

#include "common/image/raw.h"

namespace flux::image {
namespace {

// A chunk of the container; empty if there is none.
std::vector<uint8_t> read_chunk(const WebPDemuxer* demuxer, const char* name) {
  std::vector<uint8_t> out;
  WebPChunkIterator chunk;
  if (WebPDemuxGetChunk(demuxer, name, 1, &chunk) != 0) {
    out.assign(chunk.chunk.bytes, chunk.chunk.bytes + chunk.chunk.size);
    WebPDemuxReleaseChunkIterator(&chunk);
  }
  return out;
}

}  // namespace

Raw decode_webp(Bytes file, Extent extent) {
  Raw raw;
  const WebPData data{reinterpret_cast<const uint8_t*>(file.data()), file.size()};
  WebPBitstreamFeatures features;
  if (WebPGetFeatures(data.bytes, data.size, &features) != VP8_STATUS_OK)
    throw InputError("WebP: the header is damaged");
  raw.size = {features.width, features.height};
  check_size(raw.size);
  const std::unique_ptr<WebPDemuxer, decltype(&WebPDemuxDelete)> demuxer(WebPDemux(&data),
                                                                         WebPDemuxDelete);
  if (!demuxer) throw InputError("WebP: truncated or corrupt");
  const auto exif = read_chunk(demuxer.get(), "EXIF");
  auto block = std::as_bytes(std::span(exif));
  if (block.size() > 6 && std::memcmp(block.data(), "Exif\0", 6) == 0)
    block = block.subspan(6);  // some writers keep it
  raw.orientation = exif_orientation(block);
  if (extent == Extent::kHeader) return raw;
  raw.icc = read_chunk(demuxer.get(), "ICCP");

  // The animation decoder reads still pictures too, and composes a first frame that is smaller than
  // its canvas.
  WebPAnimDecoderOptions options;
  if (WebPAnimDecoderOptionsInit(&options) == 0) throw InputError("WebP: wrong library version");
  options.color_mode = MODE_RGBA;
  const std::unique_ptr<WebPAnimDecoder, decltype(&WebPAnimDecoderDelete)> decoder(
      WebPAnimDecoderNew(&data, &options), WebPAnimDecoderDelete);
  WebPAnimInfo info;
  if (!decoder || WebPAnimDecoderGetInfo(decoder.get(), &info) == 0)
    throw InputError("WebP: truncated or corrupt");
  if (info.canvas_width != raw.size.width || info.canvas_height != raw.size.height)
    throw InputError("WebP: two sizes");
  uint8_t* pixels = nullptr;
  int timestamp = 0;
  if (WebPAnimDecoderGetNext(decoder.get(), &pixels, &timestamp) == 0)
    throw InputError("WebP: truncated or corrupt");

  raw.kind = features.has_alpha != 0 ? Raw::Kind::kRgba : Raw::Kind::kRgb;
  raw.allocate();
  if (raw.kind == Raw::Kind::kRgba) {
    std::memcpy(raw.data.data(), pixels, raw.data.size());
  } else {
    for (size_t i = 0; i < raw.data.size() / 3; ++i)
      std::memcpy(&raw.data[3 * i], pixels + 4 * i, 3);
  }
  return raw;
}

bool webp_is_animated(Bytes file) {
  const WebPData data{reinterpret_cast<const uint8_t*>(file.data()), file.size()};
  const std::unique_ptr<WebPDemuxer, decltype(&WebPDemuxDelete)> demuxer(WebPDemux(&data),
                                                                         WebPDemuxDelete);
  return demuxer && WebPDemuxGetI(demuxer.get(), WEBP_FF_FRAME_COUNT) > 1;
}

}  // namespace flux::image
