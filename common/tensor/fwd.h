// common/tensor/fwd.h - tensors by name only, for headers that pass them: a torch header costs
// seconds per file.
#pragma once
#include <cstdint>
#include <map>
#include <string>

namespace at {
class Tensor;
}
namespace c10 {
enum class ScalarType : int8_t;
struct Device;
}  // namespace c10

namespace flux {

/// Tensors by name, sorted by name.
using TensorMap = std::map<std::string, at::Tensor>;

}  // namespace flux
