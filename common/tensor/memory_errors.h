// common/tensor/memory_errors.h - LibTorch's several ways to say that memory ran out, as one
// ResourceError.
#pragma once
#include <c10/util/Exception.h>

#include <new>
#include <string>
#include <string_view>

#include "common/core/error.h"

namespace flux {

/// Memory ran out, of the GPU or of the machine.
struct OutOfMemory : ResourceError {
  using ResourceError::ResourceError;
};

/// Runs `work`. If memory runs out in it, throws OutOfMemory with `message` ("not enough memory
/// to encode images") and `hint`.
template <class Work>
auto with_memory_errors(const std::string& message, const std::string& hint, const Work& work) {
  try {
    return work();
  } catch (const c10::OutOfMemoryError& error) {
    throw OutOfMemory(message + " on the GPU\n  " + error.what_without_backtrace(), hint);
  } catch (const c10::Error& error) {
    // the CPU's allocator has no type of its own for it
    const std::string_view what = error.what_without_backtrace();
    if (what.find("can't allocate memory") == std::string_view::npos) throw;
    throw OutOfMemory(message + "\n  " + std::string(what), hint);
  } catch (const std::bad_alloc&) {
    throw OutOfMemory(message, hint);
  }
}

}  // namespace flux
