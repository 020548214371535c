#include "pipelines/text/memory.h"

#include <fmt/format.h>

#include <algorithm>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "common/engine/record_file.h"
#include "common/tensor/device.h"

namespace flux::text {
namespace {

/// By which a process without a net grows: libraries' buffers, HDF5, zstd, threads.
constexpr int64_t kGrowth = int64_t{96} << 20;
constexpr int64_t kCudaContext = int64_t{522} << 20;  // with the allocator's pages, assumed
/// Captions on their way to the cache (write_queue.h), and those in hand.
constexpr int64_t kQueued = 12;

struct Need {
  int64_t device = 0, host = 0;  // on a CPU all is host
};

class Needs {
 public:
  Needs(const t5::File& file,
        c10::ScalarType dtype,
        c10::Device device,
        const Options& options,
        int64_t fixed)
      : file_(file), dtype_(dtype), device_(device), options_(options), fixed_(fixed) {
    sizes_.config = file.config();
    sizes_.dtype = dtype;
  }

  Need of(bool streams, int64_t captions) const {
    const int64_t length = options_.t5_length_tokens, width = file_.config().width;
    const bool masked = options_.pad_policy == PadPolicy::kMasked;
    const int64_t together = masked ? std::min(captions, kMaskedCaptions) : 1;
    // masked ones are filled up to 256 rows
    const int64_t filled = masked ? 256 : 0;
    const int64_t groups = (captions + together - 1) / together;
    const int64_t rows = together * length + filled;
    const int64_t moving = sizes_.batch_bytes(captions * length + groups * filled) +
                           sizes_.scratch_bytes(rows, length, masked) +
                           2 * sizes_.batch_bytes(rows);
    const int64_t weights = streams ? t5::LayerStream::ring_bytes(file_, dtype_)
                                    : file_.bytes(dtype_) - file_.outer_bytes();
    const int64_t queued =
        kQueued * length * width * static_cast<int64_t>(dtype_bits(options_.encode.dtype)) / 8;
    const int64_t staging =
        streams ? t5::LayerStream::staging_bytes(file_, dtype_, device_) : int64_t{4} << 20;
    Need need;
    need.host = fixed_ + file_.outer_bytes() + queued + staging;
    (device_.is_cuda() ? need.device : need.host) += weights + moving;
    if (device_.is_cuda()) need.device += kCudaContext + (streams ? 0 : file_.outer_bytes());
    return need;
  }

 private:
  const t5::File& file_;
  c10::ScalarType dtype_;
  c10::Device device_;
  const Options& options_;
  int64_t fixed_;
  t5::Encoder sizes_;
};

std::string shown(int64_t bytes) { return show_bytes(static_cast<uint64_t>(bytes)); }

}  // namespace

int64_t process_bytes() { return static_cast<int64_t>(rss_bytes()) + kGrowth; }

std::string T5Plan::describe() const {
  return fmt::format("T5 {}: {} of {} ({}), {} a pass",
                     streams ? "streams from its file" : "stays in memory",
                     shown(bytes),
                     shown(budget),
                     budget_name,
                     captions == 1 ? "1 caption" : fmt::format("{} captions", captions));
}

T5Plan plan_t5(const t5::File& file,
               c10::ScalarType dtype,
               c10::Device device,
               const Options& options,
               int64_t fixed) {
  const Needs needs(file, dtype, device, options, fixed);
  const bool cuda = device.is_cuda(), masked = options.pad_policy == PadPolicy::kMasked;
  const int64_t host_budget = options.host_memory > 0
                                  ? options.host_memory
                                  : engine::available_memory_bytes() / 5 * 4 + fixed;
  const int64_t device_budget = !cuda                       ? 0
                                : options.device_memory > 0 ? options.device_memory
                                                            : device_free_bytes(device) / 10 * 9;
  const auto fits = [&](const Need& need) {
    return need.host <= host_budget && need.device <= device_budget;
  };
  const auto plan = [&](bool streams, int64_t captions, const Need& need) {
    const bool of_device = cuda && (need.device > device_budget || need.host <= host_budget);
    return T5Plan{streams,
                  captions,
                  of_device ? need.device : need.host,
                  of_device ? device_budget : host_budget,
                  of_device ? "--device-memory" : "--host-memory"};
  };
  const int64_t asked = options.encode.batch_size;
  const int64_t at_a_time = masked ? std::max(asked, kMaskedCaptions) : asked;
  if (const Need need = needs.of(false, at_a_time); fits(need)) return plan(false, at_a_time, need);
  // enough that computing them takes longer than reading a layer
  int64_t captions = asked > 1 ? asked : cuda ? 256 : 32;
  while (captions > 1 && !fits(needs.of(true, captions))) captions -= (captions + 7) / 8;
  const Need need = needs.of(true, captions);
  const T5Plan found = plan(true, captions, need);
  if (!fits(need))
    throw ResourceError(
        fmt::format("T5 needs {} at least, {} gives {}",
                    shown(found.bytes),
                    found.budget_name,
                    shown(found.budget)),
        fmt::format("give more {}, or use --precision bf16 or --t5-length 256", found.budget_name));
  return found;
}

}  // namespace flux::text
