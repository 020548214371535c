#include "common/tokenizers/tiny.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "common/core/file.h"
#include "common/core/text.h"
#include "common/tokenizers/byte_symbols.h"

namespace flux::tokenizers {
namespace fs = std::filesystem;
namespace {

// What captions of the demo and of the tests are made of, most frequent first.
constexpr std::string_view kWords =
    "a the of and in with on at is to by an it for as from photo picture image painting drawing "
    "portrait style red green "
    "blue yellow orange purple black white grey brown pink dark light bright soft small large big "
    "old new square circle "
    "triangle stripe striped dot dots checker board ring cross gradient round wide tall left right "
    "top bottom center "
    "background foreground shape shapes color colors simple abstract flat cat dog bird horse man "
    "woman child person face "
    "hand tree forest flower grass leaf mountain river lake sea beach sky cloud sun moon star "
    "night day morning evening "
    "city street house room window door wall table chair car boat train bridge road stone water "
    "fire snow rain glass wood "
    "metal paper sitting standing walking running holding looking wearing hat coat dress close up "
    "view front side back "
    "high low detail detailed quality sharp focus film camera lens two three four five some many "
    "one very near under over "
    "behind between quick fox jumps lazy hello world";

std::vector<std::string> words() { return split(kWords, ' '); }

// ---- protobuf: just enough to write a SentencePiece ModelProto

void put_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  out += static_cast<char>(value);
}
void put_key(std::string& out, uint64_t field, uint64_t wire_type) {
  put_varint(out, field << 3 | wire_type);
}
void put_number(std::string& out, uint64_t field, int64_t value) {
  put_key(out, field, 0);
  put_varint(out, static_cast<uint64_t>(value));
}
void put_bytes(std::string& out, uint64_t field, std::string_view bytes) {
  put_key(out, field, 2);
  put_varint(out, bytes.size());
  out += bytes;
}
template <class Number>
void put_fixed(std::string& out, Number value) {
  char bytes[sizeof(value)];
  std::memcpy(bytes, &value, sizeof(value));  // little-endian
  out.append(bytes, sizeof(value));
}
void put_float(std::string& out, uint64_t field, float value) {
  put_key(out, field, 5);
  put_fixed(out, value);
}

// ---- charsmap: a Darts-clone double array over the keys, then the replacements; charsmap.cpp
// reads it back

class CharsmapBuilder {
 public:
  static std::string build(const std::map<std::string, std::string>& replacements) {
    CharsmapBuilder builder;
    std::string pool;
    std::vector<Key> keys;
    for (const auto& [key, replacement] : replacements) {
      keys.push_back({key, static_cast<uint32_t>(pool.size())});
      pool += replacement;
      pool += '\0';
    }
    builder.used_.insert(0);
    builder.place(keys, 0, 0);
    while (builder.units_.size() % 256 != 0)
      builder.units_.push_back(0);  // whole blocks, as Darts-clone writes them
    std::string out;
    put_fixed(out, static_cast<uint32_t>(builder.units_.size() * sizeof(uint32_t)));
    for (const uint32_t unit : builder.units_) put_fixed(out, unit);
    return out + pool;
  }

 private:
  struct Key {
    std::string text;
    uint32_t value;
  };
  // Places the children of the node at `pos`: the sorted keys, which agree in their first `depth`
  // bytes.
  void place(const std::vector<Key>& keys, size_t depth, uint32_t pos) {
    std::map<unsigned char, std::vector<Key>> children;  // 0: the key that ends here
    for (const Key& key : keys) {
      children[key.text.size() == depth ? 0 : static_cast<unsigned char>(key.text[depth])]
          .push_back(key);
    }
    uint32_t base = 1;
    const auto fits = [&] {
      return !bases_.contains(base) && std::ranges::none_of(children, [&](const auto& c) {
        return used_.contains(base ^ c.first);
      });
    };
    while (!fits()) ++base;
    bases_.insert(base);
    const bool ends = children.contains(0);
    unit(pos) |= (pos ^ base) << 10 | (ends ? 0x100u : 0u);
    for (const auto& [byte, unused] : children) used_.insert(base ^ byte);
    for (const auto& [byte, rest] : children) {
      if (byte == 0) {
        unit(base) = rest.front().value | 0x80000000u;
      } else {
        unit(base ^ byte) = byte;
        place(rest, depth + 1, base ^ byte);
      }
    }
  }
  uint32_t& unit(uint32_t pos) {
    if (units_.size() <= pos) units_.resize(pos + 1);
    return units_[pos];
  }
  std::vector<uint32_t> units_;
  std::set<uint32_t> used_, bases_;
};

std::string tiny_charsmap() {
  std::map<std::string, std::string> map = {{"\u2026", "..."},
                                            {"\u2122", "TM"},
                                            {"\u00BD", "1\u20442"},
                                            {"\u00B2", "2"},
                                            {"\uFB01", "fi"},
                                            {"\uFB02", "fl"},
                                            {"e\u0301", "\u00E9"},
                                            {"u\u0308", "\u00FC"}};
  for (const char* space : {"\t",
                            "\n",
                            "\f",
                            "\r",
                            "\u00A0",
                            "\u2003",
                            "\u2009",
                            "\u200B",
                            "\u200C",
                            "\u200D",
                            "\u2028",
                            "\u2029",
                            "\u202F",
                            "\u2581",
                            "\u3000",
                            "\uFEFF",
                            "\uFFFD"}) {
    map[space] = " ";
  }
  for (char c = 1; c < 9; ++c) map[std::string(1, c)] = "";
  map["\x7F"] = "";
  std::string wide = "\uFF01";  // full-width forms of ! to ~
  for (char c = '!'; c <= '~'; ++c) {
    const int offset = 0x01 + c - '!';
    wide[1] = static_cast<char>(0xBC + offset / 64);
    wide[2] = static_cast<char>(0x80 + offset % 64);
    map[wide] = std::string(1, c);
  }
  return CharsmapBuilder::build(map);
}

}  // namespace

