// pipelines/lora/lora_file.h - adapter files in and out, a layer at a time.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/core/scratch_file.h"
#include "common/models/lora/layouts.h"
#include "common/models/lora/weighted_file.h"
#include "formats/safetensors/reader.h"
#include "formats/safetensors/writer.h"
#include "pipelines/lora/options.h"

namespace flux::lora_tools {

/// An adapter file, mapped.
class LoraInput {
 public:
  /// Throws InputError naming the file, as AdapterFile does.
  explicit LoraInput(std::filesystem::path path,
                     std::optional<dit::Config> config = std::nullopt,
                     double weight = 1);

  const std::filesystem::path& path() const { return path_; }
  double weight() const { return weight_; }
  const lora::AdapterFile& adapters() const { return *adapters_; }
  const lora::Metadata& metadata() const { return set_.metadata; }
  bool has(const std::string& module_path) const;
  /// Lets go of what was read so far, so that it does not count as resident; it is read again where it is needed.
  void release() const;
  /// entry() of the adapters. Throws InputError naming the file.
  lora::Entry entry(const std::string& module_path) const;

 private:
  std::filesystem::path path_;
  double weight_;
  safetensors::FileSet set_;
  std::optional<lora::AdapterFile> adapters_;
};

/// Nothing for kAuto.
std::optional<c10::ScalarType> scalar_type_of(OutDType dtype);

/// An adapter file being written: tensors come in any order and wait in a scratch file beside it.
class LoraOutput {
 public:
  /// Throws UsageError if `out` is there and was not made by flux-lora, or is one of `inputs`.
  LoraOutput(const OutputOptions& options,
             lora::Layout layout,
             const dit::Config& config,
             const std::vector<std::filesystem::path>& inputs);

  void write(const lora::Entry& entry);
  void write(const lora::TextModule& module);
  void write_replaced(const std::string& name, const at::Tensor& tensor);
  void write_embedding(const std::string& name, const at::Tensor& tensor);

  lora::Layout layout() const { return layout_; }
  size_t num_tensors() const { return specs_.size(); }
  uint64_t bytes() const { return static_cast<uint64_t>(end_); }
  /// Writes the file. `metadata`: format, the maker and, in the layout of sd-scripts, its hashes are added. Throws
  /// InputError if nothing was written.
  void commit(lora::Metadata metadata);

 private:
  void add(const std::string& name, const at::Tensor& tensor);

  std::filesystem::path out_;
  lora::Layout layout_;
  lora::LayoutWriter writer_;
  ScratchFile scratch_;
  std::vector<safetensors::TensorSpec> specs_;
  std::vector<int64_t> offsets_;
  int64_t end_ = 0;
};

/// Metadata that stay true of the same adapters in another layout: without hashes of the file and PEFT's configuration.
lora::Metadata kept_metadata(const lora::Metadata& metadata);
/// ss_network_dim and ss_network_alpha of what was resized or made: the rank of all, or "Dynamic" where they differ.
void set_rank(lora::Metadata& metadata, const std::vector<int64_t>& ranks);

/// The layers that any of `inputs` adapts, in the order of the model. Throws InputError if they are of different
/// models, naming both sizes.
dit::Config common_config(const std::vector<std::unique_ptr<LoraInput>>& inputs);
std::vector<lora::Target> all_adapted(const std::vector<std::unique_ptr<LoraInput>>& inputs,
                                      const dit::Config& config);

}  // namespace flux::lora_tools
