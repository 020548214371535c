#include "common/tokenizers/sentencepiece_model.h"

#include <fmt/format.h>

#include <cstring>
#include <stdexcept>

namespace flux::tokenizers {
namespace {

// One field of a protobuf message.
struct Field {
  uint64_t number = 0;
  uint64_t value = 0;      // wire types 0, 1 and 5
  std::string_view bytes;  // wire type 2
  int wire_type = 0;
};

class FieldReader {
 public:
  FieldReader(std::string_view message, size_t file_offset)
      : message_(message), file_offset_(file_offset) {}

  bool next(Field& field) {
    if (pos_ == message_.size()) return false;
    const uint64_t key = varint();
    field = {.number = key >> 3, .value = 0, .bytes = {}, .wire_type = static_cast<int>(key & 7)};
    switch (field.wire_type) {
      case 0:
        field.value = varint();
        break;
      case 1:
        field.value = fixed(8);
        break;
      case 2:
        field.bytes = take(varint());
        break;
      case 5:
        field.value = fixed(4);
        break;
      default:
        fail("unknown wire type");
    }
    if (field.number == 0) fail("field number 0");
    return true;
  }
  // Offset in the file of a field's bytes.
  size_t offset_of(std::string_view bytes) const {
    return file_offset_ + static_cast<size_t>(bytes.data() - message_.data());
  }
  [[noreturn]] void fail(const char* what) const {
    throw std::invalid_argument(
        fmt::format("not a SentencePiece model: {} near byte {}", what, file_offset_ + pos_));
  }

 private:
  std::string_view take(uint64_t size) {
    if (size > message_.size() - pos_) fail("cut short");
    const std::string_view out = message_.substr(pos_, static_cast<size_t>(size));
    pos_ += static_cast<size_t>(size);
    return out;
  }
  uint64_t fixed(size_t size) {
    uint64_t value = 0;
    std::memcpy(&value, take(size).data(), size);  // little-endian
    return value;
  }
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    fail("a number of more than 10 bytes");
  }

  std::string_view message_;
  size_t file_offset_, pos_ = 0;
};

Piece parse_piece(std::string_view message, size_t file_offset) {
  Piece piece;
  FieldReader reader(message, file_offset);
  for (Field field; reader.next(field);) {
    if (field.number == 1 && field.wire_type == 2) {
      piece.text = field.bytes;
    } else if (field.number == 2 && field.wire_type == 5) {
      const auto bits = static_cast<uint32_t>(field.value);
      std::memcpy(&piece.score, &bits, sizeof(bits));
    } else if (field.number == 3 && field.wire_type == 0) {
      if (field.value < 1 || field.value > 6) reader.fail("unknown piece type");
      piece.type = static_cast<PieceType>(field.value);
    } else if (field.number <= 3) {
      reader.fail("a piece field of another type");
    }
  }
  return piece;
}

}  // namespace

SentencePieceModel parse_sentencepiece_model(std::string_view bytes) {
  SentencePieceModel model;
  FieldReader reader(bytes, 0);
  for (Field field; reader.next(field);) {
    if (field.number > 3) continue;  // self_test_data, denormalizer_spec, extensions
    if (field.wire_type != 2) reader.fail("a field of another type");
    FieldReader inner(field.bytes, reader.offset_of(field.bytes));
    if (field.number == 1) {
      model.pieces.push_back(parse_piece(field.bytes, reader.offset_of(field.bytes)));
      continue;
    }
    for (Field f; inner.next(f);) {
      if (field.number == 2 && f.number == 3 && f.wire_type == 0)
        model.model_type = static_cast<int64_t>(f.value);
      if (field.number == 2 && f.number == 35 && f.wire_type == 0)
        model.byte_fallback = f.value != 0;
      if (field.number == 3 && f.number == 2 && f.wire_type == 2) model.charsmap = f.bytes;
    }
  }
  return model;
}

}  // namespace flux::tokenizers
