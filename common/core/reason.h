// common/core/reason.h - what a parser says about a text, in words for users.
#pragma once
#include <string>
#include <string_view>

namespace flux {

/// What toml11's exceptions say, on one line without its names and its drawing of the file:
/// "value ("a") already exists: value defined twice". Printable.
std::string toml_reason(std::string_view said);
/// What nlohmann-json's exceptions say, without its names and numbers: "unexpected '}'; expected
/// string literal". Printable.
std::string json_reason(std::string_view said);

}  // namespace flux
