#include "common/engine/share_layout.h"

#include <algorithm>
#include <stdexcept>

#include "common/optim/norm.h"

namespace flux::engine {

static_assert(kShareGranule % kSquaresPart == 0);

RecordLayout shared_layout(const RecordLayout& layout, int64_t world) {
  const auto type = layout.slices().at(0).dtype;
  const auto granule = kShareGranule * static_cast<int64_t>(c10::elementSize(type));
  RecordLayout shared(granule, granule * world);
  for (const Slice& slice : layout.slices()) {
    if (slice.dtype != type)
      throw std::invalid_argument("shared_layout: tensors of several dtypes");
    shared.add(slice.name, slice.shape, slice.dtype);
  }
  return shared;
}

Share make_share(const RecordLayout& layout,
                 const std::vector<Trainable>& trainables,
                 int64_t world,
                 int64_t rank) {
  const auto size = static_cast<int64_t>(c10::elementSize(layout.slices().at(0).dtype));
  Share share;
  share.elements = layout.bytes() / size / world;
  const int64_t first = share.elements * rank, last = first + share.elements;
  for (size_t i = 0; i < trainables.size(); ++i) {
    const Slice& slice = layout.slices()[i];
    const Share::Range range{slice.offset / size, slice.bytes / size};
    share.tensors.push_back(range);
    const int64_t begin = std::max(first, range.begin),
                  end = std::min(last, range.begin + range.count);
    if (begin >= end) continue;
    Trainable part = trainables[i];
    part.offset = begin - range.begin;
    part.whole = slice.shape;
    share.owned.push_back(std::move(part));
    share.begins.push_back(begin - first);
    share.counts.push_back(end - begin);
  }
  return share;
}

at::Tensor owned_view(const Share& share, size_t i, const at::Tensor& part, c10::ScalarType dtype) {
  const auto size = static_cast<int64_t>(c10::elementSize(dtype));
  return part.narrow(0, share.begins[i] * size, share.counts[i] * size).view(dtype).variable_data();
}

}  // namespace flux::engine
