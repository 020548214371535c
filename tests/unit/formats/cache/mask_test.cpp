// Latents with loss masks: a second tensor, under a required feature.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "common/core/error.h"
#include "common/core/file.h"
#include "formats/cache/codec.h"
#include "formats/cache/journal.h"
#include "formats/cache/reader.h"
#include "formats/cache/segment_reader.h"
#include "formats/cache/segment_writer.h"
#include "tests/support/cache_samples.h"
#include "tests/support/temporary_folder.h"

namespace flux::cache {
namespace {

using testing::HasSubstr;

/// Every third sample of cache_samples.h has a mask; buckets mix those with and without.
test::SampleData masked_sample(const Layout& layout, uint64_t i) {
  auto data = test::sample(layout, i);
  if (i / 3 % 2 == 0) return data;
  data.info.flags |= kSampleMasked;
  std::vector<float> mask(data.info.height * data.info.width);
  for (size_t k = 0; k < mask.size(); ++k)
    mask[k] = static_cast<float>(k + i) / static_cast<float>(mask.size() + i);
  const auto bytes = std::as_bytes(std::span(mask));
  data.tensors.emplace_back(bytes.begin(), bytes.end());
  return data;
}

std::filesystem::path write_segment(const std::filesystem::path& folder,
                                    const Recipe& recipe,
                                    const Record& record) {
  const auto path = folder / new_segment_name();
  AtomicFile file(path);
  file.write(encode_segment({recipe, test::provenance(), "2026-01-01T00:00:00Z"}, {{record}}));
  file.commit();
  return path;
}

TEST(Mask, IsGivenBackWithItsSample) {
  const test::TemporaryFolder folder;
  const Recipe recipe = test::recipe(Kind::kLatents);
  const Layout layout = layout_of(recipe.kind, recipe.parameters);
  std::vector<WantedItem> items;
  {
    Writer killed(folder.path(), recipe, test::provenance());  // through the journal, too
    for (uint64_t i = 0; i < 7; ++i) {
      const auto data = masked_sample(layout, i);
      killed.add(data.info, data.spans());
    }
  }
  Writer writer(folder.path(), recipe, test::provenance());
  EXPECT_EQ(writer.num_recovered(), 7);
  for (uint64_t i = 0; i < 18; ++i) {
    const auto data = masked_sample(layout, i);
    writer.add(data.info, data.spans());
    items.push_back(test::wanted(data, i));
  }
  writer.publish(test::publication(items));
  const Cache cache(folder.path(), Kind::kLatents);
  EXPECT_EQ(cache.manifest().required_features, std::vector<std::string>{kMasksFeature});
  for (uint64_t i = 0; i < 18; ++i) {
    const auto expected = masked_sample(layout, i);
    const auto& variant = cache.index().variants(static_cast<int64_t>(i))[0];
    EXPECT_EQ(variant.flags & kSampleMasked, expected.info.flags & kSampleMasked);
    EXPECT_EQ(cache.read(variant).tensors, expected.tensors) << i;
  }
}

TEST(Mask, IsAFeatureOnlyWhereASampleHasOne) {
  const test::TemporaryFolder folder;
  const Recipe recipe = test::recipe(Kind::kLatents);
  test::make_cache(folder.path(), recipe, 0, 5);
  EXPECT_TRUE(read_manifest(folder.path()).required_features.empty());
}

TEST(Mask, OutOfRangeIsRefused) {
  const test::TemporaryFolder folder;
  const Recipe recipe = test::recipe(Kind::kLatents);
  const Layout layout = layout_of(recipe.kind, recipe.parameters);
  for (const float bad : {-0.001f, 1.001f, std::nanf(""), INFINITY}) {
    auto data = masked_sample(layout, 3);
    std::memcpy(data.tensors[1].data() + 8, &bad, sizeof bad);
    EXPECT_THROW(prepare(layout, data.info, data.spans()), std::invalid_argument);
    // as somebody else's program might write it
    Record record{data.info, {}};
    Xxh3 hash;
    for (size_t t = 0; t < 2; ++t) {
      hash.add(data.tensors[t]);
      record.frames.push_back(encode_frame(data.tensors[t], t == 0 ? 2 : 4));
    }
    record.info.tensor_xxh3 = hash.digest();
    const auto path = write_segment(folder.path(), recipe, record);
    try {
      Segment(path).read(0);
      ADD_FAILURE() << bad;
    } catch (const CacheError& error) {
      EXPECT_THAT(error.what(), HasSubstr("is a mask with the value"));
    }
  }
}

TEST(Mask, UnknownFlagsAreRefused) {
  const test::TemporaryFolder folder;
  const Recipe recipe = test::recipe(Kind::kLatents);
  const Layout layout = layout_of(recipe.kind, recipe.parameters);
  auto data = test::sample(layout, 0);
  Record record = prepare(layout, data.info, data.spans());
  record.info.flags = 4;
  const auto path = write_segment(folder.path(), recipe, record);
  try {
    Segment segment(path);
    ADD_FAILURE();
  } catch (const CacheError& error) {
    EXPECT_THAT(error.what(), HasSubstr("has the flags 4"));
  }
}

}  // namespace
}  // namespace flux::cache
