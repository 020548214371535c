#include "common/optim/optimizer_op.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "common/optim/adafactor_update.h"
#include "common/optim/adamw8bit_cpu.h"
#include "common/optim/elementwise_cpu.h"
#include "common/optim/tile.h"

namespace flux {
namespace {

// Fewer tiles than this cost less than waking another thread.
constexpr int64_t kGrain = 16;

using Step = void(const at::Tensor&,
                  const at::Tensor&,
                  at::TensorList,
                  at::TensorList,
                  int64_t,
                  c10::ArrayRef<double>,
                  at::IntArrayRef);

template <class F>
void for_tiles(int64_t n, const F& f) {
  at::parallel_for(0, (n + kTile - 1) / kTile, kGrain, [&](int64_t first, int64_t last) {
    f(first * kTile, std::min(n, last * kTile));
  });
}

template <class Scalars, class Range>
void run_tiles(const Operands& o, c10::ArrayRef<double> numbers, const Range& range) {
  const auto scalars = from_numbers<Scalars>(numbers);
  for_tiles(o.n, [&](int64_t begin, int64_t end) { range(o, scalars, begin, end); });
}

void observe(const Operands& o, const ProdigyScalars& scalars, double* sums) {
  const int64_t parts = prodigy_num_parts(o.n);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      double* const sum = sums + 2 * part;
      sum[0] = sum[1] = 0;
      prodigy_observe_range(
          o, scalars, part * kProdigyPart, std::min(o.n, (part + 1) * kProdigyPart), sum);
    }
  });
  double* const totals = sums + 2 * parts;
  totals[0] = totals[1] = 0;
  for (int64_t i = 0; i < 2 * parts; ++i) totals[i % 2] += sums[i];
}

float* floats(const at::Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

void step_cpu(const at::Tensor& parameter,
              const at::Tensor& gradient,
              at::TensorList states,
              at::TensorList scratch,
              int64_t kind,
              c10::ArrayRef<double> numbers,
              at::IntArrayRef key) {
  Operands o = operands_of(parameter, gradient, states, key);
  switch (static_cast<UpdateKind>(kind)) {
    case UpdateKind::kAdamW:
      return run_tiles<AdamWScalars>(o, numbers, adamw_range);
    case UpdateKind::kLion:
      return run_tiles<LionScalars>(o, numbers, lion_range);
    case UpdateKind::kSgd:
      return run_tiles<SgdScalars>(o, numbers, sgd_range);
    case UpdateKind::kScheduleFree:
      return run_tiles<ScheduleFreeScalars>(o, numbers, schedule_free_range);
    case UpdateKind::kProdigy:
      return run_tiles<ProdigyScalars>(o, numbers, prodigy_range);
    case UpdateKind::kEma:
      return run_tiles<EmaScalars>(o, numbers, ema_range);
    case UpdateKind::kProdigyObserve:
      return observe(
          o, from_numbers<ProdigyScalars>(numbers), static_cast<double*>(scratch[0].data_ptr()));
    case UpdateKind::kAdamW8bit: {
      const auto scalars = from_numbers<AdamW8bitScalars>(numbers);
      const bool small = states[0].scalar_type() == at::kFloat;
      return for_tiles(o.n, [&](int64_t begin, int64_t end) {
        if (small)
          adamw8bit_small_range(o, scalars, begin, end);
        else
          adamw8bit_range(o, floats(states[2]), floats(states[3]), scalars, begin, end);
      });
    }
    case UpdateKind::kAdafactor: {
      const auto scalars = from_numbers<AdafactorScalars>(numbers);
      const AdafactorArguments a = adafactor_arguments(parameter, states, scratch, scalars, o);
      return adafactor_update(o, a, scalars);
    }
  }
}

void step_meta(const at::Tensor&,
               const at::Tensor&,
               at::TensorList,
               at::TensorList,
               int64_t,
               c10::ArrayRef<double>,
               at::IntArrayRef) {}

TORCH_LIBRARY_FRAGMENT(flux, library) {
  library.def(
      "optimizer_step(Tensor(a!) parameter, Tensor gradient, Tensor(b!)[] states, Tensor(c!)[] "
      "scratch, int kind, float[] numbers, int[] key) -> ()");
}
TORCH_LIBRARY_IMPL(flux, CPU, library) { library.impl("optimizer_step", step_cpu); }
TORCH_LIBRARY_IMPL(flux, Meta, library) { library.impl("optimizer_step", step_meta); }

}  // namespace

void optimizer_step(const at::Tensor& parameter,
                    const at::Tensor& gradient,
                    at::TensorList states,
                    at::TensorList scratch,
                    UpdateKind kind,
                    c10::ArrayRef<double> numbers,
                    const StepKey& key) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flux::optimizer_step", "").typed<Step>();
  const int64_t packed[] = {static_cast<int64_t>(key.keep),
                            key.first,
                            bits_of(key.gradient_scale),
                            key.rounding.key[0],
                            key.rounding.key[1],
                            key.rounding.high[0],
                            key.rounding.high[1],
                            key.offset};
  op.call(parameter, gradient, states, scratch, static_cast<int64_t>(kind), numbers, packed);
}

}  // namespace flux
