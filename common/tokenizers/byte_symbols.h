// common/tokenizers/byte_symbols.h - how byte-level BPE spells a byte as a printable character.
#pragma once
#include <string>
#include <vector>

namespace flux::tokenizers {

/// The symbol (UTF-8) of `byte`: printable Latin-1 stands for itself, the 68 others are U+0100 and
/// up in ascending order.
std::string byte_symbol(unsigned char byte);
/// All bytes in the order of their ids in CLIP's vocabulary: those that stand for themselves first.
std::vector<unsigned char> bytes_in_id_order();

}  // namespace flux::tokenizers
