#include "common/tokenizers/clip_bpe.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <queue>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/reason.h"
#include "common/core/text.h"
#include "common/tokenizers/added_tokens.h"
#include "common/tokenizers/byte_symbols.h"
#include "common/tokenizers/tokenizer_json.h"
#include "common/tokenizers/unicode.h"

namespace flux::tokenizers {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kBos = "<|startoftext|>", kEos = "<|endoftext|>";
constexpr std::string_view kWordEnd = "</w>";
constexpr size_t kMaxMerges = 48894;  // CLIP's own reader stops there too
constexpr int64_t kLargestId = 1 << 24;

using Vocabulary = std::unordered_map<std::string, int32_t>;

Vocabulary read_vocabulary(const nlohmann::json& object) {
  if (!object.is_object() || object.empty())
    throw std::invalid_argument("the vocabulary is not an object of token: id");
  Vocabulary vocabulary;
  for (const auto& [token, id] : object.items()) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() > kLargestId) {
      throw std::invalid_argument(
          fmt::format("token '{}' has no id in 0..{}", printable(token), kLargestId));
    }
    vocabulary.emplace(token, id.get<int32_t>());
  }
  return vocabulary;
}

}  // namespace

struct ClipTokenizer::Model {
  struct Merge {
    uint32_t rank;
    int32_t result;
  };
  std::unordered_map<uint64_t, Merge> merges;          // by pair(left, right)
  std::array<int32_t, 256> symbols{}, last_symbols{};  // id of a byte inside a word, and at its end
  AddedTokens raw_tokens, normalized_tokens;
  int64_t vocab_size = 0;
  int32_t bos_id = 0, eos_id = 0;
  Sha256Digest sha256{};

