// Kinds tokenizers and hostile-safetensors: exact verdicts, without networks.
#include <fmt/format.h>

#include <cstring>
#include <functional>
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
#include "formats/safetensors/reader.h"
#include "pipelines/check/case.h"

namespace flux::check {
namespace fs = std::filesystem;
namespace {

constexpr uint64_t kMaxLinesBytes = 256 << 20;

/// Counts the lines of a file that agree in one field, and keeps the first that do not.
class Tally {
 public:
  void add(bool same, const nlohmann::json& line, const std::string& why = {}) {
    ++num_lines_;
    if (same) return;
    ++num_wrong_;
    if (examples_.size() < 3)
      examples_.push_back(fmt::format(
          "id {}{}", line.value("id", nlohmann::json()).dump(), why.empty() ? "" : " " + why));
  }
  void report(Report& report, const std::string& name) const {
    std::string note = fmt::format("{} of {} lines equal", num_lines_ - num_wrong_, num_lines_);
    if (num_wrong_ > 0) note += fmt::format("; not: {}", fmt::join(examples_, ", "));
    report.verdict(name, num_wrong_ == 0, note);
  }

 private:
  int64_t num_lines_ = 0, num_wrong_ = 0;
  std::vector<std::string> examples_;
};

void for_each_line(const Case& c,
                   const std::string& file,
                   const std::function<void(const nlohmann::json& line)>& take) {
  const std::string text = read_file(c.folder / file, kMaxLinesBytes);
  size_t number = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    ++number;
    const std::string_view line = std::string_view(text).substr(at, end - at);
    at = end + 1;
    if (trim(line).empty()) continue;
    const auto json = nlohmann::json::parse(line, nullptr, false);
    if (!json.is_object())
      throw InputError(
          fmt::format("{}: line {} is not a JSON object", show(c.folder / file), number));
    take(json);
  }
}

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
  for (const auto& [field, tally] : tallies) tally.report(*c.report, "tokens.jsonl " + field);
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
  for (const auto& [field, tally] : tallies) tally.report(*c.report, "padded.jsonl " + field);
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

void check_hostile_safetensors(const Case& c) {
  const fs::path path = c.required("index", "index.json");
  const auto index = nlohmann::json::parse(read_file(path, kMaxLinesBytes), nullptr, false);
  if (!index.is_object() || !index.contains("safetensors") || !index["safetensors"].is_array()) {
    throw InputError(fmt::format("{}: no list 'safetensors'", show(path)));
  }
  for (const auto& entry : index["safetensors"]) {
    const fs::path file = path.parent_path() / entry.at("file").get<std::string>();
    const std::string expect = entry.at("expect"), name = file.filename().native();
    if (!c.has(name) || !fs::equivalent(file, c.folder / name))
      continue;  // a case may hold a part of the files
    std::string reason;
    try {
      safetensors::File::open(file);
    } catch (const InputError& error) {
      reason = error.what();
      reason = reason.substr(0, reason.find('\n'));
    }
    const bool refused = !reason.empty();
    const bool ok = expect == "policy" || refused == (expect == "refuse");
    c.report->verdict(
        name,
        ok,
        fmt::format(
            "{}, {}",
            expect,
            refused ? reason.substr(std::min(reason.size(), show(file).size() + 2)) : "accepted"));
  }
}

}  // namespace flux::check