std::string tiny_t5_model() {
  std::string out;
  const auto put_piece = [&](std::string_view text, float score, int64_t type) {
    std::string piece;
    put_bytes(piece, 1, text);
    put_float(piece, 2, score);
    if (type != 1) put_number(piece, 3, type);
    put_bytes(out, 1, piece);
  };
  put_piece("<pad>", 0.0f, 3);
  put_piece("</s>", 0.0f, 3);
  put_piece("<unk>", 0.0f, 2);
  // scores are multiples of 1/64, so that sums are exact in float and in double
  int rank = 0;
  const auto next_score = [&](float start) { return start - static_cast<float>(rank++) / 64.0f; };
  put_piece("\u2581", -2.0f, 1);
  for (const std::string& word : words()) put_piece("\u2581" + word, next_score(-4.0f), 1);
  for (const char* ending :
       {"s", "ing", "ed", "er", "ly", "est", "ness", "...", "---", "ll", "th", "he", "in", "an"}) {
    put_piece(ending, next_score(-4.0f), 1);
  }
  for (char c = '!'; c <= '~'; ++c) {
    if (c != 's' &&
        std::string_view("<\\^`{}~").find(c) == std::string_view::npos) {  // as the real vocabulary
      put_piece(std::string(1, c), next_score(-6.0f), 1);
    }
  }
  for (const char* other : {"\u00E9",
                            "\u00E8",
                            "\u00E4",
                            "\u00F6",
                            "\u00FC",
                            "\u00DF",
                            "\u2013",
                            "\u2014",
                            "\u2019",
                            "\u201C",
                            "\u201D",
                            "\u20AC"}) {
    put_piece(other, next_score(-6.0f), 1);
  }

  std::string trainer;
  put_number(trainer, 3, 1);   // model_type: unigram
  put_number(trainer, 40, 2);  // unk_id, bos_id, eos_id, pad_id
  put_number(trainer, 41, -1);
  put_number(trainer, 42, 1);
  put_number(trainer, 43, 0);
  put_bytes(out, 2, trainer);

  std::string normalizer;
  put_bytes(normalizer, 1, "flux_tiny");
  put_bytes(normalizer, 2, tiny_charsmap());
  put_number(normalizer, 3, 1);  // add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
  put_number(normalizer, 4, 1);
  put_number(normalizer, 5, 1);
  put_bytes(out, 3, normalizer);
  return out;
}

namespace {

struct TinyClip {
  std::vector<std::string> tokens;  // by id
  std::vector<std::pair<std::string, std::string>> merges;
};

// The merges that build each word from its front, as far as shorter words have not built a part of
// it.
TinyClip tiny_clip() {
  TinyClip out;
  for (const char* end : {"", "</w>"}) {
    for (const unsigned char byte : bytes_in_id_order())
      out.tokens.push_back(byte_symbol(byte) + end);
  }
  std::set<std::string> known(out.tokens.begin(), out.tokens.end());
  for (const std::string& word : words()) {
    std::vector<std::string> symbols;
    for (const char c : word) symbols.emplace_back(1, c);
    symbols.back() += "</w>";
    const auto apply = [&](const std::pair<std::string, std::string>& merge) {
      for (size_t i = 0; i + 1 < symbols.size(); ++i) {
        if (symbols[i] != merge.first || symbols[i + 1] != merge.second) continue;
        symbols[i] += symbols[i + 1];
        symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(i) + 1);
      }
    };
    for (const auto& merge : out.merges) apply(merge);  // by rank, which is their order
    while (symbols.size() > 1) {
      const std::pair<std::string, std::string> merge(symbols[0], symbols[1]);
      if (!known.insert(merge.first + merge.second).second)
        break;  // a token has one pair that makes it
      out.tokens.push_back(merge.first + merge.second);
      out.merges.push_back(merge);
      apply(merge);
    }
  }
  out.tokens.emplace_back("<|startoftext|>");
  out.tokens.emplace_back("<|endoftext|>");
  return out;
}

}  // namespace

std::string tiny_clip_vocab() {
  nlohmann::ordered_json vocab = nlohmann::ordered_json::object();
  int64_t id = 0;
  for (const std::string& token : tiny_clip().tokens) vocab.push_back({token, id++});
  return vocab.dump() + "\n";
}

std::string tiny_clip_merges() {
  std::string out = "#version: 0.2\n";
  for (const auto& [left, right] : tiny_clip().merges) out += left + " " + right + "\n";
  return out;
}

void write_tiny_tokenizers(const fs::path& folder) {
  make_folder(folder / "t5");
  make_folder(folder / "clip");
  write_file_if_changed(folder / "t5" / "spiece.model", tiny_t5_model());
  write_file_if_changed(folder / "clip" / "vocab.json", tiny_clip_vocab());
  write_file_if_changed(folder / "clip" / "merges.txt", tiny_clip_merges());
}

}  // namespace flux::tokenizers
