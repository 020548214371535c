// pipelines/cache/npz.h - numpy's archives of arrays.
#pragma once
#include <string>
#include <vector>

#include "pipelines/cache/decode.h"

namespace flux::cache {

/// The bytes of an .npz file: an entry NAME.npy a tensor, stored without compression, float32 but
/// for tensors of bytes, which stay. Equal tensors give equal bytes. Throws ResourceError if memory
/// does not suffice.
/// Source: numpy.lib.format, version 1.0.
std::string npz_bytes(const std::vector<NamedTensor>& tensors);

}  // namespace flux::cache
