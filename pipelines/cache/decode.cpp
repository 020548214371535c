#include "pipelines/cache/decode.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux::cache {
namespace {

constexpr size_t kMaxOpen = 32;

float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(half & 0x7FFF) << 13;
  if ((half & 0x7C00) == 0x7C00) return std::bit_cast<float>(sign | rest | 0x7F800000);
  return std::bit_cast<float>(sign |
                              std::bit_cast<uint32_t>(std::bit_cast<float>(rest) * 0x1p112f));
}

}  // namespace

std::shared_ptr<const Segment> Segments::of(const ListedSample& sample) {
  const std::lock_guard guard(lock_);
  auto found = std::ranges::find(open_, sample.file, [](const auto& entry) { return entry.first; });
  if (found == open_.end()) {
    open_.emplace_front(sample.file, with_repair_hint(folder_, [&] {
                          return std::make_shared<const Segment>(folder_ / sample.file);
                        }));
    if (open_.size() > kMaxOpen) open_.pop_back();
  } else {
    open_.splice(open_.begin(), open_, found);
  }
  const auto& segment = open_.front().second;
  const auto row = static_cast<size_t>(sample.row);
  if (row >= segment->samples().size() || segment->samples()[row].key != sample.info.key) {
    throw CacheError(show(folder_ / sample.file) + ": has changed while it was read",
                     "run this again when nothing else works on the folder");
  }
  return segment;
}

std::vector<NamedTensor> decode(Segments& segments, const ListedSample& sample) {
  const auto segment = segments.of(sample);
  const Layout& layout = segment->layout();
  auto tensors =
      with_repair_hint(segment->path().parent_path(), [&] { return segment->read(sample.row); });
  std::vector<NamedTensor> out;
  if (layout.kind == Kind::kText) {
    out.push_back({"t5", layout.dtype, {layout.t5_length, layout.t5_width}, std::move(tensors[0])});
    out.push_back({"clip", layout.dtype, {layout.clip_width}, std::move(tensors[1])});
    return out;
  }
  const std::vector<int64_t> size{sample.info.height, sample.info.width};
  constexpr int64_t kChannels = 16;  // of one of the two halves, and of a sample
  const std::vector<int64_t> shape{kChannels, size[0], size[1]};
  auto& latents = tensors[0];
  if (layout.channels == kChannels) {
    out.push_back({"latents", layout.dtype, shape, std::move(latents)});
  } else {
    const auto half = latents.begin() + static_cast<std::ptrdiff_t>(latents.size() / 2);
    out.push_back({"mean", layout.dtype, shape, {latents.begin(), half}});
    out.push_back({"logvar", layout.dtype, shape, {half, latents.end()}});
  }
  if (tensors.size() > 1) out.push_back({"mask", DType::kF32, size, std::move(tensors[1])});
  return out;
}

std::vector<float> as_floats(const NamedTensor& tensor) {
  const bool wide = tensor.dtype == DType::kF32;
  std::vector<float> out(tensor.bytes.size() / (wide ? 4 : 2));
  if (wide) {
    std::memcpy(out.data(), tensor.bytes.data(), tensor.bytes.size());
    return out;
  }
  for (size_t i = 0; i < out.size(); ++i) {
    uint16_t value;
    std::memcpy(&value, tensor.bytes.data() + 2 * i, sizeof value);
    out[i] = tensor.dtype == DType::kF16 ? from_f16(value)
                                         : std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
  }
  return out;
}

void require_readable(const Contents& contents) {
  if (!contents.problems.empty()) {
    throw CacheError(contents.problems[0], contents.hint);
  }
  if (!contents.kind) {
    throw CacheError(show(contents.folder) + ": holds no cache yet",
                     "give the folder that --out of a cache tool named");
  }
}

std::string sample_label(const ListedSample& sample, Kind kind) {
  if (kind == Kind::kText && !sample.info.text.empty()) return sample.info.text;
  if (kind == Kind::kLatents && sample.path && !sample.path->empty()) return *sample.path;
  return to_hex(sample.info.key);
}

}  // namespace flux::cache
