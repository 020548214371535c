#include "pipelines/lora/lora_file.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <span>
#include <stdexcept>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "common/tensor/tensor.h"
#include "formats/checkpoint/checkpoint.h"
#include "formats/safetensors/set_writer.h"

namespace flux::lora_tools {
namespace fs = std::filesystem;
namespace {

constexpr char kMadeHere[] = "flux_stages.lora";

[[noreturn]] void rethrow_naming(const fs::path& path, const InputError& error) {
  throw InputError(show(path) + ": " + error.what());
}

/// Lets go of the whole pages of a range of a mapped file: they come back from the file.
void release_pages(std::span<const std::byte> range) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(range.data());
  const uintptr_t first = (begin + page - 1) / page * page,
                  last = (begin + range.size()) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

/// Tensors over the mapping. Not read_weights(): release() needs to know where they lie.
TensorMap tensors_of(const safetensors::FileSet& set) {
  TensorMap out;
  for (const auto& file : set.files)
    for (const safetensors::Tensor& tensor : file->tensors()) {
      if (!scalar_type(tensor.dtype))
        throw InputError(fmt::format("tensor '{}' has dtype {}, which is not supported",
                                     printable(tensor.name),
                                     dtype_name(tensor.dtype)),
                         "use a LoRA in BF16, F16 or F32");
      out.emplace(tensor.name, borrow(tensor.bytes, tensor.dtype, tensor.shape, file));
    }
  return out;
}

/// A mapping of a descriptor for the life of this object.
class Mapping {
 public:
  Mapping(int descriptor, size_t size) : size_(size) {
    if (size == 0) return;
    data_ = mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, 0);
    if (data_ == MAP_FAILED) throw ResourceError("what was computed cannot be read back");
  }
  ~Mapping() {
    if (size_ > 0) munmap(data_, size_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }

 private:
  void* data_ = nullptr;
  size_t size_;
};

}  // namespace

LoraInput::LoraInput(fs::path path, std::optional<dit::Config> config, double weight)
    : path_(std::move(path)), weight_(weight), set_(safetensors::open_set(path_)) {
  try {
    lora::add_peft_config(path_, set_.metadata);
    adapters_.emplace(tensors_of(set_), set_.metadata, std::move(config));
  } catch (const InputError& error) {
    rethrow_naming(path_, error);
  }
}

bool LoraInput::has(const std::string& module_path) const {
  return std::ranges::find(adapters_->targets(), module_path, &lora::Target::path) !=
         adapters_->targets().end();
}

lora::Entry LoraInput::entry(const std::string& module_path) const {
  try {
    return adapters_->entry(module_path);
  } catch (const InputError& error) {
    rethrow_naming(path_, error);
  }
}

void LoraInput::release() const {
  for (const auto& file : set_.files) {
    const auto& tensors = file->tensors();  // one behind the other
    if (tensors.empty()) continue;
    const std::byte* const begin = tensors.front().bytes.data();
    release_pages({begin, tensors.back().bytes.data() + tensors.back().bytes.size()});
  }
}

std::optional<c10::ScalarType> scalar_type_of(OutDType dtype) {
  switch (dtype) {
    case OutDType::kAuto:
      return std::nullopt;
    case OutDType::kBF16:
      return at::kBFloat16;
    case OutDType::kF16:
      return at::kHalf;
    case OutDType::kF32:
      return at::kFloat;
  }
  throw std::invalid_argument("no such dtype");
}

namespace {

/// The folder of the output, once it may be written.
fs::path folder_for(const fs::path& out, const std::vector<fs::path>& inputs) {
  std::error_code error;
  for (const fs::path& input : inputs)
    if (fs::equivalent(input, out, error))
      throw UsageError(show(out) + ": --out is a file that is read", "write to another file");
  safetensors::require_replaceable(out, kMadeHere, "flux-lora");
  return out.has_parent_path() ? out.parent_path() : fs::path(".");
}

}  // namespace

LoraOutput::LoraOutput(const OutputOptions& options,
                       lora::Layout layout,
                       const dit::Config& config,
                       const std::vector<fs::path>& inputs)
    : out_(options.out),
      layout_(layout),
      writer_(layout, config, scalar_type_of(options.dtype)),
      scratch_(folder_for(options.out, inputs), "tensors of the LoRA") {}

void LoraOutput::add(const std::string& name, const at::Tensor& tensor) {
  cancel::check();
  const at::Tensor t = tensor.contiguous();
  const auto bytes = host_bytes(t);
  scratch_.write(end_, bytes);
  specs_.push_back({name, dtype_of(t), t.sizes().vec()});
  offsets_.push_back(end_);
  end_ += static_cast<int64_t>(bytes.size());
}

void LoraOutput::write(const lora::Entry& entry) {
  writer_.write(entry, [this](const std::string& name, const at::Tensor& t) { add(name, t); });
}
void LoraOutput::write(const lora::TextModule& module) {
  writer_.write(module, [this](const std::string& name, const at::Tensor& t) { add(name, t); });
}
void LoraOutput::write_replaced(const std::string& name, const at::Tensor& tensor) {
  writer_.write_replaced(
      name, tensor, [this](const std::string& n, const at::Tensor& t) { add(n, t); });
}
void LoraOutput::write_embedding(const std::string& name, const at::Tensor& tensor) {
  writer_.write_embedding(
      name, tensor, [this](const std::string& n, const at::Tensor& t) { add(n, t); });
}

void LoraOutput::commit(lora::Metadata metadata) {
  if (specs_.empty()) throw InputError("nothing is left to write");
  metadata["format"] = "pt";
  metadata[kMadeHere] = fmt::format("flux-lora {}", tool_version());
  const Mapping mapping(scratch_.descriptor(), static_cast<size_t>(end_));
  std::vector<checkpoint::Tensor> tensors;
  std::map<std::string, std::span<const std::byte>> bytes;
  for (size_t i = 0; i < specs_.size(); ++i) {
    const auto size = safetensors::tensor_bytes(specs_[i].dtype, specs_[i].shape);
    const auto span = mapping.bytes().subspan(static_cast<size_t>(offsets_[i]), size);
    tensors.push_back({specs_[i], span});
    bytes[specs_[i].name] = span;
  }
  if (layout_ == lora::Layout::kSdScripts) {
    const auto hashes = checkpoint::lora_hashes(tensors, metadata);
    metadata["sshs_model_hash"] = hashes.model_hash;
    metadata["sshs_legacy_hash"] = hashes.legacy_hash;
    release_pages(mapping.bytes());
  }
  safetensors::Writer writer(out_, specs_, metadata);
  for (const auto& spec : writer.order()) {
    writer.write(spec.name, bytes.at(spec.name));
    release_pages(bytes.at(spec.name));
  }
  writer.commit();
}

lora::Metadata kept_metadata(const lora::Metadata& metadata) {
  lora::Metadata out = metadata;
  for (const char* key : {"lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash"})
    out.erase(key);
  return out;
}

void set_rank(lora::Metadata& metadata, const std::vector<int64_t>& ranks) {
  if (ranks.empty()) return;
  const auto [low, high] = std::ranges::minmax(ranks);
  metadata["ss_network_dim"] = low == high ? std::to_string(low) : "Dynamic";
  metadata["ss_network_alpha"] = low == high ? fmt::format("{}.0", low) : "Dynamic";
}

dit::Config common_config(const std::vector<std::unique_ptr<LoraInput>>& inputs) {
  dit::Config config = inputs.at(0)->adapters().config();
  for (const auto& input : inputs) {
    const dit::Config& c = input->adapters().config();
    if (c.hidden != config.hidden)
      throw InputError(fmt::format("{} is of a model of width {}, {} of one of width {}",
                                   show(inputs[0]->path()),
                                   config.hidden,
                                   show(input->path()),
                                   c.hidden));
    const auto blocks = std::pair(std::max(config.num_double_blocks, c.num_double_blocks),
                                  std::max(config.num_single_blocks, c.num_single_blocks));
    // what a file does not tell is FLUX.1-dev's, so that what differs from it was told
    const dit::Config plain;
    const auto take = [](int64_t& to, int64_t value, int64_t untold) {
      if (to == untold) to = value;
    };
    take(config.mlp, c.mlp, 4 * config.hidden);
    take(config.in_channels, c.in_channels, plain.in_channels);
    take(config.out_channels, c.out_channels, plain.out_channels);
    take(config.prompt_dim, c.prompt_dim, plain.prompt_dim);
    take(config.pooled_dim, c.pooled_dim, plain.pooled_dim);
    take(config.sinusoid_dim, c.sinusoid_dim, plain.sinusoid_dim);
    std::tie(config.num_double_blocks, config.num_single_blocks) = blocks;
  }
  return config;
}

std::vector<lora::Target> all_adapted(const std::vector<std::unique_ptr<LoraInput>>& inputs,
                                      const dit::Config& config) {
  std::vector<lora::Target> out;
  for (const lora::Target& target : lora::all_targets(config)) {
    bool adapted = false;
    for (const auto& input : inputs) {
      const auto& targets = input->adapters().targets();
      const auto found = std::ranges::find(targets, target.path, &lora::Target::path);
      if (found == targets.end()) continue;
      adapted = true;
      if (found->in != target.in || found->out != target.out)
        throw InputError(
            fmt::format("{}: {} is [{}, {}], expected [{}, {}]: the LoRAs are of other models",
                        show(input->path()),
                        target.path,
                        found->out,
                        found->in,
                        target.out,
                        target.in));
    }
    if (adapted) out.push_back(target);
  }
  return out;
}

}  // namespace flux::lora_tools
