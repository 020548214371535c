// common/cuda/register.cpp - the CUDA faces of the project's ops: LibTorch tensors on this side,
// the torch-free kernels of the .cu files on the other.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>

#include "common/ops/qk_norm_rope_cuda.h"
#include "common/ops/qk_norm_rope_impl.h"
#include "common/ops/rows_cuda.h"
#include "common/ops/rows_impl.h"
#include "common/optim/adamw_cuda.h"
#include "common/optim/adamw_scalars.h"
#include "common/optim/blockwise8.h"
#include "common/optim/op_arguments.h"
#include "common/optim/optimizer_cuda.h"
#include "common/quant/quant_cuda.h"
#include "common/quant/quant_impl.h"

/// Asked by common/tensor/device.cpp after it has opened this library.
extern "C" int flux_cuda_device_count() { return static_cast<int>(c10::cuda::device_count()); }

namespace {
std::atomic<int> used_gpu = 0;  // threads begin at the first one
}

/// Asked by common/tensor/device.cpp: the one GPU of this process.
extern "C" void flux_cuda_use(int device) {
  used_gpu = device;
  c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
}

/// Asked by common/tensor/device.cpp.
extern "C" int64_t flux_cuda_free_bytes(int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(std::max(device, 0)));
  size_t free = 0, all = 0;
  C10_CUDA_CHECK(cudaMemGetInfo(&free, &all));
  return static_cast<int64_t>(free);
}

/// Asked by common/engine/record_store.cpp: pins host memory, so that copies to the GPU do not wait for the CPU.
/// Whether that worked; it may not, by the limit on locked memory.
extern "C" int flux_cuda_pin(void* memory, size_t bytes) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(used_gpu.load()));
  if (cudaHostRegister(memory, bytes, cudaHostRegisterPortable) == cudaSuccess) return 1;
  cudaGetLastError();  // the next call shall not see it
  return 0;
}
extern "C" int flux_cuda_unpin(void* memory) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(used_gpu.load()));
  if (cudaHostUnregister(memory) == cudaSuccess) return 1;
  cudaGetLastError();
  return 0;
}

