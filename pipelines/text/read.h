// pipelines/text/read.h - which captions a data set or a prompt file needs, each once.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/core/hash.h"
#include "formats/cache/manifest.h"
#include "pipelines/text/options.h"

namespace flux::text {

/// One text that an item's caption can be, and its share of visits.
struct Use {
  size_t caption = 0;  // index in Wanted::captions
  double weight = 1;
};

/// One image (or prompt) and the captions that it needs.
struct Item {
  Sha256Digest item{};
  uint32_t subset = 0, repeats = 1, flags = 0;  // cache::kItem*
  std::string path;
  std::vector<Use> uses;
};

struct Wanted {
  std::vector<std::string> captions;  // distinct, UTF-8, in the order in which items need them
  std::vector<Item> items;
  std::vector<cache::Quarantined>
      quarantined;  // captions that cannot be used: not UTF-8, empty file, above 1 MiB
  nlohmann::json plan;
  bool has_random_parts = false;  // a caption can become several texts
};

/// The captions of a data set: programs enumerated or drawn, and the empty caption where a subset
/// asks for dropout. Throws InputError: the data set cannot be read, or images have no caption (the
/// count and five names). Interrupted.
Wanted read_dataset(const Options& options);

/// The prompts of a file: one a line, UTF-8, byte order mark stripped, white space at both ends
/// too; blank lines and lines that start with # skipped. Item n is the n-th prompt, from 0; the
/// plan's `kind` is "prompts". Throws InputError: absent, not UTF-8 (with the offset), no prompt in
/// it.
Wanted read_prompts(const std::filesystem::path& file);

}  // namespace flux::text
