// common/optim/optimizer_cuda.h - the updates of a parameter on device memory; compiled into
// libflux_cuda.so. No LibTorch.
#pragma once
#include <cuda_runtime_api.h>

#include "common/optim/adafactor_math.h"
#include "common/optim/adamw8bit_math.h"
#include "common/optim/elements_math.h"
#include "common/optim/operands.h"

namespace flux {

// All pointers are device memory; all run on `stream` and return the launches' error. Arithmetic is
// that of the CPU's; sums of Adafactor are made in another fixed order.

/// Updates of single elements; states as elementwise_cpu.h says.
cudaError_t update_cuda(const Operands& operands, const AdamWScalars& scalars, cudaStream_t stream);
cudaError_t update_cuda(const Operands& operands, const LionScalars& scalars, cudaStream_t stream);
cudaError_t update_cuda(const Operands& operands, const SgdScalars& scalars, cudaStream_t stream);
cudaError_t update_cuda(const Operands& operands,
                        const ScheduleFreeScalars& scalars,
                        cudaStream_t stream);
cudaError_t update_cuda(const Operands& operands,
                        const ProdigyScalars& scalars,
                        cudaStream_t stream);
cudaError_t update_cuda(const Operands& operands, const EmaScalars& scalars, cudaStream_t stream);
/// sums: prodigy_num_sums(n) doubles, of which the last two are the results.
cudaError_t prodigy_observe_cuda(const Operands& operands,
                                 const ProdigyScalars& scalars,
                                 double* sums,
                                 cudaStream_t stream);

/// maps: the signed and the unsigned Map8 of blockwise8.h.
cudaError_t adamw8bit_update_cuda(const Operands& operands,
                                  float* absmax1,
                                  float* absmax2,
                                  const Map8* maps,
                                  const AdamW8bitScalars& scalars,
                                  cudaStream_t stream);
/// The same with float32 states.
cudaError_t adamw8bit_small_update_cuda(const Operands& operands,
                                        const AdamW8bitScalars& scalars,
                                        cudaStream_t stream);

/// states[0]: the first moment, or null. sums and floats: scratch, as adafactor_num_sums() and
/// adafactor_num_floats() say.
cudaError_t adafactor_update_cuda(const Operands& operands,
                                  const AdafactorFactors& factors,
                                  float* row_means,
                                  float* column_means,
                                  double* sums,
                                  float* floats,
                                  const AdafactorScalars& scalars,
                                  cudaStream_t stream);

}  // namespace flux
