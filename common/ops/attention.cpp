// common/ops/attention.cpp - autograd around LibTorch's fused kernels, called directly, so that nothing is chosen, copied
// or kept that is not written here.
#include "common/ops/attention.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention.h>
#include <ATen/ops/_scaled_dot_product_efficient_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>

#include "common/ops/op.h"
#include "common/tensor/memory.h"
#include "common/tensor/tensor.h"

namespace flux {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::atomic<AttentionBackend> chosen = AttentionBackend::kFlash;

enum class Kernel : int64_t { kCpu, kFlash, kEfficient, kCudnn };

Kernel kernel_of(const at::Tensor& q, bool masked) {
  if (kernel_device(q) != c10::kCUDA) return Kernel::kCpu;
  const auto backend = chosen.load();
  if (backend == AttentionBackend::kEfficient || q.scalar_type() == at::kFloat)
    return Kernel::kEfficient;
  if (backend == AttentionBackend::kCudnn) return Kernel::kCudnn;
  return masked ? Kernel::kEfficient : Kernel::kFlash;
}

at::Tensor swapped(const at::Tensor& x) { return x.transpose(1, 2); }

/// 0 where a key may be attended to, else -inf: [B, 1, 1, N], or for CUDA's kernels expanded to all queries.
at::Tensor bias_of(const at::Tensor& mask, const at::Tensor& q, Kernel kernel) {
  constexpr int64_t kAligned = 16;  // numbers; CUDA's kernels read rows in vectors
  const int64_t batch = mask.size(0), keys = mask.size(1);
  const int64_t padded =
      kernel == Kernel::kCpu ? keys : (keys + kAligned - 1) / kAligned * kAligned;
  const auto bias = at::zeros({batch, 1, 1, padded}, q.options()).narrow(3, 0, keys);
  if (!q.is_meta())
    bias.masked_fill_(mask.logical_not().view({batch, 1, 1, keys}),
                      -std::numeric_limits<double>::infinity());
  return kernel == Kernel::kCpu ? bias : bias.expand({batch, q.size(2), q.size(1), keys});
}

/// What LibTorch's CPU kernels hold while they run, as tensors on Meta. In blocks of queries and keys as its
/// ATen/native/cpu/FlashAttentionKernel.cpp has them; a test compares each number with the allocator's.
class CpuScratch {
 public:
  CpuScratch(const at::Tensor& q, const at::Tensor& k)
      : options_(q.options()),
        half_(q.scalar_type() != at::kFloat),
        threads_(at::get_num_threads()),
        batch_(q.size(0)),
        heads_(q.size(2)),
        head_(q.size(3)),
        queries_(q.size(1)),
        keys_(k.size(1)) {}

  variable_list forward() const {
    const MemoryScope scope(MemoryCause::kKernelScratch);
    const int64_t q = query_block(), k = key_block();
    variable_list out{floats(threads_ * (q * k + 2 * q + q * head_))};
    if (!half_) return out;
    out.push_back(halves(threads_ * q * k));
    if (!packs()) return out;
    out.push_back(halves(batch_ * heads_ * keys_ * head_));
    out.push_back(halves(batch_ * heads_ * keys_ * head_));
    out.push_back(halves(threads_ * k * head_));
    return out;
  }

  variable_list backward() const {
    const MemoryScope scope(MemoryCause::kKernelScratch);
    const int64_t q = query_block(), k = key_block();
    variable_list out{floats(threads_ * 2 * q * k)};
    if (half_) out.push_back(halves(threads_ * 2 * q * k));
    for (int64_t i = 0; i < std::min(threads_, batch_ * heads_); ++i) out.push_back(floats(q));
    return out;
  }

 private:
  int64_t query_block() const {
    return std::min<int64_t>(queries_, queries_ >= 768 ? 256 : queries_ >= 192 ? 64 : 32);
  }
  int64_t key_block() const { return std::min<int64_t>(keys_, 512); }
  /// Whether keys and values are packed for AMX.
  bool packs() const {
    if (!at::native::cpublas::could_pack(at::kBFloat16) || heads_ < 4 || head_ % 64 != 0 ||
        keys_ < 64)
      return false;
    const int64_t blocks = (queries_ + query_block() - 1) / query_block();
    const double size = static_cast<double>(batch_ * heads_ * keys_ * head_ / 1024);
    const double products = static_cast<double>((batch_ * heads_ * blocks + threads_ - 1) /
                                                threads_ * query_block() * keys_ * head_ / 1024);
    const double ratio = products / size;
    if (size < 2688) return ratio >= 36 || (ratio >= 24 && head_ > 64);
    return ratio >= (size < 16384 ? 52 : 40);
  }
  at::Tensor floats(int64_t count) const { return at::empty({count}, options_.dtype(at::kFloat)); }
  at::Tensor halves(int64_t count) const { return at::empty({count}, options_); }

