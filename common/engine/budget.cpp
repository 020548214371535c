#include "common/engine/budget.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "common/core/file.h"
#include "common/engine/record_file.h"
#include "common/tensor/device.h"
#include "common/tensor/memory.h"

namespace flux::engine {

int64_t process_bytes_without_tensors() {
  return std::max<int64_t>(0, static_cast<int64_t>(rss_bytes()) - cpu_memory().live) +
         kProcessGrowth;
}

Budgets budgets(c10::Device device, int64_t host_memory, int64_t device_memory) {
  Budgets b;
  b.fixed = process_bytes_without_tensors();
  b.host = host_memory > 0 ? host_memory : available_memory_bytes() / 5 * 4 + b.fixed;
  if (device.is_cuda())
    b.device = device_memory > 0 ? device_memory : device_free_bytes(device) / 10 * 9;
  return b;
}

void limit_threads(const dit::Config& config) {
  constexpr int64_t kSmallModel = 50'000'000;
  if (config.num_parameters() < kSmallModel) at::set_num_threads(1);
}

}  // namespace flux::engine
