// common/quant/scratch.h - the one piece of memory in which quantised weights become plain ones, a
// weight at a time.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <mutex>

#include "common/quant/quant.h"

namespace flux {

/// A quantised weight as a plain matrix for as long as the object lives: in the scratch of its
/// device, which the process has once and keeps. It grows to the largest weight asked for. Another
/// one on the same device waits until this one goes; work on a GPU must be on one stream, whose
/// order keeps the next weight from coming too early.
class PlainWeight {
 public:
  /// `type` is float32|bfloat16.
  PlainWeight(const QuantizedWeight& weight, c10::ScalarType type);
  const at::Tensor& operator*() const { return plain_; }

 private:
  std::unique_lock<std::mutex> lock_;
  at::Tensor plain_;
};

/// Bytes that a PlainWeight [out, in] needs. The scratch has as many as the largest one so far.
int64_t plain_weight_bytes(int64_t out, int64_t in, c10::ScalarType type);
/// Makes the scratch of a device at least that large, so that it need not grow in pieces.
void reserve_plain_weights(const at::Device& device, int64_t bytes);
/// Gives the scratch of a device back. No PlainWeight may be alive there.
void release_plain_weights(const at::Device& device);
/// Bytes that the scratch of a device has now.
int64_t reserved_plain_weights(const at::Device& device);

}  // namespace flux
