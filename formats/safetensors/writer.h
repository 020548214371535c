// formats/safetensors/writer.h - writes safetensors files tensor by tensor, so that no model is in
// memory twice.
#pragma once
#include <cstddef>
#include <filesystem>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/core/dtype.h"
#include "common/core/file.h"
#include "formats/safetensors/reader.h"

namespace flux::safetensors {

/// A tensor to be written: what the header says of it.
struct TensorSpec {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
};

/// {"format": "pt"}: transformers refuses files without it.
Metadata pt_metadata();

/// The order of tensors in a file. Throws std::invalid_argument for a name twice.
std::vector<TensorSpec> in_file_order(std::vector<TensorSpec> tensors);
/// What a Writer of the same arguments writes before the tensors: the length word and the padded
/// JSON. Throws as it does.
std::string header_bytes(std::vector<TensorSpec> tensors, const Metadata& metadata);

/// The header is written at once, the tensors' bytes one after the other, and the file appears
/// under its name on commit() only (temporary file, flush, rename). Equal input gives equal bytes:
/// metadata by key, tensors sorted by element size (largest first), then dtype, then name; the
/// header is padded with spaces to a multiple of 8.
class Writer {
 public:
  /// Throws std::invalid_argument: a name twice or "__metadata__", text that is not UTF-8, a
  /// negative or overflowing shape, a header above kMaxHeaderBytes. ResourceError: the file cannot
  /// be made.
  Writer(std::filesystem::path path, std::vector<TensorSpec> tensors, const Metadata& metadata);

  /// The order in which tensors must be written.
  const std::vector<TensorSpec>& order() const { return order_; }
  /// Bytes of the next tensor of order(), all at once or in pieces under the same name. Throws
  /// std::invalid_argument if it is not that tensor's turn or the bytes are too many;
  /// ResourceError: the disk is full.
  void write(std::string_view name, std::span<const std::byte> bytes);
  /// Throws std::invalid_argument if a tensor is missing or short.
  void commit();

 private:
  void skip_full();
  std::vector<TensorSpec> order_;
  std::string header_;  // before file_: what cannot be written makes no temporary file
  AtomicFile file_;
  size_t next_ = 0;       // index in order_ of the tensor being written
  uint64_t written_ = 0;  // bytes of it so far
};

/// The same file, its tensors written in any order, whole or in parts: for models whose blocks come by one at a time.
///
/// Several processes may write one file, each its parts, and one makes and commits it:
///
///   one: ScatteredWriter writer(path, tensors, metadata);       others: ScatteredWriter writer(path, tensors, shared);
///        shared = writer.share();                                       writer.write_part(...);
///        writer.write_part(...);                                        written = writer.leave();
///        writer.add_written(written);  // of each of the others
///        writer.commit();
class ScatteredWriter {
 public:
  /// A range of the tensors' bytes, which lie one behind the other.
  struct Range {
    uint64_t begin = 0, end = 0;
  };
  /// What the others must know of a file.
  struct Shared {
    std::string temporary;    // its name now, beside the final one
    uint64_t data_begin = 0;  // in the file, of the tensors' bytes
  };

  /// Throws as Writer does.
  ScatteredWriter(std::filesystem::path path,
                  std::vector<TensorSpec> tensors,
                  const Metadata& metadata);
  /// Opens what another process shares; `tensors` are those it has. Throws ResourceError if it is not there.
  ScatteredWriter(std::filesystem::path path,
                  std::vector<TensorSpec> tensors,
                  const Shared& shared);

  /// All bytes of a tensor, once. Throws std::invalid_argument for another name, a second time or another size;
  /// ResourceError: the disk is full.
  void write(std::string_view name, std::span<const std::byte> bytes);
  /// Bytes of a tensor from `first` on, each once. Throws the same, also for bytes beyond the tensor's end.
  void write_part(std::string_view name, uint64_t first, std::span<const std::byte> bytes);

  /// For others, which may open the file from now on.
  Shared share();
  /// Ends a file that another process commits: all is on the disk. Returns what was written, in ascending order.
  std::vector<Range> leave();
  /// What another process wrote. Throws std::invalid_argument that names a tensor of which it was written already.
  void add_written(std::span<const Range> ranges);
  /// Throws std::invalid_argument if a byte is missing.
  void commit();

 private:
  struct Place {
    uint64_t begin = 0, bytes = 0;
  };
  void place(std::vector<TensorSpec> tensors);
  const Place& place_of(std::string_view name) const;
  std::string_view tensor_at(uint64_t begin) const;
  void claim(Range range);

  std::filesystem::path path_;
  std::map<std::string, Place, std::less<>> places_;
  std::map<uint64_t, uint64_t> written_;  // ends by begins; ranges that touch are one
  uint64_t data_bytes_ = 0;
  std::string header_;  // of a file that was made here
  uint64_t data_begin_ = 0;
  AtomicFile file_;
};

}  // namespace flux::safetensors
