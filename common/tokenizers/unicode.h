// common/tokenizers/unicode.h - character classes, case, NFC and grapheme clusters as the
// reference's library has them.
#pragma once
#include <cstddef>
#include <string>
#include <string_view>

namespace flux::tokenizers {

// Everything below takes well-formed UTF-8; require_utf8 is the gate.

/// Throws InputError with the offset of the first bad byte unless `text` is well-formed UTF-8.
void require_utf8(std::string_view text);

/// The code point at `pos`, which moves behind it.
char32_t next_code_point(std::string_view text, size_t& pos);
void append_code_point(std::string& text, char32_t code_point);

/// What a regular expression sees: \s, \p{L}, \p{N}, and the rest (combining marks among it).
enum class CharClass { kSpace, kLetter, kNumber, kOther };
/// Classes of Unicode 16, whatever ICU's version (14 or later) is.
CharClass char_class(char32_t code_point);

/// Appends the lower case of one code point: Unicode 16, no context (a final sigma stays medial),
/// U+0130 becomes two.
void append_lower(std::string& text, char32_t code_point);

/// Normalisation form C of Unicode 9: later code points are left alone and compose with nothing.
/// Linear time, even for long runs of combining marks.
std::string nfc(std::string_view text);

/// End of the extended grapheme cluster that starts at `begin` < text.size(). Source: UAX 29, rules
/// GB3 to GB13.
size_t grapheme_end(std::string_view text, size_t begin);

}  // namespace flux::tokenizers
