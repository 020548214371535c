#include "common/tokenizers/trie.h"

namespace flux::tokenizers {

bool Trie::insert(std::string_view key, int32_t value) {
  if (key.empty()) return false;
  int32_t node = 0;
  for (const char byte : key) {
    const auto [it, is_new] =
        children_.try_emplace(edge(node, byte), static_cast<int32_t>(values_.size()));
    if (is_new) values_.push_back(kNone);
    node = it->second;
  }
  int32_t& slot = values_[static_cast<size_t>(node)];
  if (slot != kNone) return false;
  slot = value;
  return true;
}

}  // namespace flux::tokenizers
