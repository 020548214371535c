// tests/unit/common/tokenizers/tokenizer_vectors.h - JSON lines of reference vectors.
#pragma once
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "common/core/hash.h"
#include "common/tokenizers/clip_bpe.h"
#include "common/tokenizers/t5_unigram.h"

namespace flux::test {

inline std::filesystem::path tiny_vectors() {
  return std::filesystem::path(FLUX_SOURCE_DIR) / "tests/golden/tokenizers-tiny";
}

inline std::vector<nlohmann::json> json_lines(const std::filesystem::path& file) {
  std::vector<nlohmann::json> rows;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) rows.push_back(nlohmann::json::parse(line));
  return rows;
}

/// The first 16 hex digits of SHA-256 over the ids as little-endian int32.
inline std::string short_hash(std::span<const int32_t> ids) {
  return to_hex(sha256(std::as_bytes(ids))).substr(0, 16);
}

/// Compares every line of a folder of tokens.jsonl, padded.jsonl and invalid_utf8.jsonl.
inline void expect_equal_ids(const std::filesystem::path& folder,
                             const tokenizers::T5Tokenizer& t5,
                             const tokenizers::ClipTokenizer& clip) {
  const auto rows = json_lines(folder / "tokens.jsonl");
  ASSERT_GT(rows.size(), 100u);
  for (const auto& row : rows) {
    SCOPED_TRACE(testing::Message()
                 << "id " << row["id"] << " text " << row["text"].dump(-1, ' ', true));
    const auto text = row["text"].get<std::string>();
    const auto t5_ids = t5.encode(text), clip_ids = clip.encode(text);
    ASSERT_EQ(t5_ids, row["t5"].get<std::vector<int32_t>>());
    ASSERT_EQ(clip_ids, row["clip"].get<std::vector<int32_t>>());
    const auto t5_512 = t5.padded(t5_ids, 512), t5_256 = t5.padded(t5_ids, 256);
    ASSERT_EQ(short_hash(t5_512.ids), row["t5_512"]);
    ASSERT_EQ(short_hash(t5_256.ids), row["t5_256"]);
    ASSERT_EQ(short_hash(clip.padded(clip_ids, 77).ids), row["clip_77"]);
    ASSERT_EQ(t5_512.num_live_tokens, row["t5_len"][0]);
    ASSERT_EQ(t5_256.num_live_tokens, row["t5_len"][1]);
  }
  for (const auto& row : json_lines(folder / "padded.jsonl")) {
    SCOPED_TRACE(testing::Message() << "padded id " << row["id"]);
    const auto text = row["text"].get<std::string>();
    const auto t5_ids = t5.encode(text);
    EXPECT_EQ(t5.padded(t5_ids, 512).ids, row["t5_512"].get<std::vector<int32_t>>());
    EXPECT_EQ(t5.padded(t5_ids, 256).ids, row["t5_256"].get<std::vector<int32_t>>());
    EXPECT_EQ(clip.padded(clip.encode(text), 77).ids, row["clip_77"].get<std::vector<int32_t>>());
  }
}

}  // namespace flux::test
