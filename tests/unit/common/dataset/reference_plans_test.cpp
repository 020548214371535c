// Every dataset file of the reference set, resolved and compared with what sd-scripts made of it.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/dataset/dataset.h"
#include "common/image/bucket.h"
#include "tests/support/shared_data.h"

namespace flux::dataset {
namespace {

using Json = nlohmann::json;

// "# args: --resolution 96,96 --enable_bucket" of the first line, as sd-scripts' command line reads
// them.
std::vector<Fallback> fallbacks_of(const std::filesystem::path& toml) {
  std::string line;
  std::ifstream stream(toml);
  std::getline(stream, line);
  std::vector<Fallback> out;
  if (!line.starts_with("# args: ")) return out;
  std::istringstream words(line.substr(8));
  for (std::string word; words >> word;) {
    if (word.starts_with("--")) {
      word.erase(0, 2);
      if (word == "train_batch_size") word = "batch_size";
      if (word == "dataset_repeats") word = "num_repeats";
      out.push_back({word, "true"});
    } else {
      const bool number = word.find_first_not_of("0123456789,") == std::string::npos;
      out.back().value = !number                               ? "\"" + word + "\""
                         : word.find(',') != std::string::npos ? "[" + word + "]"
                                                               : word;
    }
  }
  return out;
}

image::Buckets buckets_of(const PixelOptions& p) {
  image::BucketOptions o;
  o.resolution = {p.width, p.height}, o.enabled = p.buckets, o.min_side = p.min_side,
  o.max_side = p.max_side;
  o.steps = p.steps, o.no_upscale = p.no_upscale, o.profile = Profile::kKohya;
  return image::Buckets(o);
}

// One dataset's part as the reference describes it: images by key, and buckets with counts.
Json describe(const Resolved& r,
              const Dataset& dataset,
              bool validation,
              const std::filesystem::path& base) {
  Json images = Json::object();
  std::map<image::Size, int64_t> counts;
  for (const auto& i : r.images) {
    const auto& subset = r.subset(i.subset);
    if (subset.dataset != dataset.index || i.validation != validation) continue;
    const auto key =
        subset.metadata_file.empty() ? i.file.lexically_relative(base).native() : i.name;
    const auto rgb = image::decode(as_bytes(read_file(i.file)), {Profile::kKohya, {}});
    const auto p = buckets_of(subset.pixels).place(rgb.size);
    images[key] = {{"caption", read_caption(r, i).value_or("")},
                   {"num_repeats", i.repeats},
                   {"is_reg", subset.is_reg},
                   {"size", {rgb.size.width, rgb.size.height}},
                   {"bucket", {p.bucket.width, p.bucket.height}},
                   {"resized", {p.resized.width, p.resized.height}},
                   {"resize_interpolation", subset.pixels.interpolation}};
    counts[p.bucket] += i.repeats;
  }
  Json buckets = Json::array();
  int64_t batches = 0;
  for (const auto& [size, count] : counts) {
    buckets.push_back({{"resolution", {size.width, size.height}}, {"count", count}});
    batches += (count + dataset.batch_size - 1) / dataset.batch_size;
  }
  return {{"images", images}, {"buckets", buckets}, {"batches_per_epoch", batches}};
}

TEST(ReferencePlans, AreResolvedOrRefusedAsRecorded) {
  FLUX_SHARED_DATA_OR_SKIP(folder, "golden/data");
  const auto base = folder / "sets";
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder / "plans")) {
    if (entry.path().extension() != ".toml") continue;
    ++count;
    SCOPED_TRACE(entry.path().filename());
    auto json_path = entry.path();
    const auto expected = Json::parse(std::ifstream(json_path.replace_extension(".json")));
    const auto resolve = [&] {
      auto r = resolve_file(entry.path(), Profile::kKohya, fallbacks_of(entry.path()), base);
      for (const auto& i : r.images) (void)read_caption(r, i);
      return r;
    };
    if (expected.contains("expect")) {
      try {
        resolve();
        ADD_FAILURE() << "accepted; " << expected.at("expect");
      } catch (const InputError& error) {
        if (std::getenv("FLUX_VERBOSE") != nullptr) std::printf("%s\n", error.what());
      }
      continue;
    }
    Resolved r;
    ASSERT_NO_THROW(r = resolve());
    const bool split = !expected.at("validation").empty();  // whose members are ours to choose
    for (const auto& dataset : r.datasets) {
      const auto& e = expected.at("train").at(static_cast<size_t>(dataset.index));
      EXPECT_EQ(dataset.batch_size, e.at("batch_size"));
      const auto d = describe(r, dataset, false, base);
      EXPECT_EQ(d.at("images").size(), e.at("images").size());
      if (split) {
        const auto held_out = describe(r, dataset, true, base);
        EXPECT_EQ(held_out.at("images").size(), expected.at("validation")[0].at("images").size());
        continue;
      }
      EXPECT_EQ(d.at("buckets"), e.at("buckets"));
      EXPECT_EQ(d.at("batches_per_epoch"), e.at("batches_per_epoch"));
      for (auto image : e.at("images")) {
        const std::string key = image.at("key");
        image.erase("key");
        if (image.at("resize_interpolation").is_null()) image["resize_interpolation"] = "";
        ASSERT_TRUE(d.at("images").contains(key)) << key;
        EXPECT_EQ(d.at("images").at(key), image) << key;
      }
      size_t n = 0;
      for (const auto& s : r.subsets) {
        if (s.dataset != dataset.index) continue;
        const auto& es = e.at("subsets").at(n++);
        EXPECT_EQ(s.num_repeats, es.at("num_repeats"));
        EXPECT_EQ(s.flip_aug, es.at("flip_aug"));
        EXPECT_EQ(s.captions.shuffle, es.at("shuffle_caption"));
        EXPECT_EQ(s.captions.separator, es.at("caption_separator"));
        EXPECT_EQ(s.captions.keep_tokens, es.at("keep_tokens"));
        EXPECT_EQ(s.captions.keep_tokens_separator, es.at("keep_tokens_separator"));
        EXPECT_EQ(s.captions.dropout_rate, es.at("caption_dropout_rate"));
        EXPECT_EQ(s.captions.tag_dropout_rate, es.at("caption_tag_dropout_rate"));
        EXPECT_EQ(s.captions.token_warmup_step, es.at("token_warmup_step"));
        EXPECT_EQ(s.color_aug, es.at("color_aug"));
        EXPECT_EQ(s.alpha_mask, es.at("alpha_mask"));
      }
      EXPECT_EQ(n, e.at("subsets").size());
    }
  }
  EXPECT_EQ(count, 34);
}

TEST(ReferenceSplits, HaveTheRecordedCounts) {
  FLUX_SHARED_DATA_OR_SKIP(folder, "golden/data/captions");
  const auto json = Json::parse(std::ifstream(folder / "validation_split.json"));
  for (const auto& c : json.at("cases")) {
    std::vector<Sha256Digest> items;
    for (int i = 0; i < c.at("n"); ++i) items.push_back(item_digest(0, std::to_string(i)));
    const auto members = validation_members(items, c.at("split"), 7);
    EXPECT_EQ(std::count(members.begin(), members.end(), false), c.at("train")) << c.dump();
    // where the reference trains on what it holds out, the rest is fewer
    const bool disjoint = c.at("disjoint");
    EXPECT_TRUE(!disjoint || std::count(members.begin(), members.end(), true) == c.at("validation"))
        << c.dump();
  }
}

}  // namespace
}  // namespace flux::dataset
