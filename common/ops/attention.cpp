#include "common/ops/attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include <stdexcept>

#include "common/tensor/tensor.h"

namespace flux {
namespace {

// On Meta LibTorch's own attention falls back to the form with a score matrix and then fails; this
// allocates what the fused kernels do.
struct MetaAttention : torch::autograd::Function<MetaAttention> {
  static at::Tensor forward(torch::autograd::AutogradContext* context,
                            const at::Tensor& q,
                            const at::Tensor& k,
                            const at::Tensor& v) {
    const auto out = at::empty(q.sizes(), q.options());
    const auto log_sum_exp =
        at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
    context->save_for_backward({q, k, v, out, log_sum_exp});
    return out;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list&) {
    const auto saved = context->get_saved_variables();
    return {at::empty_like(saved[0]), at::empty_like(saved[1]), at::empty_like(saved[2])};
  }
};

}  // namespace

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
  if (q.is_meta()) return MetaAttention::apply(q, k, v).flatten(2);
  std::optional<at::Tensor> mask;
  if (key_mask) mask = key_mask->unsqueeze(1).unsqueeze(1);  // [B, 1, 1, N]
  const auto out = at::scaled_dot_product_attention(
      q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask);
  return out.transpose(1, 2).flatten(2);
}

}  // namespace flux
