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

/// The same file, its tensors written in any order: for models whose blocks come by one at a time.
class ScatteredWriter {
 public:
  /// Throws as Writer does.
  ScatteredWriter(std::filesystem::path path,
                  std::vector<TensorSpec> tensors,
                  const Metadata& metadata);

  /// All bytes of a tensor, once. Throws std::invalid_argument for another name, a second time or another size;
  /// ResourceError: the disk is full.
  void write(std::string_view name, std::span<const std::byte> bytes);
  /// Throws std::invalid_argument if a tensor is missing.
  void commit();

 private:
  struct Place {
    uint64_t offset = 0, bytes = 0;
  };
  std::map<std::string, Place, std::less<>> places_;  // of what is not written yet
  std::string header_;
  AtomicFile file_;
};

}  // namespace flux::safetensors
