// common/core/text.h - text that is safe to show, UTF-8 checks, sizes and durations for people.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace flux {

/// `text` with control characters and bytes that are not UTF-8 written as \n, \t or \xNN, so that
/// what users' files say cannot steer a terminal or forge a log line.
std::string printable(std::string_view text);
/// A path for messages: printable, and in quotes where it holds spaces or anything escaped.
std::string show(const std::filesystem::path& path);

/// Offset of the first byte that is not well-formed UTF-8 (overlong forms and surrogates are not),
/// or nothing.
std::optional<size_t> first_invalid_utf8(std::string_view bytes);

/// The candidate nearest to `name` by edit distance, if one is near enough to be what was meant.
std::optional<std::string> nearest_name(std::string_view name,
                                        std::span<const std::string> candidates);

/// At most `max_bytes` of it, cut between characters, then "..." if it was cut.
std::string shortened(std::string_view text, size_t max_bytes);
std::string lower_ascii(std::string_view text);
std::vector<std::string> split(std::string_view text, char separator);
std::string_view trim(std::string_view text);  // ASCII white space, both ends

/// 1536 -> "1.5 KiB"
std::string show_bytes(uint64_t bytes);
/// "20GiB" -> 21474836480; also KB MB GB TB (powers of 1000), KiB MiB GiB TiB, B or nothing, with a
/// fraction and a blank before the unit, in any letter case. Nothing if it is no size or beyond 2^62.
std::optional<int64_t> parse_bytes(std::string_view text);
/// 3725 -> "1:02:05", 65 -> "1:05", 3.2 -> "3.2 s"
std::string show_seconds(double seconds);
/// {2, 3} -> "[2, 3]", {} -> "[]"
std::string shape_text(std::span<const int64_t> shape);
/// First `limit` names joined by ", ", then "and N more".
std::string join_some(std::span<const std::string> names, size_t limit = 5);

}  // namespace flux
