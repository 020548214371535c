#include "common/models/flux/config.h"

#include <fmt/format.h>

#include "common/models/flux/names.h"

namespace flux::dit {

int64_t Config::num_parameters() const {
  int64_t total = 0;
  for (const auto& [name, shape] : tensor_shapes(*this)) {
    int64_t count = 1;
    for (int64_t length : shape) count *= length;
    total += count;
  }
  return total;
}

std::string Config::describe() const {
  return fmt::format("FLUX transformer, {} + {} blocks, hidden {}, {} guidance",
                     num_double_blocks,
                     num_single_blocks,
                     hidden,
                     guidance ? "with" : "without");
}

}  // namespace flux::dit
