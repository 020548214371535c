#include "common/core/progress.h"

#include <fmt/format.h>

#include <utility>

#include "common/core/log.h"
#include "common/core/text.h"

namespace flux {

Progress::Progress(std::string label, std::string unit, int64_t total)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      total_(total),
      start_(Clock::now()),
      last_(start_) {}

Progress::~Progress() {
  if (drawn_) log::redraw("");
}

double Progress::seconds() const {
  return std::chrono::duration<double>(Clock::now() - start_).count();
}

void Progress::update(int64_t done, std::string_view detail) {
  using namespace std::chrono_literals;
  const auto now = Clock::now();
  const auto interval = log::on_terminal() ? Clock::duration(167ms) : Clock::duration(60s);
  if (now - last_ < interval) return;
  last_ = now;
  const double elapsed = seconds();
  const double rate = elapsed > 0 ? static_cast<double>(done) / elapsed : 0;
  std::string line = total_ > 0 ? fmt::format("{} {}/{} {}", label_, done, total_, unit_)
                                : fmt::format("{} {} {}", label_, done, unit_);
  line += rate >= 1 || rate == 0 ? fmt::format(", {:.1f}/s", rate)
                                 : fmt::format(", {:.1f} s each", 1 / rate);
  if (total_ > done && rate > 0) {
    line += fmt::format(", {} left", show_seconds(static_cast<double>(total_ - done) / rate));
  }
  if (!detail.empty()) line += fmt::format(", {}", detail);
  if (log::on_terminal()) {
    log::redraw(line);
    drawn_ = true;
  } else {
    log::info("{}", line);
  }
}

}  // namespace flux
