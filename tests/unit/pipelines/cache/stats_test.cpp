// flux-cache stats: float64 moments of each channel, whatever the number of threads, and counts of
// what is no number.
#include "pipelines/cache/stats.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "tests/support/cache_samples.h"
#include "tests/support/temporary_folder.h"

namespace flux::cache {
namespace {

namespace fs = std::filesystem;

// Two passes over the values, as numpy does it.
struct Expected {
  std::vector<double> values;
  int64_t nans = 0, infinite = 0;
  void add(float value) {
    if (std::isnan(value))
      ++nans;
    else if (std::isinf(value))
      ++infinite;
    else
      values.push_back(static_cast<double>(value));
  }
  void expect(const Moments& found) const {
    ASSERT_EQ(found.count, static_cast<int64_t>(values.size()));
    EXPECT_EQ(found.num_nan, nans);
    EXPECT_EQ(found.num_inf, infinite);
    double mean = 0, squares = 0;
    for (const double v : values) mean += v / static_cast<double>(values.size());
    for (const double v : values) squares += (v - mean) * (v - mean);
    EXPECT_NEAR(found.mean, mean, 1e-12 * std::max(1.0, std::fabs(mean)));
    EXPECT_NEAR(found.deviation(), std::sqrt(squares / static_cast<double>(values.size())), 1e-9);
    EXPECT_EQ(found.min, *std::ranges::min_element(values));
    EXPECT_EQ(found.max, *std::ranges::max_element(values));
  }
};

float value_at(const std::vector<std::byte>& bytes, DType dtype, size_t i) {
  if (dtype == DType::kF32) {
    float value;
    std::memcpy(&value, bytes.data() + 4 * i, 4);
    return value;
  }
  uint16_t value;
  std::memcpy(&value, bytes.data() + 2 * i, 2);
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

void fill_cache(const fs::path& folder,
                const Recipe& how,
                const std::vector<test::SampleData>& all) {
  Writer writer(folder, how, test::provenance());
  std::vector<WantedItem> items;
  for (uint64_t i = 0; i < all.size(); ++i) {
    writer.add(all[i].info, all[i].spans());
    items.push_back(test::wanted(all[i], i));
  }
  writer.publish(test::publication(std::move(items)));
}

const TensorStats& tensor(const Stats& found, const std::string& name) {
  for (const auto& t : found.tensors) {
    if (t.name == name) return t;
  }
  throw std::runtime_error("no " + name);
}

TEST(Stats, DescribeEachChannelOfLatents) {
  for (const std::string dtype : {"bf16", "f32"}) {
    SCOPED_TRACE(dtype);
    const test::TemporaryFolder folder;
    const Recipe how = test::recipe(Kind::kLatents, dtype);
    const Layout layout = layout_of(how.kind, how.parameters);
    std::vector<test::SampleData> samples;
    std::vector<Expected> expected(32);
    for (uint64_t i = 0; i < 150; ++i) {
      samples.push_back(test::sample(layout, i));
      auto& bytes = samples.back().tensors[0];
      const auto put = [&](size_t at, uint32_t bits) {  // the upper half of a float32 is a bfloat16
        if (dtype == "f32")
          std::memcpy(bytes.data() + 4 * at, &bits, 4);
        else
          std::memcpy(bytes.data() + 2 * at, reinterpret_cast<const char*>(&bits) + 2, 2);
      };
      if (i == 5) put(0, 0x7FC00000), put(1, 0x7F800000), put(2, 0xFF800000);
      if (i == 140) put(3, 0xFFC00000);
      const size_t plane = samples.back().info.height * samples.back().info.width;
      for (size_t k = 0; k < 32 * plane; ++k)
        expected[k / plane].add(value_at(bytes, layout.dtype, k));
    }
    fill_cache(folder.path(), how, samples);
    const Stats found = stats(look_into(folder.path(), false));
    EXPECT_EQ(found.num_samples, 150);
    ASSERT_EQ(found.tensors.size(), 2u);
    for (size_t c = 0; c < 32; ++c) {
      SCOPED_TRACE(testing::Message() << "channel " << c);
      expected[c].expect(tensor(found, c < 16 ? "mean" : "logvar").channels.at(c % 16));
    }
    EXPECT_EQ(tensor(found, "mean").all().num_nan, 2);
    EXPECT_EQ(tensor(found, "mean").all().num_inf, 2);
    EXPECT_EQ(tensor(found, "logvar").all().num_nan, 0);
    ASSERT_EQ(found.throughput.size(), 2u);
    EXPECT_EQ(found.throughput[0].threads, 1);
    for (const auto& t : found.throughput) EXPECT_GT(t.samples_per_s * t.mb_per_s, 0);
    // equal to the last bit, whichever thread was first
    const auto again = stats_json(stats(look_into(folder.path(), false)));
    EXPECT_EQ(stats_json(found)["tensors"], again["tensors"]);
    EXPECT_THAT(stats_text(found), testing::HasSubstr("\nlogvar 15 "));
  }
}

TEST(Stats, TellLiveRowsOfT5FromAll) {
  const test::TemporaryFolder folder;
  const Recipe how = test::recipe(Kind::kText);
  const Layout layout = layout_of(how.kind, how.parameters);
  std::vector<test::SampleData> samples;
  std::vector<Expected> live(test::kT5Width), all(test::kT5Width), clip(test::kClipWidth);
  for (uint64_t i = 0; i < 40; ++i) {
    samples.push_back(test::sample(layout, i));
    const auto& sample = samples.back();
    for (size_t k = 0; k < test::kT5Length * test::kT5Width; ++k) {
      const float value = value_at(sample.tensors[0], layout.dtype, k);
      all[k % test::kT5Width].add(value);
      if (k / test::kT5Width < sample.info.t5_tokens) live[k % test::kT5Width].add(value);
    }
    for (size_t k = 0; k < test::kClipWidth; ++k)
      clip[k].add(value_at(sample.tensors[1], layout.dtype, k));
  }
  fill_cache(folder.path(), how, samples);
  const Stats found = stats(look_into(folder.path(), false));
  for (size_t c = 0; c < test::kT5Width; ++c) {
    live[c].expect(tensor(found, "t5_live").channels.at(c));
    all[c].expect(tensor(found, "t5_all").channels.at(c));
  }
  for (size_t c = 0; c < test::kClipWidth; ++c)
    clip[c].expect(tensor(found, "clip").channels.at(c));
  EXPECT_EQ(stats_json(found)["tensors"]["clip"]["channels"].size(), test::kClipWidth);
}

TEST(Stats, KeepDigitsFarFromZero) {
  Moments far;
  for (int i = 0; i < 1000; ++i)
    far.merge({.count = 1, .mean = 1e9 + i % 2, .min = 1e9 + i % 2, .max = 1e9 + i % 2});
  EXPECT_DOUBLE_EQ(far.mean, 1e9 + 0.5);
  EXPECT_NEAR(far.deviation(), 0.5, 1e-9);
}

TEST(Stats, SayNothingOfAnEmptyCache) {
  const test::TemporaryFolder folder;
  test::make_cache(folder.path(), test::recipe(Kind::kLatents), 0, 0);
  const Stats found = stats(look_into(folder.path(), false));
  EXPECT_EQ(found.num_samples, 0);
  EXPECT_TRUE(found.tensors.empty());
  EXPECT_FALSE(stats_text(found).empty());
}

TEST(Stats, StopOnASignal) {
  const test::TemporaryFolder folder;
  test::make_cache(folder.path(), test::recipe(Kind::kText), 0, 40);
  const Contents contents = look_into(folder.path(), false);
  cancel::set(ExitCode::kInterrupt);
  EXPECT_THROW(stats(contents), Interrupted);
  cancel::set(std::nullopt);
}

TEST(Stats, RefuseADamagedSample) {
  const test::TemporaryFolder folder;
  test::make_cache(folder.path(), test::recipe(Kind::kText), 0, 3);
  Contents contents = look_into(folder.path(), false);
  const auto segment = folder.path() / contents.samples[0].file;
  fs::resize_file(segment, fs::file_size(segment) - 7);
  EXPECT_THROW(stats(contents), CacheError);                         // damaged since it was listed
  EXPECT_THROW(stats(look_into(folder.path(), false)), CacheError);  // and before
}

}  // namespace
}  // namespace flux::cache
