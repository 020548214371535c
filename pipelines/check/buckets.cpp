// Kind data-buckets: the sizes that sd-scripts trains pictures at, and the batches they make.
#include <fmt/format.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "common/core/error.h"
#include "common/image/bucket.h"
#include "pipelines/check/case.h"
#include "pipelines/check/data.h"
#include "pipelines/check/lines.h"

namespace flux::check {
using Json = nlohmann::json;
namespace {

/// What one list of options gives; nothing in it if they are refused.
std::optional<image::Buckets> buckets_of(image::BucketOptions options) {
  options.profile = Profile::kKohya;
  try {
    return image::Buckets(options);
  } catch (const std::invalid_argument&) {
    return std::nullopt;
  }
}

std::map<int64_t, std::optional<image::Buckets>> check_bucket_lists(const Case& c) {
  std::map<int64_t, std::optional<image::Buckets>> all;
  if (!c.has("buckets.json")) return all;
  Tally tally;
  const auto json = read_object(c.folder / "buckets.json");
  int64_t index = 0;
  for (const auto& golden : json.at("configs")) {
    image::BucketOptions options;
    options.resolution = size_of(golden.at("resolution"));
    options.min_side = golden.at("min"), options.max_side = golden.at("max");
    options.steps = golden.at("steps"), options.no_upscale = golden.at("no_upscale");
    const int64_t number = golden.value("config", index++);
    const auto& buckets = all[number] = buckets_of(options);
    const std::string name = fmt::format("config {}", number);
    if (golden.contains("error") || !buckets) {
      const bool refused = !buckets;
      tally.add(refused == golden.contains("error"), name, refused ? "refused" : "accepted");
      continue;
    }
    Json list = Json::array();
    for (const auto& size : buckets->list()) list.push_back(json_of(size));
    const auto differs = difference({{"min_adjusted", buckets->min_side()},
                                     {"max_adjusted", buckets->max_side()},
                                     {"buckets", list}},
                                    golden);
    tally.add(differs.empty(), name, differs);
  }
  tally.report(*c.report, "buckets.json", "configurations");
  return all;
}

void check_select(const Case& c, const std::map<int64_t, std::optional<image::Buckets>>& all) {
  if (!c.has("select.jsonl")) return;
  Tally tally;
  int64_t number = 0;
  for_each_line(c, "select.jsonl", [&](const Json& golden) {
    const std::string name = fmt::format("line {}", ++number);
    std::optional<image::Buckets> fixed;
    if (golden.contains("fixed")) {
      image::BucketOptions options;
      options.resolution = size_of(golden["fixed"]), options.enabled = false;
      fixed = buckets_of(options);
    } else if (const auto it = all.find(golden.at("config")); it != all.end()) {
      fixed = it->second;
    }
    if (!fixed) return tally.add(false, name, "no such configuration");
    const auto picture = size_of(golden.at("wh"));
    try {
      const auto p = fixed->place(picture);
      const auto differs = difference({{"bucket", json_of(p.bucket)},
                                       {"resized", json_of(p.resized)},
                                       {"crop_xy", {p.crop_x, p.crop_y}},
                                       {"filter", filter_of(picture, p.resized)}},
                                      golden);
      const bool accepts = !golden.contains("error");
      tally.add(accepts && differs.empty(), name, accepts ? differs : "accepted");
    } catch (const InputError& error) {
      tally.add(golden.contains("error"), name, error.what());
    }
  });
  tally.report(*c.report, "select.jsonl");
}

}  // namespace

void check_buckets(const Case& c) {
  check_select(c, check_bucket_lists(c));
  if (!c.has("batches.json")) return;
  Tally tally;
  const auto json = read_object(c.folder / "batches.json");
  for (const auto& golden : json.at("cases")) {
    int64_t batches = 0;
    for (const int64_t count : golden.at("bucket_counts"))
      batches += num_batches(count, golden.at("batch_size"));
    tally.add(batches == golden.at("batches"), golden.dump(), fmt::format("{} batches", batches));
  }
  tally.report(*c.report, "batches.json", "cases");
}

}  // namespace flux::check