namespace flux {
namespace {

// More rows a warp than this save nothing, and the partial sums of the scales' gradient stay small:
// 1 kB for 64 rows.
constexpr int64_t kRowsPerGroup = 64;

kernel::QkvTuple qk_norm_rope(const at::Tensor& qkv,
                              const at::Tensor& query_scale,
                              const at::Tensor& key_scale,
                              const at::Tensor& cos,
                              const at::Tensor& sin,
                              double eps) {
  const c10::cuda::CUDAGuard guard(qkv.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto launch = [&](const auto& args) {
    C10_CUDA_CHECK(kernel::qk_norm_rope_cuda(args, stream));
  };
  return kernel::run_forward<kernel::Bf16>(qkv, query_scale, key_scale, cos, sin, eps, launch);
}

std::tuple<at::Tensor, at::Tensor> qk_norm_rope_backward(const at::Tensor& grad_q,
                                                         const at::Tensor& grad_k,
                                                         const at::Tensor& grad_v,
                                                         const at::Tensor& qkv,
                                                         const at::Tensor& query_scale,
                                                         const at::Tensor& key_scale,
                                                         const at::Tensor& cos,
                                                         const at::Tensor& sin,
                                                         double eps,
                                                         bool want_scales) {
  const c10::cuda::CUDAGuard guard(qkv.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto launch = [&](const auto& args) {
    C10_CUDA_CHECK(kernel::qk_norm_rope_backward_cuda(args, stream));
  };
  return kernel::run_backward<kernel::Bf16>({grad_q, grad_k, grad_v},
                                            qkv,
                                            query_scale,
                                            key_scale,
                                            cos,
                                            sin,
                                            eps,
                                            want_scales,
                                            kRowsPerGroup,
                                            launch);
}

void adamw_step(const at::Tensor& parameter,
                const at::Tensor& gradient,
                const at::Tensor& exp_avg,
                const at::Tensor& exp_avg_sq,
                double learning_rate,
                double beta1,
                double beta2,
                double eps,
                double weight_decay,
                int64_t step) {
  const c10::cuda::CUDAGuard guard(parameter.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto scalars = adamw_scalars(learning_rate, {beta1, beta2, eps, weight_decay}, step);
  const auto run = [&]<class T>(T) {
    const auto data = [](const at::Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); };
    C10_CUDA_CHECK(adamw_cuda(data(parameter),
                              data(gradient),
                              data(exp_avg),
                              data(exp_avg_sq),
                              parameter.numel(),
                              scalars,
                              stream));
  };
  parameter.scalar_type() == at::kBFloat16 ? run(uint16_t{}) : run(float{});
}

void quantize_weight(const at::Tensor& weight,
                     int64_t format,
                     const at::Tensor& codes,
                     const at::Tensor& scales) {
  const c10::cuda::CUDAGuard guard(weight.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto blocks = kernel::quant_blocks(weight, format);
  const auto run = [&]<class T>(T) {
    const auto* values = static_cast<const T*>(weight.const_data_ptr());
    auto* to = static_cast<uint8_t*>(codes.data_ptr());
    auto* scale = scales.mutable_data_ptr<float>();
    C10_CUDA_CHECK(format == static_cast<int64_t>(QuantFormat::kFp8)
                       ? kernel::fp8_quantize_cuda(blocks, values, to, scale, stream)
                       : kernel::nf4_quantize_cuda(blocks, values, to, scale, stream));
  };
  weight.scalar_type() == at::kBFloat16 ? run(kernel::Bf16Bits{}) : run(float{});
}

void dequantize_weight(const at::Tensor& codes,
                       const at::Tensor& scales,
                       int64_t format,
                       const at::Tensor& out) {
  const c10::cuda::CUDAGuard guard(out.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto blocks = kernel::quant_blocks(out, format);
  const auto run = [&]<class T>(T) {
    auto* values = static_cast<T*>(out.data_ptr());
    const auto* from = static_cast<const uint8_t*>(codes.const_data_ptr());
    const auto* scale = scales.const_data_ptr<float>();
    C10_CUDA_CHECK(format == static_cast<int64_t>(QuantFormat::kFp8)
                       ? kernel::fp8_dequantize_cuda(blocks, from, scale, values, stream)
                       : kernel::nf4_dequantize_cuda(blocks, from, scale, values, stream));
  };
  out.scalar_type() == at::kBFloat16 ? run(kernel::Bf16Bits{}) : run(float{});
}

/// The two maps of 8-bit states on a device, made once for each.
const Map8* maps_on(at::Device device) {
  static std::mutex mutex;
  // never freed: the driver may be gone when static objects go
  static auto* const made = new std::map<int, at::Tensor>;
  const std::lock_guard lock(mutex);
  at::Tensor& maps = (*made)[device.index()];
  if (!maps.defined()) {
    const Map8 both[2] = {map8(true), map8(false)};
    maps = at::empty({static_cast<int64_t>(sizeof both)}, at::device(device).dtype(at::kByte));
    // without a stream: any may read it afterwards
    C10_CUDA_CHECK(cudaMemcpy(maps.data_ptr(), both, sizeof both, cudaMemcpyHostToDevice));
  }
  return static_cast<const Map8*>(maps.const_data_ptr());
}

void optimizer_step(const at::Tensor& parameter,
                    const at::Tensor& gradient,
                    at::TensorList states,
                    at::TensorList scratch,
                    int64_t kind,
                    c10::ArrayRef<double> numbers,
                    at::IntArrayRef key) {
  const c10::cuda::CUDAGuard guard(parameter.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  Operands o = operands_of(parameter, gradient, states, key);
  const auto floats = [&](size_t i) { return static_cast<float*>(states[i].data_ptr()); };
  const auto single = [&]<class Scalars>() {
    C10_CUDA_CHECK(update_cuda(o, from_numbers<Scalars>(numbers), stream));
  };
  switch (static_cast<UpdateKind>(kind)) {
    case UpdateKind::kAdamW:
      return single.template operator()<AdamWScalars>();
    case UpdateKind::kLion:
      return single.template operator()<LionScalars>();
    case UpdateKind::kSgd:
      return single.template operator()<SgdScalars>();
    case UpdateKind::kScheduleFree:
      return single.template operator()<ScheduleFreeScalars>();
    case UpdateKind::kProdigy:
      return single.template operator()<ProdigyScalars>();
    case UpdateKind::kEma:
      return single.template operator()<EmaScalars>();
    case UpdateKind::kProdigyObserve:
      C10_CUDA_CHECK(prodigy_observe_cuda(o,
                                          from_numbers<ProdigyScalars>(numbers),
                                          static_cast<double*>(scratch[0].data_ptr()),
                                          stream));
      return;
    case UpdateKind::kAdamW8bit: {
      const auto scalars = from_numbers<AdamW8bitScalars>(numbers);
      if (states[0].scalar_type() == at::kFloat) {
        C10_CUDA_CHECK(adamw8bit_small_update_cuda(o, scalars, stream));
      } else {
        C10_CUDA_CHECK(adamw8bit_update_cuda(
            o, floats(2), floats(3), maps_on(parameter.device()), scalars, stream));
      }
      return;
    }
    case UpdateKind::kAdafactor: {
      const auto scalars = from_numbers<AdafactorScalars>(numbers);
      const AdafactorArguments a = adafactor_arguments(parameter, states, scratch, scalars, o);
      C10_CUDA_CHECK(adafactor_update_cuda(
          o, a.factors, a.row_means, a.column_means, a.sums, a.floats, scalars, stream));
      return;
    }
  }
}

using kernel::MaybeTensor;

/// Calls run(T(), stream) on the device of `like`, T being the type of its numbers.
template <class Run>
void on_stream(const at::Tensor& like, const Run& run) {
  const c10::cuda::CUDAGuard guard(like.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(like.scalar_type() == at::kBFloat16 ? run(kernel::Bf16Bits{}, stream)
                                                     : run(float{}, stream));
}

void modulate(const at::Tensor& x,
              const at::Tensor& shift,
              const at::Tensor& scale,
              double eps,
              const at::Tensor& out,
              const at::Tensor& stats) {
  on_stream(x, [&]<class T>(T, cudaStream_t stream) {
    return kernel::modulate_cuda(kernel::modulate_args<T>(x, shift, scale, eps, out, stats),
                                 stream);
  });
}

void modulate_backward(const at::Tensor& grad,
                       const at::Tensor& x,
                       const at::Tensor& scale,
                       const at::Tensor& stats,
                       int64_t group,
                       const MaybeTensor& grad_x,
                       const MaybeTensor& sums) {
  on_stream(x, [&]<class T>(T, cudaStream_t stream) {
    return kernel::modulate_cuda(
        kernel::modulate_args<T>(grad, x, scale, stats, group, grad_x, sums), stream);
  });
}

void gated(const at::Tensor& x,
           const at::Tensor& gate,
           const at::Tensor& update,
           const at::Tensor& out) {
  on_stream(x, [&]<class T>(T, cudaStream_t stream) {
    return kernel::gated_cuda(kernel::gated_args<T>(x, gate, update, out), stream);
  });
}

void gated_backward(const at::Tensor& grad,
                    const at::Tensor& gate,
                    const MaybeTensor& update,
                    int64_t group,
                    const MaybeTensor& grad_update,
                    const MaybeTensor& sums) {
  on_stream(grad, [&]<class T>(T, cudaStream_t stream) {
    return kernel::gated_cuda(kernel::gated_args<T>(grad, gate, update, group, grad_update, sums),
                              stream);
  });
}

void add_groups(const at::Tensor& sums, const at::Tensor& out) {
  on_stream(out, [&]<class T>(T, cudaStream_t stream) {
    return kernel::add_groups_cuda(kernel::group_sums_args<T>(sums, out), stream);
  });
}

void gelu(const at::Tensor& x, const at::Tensor& out) {
  on_stream(x, [&]<class T>(T, cudaStream_t stream) {
    return kernel::gelu_cuda(kernel::gelu_args<T>(x, out), stream);
  });
}

void gelu_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& grad_x) {
  on_stream(x, [&]<class T>(T, cudaStream_t stream) {
    return kernel::gelu_cuda(kernel::gelu_args<T>(grad, x, grad_x), stream);
  });
}

void loss(const at::Tensor& prediction,
          const at::Tensor& target,
          const MaybeTensor& mask,
          const at::Tensor& c,
          int64_t type,
          int64_t group,
          const at::Tensor& sums) {
  on_stream(prediction, [&]<class T>(T, cudaStream_t stream) {
    return kernel::loss_cuda(kernel::loss_args<T>(prediction, target, mask, c, type, group, sums),
                             stream);
  });
}

void loss_backward(const at::Tensor& grad,
                   const at::Tensor& prediction,
                   const at::Tensor& target,
                   const MaybeTensor& mask,
                   const at::Tensor& c,
                   int64_t type,
                   const at::Tensor& grad_prediction) {
  on_stream(prediction, [&]<class T>(T, cudaStream_t stream) {
    return kernel::loss_cuda(
        kernel::loss_backward_args<T>(grad, prediction, target, mask, c, type, grad_prediction),
        stream);
  });
}

TORCH_LIBRARY_IMPL(flux, CUDA, library) {
  library.impl("modulate", modulate);
  library.impl("modulate_backward", modulate_backward);
  library.impl("gated", gated);
  library.impl("gated_backward", gated_backward);
  library.impl("add_groups", add_groups);
  library.impl("gelu", gelu);
  library.impl("gelu_backward", gelu_backward);
  library.impl("loss", loss);
  library.impl("loss_backward", loss_backward);
  library.impl("quantize_weight", quantize_weight);
  library.impl("dequantize_weight", dequantize_weight);
  library.impl("qk_norm_rope", qk_norm_rope);
  library.impl("qk_norm_rope_backward", qk_norm_rope_backward);
  library.impl("adamw_step", adamw_step);
  library.impl("optimizer_step", optimizer_step);
}

}  // namespace
}  // namespace flux
