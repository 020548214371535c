#include "common/core/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <mutex>

#include "common/core/text.h"

namespace flux::log {
namespace {

struct State {
  std::mutex mutex;
  std::string program = "flux";
  bool line_drawn = false;  // a progress line stands on the terminal without a line break
  std::shared_ptr<spdlog::logger> logger = [] {
    auto made =
        std::make_shared<spdlog::logger>("flux", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_pattern("%v");
    made->flush_on(spdlog::level::trace);
    return made;
  }();
};

State& state() {
  static State instance;
  return instance;
}

// spdlog calls it "warning"; here the words are error warn info debug
constexpr const char* name(Level level) {
  switch (level) {
    case Level::kDebug:
      return "debug";
    case Level::kInfo:
      return "info";
    case Level::kWarn:
      return "warn";
    case Level::kError:
      return "error";
  }
  return "?";
}

constexpr spdlog::level::level_enum spd(Level level) {
  switch (level) {
    case Level::kDebug:
      return spdlog::level::debug;
    case Level::kInfo:
      return spdlog::level::info;
    case Level::kWarn:
      return spdlog::level::warn;
    case Level::kError:
      return spdlog::level::err;
  }
  return spdlog::level::err;
}

std::string safe_lines(std::string_view text) {
  std::string out;
  for (const std::string& line : split(text, '\n')) {
    if (!out.empty()) out += '\n';
    out += printable(line);
  }
  return out;
}

}  // namespace

void start(std::string_view program, Level lowest) {
  const std::lock_guard lock(state().mutex);
  state().program = program;
  state().logger->set_level(spd(lowest));
}

void write(Level level, std::string_view text) {
  const std::lock_guard lock(state().mutex);
  if (state().line_drawn) std::fputs("\r\033[K", stderr);
  state().line_drawn = false;
  state().logger->log(spd(level), "{}: {}: {}", state().program, name(level), safe_lines(text));
}

void redraw(std::string_view line) {
  const std::lock_guard lock(state().mutex);
  std::string text = printable(line);
  // a line that wraps cannot be drawn over
  winsize window{};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 8)
    text = shortened(text, window.ws_col - 4u);
  std::fprintf(stderr, "\r\033[K%s", text.c_str());
  std::fflush(stderr);
  state().line_drawn = true;
}

bool on_terminal() {
  static const bool terminal = isatty(STDERR_FILENO) == 1;
  return terminal;
}

}  // namespace flux::log
