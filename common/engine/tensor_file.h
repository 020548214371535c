// common/engine/tensor_file.h - the tensors of a weight file, read by pread: nothing of it counts as resident.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/core/hash.h"
#include "common/engine/record_file.h"
#include "common/engine/record_layout.h"
#include "common/models/weights/weights.h"
#include "common/tensor/weight_file.h"

namespace flux::engine {

/// A range of one file of a set.
struct Piece {
  size_t file = 0;
  int64_t offset = 0, bytes = 0;
};

/// A tensor as stored.
struct StoredTensor {
  c10::ScalarType dtype{};
  std::vector<int64_t> shape;
  std::vector<Piece> pieces;  // its bytes, in their order

  int64_t bytes() const;
};

/// Part of a record in memory.
struct RecordPart {
  int64_t begin = 0, end = 0;  // in the record
  std::byte* data = nullptr;

  std::byte* at(int64_t offset) const { return data + (offset - begin); }
  /// What of [from, to) belongs here, as a range of the record; begin >= end if nothing does.
  std::pair<int64_t, int64_t> overlap(int64_t from, int64_t to) const;
  /// Copies what of [offset, offset + bytes.size()) belongs here.
  void put(int64_t offset, std::span<const std::byte> bytes) const;
  /// Zeros what of [from, to) belongs here.
  void clear(int64_t from, int64_t to) const;
};

/// A file, a sharded set or a folder of it. All functions that read are for any thread and throw InputError naming the file
/// if it ends early or cannot be read.
class TensorFile {
 public:
  /// Reads the headers. Throws InputError: what safetensors::open_set refuses, a dtype that is not supported, a file that
  /// changes while it is opened.
  TensorFile(const std::filesystem::path& path, FileAccess access);
  ~TensorFile();

  /// What read_weights() gives, but for the values: a tensor has its dtype, its shape and an address that stands for its
  /// place in the file. Nobody may read through it.
  const WeightFile& contents() const { return contents_; }
  /// Where a tensor of contents(), or one that shares its whole memory, is stored.
  Piece place(const at::Tensor& stand_in) const;
  StoredTensor stored(const at::Tensor& stand_in) const;

  /// Bytes [begin, begin + to.size()) of a tensor as stored.
  void read_bytes(const StoredTensor& tensor, int64_t begin, std::span<std::byte> to) const;
  /// Values [first, first + count) in `dtype`, to memory aligned for it.
  void read_values(const StoredTensor& tensor,
                   int64_t first,
                   int64_t count,
                   c10::ScalarType dtype,
                   std::byte* to) const;
  /// What a slice has in a part of its record; the part's edges lie between values.
  void read_slice(const StoredTensor& tensor, const Slice& slice, const RecordPart& part) const;
  /// Asks the system to read it ahead.
  void prefetch(const StoredTensor& tensor) const;
  /// Memory that read_values() holds while it converts, and of reading itself.
  static int64_t conversion_bytes(const StoredTensor& tensor, c10::ScalarType dtype);
  int64_t staging_bytes() const;

  /// flux::weights_sha256 of tensors by canonical name, remembered like remembered_weights_sha256(contents().stamps, net,
  /// ...).
  Sha256Digest weights_sha256(std::string_view net,
                              const std::map<std::string, StoredTensor>& tensors,
                              bool rehash) const;

 private:
  WeightFile contents_;
  std::vector<std::unique_ptr<RecordFile>> files_;
  std::map<const std::byte*, Piece> places_;
};

/// Values converted or quantised at a time: float32 from the file, bfloat16, codes and scales are 1.8 MiB. A multiple of
/// kQuantBlock.
inline constexpr int64_t kChunkValues = int64_t{1} << 18;

}  // namespace flux::engine
