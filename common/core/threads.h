// common/core/threads.h - threads that a crowded machine may not give.
#pragma once
#include <exception>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "common/core/error.h"

namespace flux {

/// Starts `count` threads that call `work`, or fewer where the system gives no more. Throws
/// ResourceError if it gives none.
inline std::vector<std::jthread> start_threads(int count, const std::function<void()>& work) {
  std::vector<std::jthread> threads;
  threads.reserve(static_cast<size_t>(count));
  for (int t = 0; t < count; ++t) {
    try {
      threads.emplace_back(work);
    } catch (const std::exception& error) {  // system_error, or bad_alloc
      if (!threads.empty()) break;
      throw ResourceError(std::string("no thread can be started: ") + error.what(),
                          "end other programs, or raise the limits on memory and processes "
                          "(ulimit -u, ulimit -v)");
    }
  }
  return threads;
}

}  // namespace flux
