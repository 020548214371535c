// formats/safetensors/reader.h - strict, zero-copy reading of safetensors files, single and
// sharded.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/core/dtype.h"
#include "common/core/file.h"

namespace flux::safetensors {

using Shape = std::vector<int64_t>;
using Metadata = std::map<std::string, std::string>;

/// Bytes of a tensor; throws std::invalid_argument if the product overflows or is no whole number
/// of bytes.
uint64_t tensor_bytes(DType dtype, std::span<const int64_t> shape);

/// One tensor of a file. `bytes` is row-major, little-endian, of any alignment, and lives as long
/// as what it was read from.
struct Tensor {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
  uint64_t begin = 0, end = 0;  // range in the file's data part
  std::span<const std::byte> bytes;
};

/// What a file says, in the order of its bytes.
struct Contents {
  std::vector<Tensor> tensors;
  Metadata metadata;
};

inline constexpr uint64_t kMaxHeaderBytes = 100'000'000;
inline constexpr int64_t kMaxTensors = 1'000'000;
inline constexpr int64_t kMaxRank = 64;

/// Reads a whole file held in memory. Strict: header of 2 to kMaxHeaderBytes bytes inside the file,
/// starting with '{', valid UTF-8 and JSON, padded with spaces only, no key twice at any level; an
/// entry has exactly dtype, shape and data_offsets (further fields are refused); counts are plain
/// non-negative integers below 2^63; tensors cover the data part without holes or overlaps and have
/// the size that dtype and shape say; metadata maps strings to strings (null is refused). Throws
/// InputError that starts with `where` and names the rule broken; files of other kinds (pickle,
/// GGUF, web pages, Git LFS pointers) are named as what they are. Source: safetensors format
/// description (huggingface/safetensors README).
Contents parse(std::span<const std::byte> file, std::string_view where);

/// One file, mapped. Tensors' bytes point into the mapping.
class File {
 public:
  /// Throws InputError, as parse() and MappedFile do.
  static std::shared_ptr<const File> open(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return mapping_.path(); }
  const FileStamp& stamp() const { return mapping_.stamp(); }
  const std::vector<Tensor>& tensors() const { return contents_.tensors; }
  const Metadata& metadata() const { return contents_.metadata; }
  /// nullptr if there is none of that name.
  const Tensor* find(std::string_view name) const;

 private:
  explicit File(const std::filesystem::path& path);
  MappedFile mapping_;
  Contents contents_;
  std::map<std::string_view, const Tensor*> by_name_;
};

/// The files that hold one set of weights.
struct FileSet {
  std::vector<std::shared_ptr<const File>> files;  // in the order of their names
  Metadata metadata;                               // of all files; the first that names a key wins
};

/// Opens one file; a sharded set by its *.safetensors.index.json or by its first shard
/// (NAME-00001-of-0000N.safetensors); or a folder that holds exactly one index or one file. Throws
/// InputError if a tensor is in two shards, a shard of the set is absent, or index and shards
/// disagree (a tensor in one only, or in another shard; a shard name that is not a plain name);
/// only warns if the index's total_size is not the sum of tensor bytes. Source:
/// huggingface/transformers, modeling_utils.py.
FileSet open_set(const std::filesystem::path& path);

}  // namespace flux::safetensors
