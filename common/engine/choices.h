// common/engine/choices.h - the engine's choices by name, for programs that see no torch header.
#pragma once

namespace flux::engine {

enum class ClipMode {
  kGlobal,        // by the norm over all gradients: exact, since a block's update waits for it
  kPerParameter,  // each by its own norm, as sd-scripts' fused backward pass does
  kNone,
};

/// Where block inputs are kept. kHost is the device itself on a CPU.
enum class InputPlace { kDevice, kHost, kDisk };

/// Where the weights of streamed blocks are between visits.
enum class StreamFrom {
  kFile,  // frozen weights: the model's file; trained ones: a scratch file
  kHost,  // host memory, pinned for a GPU
};

}  // namespace flux::engine
