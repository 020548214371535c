#include "common/tokenizers/unicode.h"

#include <fmt/format.h>
#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>
#include <unicode/uchar.h>
#include <unicode/uniset.h>
#include <unicode/utf8.h>

#include <algorithm>
#include <array>
#include <span>
#include <stdexcept>
#include <vector>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux::tokenizers {
namespace {

struct Range {
  char32_t first, last;
};

bool contains(std::span<const Range> sorted, char32_t c) {
  const auto it = std::ranges::upper_bound(sorted, c, {}, &Range::first);
  return it != sorted.begin() && c <= std::prev(it)->last;
}

// Letters and numbers that came after Unicode 14 (the oldest ICU here) and that the reference (HF
// tokenizers 0.21.4, which has Unicode 16) knows. Found by asking it about every code point.
constexpr Range kNewLetters[] = {
    {0x1C89, 0x1C8A},   {0xA7CB, 0xA7CD},   {0xA7DA, 0xA7DC},   {0x105C0, 0x105F3},
    {0x10D4A, 0x10D65}, {0x10D6F, 0x10D85}, {0x10EC2, 0x10EC4}, {0x1123F, 0x11240},
    {0x11380, 0x11389}, {0x1138B, 0x1138B}, {0x1138E, 0x1138E}, {0x11390, 0x113B5},
    {0x113B7, 0x113B7}, {0x113D1, 0x113D1}, {0x113D3, 0x113D3}, {0x11BC0, 0x11BE0},
    {0x11F02, 0x11F02}, {0x11F04, 0x11F10}, {0x11F12, 0x11F33}, {0x1342F, 0x1342F},
    {0x13441, 0x13446}, {0x13460, 0x143FA}, {0x16100, 0x1611D}, {0x16D40, 0x16D6C},
    {0x18CFF, 0x18CFF}, {0x1B132, 0x1B132}, {0x1B155, 0x1B155}, {0x1DF25, 0x1DF2A},
    {0x1E030, 0x1E06D}, {0x1E4D0, 0x1E4EB}, {0x1E5D0, 0x1E5ED}, {0x1E5F0, 0x1E5F0},
    {0x2B739, 0x2B739}, {0x2EBF0, 0x2EE5D}, {0x31350, 0x323AF}};
constexpr Range kNewNumbers[] = {{0x10D40, 0x10D49},
                                 {0x116D0, 0x116E3},
                                 {0x11BF0, 0x11BF9},
                                 {0x11F50, 0x11F59},
                                 {0x16130, 0x16139},
                                 {0x16D70, 0x16D79},
                                 {0x1CCF0, 0x1CCF9},
                                 {0x1D2C0, 0x1D2D3},
                                 {0x1E4F0, 0x1E4F9},
                                 {0x1E5F1, 0x1E5FA}};

bool at_most_unicode(UChar32 c, uint8_t version) {
  UVersionInfo age;
  u_charAge(c, age);
  return age[0] != 0 && age[0] <= version;
}

// Canonical combining class in Unicode 9.
uint8_t combining_class(UChar32 c) {
  const uint8_t value = u_getCombiningClass(c);
  return value != 0 && at_most_unicode(c, 9) ? value : 0;
}

// NFC restricted to what Unicode 9 knew: the reference's normaliser is that old.
const icu::Normalizer2& nfc_of_unicode_9() {
  static const icu::FilteredNormalizer2* const filtered = [] {
    UErrorCode status = U_ZERO_ERROR;
    auto* const known =
        new icu::UnicodeSet(u"[:Age=9.0:]", status);  // lives as long as the program
    known->freeze();
    const icu::Normalizer2* const full = icu::Normalizer2::getNFCInstance(status);
    if (U_FAILURE(status))
      throw std::runtime_error(fmt::format("ICU has no NFC data: {}", u_errorName(status)));
    return new icu::FilteredNormalizer2(*full, *known);
  }();
  return *filtered;
}

// Appends a mark's parts: four characters decompose to two marks each, and never compose again.
void append_marks(std::vector<std::pair<uint8_t, UChar32>>& marks, UChar32 c) {
  const auto push = [&](UChar32 mark) { marks.emplace_back(combining_class(mark), mark); };
  switch (c) {
    case 0x344:
      push(0x308), push(0x301);
      break;
    case 0xF73:
      push(0xF71), push(0xF72);
      break;
    case 0xF75:
      push(0xF71), push(0xF74);
      break;
    case 0xF81:
      push(0xF71), push(0xF80);
      break;
    default:
      push(c);
  }
}

bool is_mark(UChar32 c) {
  return c >= 0x300 && (combining_class(c) != 0 || c == 0xF73 || c == 0xF75 || c == 0xF81);
}

// `text` with long runs of combining marks in canonical order. ICU sorts by insertion, which takes
// quadratic time on a caption of a million marks; sorting first changes nothing in the normal form.
std::string with_sorted_marks(std::string_view text) {
  constexpr size_t kLongRun = 64;
  std::string out;
  std::vector<std::pair<uint8_t, UChar32>> marks;
  size_t run_begin = 0;
  const auto end_run = [&](size_t end) {
    if (marks.size() < kLongRun) {
      out += text.substr(run_begin, end - run_begin);
    } else {
      std::ranges::stable_sort(marks, {}, &std::pair<uint8_t, UChar32>::first);
      for (const auto& [unused, mark] : marks) append_code_point(out, static_cast<char32_t>(mark));
    }
    marks.clear();
  };
  for (size_t pos = 0; pos < text.size();) {
    const size_t begin = pos;
    const auto c = static_cast<UChar32>(next_code_point(text, pos));
    if (is_mark(c)) {
      if (marks.empty()) run_begin = begin;
      append_marks(marks, c);
      continue;
    }
    if (!marks.empty()) end_run(begin);
    out += text.substr(begin, pos - begin);
  }
  if (!marks.empty()) end_run(text.size());
  return out;
}

UGraphemeClusterBreak break_property(UChar32 c) {
  if (c == 0x897)
    return U_GCB_EXTEND;  // of Unicode 16; its other marks cannot meet a cluster below six bytes
  return static_cast<UGraphemeClusterBreak>(u_getIntPropertyValue(c, UCHAR_GRAPHEME_CLUSTER_BREAK));
}

}  // namespace

