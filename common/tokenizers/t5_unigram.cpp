#include "common/tokenizers/t5_unigram.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/reason.h"
#include "common/core/text.h"
#include "common/tokenizers/added_tokens.h"
#include "common/tokenizers/charsmap.h"
#include "common/tokenizers/sentencepiece_model.h"
#include "common/tokenizers/tokenizer_json.h"
#include "common/tokenizers/trie.h"
#include "common/tokenizers/unicode.h"

namespace flux::tokenizers {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kSpaceMark = "\u2581";
constexpr double kUnknownPenalty = 10.0;
constexpr int32_t kNumSentinels = 100;
constexpr size_t kLongestPiece_bytes =
    512;  // the real one's longest is 48; bounds the time a text takes

struct ScoredPiece {
  std::string text;
  double score;
};

}  // namespace

struct T5Tokenizer::Model {
  std::vector<double> scores;  // by id
  Trie pieces;
  AddedTokens raw_tokens, normalized_tokens;  // found before and after normalisation
  Charsmap charsmap{{}};
  double unknown_score = 0;
  int32_t pad_id = 0, eos_id = 1, unk_id = 2;
  Sha256Digest sha256{};

  /// Takes the vocabulary; throws std::invalid_argument.
  void set_pieces(const std::vector<ScoredPiece>& list);
  std::optional<int32_t> find(std::string_view piece) const;
  void find_specials();
  std::string normalize(std::string_view text) const;
  void encode_words(std::string_view normalized, std::vector<int32_t>& ids) const;
  void viterbi(std::string_view word, std::vector<int32_t>& ids) const;

  static std::unique_ptr<Model> from_sentencepiece(std::string_view bytes);
  static std::unique_ptr<Model> from_json(std::string_view bytes);
};

void T5Tokenizer::Model::set_pieces(const std::vector<ScoredPiece>& list) {
  if (list.empty()) throw std::invalid_argument("the vocabulary is empty");
  double lowest = std::numeric_limits<double>::infinity();
  for (size_t id = 0; id < list.size(); ++id) {
    const auto& [text, score] = list[id];
    if (first_invalid_utf8(text))
      throw std::invalid_argument(fmt::format("piece {} is not UTF-8", id));
    if (!std::isfinite(score))
      throw std::invalid_argument(fmt::format("piece {} has no finite score", id));
    if (text.size() > kLongestPiece_bytes) {
      throw std::invalid_argument(fmt::format(
          "piece {} has {} bytes, at most {} are read", id, text.size(), kLongestPiece_bytes));
    }
    if (!pieces.insert(text, static_cast<int32_t>(id))) {
      throw std::invalid_argument(text.empty()
                                      ? fmt::format("piece {} is empty", id)
                                      : fmt::format("piece '{}' is there twice", printable(text)));
    }
    scores.push_back(score);
    lowest = std::min(lowest, score);
  }
  unknown_score = lowest - kUnknownPenalty;
}

std::optional<int32_t> T5Tokenizer::Model::find(std::string_view piece) const {
  std::optional<int32_t> id;
  pieces.prefixes(piece, [&](size_t length, int32_t found) {
    if (length == piece.size()) id = found;
  });
  return id;
}

void T5Tokenizer::Model::find_specials() {
  const auto need = [&](std::string_view piece) {
    if (const auto id = find(piece)) return *id;
    throw std::invalid_argument(fmt::format("the vocabulary has no {}", piece));
  };
  pad_id = need("<pad>");
  eos_id = need("</s>");
}

