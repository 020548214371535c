#include "pipelines/check/quant.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <string>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/quant/quant_cpu.h"
#include "common/tensor/tensor.h"

namespace flux::check {
namespace {

using kernel::QuantBlocks;

/// NaN has many bits, and any of them will do.
at::Tensor one_nan(const at::Tensor& values) { return values.masked_fill(values.isnan(), NAN); }

const at::Tensor& floats(const at::Tensor& tensor, const std::string& name, const Case& c) {
  if (tensor.scalar_type() != at::kFloat)
    throw InputError(show(c.folder / "fp8_e4m3.safetensors") + ": " + name + " is not F32");
  return tensor;
}

void check_scaled(const Case& c,
                  const TensorMap& v,
                  const std::string& prefix,
                  const at::Tensor& x,
                  const QuantBlocks& blocks) {
  const at::Tensor codes = at::empty(x.sizes(), at::kByte), back = at::empty_like(x),
                   scales = at::empty({blocks.count()}, at::kFloat);
  kernel::fp8_quantize_cpu(blocks,
                           0,
                           blocks.count(),
                           x.const_data_ptr<float>(),
                           codes.mutable_data_ptr<uint8_t>(),
                           scales.mutable_data_ptr<float>());
  kernel::fp8_dequantize_cpu(blocks,
                             0,
                             blocks.count(),
                             codes.const_data_ptr<uint8_t>(),
                             scales.const_data_ptr<float>(),
                             back.mutable_data_ptr<float>());
  const auto compare = [&](const char* part, const at::Tensor& got) {
    if (const auto it = v.find(prefix + part); it != v.end())
      c.report->equal("fp8_e4m3 " + prefix + part,
                      it->second.numel() == got.numel() ? got.view(it->second.sizes()) : got,
                      it->second);
  };
  compare("scale", scales);
  compare("q", codes);
  compare("deq", back);
}

}  // namespace

void check_fp8(const Case& c) {
  const TensorMap v = c.read_tensors("fp8_e4m3.safetensors");
  if (const auto it = v.find("table"); it != v.end()) {
    const at::Tensor table = at::empty({256}, at::kFloat);
    for (int code = 0; code < 256; ++code)
      table.mutable_data_ptr<float>()[code] = kernel::fp8_value(static_cast<uint8_t>(code));
    c.report->equal("fp8_e4m3 table", one_nan(table), one_nan(it->second));
  }
  for (const auto& [name, tensor] : v) {
    if (!name.ends_with("/x")) continue;
    const std::string prefix = name.substr(0, name.size() - 1);
    const at::Tensor x = floats(tensor, name, c).contiguous();
    if (x.dim() == 2) {
      const int64_t rows = x.size(0), in = x.size(1);
      check_scaled(c, v, prefix + "tensor/", x, {1, x.numel(), x.numel()});
      check_scaled(c, v, prefix + "channel/", x, {rows, in, in});
      check_scaled(c, v, prefix + "block64/", x, {rows, in, 64});
    }
    const at::Tensor codes = at::empty(x.sizes(), at::kByte);
    for (int64_t i = 0; i < x.numel(); ++i)
      codes.mutable_data_ptr<uint8_t>()[i] = kernel::fp8_code(x.const_data_ptr<float>()[i]);
    for (const char* part : {"clamped_cast", "raw_cast"})  // beyond 448 both become 448
      if (const auto it = v.find(prefix + part); it != v.end())
        c.report->equal("fp8_e4m3 " + prefix + part, codes, it->second);
  }
}

}  // namespace flux::check
