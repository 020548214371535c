// common/engine/model_file.h - a FLUX transformer's file as records, a block each, read by pread.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/engine/record_file.h"
#include "common/engine/record_layout.h"
#include "common/engine/record_store.h"
#include "common/models/flux/config.h"
#include "common/quant/quant.h"

namespace flux::engine {

/// "double_blocks.3." or "single_blocks.3.", by the number of a block in forward order (double
/// blocks first).
std::string block_prefix(const dit::Config& config, int64_t block);

/// The tensors of a block in the order of dit::tensor_shapes(), named as there without the prefix:
/// "img_attn.qkv.weight". With `quant`, weights that it covers (is_quantized_name) are two
/// slices: codes under the weight's name, float32 scales under scale_name(), right behind.
///   dtype  of everything else
RecordLayout block_layout(const dit::Config& config,
                          int64_t block,
                          c10::ScalarType dtype,
                          std::optional<QuantFormat> quant = std::nullopt);

struct ModelFileOptions {
  /// Of the tensors in records that are not quantised.
  c10::ScalarType dtype = c10::ScalarType::BFloat16;
  /// Quantises the blocks' matrices while they are read. Not needed for a file that is quantised
  /// already: its codes and scales are read as they are.
  std::optional<QuantFormat> quant = std::nullopt;
  FileAccess access = kDefaultFileAccess;
};

/// Record i is block i in forward order, double blocks first. The bytes are those of
/// canonical_tensors() and to_dtype() (or quantize() of their bfloat16 values), whatever the layout
/// of the file: BFL or diffusers, one file or shards, alone or in an all-in-one file, in bf16, fp16,
/// fp32 or plain fp8. Nothing is read through a mapping, so nothing of the file counts as resident.
class ModelFile final : public RecordStore {
 public:
  /// Reads the headers. Throws InputError: what read_weights, take_net, read_config and
  /// canonical_tensors refuse; a file that changes while it is opened; a quantised file of another
  /// format than asked for.
  explicit ModelFile(const std::filesystem::path& path, const ModelFileOptions& options = {});
  ~ModelFile() override;

  const dit::Config& config() const;
  const std::filesystem::path& path() const;
  const std::vector<FileStamp>& stamps() const;
  const std::map<std::string, std::string>& metadata() const;
  /// What the records are quantised to: asked for, or how the file is.
  std::optional<QuantFormat> quant() const;
  /// Of record `index`.
  const RecordLayout& layout(int64_t index) const;

  int64_t num_records() const override;
  int64_t record_bytes(int64_t index) const override;
  using RecordStore::read;
  /// Throws InputError naming the file if it ends early or cannot be read.
  void read(int64_t index, int64_t offset, std::span<std::byte> to) const override;
  void prefetch(int64_t index) const override;
  std::vector<std::pair<int64_t, int64_t>> parts(int64_t index, int64_t max_bytes) const override;
  int64_t staging_bytes() const override;

  /// Any tensor by its BFL name ("img_in.weight"), into a contiguous CPU tensor of its shape, in
  /// the tensor's dtype. Throws std::invalid_argument for an unknown name, another shape, or a
  /// matrix that the file holds quantised.
  void read_tensor(const std::string& name, const at::Tensor& to) const;

  /// flux::weights_sha256 of the tensors as stored, remembered like
  /// remembered_weights_sha256(stamps(), "flux", ...), and read by pread. Throws InputError.
  Sha256Digest weights_sha256(bool rehash = false) const;

 private:
  struct Impl;
  std::unique_ptr<const Impl> impl_;
};

}  // namespace flux::engine