  at::TensorOptions options_;
  bool half_;
  int64_t threads_, batch_, heads_, head_, queries_, keys_;
};

int64_t rounded(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

/// What CUDA's kernels hold, known from their sources for flash; the others are planned like it.
variable_list cuda_backward_scratch(const at::Tensor& q) {
  const MemoryScope scope(MemoryCause::kKernelScratch);
  const auto options = q.options().dtype(at::kFloat);
  const int64_t queries = rounded(q.size(1), 128), head = rounded(q.size(3), 32);
  return {at::empty({q.size(0), q.size(2), queries}, options),         // rows' sums of dO * O
          at::empty({q.size(0), queries, q.size(2), head}, options)};  // dq
}

/// The result, the logarithm of the rows' sums, and what else the kernel's backward wants.
struct Forward {
  at::Tensor out, log_sums;  // [B, N, heads, head]; the kernel's
  at::Tensor seed, offset, first_q, first_k;
  int64_t max_q = 0, max_k = 0;
};

Forward run(Kernel kernel,
            const at::Tensor& q,
            const at::Tensor& k,
            const at::Tensor& v,
            const std::optional<at::Tensor>& bias) {
  Forward f;
  if (q.is_meta()) {
    f.out = at::empty(q.sizes(), q.options());
    f.log_sums = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
    if (kernel == Kernel::kCpu) CpuScratch(q, k).forward();
    return f;
  }
  const auto a = swapped(q), b = swapped(k), c = swapped(v);
  if (kernel == Kernel::kCpu) {
    std::tie(f.out, f.log_sums) =
        at::_scaled_dot_product_flash_attention_for_cpu(a, b, c, 0, false, bias);
  } else if (kernel == Kernel::kEfficient) {
    std::tie(f.out, f.log_sums, f.seed, f.offset) =
        at::_scaled_dot_product_efficient_attention(a, b, c, bias, /*compute_log_sumexp=*/true);
  } else {
    auto results = kernel == Kernel::kFlash
                       ? at::_scaled_dot_product_flash_attention(a, b, c)
                       : at::_scaled_dot_product_cudnn_attention(a, b, c, bias, true);
    f.out = std::get<0>(results);
    f.log_sums = std::get<1>(results);
    f.first_q = std::get<2>(results);
    f.first_k = std::get<3>(results);
    f.max_q = std::get<4>(results).expect_int();
    f.max_k = std::get<5>(results).expect_int();
    f.seed = std::get<6>(results);
    f.offset = std::get<7>(results);
  }
  f.out = swapped(f.out);
  return f;
}

struct Attention : torch::autograd::Function<Attention> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& q,
                            const at::Tensor& k,
                            const at::Tensor& v,
                            const std::optional<at::Tensor>& mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Kernel kernel = kernel_of(q, mask.has_value());
    std::optional<at::Tensor> bias;
    if (mask) bias = bias_of(*mask, q, kernel);
    const auto f = run(kernel, q, k, v, bias);
    context->save_for_backward({q,
                                k,
                                v,
                                bias.value_or(at::Tensor()),
                                f.out,
                                f.log_sums,
                                f.seed,
                                f.offset,
                                f.first_q,
                                f.first_k});
    context->saved_data["kernel"] = static_cast<int64_t>(kernel);
    context->saved_data["max_q"] = f.max_q;
    context->saved_data["max_k"] = f.max_k;
    return f.out.reshape({q.size(0), q.size(1), -1});
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto &q = saved[0], &k = saved[1], &v = saved[2], &bias = saved[3], &out = saved[4],
               &log_sums = saved[5], &seed = saved[6], &offset = saved[7];
    const auto kernel = static_cast<Kernel>(context->saved_data["kernel"].toInt());
    const auto grad = [&] {
      const MemoryScope scope(MemoryCause::kKernelScratch);
      return grads[0].contiguous().view(q.sizes());
    }();
    at::Tensor grad_q, grad_k, grad_v;
    if (q.is_meta()) {
      const auto scratch = kernel == Kernel::kCpu ? variable_list() : cuda_backward_scratch(q);
      grad_q = at::empty(q.sizes(), q.options());
      grad_k = at::empty(k.sizes(), k.options());
      grad_v = at::empty(v.sizes(), v.options());
      if (kernel == Kernel::kCpu) CpuScratch(q, k).backward();
      return {grad_q, grad_k, grad_v, at::Tensor()};
    }
    const auto g = swapped(grad), a = swapped(q), b = swapped(k), c = swapped(v), o = swapped(out);
    if (kernel == Kernel::kCpu) {
      std::tie(grad_q, grad_k, grad_v) = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          g, a, b, c, o, log_sums, 0, false, bias.defined() ? std::optional(bias) : std::nullopt);
    } else if (kernel == Kernel::kEfficient) {
      at::Tensor none;
      std::tie(grad_q, grad_k, grad_v, none) = at::_scaled_dot_product_efficient_attention_backward(
          g, a, b, c, bias, o, log_sums, seed, offset, 0, {true, true, true, false});
    } else {
      const int64_t max_q = context->saved_data["max_q"].toInt();
      const int64_t max_k = context->saved_data["max_k"].toInt();
      std::tie(grad_q, grad_k, grad_v) =
          kernel == Kernel::kFlash ? at::_scaled_dot_product_flash_attention_backward(g,
                                                                                      a,
                                                                                      b,
                                                                                      c,
                                                                                      o,
                                                                                      log_sums,
                                                                                      saved[8],
                                                                                      saved[9],
                                                                                      max_q,
                                                                                      max_k,
                                                                                      0,
                                                                                      false,
                                                                                      seed,
                                                                                      offset)
                                   : at::_scaled_dot_product_cudnn_attention_backward(g,
                                                                                      a,
                                                                                      b,
                                                                                      c,
                                                                                      o,
                                                                                      log_sums,
                                                                                      seed,
                                                                                      offset,
                                                                                      bias,
                                                                                      saved[8],
                                                                                      saved[9],
                                                                                      max_q,
                                                                                      max_k,
                                                                                      0,
                                                                                      false);
    }
    return {swapped(grad_q), swapped(grad_k), swapped(grad_v), at::Tensor()};
  }
};

