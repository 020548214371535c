// Any bytes as a safetensors file: refused, or read such that tensors tile the data and every byte
// of them can be read.
#include <cstdint>
#include <cstdlib>
#include <span>

#include "common/core/error.h"
#include "formats/safetensors/reader.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace flux;
  try {
    const auto contents = safetensors::parse(std::as_bytes(std::span(data, size)), "input");
    uint64_t covered = 0;
    unsigned sum = 0;
    for (const safetensors::Tensor& tensor : contents.tensors) {
      if (tensor.begin != covered ||
          tensor.bytes.size() != safetensors::tensor_bytes(tensor.dtype, tensor.shape))
        std::abort();
      covered = tensor.end;
      for (const std::byte byte : tensor.bytes) sum += std::to_integer<unsigned>(byte);
    }
    asm volatile("" ::"r"(sum));  // keeps the reads
  } catch (const InputError&) {
  }
  return 0;
}