std::unique_ptr<T5Tokenizer::Model> T5Tokenizer::Model::from_sentencepiece(std::string_view bytes) {
  const SentencePieceModel proto = parse_sentencepiece_model(bytes);
  if (proto.pieces.empty())
    throw std::invalid_argument("not a SentencePiece model: it has no pieces");
  if (proto.model_type != 1) {
    throw std::invalid_argument(
        fmt::format("a SentencePiece model of type {}, T5's is 1 (unigram)", proto.model_type));
  }
  if (proto.byte_fallback)
    throw std::invalid_argument(
        "a SentencePiece model with byte_fallback, which T5's does not use");
  auto model = std::make_unique<Model>();
  std::vector<ScoredPiece> list;
  std::optional<int32_t> unknown;
  for (const Piece& piece : proto.pieces) {
    if (piece.type == PieceType::kUnknown) {
      if (unknown) throw std::invalid_argument("the vocabulary has two unknown pieces");
      unknown = static_cast<int32_t>(list.size());
    } else if (piece.type != PieceType::kNormal && piece.type != PieceType::kControl) {
      throw std::invalid_argument(
          fmt::format("piece '{}' has type {}; T5 has normal, unknown and control pieces",
                      printable(piece.text),
                      static_cast<int>(piece.type)));
    }
    list.push_back({piece.text, static_cast<double>(piece.score)});
  }
  if (!unknown) throw std::invalid_argument("the vocabulary has no unknown piece");
  // the sentinels follow the pieces, the last one first, and as ordinary pieces of score 0 too
  for (int32_t i = kNumSentinels - 1; i >= 0; --i)
    list.push_back({fmt::format("<extra_id_{}>", i), 0.0});
  model->set_pieces(list);
  model->unk_id = *unknown;
  model->find_specials();
  model->charsmap = Charsmap(proto.charsmap);
  const auto add = [&](int32_t id) {
    model->raw_tokens.add({list[static_cast<size_t>(id)].text, id});
  };
  add(model->pad_id), add(model->eos_id), add(model->unk_id);
  for (auto id = static_cast<int32_t>(proto.pieces.size()); id < static_cast<int32_t>(list.size());
       ++id)
    add(id);
  return model;
}

std::unique_ptr<T5Tokenizer::Model> T5Tokenizer::Model::from_json(std::string_view bytes) {
  const nlohmann::json root = parse_tokenizer_json(bytes);
  const nlohmann::json& part = member(root, "model");
  if (part.value("type", "Unigram") != "Unigram") {
    throw std::invalid_argument(fmt::format("a tokenizer of type '{}', T5's is Unigram",
                                            printable(part.value("type", ""))));
  }
  if (part.value("byte_fallback", false))
    throw std::invalid_argument("byte_fallback, which T5's tokenizer does not use");
  auto model = std::make_unique<Model>();
  std::vector<ScoredPiece> list;
  for (const nlohmann::json& entry : member(part, "vocab")) {
    if (!entry.is_array() || entry.size() != 2)
      throw std::invalid_argument("a vocabulary entry is not [piece, score]");
    list.push_back({entry[0].get<std::string>(), entry[1].get<double>()});
  }
  model->set_pieces(list);
  model->unk_id = member(part, "unk_id").get<int32_t>();
  if (model->unk_id < 0 || static_cast<size_t>(model->unk_id) >= list.size()) {
    throw std::invalid_argument(
        fmt::format("unk_id {} is outside the vocabulary of {}", model->unk_id, list.size()));
  }
  model->find_specials();

  // two forms are in use, {Precompiled} and {Precompiled, Strip, Replace}; they give equal ids, so
  // both get one pipeline
  std::string charsmap;
  for (const nlohmann::json& step : normalizer_steps(root)) {
    const std::string type = step.value("type", "");
    if (type == "Precompiled") {
      charsmap = from_base64(member(step, "precompiled_charsmap").get<std::string>());
    } else if (type != "Strip" && type != "Replace") {
      throw std::invalid_argument(
          fmt::format("normalizer '{}', which T5's tokenizer does not use", printable(type)));
    }
  }
  model->charsmap = Charsmap(charsmap);
  read_added_tokens(
      root, list.size(), model->raw_tokens, model->normalized_tokens, [&](std::string_view text) {
        return model->normalize(text);
      });
  return model;
}

// Charsmap, no white space at the end, and runs of spaces as one mark.
std::string T5Tokenizer::Model::normalize(std::string_view text) const {
  const std::string mapped = charsmap.normalize(text);
  size_t end = 0;  // behind the last code point that is not white space
  for (size_t pos = 0; pos < mapped.size();) {
    if (char_class(next_code_point(mapped, pos)) != CharClass::kSpace) end = pos;
  }
  std::string out;
  out.reserve(end);
  for (size_t pos = 0; pos < end;) {
    if (mapped[pos] != ' ') {
      out += mapped[pos++];
      continue;
    }
    const size_t begin = pos;
    while (pos < end && mapped[pos] == ' ') ++pos;
    // added tokens that are found after normalisation tell a space from a mark
    out += pos - begin > 1 ? kSpaceMark : std::string_view(" ");
  }
  return out;
}

