#include "common/core/reason.h"

#include "common/core/text.h"

namespace flux {
namespace {

constexpr auto kNowhere = std::string_view::npos;

/// What follows `mark`; nothing if it is not there.
std::string_view after(std::string_view text, std::string_view mark) {
  const size_t at = text.find(mark);
  return at == kNowhere ? std::string_view() : text.substr(at + mark.size());
}

}  // namespace

// "[error] toml::parse_boolean: WHAT", then lines of the file, each with "   | ^--- MORE" below it.
std::string toml_reason(std::string_view said) {
  std::string_view what = said.substr(0, said.find('\n'));
  if (what.find("toml::") != kNowhere) what = trim(after(after(what, "toml::"), ": "));
  while (what.ends_with('.')) what.remove_suffix(1);
  std::string more;
  for (const auto& line : split(said, '\n')) {
    if (trim(line).starts_with('|') && line.find("--- ") != kNowhere)
      more = trim(after(line, "--- "));
  }
  if (more == "here") more.clear();
  std::string out(what);
  if (!more.empty()) out += (out.empty() ? "" : ": ") + more;
  return out.empty() ? "cannot be read" : printable(out);
}

// "[json.exception.parse_error.101] parse error at line 1, column 2: syntax error while parsing
// value - WHAT", or "[json.exception.type_error.302] WHAT".
std::string json_reason(std::string_view said) {
  std::string_view what = said;
  if (what.starts_with("[json.exception.")) what = after(what, "] ");
  if (what.starts_with("parse error")) {
    const auto reason = after(what, " - ");
    what = reason.empty() ? after(what, ": ") : reason;
  }
  return what.empty() ? "cannot be read" : printable(what);
}

}  // namespace flux
