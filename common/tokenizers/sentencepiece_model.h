// common/tokenizers/sentencepiece_model.h - the parts of a SentencePiece ModelProto that decide
// ids.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace flux::tokenizers {

/// Piece types of sentencepiece_model.proto.
enum class PieceType : uint8_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6
};

struct Piece {
  std::string text;
  float score = 0;  // log-probability
  PieceType type = PieceType::kNormal;
};

struct SentencePieceModel {
  std::vector<Piece> pieces;  // by id
  int64_t model_type = 1;     // 1 unigram, 2 byte pairs, 3 words, 4 characters
  bool byte_fallback = false;
  std::string charsmap;  // normalizer_spec.precompiled_charsmap
};

/// Parses protobuf bytes; unknown fields are skipped. Throws std::invalid_argument with the reason
/// and the offset. Own code, since the sentencepiece library shows no charsmap and may end the
/// process over a bad file. Source: sentencepiece_model.proto (field numbers), the protobuf
/// encoding guide (wire types).
SentencePieceModel parse_sentencepiece_model(std::string_view bytes);

}  // namespace flux::tokenizers
