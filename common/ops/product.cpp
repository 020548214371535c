#include "common/ops/product.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "common/ops/op.h"
#include "common/ops/product_cpu.h"
#include "common/tensor/memory.h"

namespace flux {
namespace {

/// Whether rows are dense; else columns are.
bool row_major(const at::Tensor& x) { return x.stride(1) == 1 || x.size(1) == 1; }

kernel::Bf16Matrix matrix_of(const at::Tensor& x) {
  if (!x.defined()) return {};
  return {static_cast<const uint16_t*>(x.const_data_ptr()),
          x.size(0),
          x.size(1),
          x.stride(0),
          row_major(x) ? 1 : x.stride(1)};
}

/// c with an even number of dense columns, as kPairs reads it.
at::Tensor even(const at::Tensor& c) {
  if (!c.defined() || (c.size(1) % 2 == 0 && row_major(c))) return c;
  const auto wide = at::zeros({c.size(0), c.size(1) + c.size(1) % 2}, c.options());
  wide.narrow(1, 0, c.size(1)).copy_(c);
  return wide;
}

void multiply_bf16(const Product& p, const at::Tensor& out) {
  const MemoryScope scope(MemoryCause::kKernelScratch);
  const auto which = kernel::bf16_kernel();
  const auto c = which == kernel::Bf16Kernel::kPairs ? even(p.c) : p.c;
  const int64_t threads = at::get_num_threads();
  const kernel::Bf16Plan plan(which,
                              p.a.size(0),
                              p.a.size(1),
                              p.b.size(1),
                              c.defined() ? c.size(1) : 0,
                              row_major(p.a) && p.a.size(1) % 2 == 0,
                              threads);
  const auto scratch = at::empty({plan.bytes(threads)}, out.options().dtype(at::kByte));
  if (out.is_meta() || out.numel() == 0) return;
  kernel::Bf16Product product{matrix_of(p.a), matrix_of(p.b), matrix_of(c), matrix_of(p.d)};
  if (p.bias.defined()) product.bias = static_cast<const uint16_t*>(p.bias.const_data_ptr());
  product.scale = static_cast<float>(p.scale);
  product.out = static_cast<uint16_t*>(out.data_ptr());
  kernel::multiply_bf16(product, plan, threads, scratch.data_ptr());
}

/// Rows [m, m + rows) of a, whose columns are dense.
at::Tensor transposed(const at::Tensor& a, int64_t m, int64_t rows) {
  const MemoryScope scope(MemoryCause::kKernelScratch);
  const int64_t columns = a.size(1);
  auto out = at::empty({rows, columns}, a.options());
  if (a.is_meta()) return out;
  const auto run = [&]<class T>(T) {
    const auto* from = static_cast<const T*>(a.const_data_ptr()) + m;
    auto* to = static_cast<T*>(out.data_ptr());
    at::parallel_for(0, rows, 64, [&](int64_t first, int64_t last) {
      kernel::transpose_cpu(from, a.stride(1), columns, first, last, to);
    });
  };
  a.scalar_type() == at::kFloat ? run(float{}) : run(uint16_t{});
  return out;
}

/// Through LibTorch. A transposed a is copied a number of rows at a time: its kernels are up to twice as slow on it.
void multiply_plainly(const Product& p, const at::Tensor& out) {
  constexpr int64_t kRowsAtOnce = 3072;
  at::Tensor target = out;
  if (row_major(p.a) || kernel_device(p.a) == c10::kCUDA) {
    if (p.bias.defined())
      at::addmm_out(target, p.bias, p.a, p.b, 1, p.scale);
    else
      at::mm_out(target, p.a, p.b);
  } else {
    for (int64_t m = 0; m < p.a.size(0); m += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, p.a.size(0) - m);
      const auto dense = transposed(p.a, m, rows);
      auto part = target.narrow(0, m, rows);
      at::mm_out(part, dense, p.b);
    }
    if (p.bias.defined()) {
      if (p.scale != 1) target.mul_(p.scale);
      target.add_(p.bias);
    }
  }
  if (!p.bias.defined() && p.scale != 1) target.mul_(p.scale);
  if (p.c.defined()) target.addmm_(p.c, p.d);
}

bool has_kernel(const at::Tensor& out) {
  return out.scalar_type() == at::kBFloat16 && kernel_device(out) == c10::kCPU;
}

}  // namespace

void multiply(const Product& product, const at::Tensor& out) {
  has_kernel(out) ? multiply_bf16(product, out) : multiply_plainly(product, out);
}

int64_t product_scratch_bytes(
    int64_t m, int64_t k, int64_t n, c10::ScalarType type, bool a_transposed, int64_t threads) {
  if (type == at::kBFloat16)
    return kernel::Bf16Plan(kernel::bf16_kernel(), m, k, n, 0, !a_transposed && k % 2 == 0, threads)
        .bytes(threads);
  return a_transposed ? std::min<int64_t>(m, 3072) * k * c10::elementSize(type) : 0;
}

}  // namespace flux
