// common/tokenizers/tokenizer_json.h - what both tokenizers read from HF's tokenizer.json, and how
// files are found.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "common/tokenizers/added_tokens.h"

namespace flux::tokenizers {

/// Vocabulary files above this are refused; the largest real one has 4 MB.
constexpr uint64_t kLargestFile_bytes = 64u << 20;

/// `path`, or if it is a folder the first of `names` in it. Throws InputError that lists the names
/// if none is there.
std::filesystem::path file_in(const std::filesystem::path& path,
                              const std::vector<std::string>& names);
/// Whether a file's first byte that is not white space opens a JSON object.
bool is_json(std::string_view bytes);

// The rest throws std::invalid_argument or nlohmann::json::exception with the reason; the caller
// names the file.

nlohmann::json parse_tokenizer_json(std::string_view bytes);
const nlohmann::json& member(const nlohmann::json& object, const char* name);
/// The normaliser as a list: of a Sequence its steps, else the one, else nothing.
std::vector<nlohmann::json> normalizer_steps(const nlohmann::json& root);
std::string from_base64(std::string_view text);
/// Sorts "added_tokens" into those found in the raw text and those found in the normalised text;
/// ids must be below `vocab_size`. `normalize` is applied to the literals of the second kind.
void read_added_tokens(const nlohmann::json& root,
                       size_t vocab_size,
                       AddedTokens& raw,
                       AddedTokens& normalized,
                       const std::function<std::string(std::string_view)>& normalize);

}  // namespace flux::tokenizers