void require_utf8(std::string_view text) {
  if (const auto offset = first_invalid_utf8(text)) {
    throw InputError(fmt::format("text is not valid UTF-8: byte 0x{:02x} at offset {}",
                                 static_cast<unsigned char>(text[*offset]),
                                 *offset),
                     "save it as UTF-8");
  }
}

char32_t next_code_point(std::string_view text, size_t& pos) {
  UChar32 c = 0;
  U8_NEXT_UNSAFE(text.data(), pos, c);
  return static_cast<char32_t>(c);
}

void append_code_point(std::string& text, char32_t code_point) {
  std::array<char, U8_MAX_LENGTH> bytes{};
  size_t length = 0;
  U8_APPEND_UNSAFE(bytes.data(), length, static_cast<UChar32>(code_point));
  text.append(bytes.data(), length);
}

CharClass char_class(char32_t code_point) {
  const auto c = static_cast<UChar32>(code_point);
  if (u_isUWhiteSpace(c)) return CharClass::kSpace;
  if (contains(kNewLetters, code_point)) return CharClass::kLetter;
  if (contains(kNewNumbers, code_point)) return CharClass::kNumber;
  const uint32_t category = U_GET_GC_MASK(c);
  if ((category & (U_GC_L_MASK | U_GC_N_MASK)) == 0 || !at_most_unicode(c, 16))
    return CharClass::kOther;
  return (category & U_GC_L_MASK) != 0 ? CharClass::kLetter : CharClass::kNumber;
}

