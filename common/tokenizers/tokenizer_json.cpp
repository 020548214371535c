#include "common/tokenizers/tokenizer_json.h"

#include <fmt/format.h>

#include <stdexcept>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux::tokenizers {
namespace fs = std::filesystem;

fs::path file_in(const fs::path& path, const std::vector<std::string>& names) {
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) return path;
  std::string list;
  for (const std::string& name : names) {
    if (fs::exists(path / name, ignored)) return path / name;
    list += (list.empty() ? "" : " or ") + name;
  }
  throw InputError(fmt::format("{}: has no {}", show(path), list));
}

bool is_json(std::string_view bytes) {
  const std::string_view text = trim(bytes.substr(0, 64));
  return text.starts_with('{');
}

nlohmann::json parse_tokenizer_json(std::string_view bytes) {
  nlohmann::json root = nlohmann::json::parse(bytes);
  if (!root.is_object()) throw std::invalid_argument("not a JSON object");
  return root;
}

const nlohmann::json& member(const nlohmann::json& object, const char* name) {
  if (object.is_object()) {
    if (const auto it = object.find(name); it != object.end()) return *it;
  }
  throw std::invalid_argument(fmt::format("has no '{}'", name));
}

std::vector<nlohmann::json> normalizer_steps(const nlohmann::json& root) {
  const auto it = root.find("normalizer");
  if (it == root.end() || it->is_null()) return {};
  if (it->value("type", "") != "Sequence") return {*it};
  return member(*it, "normalizers").get<std::vector<nlohmann::json>>();
}

std::string from_base64(std::string_view text) {
  constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  while (text.ends_with('=')) text.remove_suffix(1);
  std::string out;
  out.reserve(text.size() * 3 / 4);
  uint32_t bits = 0;
  int num_bits = 0;
  for (const char c : text) {
    const size_t digit = kDigits.find(c);
    if (digit == std::string_view::npos) throw std::invalid_argument("the charsmap is not base64");
    bits = bits << 6 | static_cast<uint32_t>(digit);
    num_bits += 6;
    if (num_bits >= 8) out += static_cast<char>(bits >> (num_bits -= 8) & 0xFF);
  }
  return out;
}

void read_added_tokens(const nlohmann::json& root,
                       size_t vocab_size,
                       AddedTokens& raw,
                       AddedTokens& normalized,
                       const std::function<std::string(std::string_view)>& normalize) {
  for (const nlohmann::json& entry : member(root, "added_tokens")) {
    AddedToken token{member(entry, "content").get<std::string>(),
                     member(entry, "id").get<int32_t>(),
                     entry.value("lstrip", false),
                     entry.value("rstrip", false)};
    if (first_invalid_utf8(token.content))
      throw std::invalid_argument("an added token is not UTF-8");
    if (token.id < 0 || static_cast<size_t>(token.id) >= vocab_size) {
      throw std::invalid_argument(
          fmt::format("added token '{}' has id {}, outside the vocabulary of {}",
                      printable(token.content),
                      token.id,
                      vocab_size));
    }
    if (entry.value("single_word", false)) {
      throw std::invalid_argument(
          fmt::format("added token '{}' is a single_word one, which is not supported",
                      printable(token.content)));
    }
    const bool is_normalized = entry.value("normalized", false);
    if (is_normalized) token.content = normalize(token.content);
    const std::string content = token.content;
    if (!(is_normalized ? normalized : raw).add(std::move(token))) {
      throw std::invalid_argument(
          fmt::format("added token '{}' is empty or there twice", printable(content)));
    }
  }
}

}  // namespace flux::tokenizers
