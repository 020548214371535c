// common/tokenizers/trie.h - a set of byte strings, asked which of them start a text.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace flux::tokenizers {

/// Strings with a number each. Built once, then read from any thread.
class Trie {
 public:
  static constexpr int32_t kNone = -1;

  /// `value` >= 0; false if `key` is empty or is there already.
  bool insert(std::string_view key, int32_t value);

  /// Calls visit(length, value) for each key that starts `text`, shortest first.
  template <class Visit>
  void prefixes(std::string_view text, Visit visit) const {
    int32_t node = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      const auto it = children_.find(edge(node, text[i]));
      if (it == children_.end()) return;
      node = it->second;
      if (values_[static_cast<size_t>(node)] != kNone)
        visit(i + 1, values_[static_cast<size_t>(node)]);
    }
  }

 private:
  static uint64_t edge(int32_t node, char byte) {
    return static_cast<uint64_t>(node) << 8 | static_cast<unsigned char>(byte);
  }
  struct Mix {  // std::hash of an integer is the integer: neighbouring edges would fill the same
                // buckets
    size_t operator()(uint64_t x) const {
      return static_cast<size_t>((x * 0x9E3779B97F4A7C15u) >> 20);
    }
  };
  std::unordered_map<uint64_t, int32_t, Mix> children_;
  std::vector<int32_t> values_ = {kNone};  // by node; 0 is the root
};

}  // namespace flux::tokenizers
