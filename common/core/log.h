// common/core/log.h - lines on stderr: "flux-train: warn: text key=value".
#pragma once
#include <fmt/format.h>

#include <string>
#include <string_view>

namespace flux::log {

enum class Level { kDebug, kInfo, kWarn, kError };

/// Sets the name at the start of each line and the lowest level shown. run_tool calls it.
void start(std::string_view program, Level lowest);
/// Shows one line, escaped (text.h) except for line breaks. A progress line on the terminal is
/// cleared first.
void write(Level level, std::string_view text);

template <class... Args>
void debug(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::kDebug, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void info(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::kInfo, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void warn(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::kWarn, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void error(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::kError, fmt::format(format, std::forward<Args>(args)...));
}

/// Shows `line` in place of the last one on a terminal; called by Progress.
void redraw(std::string_view line);
/// Whether stderr is a terminal.
bool on_terminal();

}  // namespace flux::log