  static uint64_t pair(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  void set_vocabulary(const Vocabulary& vocabulary);
  void add_merge(const Vocabulary& vocabulary, const std::string& left, const std::string& right);
  void encode_words(std::string_view clean, std::vector<int32_t>& ids) const;
  void encode_word(std::string_view word, std::vector<int32_t>& ids) const;

  static std::unique_ptr<Model> from_vocab_and_merges(std::string_view vocab,
                                                      std::string_view merges);
  static std::unique_ptr<Model> from_json(std::string_view bytes);
};

namespace {

// "fast" cleaning: NFC, runs of white space to one space, lower case.
std::string clean(std::string_view text) {
  const std::string composed = nfc(text);
  std::string out;
  out.reserve(composed.size());
  bool in_space = false;
  for (size_t pos = 0; pos < composed.size();) {
    const char32_t c = next_code_point(composed, pos);
    const bool is_space = char_class(c) == CharClass::kSpace;
    if (!is_space) {
      append_lower(out, c);
    } else if (!in_space) {
      out += ' ';
    }
    in_space = is_space;
  }
  return out;
}

}  // namespace

void ClipTokenizer::Model::set_vocabulary(const Vocabulary& vocabulary) {
  const auto need = [&](std::string_view token) {
    const auto it = vocabulary.find(std::string(token));
    if (it == vocabulary.end())
      throw std::invalid_argument(fmt::format("the vocabulary has no {}", token));
    return it->second;
  };
  bos_id = need(kBos);
  eos_id = need(kEos);
  for (size_t byte = 0; byte < 256; ++byte) {
    const std::string symbol = byte_symbol(static_cast<unsigned char>(byte));
    const auto id = [&](const std::string& token) {
      const auto it = vocabulary.find(token);
      return it == vocabulary.end() ? eos_id : it->second;  // CLIP's unknown token is its eos
    };
    symbols[byte] = id(symbol);
    last_symbols[byte] = id(symbol + std::string(kWordEnd));
  }
  for (const auto& [unused, id] : vocabulary) vocab_size = std::max<int64_t>(vocab_size, id + 1);
}

void ClipTokenizer::Model::add_merge(const Vocabulary& vocabulary,
                                     const std::string& left,
                                     const std::string& right) {
  const auto rank = static_cast<uint32_t>(merges.size());
  const auto need = [&](const std::string& token) {
    const auto it = vocabulary.find(token);
    if (it != vocabulary.end()) return it->second;
    throw std::invalid_argument(
        fmt::format("merge {} ('{} {}') needs '{}', which the vocabulary does not have",
                    rank + 1,
                    printable(left),
                    printable(right),
                    printable(token)));
  };
  const Merge merge{rank, need(left + right)};
  if (!merges.emplace(pair(need(left), need(right)), merge).second) {
    throw std::invalid_argument(
        fmt::format("merge '{} {}' is there twice", printable(left), printable(right)));
  }
}

std::unique_ptr<ClipTokenizer::Model> ClipTokenizer::Model::from_vocab_and_merges(
    std::string_view vocab, std::string_view merges) {
  auto model = std::make_unique<Model>();
  const Vocabulary vocabulary = read_vocabulary(nlohmann::json::parse(vocab));
  model->set_vocabulary(vocabulary);
  std::vector<std::string> lines = split(merges, '\n');
  for (size_t i = 1; i < lines.size() && model->merges.size() < kMaxMerges;
       ++i) {  // line 0 is a version comment
    const std::string_view line = trim(lines[i]);
    if (line.empty()) continue;
    const std::vector<std::string> pair_of = split(line, ' ');
    if (pair_of.size() != 2 || pair_of[0].empty() || pair_of[1].empty()) {
      throw std::invalid_argument(fmt::format("line {} of merges.txt is not two symbols", i + 1));
    }
    model->add_merge(vocabulary, pair_of[0], pair_of[1]);
  }
  // transformers matches both specials in the cleaned text, so that other letter cases count too
  model->normalized_tokens.add({std::string(kBos), model->bos_id});
  model->normalized_tokens.add({std::string(kEos), model->eos_id});
  return model;
}

std::unique_ptr<ClipTokenizer::Model> ClipTokenizer::Model::from_json(std::string_view bytes) {
  const nlohmann::json root = parse_tokenizer_json(bytes);
  const nlohmann::json& part = member(root, "model");
  const auto text_of = [&](const char* key) {
    const auto it = part.find(key);
    return it == part.end() || it->is_null() ? std::string() : it->get<std::string>();
  };
  if (text_of("type") != "BPE" || text_of("end_of_word_suffix") != kWordEnd ||
      !text_of("continuing_subword_prefix").empty()) {
    throw std::invalid_argument(
        "not CLIP's byte pairs: type BPE with end_of_word_suffix </w> is expected");
  }
  std::string steps;
  for (const nlohmann::json& step : normalizer_steps(root)) steps += step.value("type", "?") + " ";
  if (steps != "NFC Replace Lowercase ") {
    throw std::invalid_argument(
        fmt::format("normalizer '{}', CLIP's is NFC, Replace, Lowercase", printable(trim(steps))));
  }
  auto model = std::make_unique<Model>();
  const Vocabulary vocabulary = read_vocabulary(member(part, "vocab"));
  model->set_vocabulary(vocabulary);
  for (const nlohmann::json& entry :
       member(part, "merges")) {  // "a b", or ["a", "b"] in newer files
    const auto pair_of = entry.is_string() ? split(entry.get<std::string>(), ' ')
                                           : entry.get<std::vector<std::string>>();
    if (pair_of.size() != 2) throw std::invalid_argument("a merge is not two symbols");
    model->add_merge(vocabulary, pair_of[0], pair_of[1]);
  }
  read_added_tokens(root,
                    static_cast<size_t>(model->vocab_size),
                    model->raw_tokens,
                    model->normalized_tokens,
                    clean);
  return model;
}

// Words of cleaned text, by the expression 's|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+
void ClipTokenizer::Model::encode_words(std::string_view text, std::vector<int32_t>& ids) const {
  constexpr std::string_view kContractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
  for (size_t pos = 0; pos < text.size();) {
    const size_t begin = pos;
    const std::string_view rest = text.substr(begin);
    const auto contraction =
        std::ranges::find_if(kContractions, [&](auto c) { return rest.starts_with(c); });
    if (contraction != std::end(kContractions)) {
      pos += contraction->size();
      encode_word(*contraction, ids);
      continue;
    }
    const CharClass first = char_class(next_code_point(text, pos));
    if (first == CharClass::kSpace) continue;
    while (first != CharClass::kNumber && pos < text.size()) {  // a number is one code point
      size_t next = pos;
      if (char_class(next_code_point(text, next)) != first) break;
      pos = next;
    }
    encode_word(text.substr(begin, pos - begin), ids);
  }
}

// Merges the adjacent pair of lowest rank, leftmost first, until none is left: a heap of candidates
// over a linked list.
void ClipTokenizer::Model::encode_word(std::string_view word, std::vector<int32_t>& ids) const {
  constexpr size_t kEnd = SIZE_MAX;
  struct Symbol {
    int32_t id;
    size_t previous, next;
    bool merged_away = false;
  };
  struct Candidate {
    uint32_t rank;
    size_t left;
    int32_t result;
    bool operator>(const Candidate& o) const {
      return std::pair(rank, left) > std::pair(o.rank, o.left);
    }
  };
  std::vector<Symbol> list(word.size());
  for (size_t i = 0; i < word.size(); ++i) {
    const auto byte = static_cast<unsigned char>(word[i]);
    const bool last = i + 1 == word.size();
    list[i] = {
        last ? last_symbols[byte] : symbols[byte], i == 0 ? kEnd : i - 1, last ? kEnd : i + 1};
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> heap;
  const auto find_merge = [&](size_t left) -> const Merge* {
    if (left == kEnd || list[left].merged_away || list[left].next == kEnd) return nullptr;
    const auto it = merges.find(pair(list[left].id, list[list[left].next].id));
    return it == merges.end() ? nullptr : &it->second;
  };
  const auto offer = [&](size_t left) {
    if (const Merge* merge = find_merge(left)) heap.push({merge->rank, left, merge->result});
  };
  for (size_t i = 0; i < word.size(); ++i) offer(i);
  while (!heap.empty()) {
    const Candidate top = heap.top();
    heap.pop();
    const Merge* merge = find_merge(top.left);
    if (merge == nullptr || merge->result != top.result) continue;  // one side has changed since
    Symbol& left = list[top.left];
    Symbol& right = list[left.next];
    left.id = top.result;
    left.next = right.next;
    right.merged_away = true;
    if (left.next != kEnd) list[left.next].previous = top.left;
    offer(left.previous);
    offer(top.left);
  }
  for (size_t i = 0; i != kEnd; i = list[i].next) ids.push_back(list[i].id);
}

ClipTokenizer::ClipTokenizer(std::unique_ptr<const Model> model) : model_(std::move(model)) {}
ClipTokenizer::ClipTokenizer(ClipTokenizer&&) noexcept = default;
ClipTokenizer& ClipTokenizer::operator=(ClipTokenizer&&) noexcept = default;
ClipTokenizer::~ClipTokenizer() = default;

ClipTokenizer ClipTokenizer::load(const fs::path& path) {
  const fs::path file = file_in(path, {"vocab.json", "tokenizer.json"});
  const std::string bytes = read_file(file, kLargestFile_bytes);
  if (file == path || file.filename() == "tokenizer.json") return parse_json(bytes, file);
  return parse(bytes, read_file(path / "merges.txt", kLargestFile_bytes), path);
}

namespace {

// Turns what a malformed file throws into an InputError that names it.
template <class Parse>
auto naming(const fs::path& name, const Parse& parse) {
  try {
    return parse();
  } catch (const std::invalid_argument& e) {
    throw InputError(
        fmt::format("{}: {}", show(name), e.what()),
        "CLIP's tokenizer is a folder with vocab.json and merges.txt, or tokenizer.json");
  } catch (const nlohmann::json::exception& e) {
    throw InputError(
        fmt::format("{}: not a CLIP vocabulary: {}", show(name), json_reason(e.what())));
  }
}

}  // namespace

ClipTokenizer ClipTokenizer::parse(std::string_view vocab,
                                   std::string_view merges,
                                   const fs::path& name) {
  auto model = naming(name, [&] { return Model::from_vocab_and_merges(vocab, merges); });
  model->sha256 = Sha256().add_field(vocab).add_field(merges).digest();
  return ClipTokenizer(std::move(model));
}

ClipTokenizer ClipTokenizer::parse_json(std::string_view bytes, const fs::path& name) {
  auto model = naming(name, [&] { return Model::from_json(bytes); });
  model->sha256 = Sha256().add_field(bytes).digest();
  return ClipTokenizer(std::move(model));
}

std::vector<int32_t> ClipTokenizer::encode(std::string_view utf8) const {
  require_utf8(utf8);
  std::vector<int32_t> ids = {model_->bos_id};
  encode_around_tokens(
      model_->raw_tokens,
      model_->normalized_tokens,
      utf8,
      [&](std::string_view text) { return clean(text); },
      [&](std::string_view text) { model_->encode_words(text, ids); },
      ids);
  ids.push_back(model_->eos_id);
  return ids;
}

Padded ClipTokenizer::padded(std::span<const int32_t> ids, int64_t length) const {
  return pad_or_truncate(ids, length, model_->eos_id, model_->eos_id);
}
int64_t ClipTokenizer::vocab_size() const { return model_->vocab_size; }
int32_t ClipTokenizer::bos_id() const { return model_->bos_id; }
int32_t ClipTokenizer::eos_id() const { return model_->eos_id; }
int32_t ClipTokenizer::pad_id() const { return model_->eos_id; }
const Sha256Digest& ClipTokenizer::sha256() const { return model_->sha256; }

}  // namespace flux::tokenizers
