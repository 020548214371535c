#include "common/tensor/weight_file.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/tensor/tensor.h"
#include "formats/safetensors/reader.h"
#include "formats/safetensors/writer.h"

namespace flux {

WeightFile read_weights(const std::filesystem::path& path) {
  safetensors::FileSet set = safetensors::open_set(path);
  WeightFile weights{path, {}, {}, std::move(set.metadata)};
  for (const auto& file : set.files) {
    weights.stamps.push_back(file->stamp());
    for (const safetensors::Tensor& tensor : file->tensors()) {
      if (!scalar_type(tensor.dtype)) {
        throw InputError(fmt::format("{}: tensor '{}' has dtype {}, which is not supported",
                                     show(file->path()),
                                     printable(tensor.name),
                                     dtype_name(tensor.dtype)),
                         "use weights in BF16, F16, F32 or plain F8_E4M3");
      }
      weights.tensors.emplace(tensor.name, borrow(tensor.bytes, tensor.dtype, tensor.shape, file));
    }
  }
  return weights;
}

void write_weights(const std::filesystem::path& path,
                   const TensorMap& tensors,
                   const std::map<std::string, std::string>& metadata) {
  std::vector<safetensors::TensorSpec> specs;
  for (const auto& [name, tensor] : tensors)
    specs.push_back({name, dtype_of(tensor), tensor.sizes().vec()});
  safetensors::Writer writer(path, std::move(specs), metadata);
  for (const auto& [name, dtype, shape] : writer.order())
    writer.write(name, host_bytes(tensors.at(name).contiguous()));
  writer.commit();
}

}  // namespace flux
