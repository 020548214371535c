// pipelines/stage/sink.h - where encoded samples go: into the cache, or to be compared with it.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "formats/cache/schema.h"

namespace flux::stage {

/// One sample with its tensors in the cache's dtype, as cache::prepare takes them.
struct EncodedSample {
  cache::SampleInfo info;
  std::vector<std::vector<std::byte>> tensors;
};

/// A sample that could not be made, and why; one line.
struct Failure {
  cache::SampleInfo info;
  std::string reason;
};

class Sink {
 public:
  virtual ~Sink() = default;
  /// Takes a sample; it need not have arrived when this returns. Throws what an earlier one met.
  virtual void add(EncodedSample sample) = 0;
  /// Waits until all samples have arrived.
  virtual void flush() = 0;
  /// If a signal has come: keeps what is finished, says so, and throws Interrupted.
  virtual void stop_if_asked() = 0;
};

}  // namespace flux::stage