/// Heads one after the other in a token, numbers of a head neighbours, as the kernels read fastest.
at::Tensor dense(const at::Tensor& x) {
  return x.stride(3) == 1 && x.stride(2) == x.size(3) ? x : x.contiguous();
}

}  // namespace

void set_attention_backend(AttentionBackend backend) { chosen = backend; }
std::string_view attention_backend(const at::Tensor& q, bool masked) {
  switch (kernel_of(q, masked)) {
    case Kernel::kCpu:
      return "flash-cpu";
    case Kernel::kFlash:
      return "flash";
    case Kernel::kEfficient:
      return "efficient";
    case Kernel::kCudnn:
      break;
  }
  return "cudnn";
}

at::Tensor attention(const at::Tensor& q,
                     const at::Tensor& k,
                     const at::Tensor& v,
                     const std::optional<at::Tensor>& key_mask) {
  if (q.dim() != 4 || k.dim() != 4 || k.sizes() != v.sizes() || q.size(0) != k.size(0) ||
      q.size(2) != k.size(2) || q.size(3) != k.size(3))
    throw std::invalid_argument(fmt::format(
        "attention: q {}, k {} and v {} do not fit", shape_text(q), shape_text(k), shape_text(v)));
  if (key_mask && (key_mask->scalar_type() != at::kBool ||
                   key_mask->sizes() != at::IntArrayRef{k.size(0), k.size(1)}))
    throw std::invalid_argument(fmt::format("attention: key_mask {} {} does not fit k {}",
                                            shape_text(*key_mask),
                                            c10::toString(key_mask->scalar_type()),
                                            shape_text(k)));
  return Attention::apply(dense(q), dense(k), dense(v), key_mask);
}

}  // namespace flux
