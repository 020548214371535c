// formats/safetensors/set_writer.h - weights as one file, or as shards with their index.
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

#include "formats/safetensors/writer.h"

namespace flux::safetensors {

/// Warns if the file is there and its metadata have `key`, which says that a program like this one made it. Throws
/// UsageError if it is there and they have not: it took somebody a day to download, maybe; or if it is a folder.
///   maker  for the message: "flux-model convert"
void require_replaceable(const std::filesystem::path& file,
                         const std::string& key,
                         std::string_view maker);

/// Where weights go.
struct SetPlace {
  /// NAME.safetensors, or a folder (any other name), in which they are called `base`.safetensors.
  std::filesystem::path out;
  std::string base = "model";
  /// Most bytes of tensors in a shard; 0: one file. A larger tensor has a shard of its own.
  uint64_t shard_bytes = 0;

  std::filesystem::path folder() const;
  /// Without ".safetensors".
  std::string name() const;
};

/// Writes tensors in any order. More than one shard are NAME-00001-of-0000N.safetensors, with
/// NAME.safetensors.index.json,
/// which appears last: {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}. Nothing has its name before
/// commit().
class SetWriter {
 public:
  /// The tensors fill shards in the order given. Throws as ScatteredWriter does; UsageError, as require_replaceable()
  /// does
  /// for each file that is to be written, and for weights of other names in the folder, which a reader would find too;
  /// ResourceError, before anything is written, if the disk has no room.
  ///   key, maker  as at require_replaceable()
  SetWriter(SetPlace place,
            const std::vector<TensorSpec>& tensors,
            const Metadata& metadata,
            const std::string& key,
            std::string_view maker);

  void write(std::string_view name, std::span<const std::byte> bytes);
  void commit();

  uint64_t total_bytes() const { return total_; }
  uint64_t written_bytes() const { return written_; }
  /// What to open: the file, or the index.
  std::filesystem::path path() const;
  size_t num_files() const { return files_.size(); }

 private:
  SetPlace place_;
  std::map<std::string, size_t, std::less<>> shard_of_;
  std::vector<std::string> names_;
  std::vector<std::unique_ptr<ScatteredWriter>> files_;
  uint64_t total_ = 0, written_ = 0, tensor_bytes_ = 0;
};

}  // namespace flux::safetensors
