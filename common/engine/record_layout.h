// common/engine/record_layout.h - a record: the tensors of one block in one piece of memory.
//
//   RecordLayout layout;
//   const size_t qkv = layout.add("img_attn.qkv.weight", {3 * H, H}, at::kBFloat16);
//   at::Tensor record = at::empty({layout.bytes()}, at::kByte);   // or a region of a ring
//   at::Tensor weight = layout.view(record, qkv);                 // [3H, H] bfloat16
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace flux::engine {

/// Slices begin at multiples of this.
inline constexpr int64_t kSliceAlignment = 64;
/// Records are as long as a multiple of this, so that files of them can be read past the page cache.
inline constexpr int64_t kRecordAlignment = 4096;

/// One tensor of a record, contiguous.
struct Slice {
  std::string name;
  std::vector<int64_t> shape;
  c10::ScalarType dtype{};
  int64_t offset = 0, bytes = 0;
  int64_t end() const { return offset + bytes; }
};

class RecordLayout {
 public:
  /// Slices begin at multiples of `alignment`, and the record is as long as a multiple of `multiple`, which are multiples
  /// of the constants above.
  explicit RecordLayout(int64_t alignment = kSliceAlignment, int64_t multiple = kRecordAlignment)
      : alignment_(alignment), multiple_(multiple) {}

  /// Appends a tensor; returns its index. Throws std::invalid_argument for a name that is there, or
  /// a shape with a negative length.
  size_t add(std::string name, std::vector<int64_t> shape, c10::ScalarType dtype);

  const std::vector<Slice>& slices() const { return slices_; }
  /// 0 without slices.
  int64_t bytes() const;
  std::optional<size_t> find(std::string_view name) const;

  /// The tensor in a record, which it shares the memory with and keeps alive. It has a version
  /// counter of its own, so that an in-place step on one slice does not disturb the graph of
  /// another.
  ///
  ///   record  uint8 [>= bytes()], contiguous, on any device (Meta too), aligned to
  ///           kSliceAlignment
  ///
  /// Throws std::invalid_argument for another record.
  at::Tensor view(const at::Tensor& record, size_t index) const;
  /// The same by name; throws std::invalid_argument if there is none.
  at::Tensor view(const at::Tensor& record, std::string_view name) const;

 private:
  int64_t alignment_, multiple_;
  std::vector<Slice> slices_;
};

}  // namespace flux::engine
