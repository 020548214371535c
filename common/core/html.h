// common/core/html.h - texts and bytes in a page.
#pragma once
#include <string>
#include <string_view>

namespace flux {

/// `text` as HTML shows it: &, <, >, " and ' escaped, control characters and broken UTF-8 written out.
std::string html_text(std::string_view text);

/// Standard base 64 with padding.
std::string base64(std::string_view bytes);

}  // namespace flux
