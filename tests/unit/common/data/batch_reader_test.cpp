#include "common/data/batch_reader.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "common/core/error.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/training_caches.h"

namespace flux {
namespace {

test::TrainingCaches many_items() {
  test::TrainingCaches caches;
  for (int i = 0; i < 11; ++i)
    caches.items.push_back({fmt::format("{}.png", i), 8, i % 3 == 0 ? 12u : 8u});
  caches.t5_length = 4;
  return caches;
}

bool equal(const Batch& a, const Batch& b) {
  return a.epoch == b.epoch && a.index == b.index && a.names == b.names && a.visits == b.visits &&
         at::equal(a.latents, b.latents) && at::equal(a.noise, b.noise) &&
         at::equal(a.prompt_embedding, b.prompt_embedding) &&
         at::equal(a.pooled_embedding, b.pooled_embedding);
}

TEST(BatchReader, GivesTheSameBatchesForAnyNumberOfThreads) {
  test::TemporaryFolder folder;
  many_items().write(folder.path());
  const TrainingData data(folder / "latents", folder / "text", {.seed = 3, .batch_size = 2});
  BatchReader one(data, {}, {.num_threads = 1, .num_ahead = 1}),
      four(data, {}, {.num_threads = 4, .num_ahead = 7});
  for (int i = 0; i < 20; ++i) EXPECT_TRUE(equal(one.next(), four.next())) << "batch " << i;
}

TEST(BatchReader, GoesOnFromAnyPosition) {
  test::TemporaryFolder folder;
  many_items().write(folder.path());
  const TrainingData data(folder / "latents", folder / "text", {.seed = 3, .batch_size = 2});
  BatchReader whole(data, {}, {});
  for (int i = 0; i < 9; ++i) whole.next();
  const DataPosition position = whole.position();
  EXPECT_EQ(position, (DataPosition{1, 9 - data.num_batches()}));
  BatchReader rest(data, position, {});
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(equal(whole.next(), rest.next())) << "batch " << i;
}

TEST(BatchReader, TakesTurnsWithOthers) {
  test::TemporaryFolder folder;
  many_items().write(folder.path());
  const TrainingData data(folder / "latents", folder / "text", {.seed = 3, .batch_size = 2});
  BatchReader all(data, {0, 1}, {});
  std::vector<std::unique_ptr<BatchReader>> readers;
  for (int64_t turn = 0; turn < 3; ++turn)
    readers.push_back(std::make_unique<BatchReader>(
        data, DataPosition{0, 1}, ReaderOptions{.num_batches = 6, .turn = turn, .stride = 3}));
  for (int update = 0; update < 6; ++update) {
    const auto outline = readers[2]->outline(3);
    for (const auto& reader : readers) EXPECT_EQ(reader->position(), all.position());
    ASSERT_EQ(outline.size(), 3u);
    for (size_t turn = 0; turn < 3; ++turn) {
      const Batch batch = readers[turn]->next();
      EXPECT_TRUE(equal(batch, all.next())) << "update " << update << " turn " << turn;
      EXPECT_EQ(outline[turn].epoch, batch.epoch);
      EXPECT_EQ(outline[turn].visits, batch.visits);
      EXPECT_EQ(outline[turn].height, batch.latents.size(2));
      EXPECT_EQ(outline[turn].width, batch.latents.size(3));
    }
  }
  EXPECT_THROW(readers[0]->next(), std::out_of_range);
}

TEST(BatchReader, StopsAfterTheBatchesAskedFor) {
  test::TemporaryFolder folder;
  many_items().write(folder.path());
  const TrainingData data(folder / "latents", folder / "text", {});
  BatchReader reader(data, {}, {.num_batches = 2});
  reader.next();
  reader.next();
  EXPECT_THROW(reader.next(), std::out_of_range);
  EXPECT_THROW(BatchReader(data, {0, 11}, {}), std::invalid_argument);
}

TEST(BatchReader, PassesOnTheErrorOfADamagedSegment) {
  test::TemporaryFolder folder;
  many_items().write(folder.path());
  const TrainingData data(folder / "latents", folder / "text", {});
  for (const auto& entry : std::filesystem::directory_iterator(folder / "text")) {
    if (entry.path().filename().string().starts_with("seg-")) std::filesystem::remove(entry.path());
  }
  BatchReader reader(data, {}, {});
  EXPECT_THROW(reader.next(), CacheError);
}

}  // namespace
}  // namespace flux
