// common/ops/op.h - how the project's ops are called, and which device's kernels they stand for.
//
// An op flux::name(inputs, results) -> () writes into results that its caller made. Its faces are registered for CPU and
// CUDA; on Meta it does nothing. So what an op allocates is written once and is the same on every device.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <utility>

namespace flux {

/// Runs the op with the C++ signature of its kernels.
template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

namespace internal {
template <class Signature>
struct NoKernel;
template <class... Args>
struct NoKernel<void(Args...)> {
  static void run(Args...) {}
};
}  // namespace internal

/// The Meta face of such an op.
template <class Signature>
auto no_kernel() {
  return &internal::NoKernel<Signature>::run;
}

/// The device whose kernels Meta tensors stand for: their scratch is what is allocated. CPU at the start.
void plan_kernels_for(c10::DeviceType device);
/// The device whose kernels `tensor` gets, or on Meta is planned to get.
c10::DeviceType kernel_device(const at::Tensor& tensor);

}  // namespace flux
