#include "pipelines/train/tags.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "common/core/log.h"
#include "common/core/text.h"
#include "formats/cache/reader.h"

namespace flux::train {
namespace {

constexpr size_t kMaxTagBytes = size_t{1} << 20;

std::string name_of(int64_t subset) { return fmt::format("subset-{}", subset); }

std::string small_letters(std::string_view tag) {
  std::string out(tag);
  for (char& c : out)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return out;
}

std::string json_text(const nlohmann::json& value) {
  return value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

/// Tags and their numbers, by subset.
nlohmann::json tag_frequency(const std::filesystem::path& text, size_t num_subsets) {
  const cache::Cache cache(text, cache::Kind::kText);
  std::vector<std::unordered_map<std::string, int64_t>> counts(num_subsets);
  size_t bytes = 0;
  int64_t left_out = 0;
  for (int64_t i = 0; i < cache.index().num_items(); ++i) {
    const auto& item = cache.index().item(i);
    if ((item.flags & cache::kItemEmptyCaption) || item.subset >= num_subsets) continue;
    auto& known = counts[item.subset];
    for (const std::string& part : split(cache.info(cache.index().variants(i).front()).text, ',')) {
      const std::string tag = small_letters(trim(part));
      if (tag.empty()) continue;
      if (const auto found = known.find(tag); found != known.end()) {
        ++found->second;
      } else if (bytes + tag.size() <= kMaxTagBytes) {
        bytes += tag.size();
        known.emplace(tag, 1);
      } else {
        ++left_out;
      }
    }
  }
  if (left_out > 0)
    log::info("ss_tag_frequency: {} tags beyond the first {} of text are left out",
              left_out,
              show_bytes(kMaxTagBytes));
  nlohmann::json out = nlohmann::json::object();
  for (size_t i = 0; i < num_subsets; ++i)
    out[name_of(static_cast<int64_t>(i))] = std::map(counts[i].begin(), counts[i].end());
  return out;
}

}  // namespace

std::map<std::string, std::string> dataset_metadata(const std::filesystem::path& text,
                                                    const std::vector<SubsetItems>& subsets) {
  nlohmann::json own = nlohmann::json::object(), regularization = own;
  for (const SubsetItems& subset : subsets) {
    // n_repeats is a whole number there: visits of an image, but for those that are cut to fit a number of regularisation images
    const int64_t repeats =
        subset.items > 0 ? std::max<int64_t>(subset.visits / subset.items, 1) : 1;
    (subset.regularization ? regularization : own)[name_of(subset.subset)] = {
        {"n_repeats", repeats}, {"img_count", subset.items}};
  }
  return {{"ss_dataset_dirs", json_text(own)},
          {"ss_reg_dataset_dirs", json_text(regularization)},
          {"ss_tag_frequency", json_text(tag_frequency(text, subsets.size()))}};
}

}  // namespace flux::train
