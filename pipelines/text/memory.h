// pipelines/text/memory.h - whether T5 stays in memory or streams, and how many captions go through it at a time.
#pragma once
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <string>

#include "common/models/t5/stream.h"
#include "pipelines/text/options.h"

namespace flux::text {

/// Masked captions that share matrix products: alone they would read T5's weights for few rows each.
inline constexpr int64_t kMaskedCaptions = 8;

struct T5Plan {
  bool streams = false;  // layer by layer from the file
  int64_t captions = 1;  // in a pass through the layers
  int64_t bytes = 0;     // that it takes of the budget
  int64_t budget = 0;
  const char* budget_name = "--host-memory";

  /// One line for the log.
  std::string describe() const;
};

/// What the process holds besides, at its start; for plan_t5().
int64_t process_bytes();

/// T5 stays if it fits, for then a caption is finished every few seconds; else it streams with as many captions a pass as
/// fit (--batch-size, or up to 32 on a CPU and 256 on a GPU). Results do not depend on it. Throws ResourceError naming the
/// bytes needed if the smallest setting does not fit.
///   fixed  of process_bytes()
T5Plan plan_t5(const t5::File& file,
               c10::ScalarType dtype,
               c10::Device device,
               const Options& options,
               int64_t fixed);

}  // namespace flux::text