// Spaces become marks, one is put in front, and each mark starts a word of its own.
void T5Tokenizer::Model::encode_words(std::string_view normalized,
                                      std::vector<int32_t>& ids) const {
  std::string marked;
  marked.reserve(normalized.size() + kSpaceMark.size());
  for (const char c : normalized) c == ' ' ? marked += kSpaceMark : marked += c;
  if (marked.empty()) return;
  if (!marked.starts_with(kSpaceMark)) marked.insert(0, kSpaceMark);
  const std::string_view text = marked;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(kSpaceMark, begin + 1), text.size());
    viterbi(text.substr(begin, end - begin), ids);
    begin = end;
  }
}

// The most probable pieces of a word. Order and strictness decide ties and are the reference's:
// starts ascending, lengths ascending, later candidates only if strictly better; sums in double.
void T5Tokenizer::Model::viterbi(std::string_view word, std::vector<int32_t>& ids) const {
  struct Node {
    double score = 0;
    size_t begin = SIZE_MAX;  // of the piece that ends here
    int32_t id = 0;
  };
  std::vector<Node> best(word.size() + 1);
  const auto offer = [&](size_t begin, size_t end, int32_t id, double piece_score) {
    const double score = best[begin].score + piece_score;
    if (best[end].begin == SIZE_MAX || score > best[end].score) best[end] = {score, begin, id};
  };
  for (size_t begin = 0; begin < word.size();) {
    size_t next = begin;
    next_code_point(word, next);
    bool has_single = false;
    pieces.prefixes(word.substr(begin), [&](size_t length, int32_t id) {
      offer(begin, begin + length, id, scores[static_cast<size_t>(id)]);
      has_single |= begin + length == next;
    });
    if (!has_single) offer(begin, next, unk_id, unknown_score);
    begin = next;
  }
  const auto first = static_cast<std::ptrdiff_t>(ids.size());
  for (size_t end = word.size(); end > 0; end = best[end].begin) {
    const bool fused = best[end].id == unk_id && std::ssize(ids) > first && ids.back() == unk_id;
    if (!fused) ids.push_back(best[end].id);
  }
  std::reverse(ids.begin() + first, ids.end());
}

T5Tokenizer::T5Tokenizer(std::unique_ptr<const Model> model) : model_(std::move(model)) {}
T5Tokenizer::T5Tokenizer(T5Tokenizer&&) noexcept = default;
T5Tokenizer& T5Tokenizer::operator=(T5Tokenizer&&) noexcept = default;
T5Tokenizer::~T5Tokenizer() = default;

T5Tokenizer T5Tokenizer::load(const fs::path& path) {
  const fs::path file = file_in(path, {"spiece.model", "tokenizer.json"});
  return parse(read_file(file, kLargestFile_bytes), file);
}

T5Tokenizer T5Tokenizer::parse(std::string_view bytes, const fs::path& name) {
  try {
    auto model = is_json(bytes) ? Model::from_json(bytes) : Model::from_sentencepiece(bytes);
    model->sha256 = flux::sha256(bytes);
    return T5Tokenizer(std::move(model));
  } catch (const std::invalid_argument& e) {
    throw InputError(fmt::format("{}: {}", show(name), e.what()),
                     "T5's tokenizer is spiece.model or tokenizer.json");
  } catch (const nlohmann::json::exception& e) {
    throw InputError(
        fmt::format("{}: not a T5 tokenizer.json: {}", show(name), json_reason(e.what())));
  }
}

std::vector<int32_t> T5Tokenizer::encode(std::string_view utf8) const {
  require_utf8(utf8);
  std::vector<int32_t> ids;
  encode_around_tokens(
      model_->raw_tokens,
      model_->normalized_tokens,
      utf8,
      [&](std::string_view text) { return model_->normalize(text); },
      [&](std::string_view text) { model_->encode_words(text, ids); },
      ids);
  ids.push_back(model_->eos_id);
  return ids;
}

Padded T5Tokenizer::padded(std::span<const int32_t> ids, int64_t length) const {
  return pad_or_truncate(ids, length, model_->eos_id, model_->pad_id);
}
int64_t T5Tokenizer::vocab_size() const { return std::ssize(model_->scores); }
int32_t T5Tokenizer::pad_id() const { return model_->pad_id; }
int32_t T5Tokenizer::eos_id() const { return model_->eos_id; }
int32_t T5Tokenizer::unk_id() const { return model_->unk_id; }
const Sha256Digest& T5Tokenizer::sha256() const { return model_->sha256; }

}  // namespace flux::tokenizers