void append_lower(std::string& text, char32_t code_point) {
  switch (code_point) {
    case 0x130:
      text += "i\u0307";
      return;  // the one code point with a longer lower case
    // capitals of Unicode 16
    case 0x1C89:
    case 0xA7CC:
    case 0xA7DA:
      append_code_point(text, code_point + 1);
      return;
    case 0xA7CB:
      append_code_point(text, 0x264);
      return;
    case 0xA7DC:
      append_code_point(text, 0x19B);
      return;
    default:
      break;
  }
  if (code_point >= 0x10D50 && code_point <= 0x10D65) {
    append_code_point(text, code_point + 0x20);
    return;
  }
  const auto c = static_cast<UChar32>(code_point);
  const UChar32 lower = u_tolower(c);
  append_code_point(
      text, lower != c && at_most_unicode(c, 16) ? static_cast<char32_t>(lower) : code_point);
}

std::string nfc(std::string_view text) {
  const bool ascii =
      std::ranges::all_of(text, [](char c) { return static_cast<unsigned char>(c) < 0x80; });
  if (ascii) return std::string(text);
  const std::string sorted = with_sorted_marks(text);
  std::string out;
  icu::StringByteSink<std::string> sink(&out, static_cast<int32_t>(sorted.size()));
  UErrorCode status = U_ZERO_ERROR;
  nfc_of_unicode_9().normalizeUTF8(0, icu::StringPiece(sorted), sink, nullptr, status);
  if (U_FAILURE(status))
    throw std::runtime_error(fmt::format("ICU normalisation failed: {}", u_errorName(status)));
  return out;
}

size_t grapheme_end(std::string_view text, size_t begin) {
  size_t pos = begin;
  auto c = static_cast<UChar32>(next_code_point(text, pos));
  UGraphemeClusterBreak before = break_property(c);
  bool pictograph =
      u_hasBinaryProperty(c, UCHAR_EXTENDED_PICTOGRAPHIC);  // seen one, and only Extend since
  bool odd_flags = before == U_GCB_REGIONAL_INDICATOR;
  while (pos < text.size()) {
    const size_t boundary = pos;
    c = static_cast<UChar32>(next_code_point(text, pos));
    const UGraphemeClusterBreak after = break_property(c);
    const bool next_pictograph = u_hasBinaryProperty(c, UCHAR_EXTENDED_PICTOGRAPHIC);
    const auto is_break_control = [](UGraphemeClusterBreak p) {
      return p == U_GCB_CR || p == U_GCB_LF || p == U_GCB_CONTROL;
    };
    bool joined = false;
    if (before == U_GCB_CR && after == U_GCB_LF) {
      joined = true;  // GB3
    } else if (is_break_control(before) || is_break_control(after)) {
      joined = false;  // GB4, GB5
    } else if (after == U_GCB_EXTEND || after == U_GCB_ZWJ || after == U_GCB_SPACING_MARK ||
               before == U_GCB_PREPEND) {
      joined = true;  // GB9, GB9a, GB9b
    } else if (before == U_GCB_L) {
      joined =
          after == U_GCB_L || after == U_GCB_V || after == U_GCB_LV || after == U_GCB_LVT;  // GB6
    } else if (before == U_GCB_LV || before == U_GCB_V) {
      joined = after == U_GCB_V || after == U_GCB_T;  // GB7
    } else if (before == U_GCB_LVT || before == U_GCB_T) {
      joined = after == U_GCB_T;  // GB8
    } else if (before == U_GCB_ZWJ && pictograph && next_pictograph) {
      joined = true;  // GB11
    } else if (before == U_GCB_REGIONAL_INDICATOR && after == U_GCB_REGIONAL_INDICATOR) {
      joined = odd_flags;  // GB12, GB13
    }
    if (!joined) return boundary;
    odd_flags = after == U_GCB_REGIONAL_INDICATOR && !odd_flags;
    pictograph = next_pictograph || (pictograph && (after == U_GCB_EXTEND || after == U_GCB_ZWJ));
    before = after;
  }
  return pos;
}

}  // namespace flux::tokenizers
