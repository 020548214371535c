// Kind tokenizers: ids, exactly.
#include <fmt/format.h>

#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/core/text.h"
#include "common/tokenizers/clip_bpe.h"
#include "common/tokenizers/t5_unigram.h"
#include "pipelines/check/case.h"
#include "pipelines/check/lines.h"

namespace flux::check {
namespace fs = std::filesystem;
namespace {

/// First 16 hex digits of the SHA-256 over the ids as little-endian int32.
std::string short_hash(const std::vector<int32_t>& ids) {
  return to_hex(sha256(std::as_bytes(std::span(ids)))).substr(0, 16);
}

struct Tokenizers {
  tokenizers::T5Tokenizer t5;
  tokenizers::ClipTokenizer clip;

  /// "t5_512" -> the ids of `text` padded to 512.
  tokenizers::Padded padded(const std::string& field, const std::string& text) const {
    const int64_t length = std::stoll(field.substr(field.find('_') + 1));
    return field.starts_with("t5") ? t5.padded(t5.encode(text), length)
                                   : clip.padded(clip.encode(text), length);
  }
};

Tokenizers load(const Case& c) {
  const fs::path folder = c.path_of("vocabularies").value_or(c.folder);
  std::error_code error;
  for (const char* name : {"t5", "clip"}) {
    if (!fs::is_directory(folder / name, error)) {
      throw InputError(
          fmt::format("{}: the {} vocabulary of this case is not there", show(folder / name), name),
          "put spiece.model into t5/, vocab.json and merges.txt into clip/");
    }
  }
  return {tokenizers::T5Tokenizer::load(folder / "t5"),
          tokenizers::ClipTokenizer::load(folder / "clip")};
}

/// One verdict a field; a file without any of them fails.
void report_all(const Case& c,
                const std::string& file,
                const std::map<std::string, Tally>& tallies) {
  if (tallies.empty()) Tally().report(*c.report, file);
  for (const auto& [field, tally] : tallies) tally.report(*c.report, file + " " + field);
}

void check_tokens(const Case& c, const Tokenizers& vocabularies) {
  std::map<std::string, Tally> tallies;
  for_each_line(c, "tokens.jsonl", [&](const nlohmann::json& line) {
    const std::string text = line.at("text");
    if (line.contains("t5"))
      tallies["t5"].add(vocabularies.t5.encode(text) == line["t5"].get<std::vector<int32_t>>(),
                        line);
    if (line.contains("clip"))
      tallies["clip"].add(
          vocabularies.clip.encode(text) == line["clip"].get<std::vector<int32_t>>(), line);
    for (const char* field : {"t5_512", "t5_256", "clip_77"}) {
      if (line.contains(field))
        tallies[field].add(
            short_hash(vocabularies.padded(field, text).ids) == line[field].get<std::string>(),
            line);
    }
    if (line.contains("t5_len")) {
      const std::vector<int64_t> live{vocabularies.padded("t5_512", text).num_live_tokens,
                                      vocabularies.padded("t5_256", text).num_live_tokens};
      tallies["t5_len"].add(live == line["t5_len"].get<std::vector<int64_t>>(), line);
    }
  });
  report_all(c, "tokens.jsonl", tallies);
}

void check_padded(const Case& c, const Tokenizers& vocabularies) {
  std::map<std::string, Tally> tallies;
  for_each_line(c, "padded.jsonl", [&](const nlohmann::json& line) {
    for (const char* field : {"t5_512", "t5_256", "clip_77"}) {
      if (line.contains(field)) {
        tallies[field].add(vocabularies.padded(field, line.at("text")).ids ==
                               line[field].get<std::vector<int32_t>>(),
                           line);
      }
    }
  });
  report_all(c, "padded.jsonl", tallies);
}

std::string bytes_of_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

/// Bytes that are not UTF-8 are refused, with the offset of the first bad one.
void check_invalid(const Case& c, const Tokenizers& vocabularies) {
  Tally offsets, t5, clip;
  for_each_line(c, "invalid_utf8.jsonl", [&](const nlohmann::json& line) {
    const std::string bytes = bytes_of_hex(line.at("hex"));
    const auto offset = line.at("first_bad_byte").get<size_t>();
    offsets.add(first_invalid_utf8(bytes) == offset, line);
    const auto refused = [&](const auto& tokenizer) {
      try {
        tokenizer.encode(bytes);
      } catch (const InputError& error) {
        return std::string_view(error.what()).find(std::to_string(offset)) !=
               std::string_view::npos;
      }
      return false;
    };
    t5.add(refused(vocabularies.t5), line);
    clip.add(refused(vocabularies.clip), line);
  });
  offsets.report(*c.report, "invalid_utf8.jsonl first_bad_byte");
  t5.report(*c.report, "invalid_utf8.jsonl refused by t5");
  clip.report(*c.report, "invalid_utf8.jsonl refused by clip");
}

}  // namespace

void check_tokenizers(const Case& c) {
  const std::pair<const char*, void (*)(const Case&, const Tokenizers&)> kFiles[] = {
      {"tokens.jsonl", check_tokens},
      {"padded.jsonl", check_padded},
      {"invalid_utf8.jsonl", check_invalid}};
  std::optional<Tokenizers> vocabularies;
  for (const auto& [file, check] : kFiles) {
    if (!c.has(file)) continue;
    if (!vocabularies) vocabularies = load(c);
    check(c, *vocabularies);
  }
}

}  // namespace flux::check
