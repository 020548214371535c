#include <gif_lib.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "common/image/raw.h"

namespace flux::image {
namespace {

[[noreturn]] void fail(int code) {
  const char* text = GifErrorString(code);
  throw InputError(std::string("GIF: ") + (text != nullptr ? text : "truncated or corrupt"));
}

int read_bytes(GifFileType* gif, GifByteType* out, int count) {
  auto& rest = *static_cast<Bytes*>(gif->UserData);
  const auto taken = std::min(rest.size(), static_cast<size_t>(count));
  std::memcpy(out, rest.data(), taken);
  rest = rest.subspan(taken);
  return static_cast<int>(taken);
}

struct Close {
  void operator()(GifFileType* gif) const { DGifCloseFile(gif, nullptr); }
};

}  // namespace

// The first frame on its screen; what the frame does not cover is transparent.
Raw decode_gif(Bytes file, Extent extent) {
  Raw raw;
  int code = 0;
  const std::unique_ptr<GifFileType, Close> gif(DGifOpen(&file, read_bytes, &code));
  if (!gif) fail(code);
  raw.size = {gif->SWidth, gif->SHeight};
  check_size(raw.size);
  if (extent == Extent::kHeader) return raw;

  int transparent = NO_TRANSPARENT_COLOR;
  for (;;) {
    GifRecordType type;
    if (DGifGetRecordType(gif.get(), &type) == GIF_ERROR) fail(gif->Error);
    if (type == IMAGE_DESC_RECORD_TYPE) break;
    if (type == TERMINATE_RECORD_TYPE) throw InputError("GIF: no picture in the file");
    if (type != EXTENSION_RECORD_TYPE) continue;
    int function = 0;
    GifByteType* block = nullptr;
    if (DGifGetExtension(gif.get(), &function, &block) == GIF_ERROR) fail(gif->Error);
    GraphicsControlBlock control;
    if (function == GRAPHICS_EXT_FUNC_CODE && block != nullptr &&
        DGifExtensionToGCB(block[0], block + 1, &control) == GIF_OK) {
      transparent = control.TransparentColor;
    }
    while (block != nullptr) {
      if (DGifGetExtensionNext(gif.get(), &block) == GIF_ERROR) fail(gif->Error);
    }
  }
  if (DGifGetImageDesc(gif.get()) == GIF_ERROR) fail(gif->Error);
  const GifImageDesc& frame = gif->Image;
  const ColorMapObject* colors = frame.ColorMap != nullptr ? frame.ColorMap : gif->SColorMap;
  if (colors == nullptr) throw InputError("GIF: no colour table");
  if (frame.Left < 0 || frame.Top < 0 || frame.Width < 1 || frame.Height < 1 ||
      frame.Left + frame.Width > gif->SWidth || frame.Top + frame.Height > gif->SHeight) {
    throw InputError("GIF: the first frame is outside its screen");
  }

  const bool whole = frame.Width == gif->SWidth && frame.Height == gif->SHeight;
  raw.kind = whole && transparent == NO_TRANSPARENT_COLOR ? Raw::Kind::kRgb : Raw::Kind::kRgba;
  raw.allocate();
  const auto channels = static_cast<size_t>(raw.channels());
  std::vector<GifPixelType> line(static_cast<size_t>(frame.Width));
  const auto read_row = [&](int y) {
    if (DGifGetLine(gif.get(), line.data(), frame.Width) == GIF_ERROR) fail(gif->Error);
    uint8_t* out =
        raw.data.data() + (static_cast<size_t>(frame.Top + y) * static_cast<size_t>(gif->SWidth) +
                           static_cast<size_t>(frame.Left)) *
                              channels;
    for (const auto index : line) {
      if (index >= colors->ColorCount) throw InputError("GIF: a colour outside its table");
      const GifColorType& color = colors->Colors[index];
      out[0] = color.Red, out[1] = color.Green, out[2] = color.Blue;
      if (channels == 4) out[3] = index == transparent ? 0 : 255;
      out += channels;
    }
  };
  if (frame.Interlace) {
    constexpr int kStart[] = {0, 4, 2, 1}, kStep[] = {8, 8, 4, 2};
    for (int pass = 0; pass < 4; ++pass) {
      for (int y = kStart[pass]; y < frame.Height; y += kStep[pass]) read_row(y);
    }
  } else {
    for (int y = 0; y < frame.Height; ++y) read_row(y);
  }
  return raw;
}

// A second picture before the end; what is damaged behind the first is not our matter.
bool gif_is_animated(Bytes file) {
  int code = 0;
  const std::unique_ptr<GifFileType, Close> gif(DGifOpen(&file, read_bytes, &code));
  if (!gif) return false;
  for (int pictures = 0;;) {
    GifRecordType type;
    GifByteType* block = nullptr;
    int ignored = 0;
    if (DGifGetRecordType(gif.get(), &type) == GIF_ERROR || type == TERMINATE_RECORD_TYPE)
      return false;
    if (type == IMAGE_DESC_RECORD_TYPE) {
      if (++pictures == 2) return true;
      if (DGifGetImageDesc(gif.get()) == GIF_ERROR ||
          DGifGetCode(gif.get(), &ignored, &block) == GIF_ERROR) {
        return false;
      }
      while (block != nullptr) {
        if (DGifGetCodeNext(gif.get(), &block) == GIF_ERROR) return false;
      }
    } else if (type == EXTENSION_RECORD_TYPE) {
      if (DGifGetExtension(gif.get(), &ignored, &block) == GIF_ERROR) return false;
      while (block != nullptr) {
        if (DGifGetExtensionNext(gif.get(), &block) == GIF_ERROR) return false;
      }
    }
  }
}

}  // namespace flux::image
