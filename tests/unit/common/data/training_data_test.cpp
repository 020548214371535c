#include "common/data/training_data.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "common/core/error.h"
#include "common/core/file.h"
#include "formats/cache/lock.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/training_caches.h"

namespace flux {
namespace {

using test::TemporaryFolder;
using test::TrainingCaches;
using testing::AllOf;
using testing::HasSubstr;

TrainingCaches five_items() {
  TrainingCaches caches;
  caches.items = {
      {"a.png", 8, 8}, {"b.png", 8, 8}, {"c.png", 8, 12}, {"d.png", 8, 8}, {"e.png", 8, 12}};
  caches.items[3].repeats = 2;
  caches.t5_length = 4;
  return caches;
}

std::string message_of(const TemporaryFolder& folder, const DataOptions& options = {}) {
  try {
    TrainingData(folder / "latents", folder / "text", options);
  } catch (const CacheError& error) {
    return error.what();
  }
  return "no error";
}

TEST(TrainingData, VisitsEveryItemAndRepeatOnceAnEpochInBatchesOfOneBucket) {
  TemporaryFolder folder;
  five_items().write(folder.path());
  const TrainingData data(folder / "latents", folder / "text", {.seed = 1, .batch_size = 3});
  EXPECT_EQ(data.num_items(), 5);
  EXPECT_EQ(data.num_visits(), 6);
  EXPECT_EQ(data.num_batches(), 3);  // 4 visits of 8x8, 2 of 8x12: ceil(4/3) + ceil(2/3)
  EXPECT_EQ(data.buckets(), (std::vector<BucketVisits>{{64, 64, 4}, {96, 64, 2}}));
  EXPECT_EQ(data.subsets(), (std::vector<SubsetItems>{{.items = 5, .visits = 6}}));
  std::set<std::multiset<int64_t>> orders;
  for (int64_t epoch = 0; epoch < 4; ++epoch) {
    std::multiset<std::string> names;
    std::set<uint64_t> keys;
    const auto batches = data.epoch_batches(epoch);
    ASSERT_EQ(batches.size(), 3u);
    for (size_t i = 0; i < batches.size(); ++i) {
      const Batch batch = data.load(epoch, static_cast<int64_t>(i), batches[i]);
      EXPECT_LE(batch.size(), 3);
      EXPECT_EQ(batch.latents.size(0), batch.size());
      names.insert(batch.names.begin(), batch.names.end());
      keys.insert(batch.visits.begin(), batch.visits.end());
    }
    EXPECT_EQ(names,
              (std::multiset<std::string>{"a.png", "b.png", "c.png", "d.png", "d.png", "e.png"}));
    EXPECT_EQ(keys.size(), 6u);
  }
}

TEST(TrainingData, BatchesOfAnUpdateAreOneBatchThatIsCut) {
  TemporaryFolder folder;
  TrainingCaches caches;  // buckets of 8, 11 and 3 visits
  for (int i = 0; i < 22; ++i)
    caches.items.push_back(
        {.name = fmt::format("{}.png", i), .rows = i < 8 ? 4u : 8u, .columns = i < 19 ? 8u : 12u});
  caches.t5_length = 4;
  caches.write(folder.path());
  const auto batches = [&](int64_t size, int64_t accumulation) {
    const TrainingData data(folder / "latents",
                            folder / "text",
                            {.seed = 1, .batch_size = size, .accumulation = accumulation});
    const auto out = data.epoch_batches(2);
    EXPECT_EQ(static_cast<int64_t>(out.size()), data.num_batches());
    return out;
  };
  const auto same = [](const Visit& a, const Visit& b) {
    return a.item == b.item && a.repeat == b.repeat;
  };
  const auto whole = batches(4, 1);
  for (const auto& [size, accumulation] : {std::pair<int64_t, int64_t>{2, 2}, {1, 4}}) {
    const auto cut = batches(size, accumulation);
    size_t next = 0;
    for (const auto& batch : whole) {
      std::vector<Visit> joined;
      for (; joined.size() < batch.size(); ++next) {
        EXPECT_LE(std::ssize(cut.at(next)), size);
        joined.insert(joined.end(), cut[next].begin(), cut[next].end());
      }
      EXPECT_TRUE(std::ranges::equal(joined, batch, same));
    }
    EXPECT_EQ(next, cut.size());
  }
}

TEST(TrainingData, OrdersEpochsBySeedAndEpochAlone) {
  TemporaryFolder folder, other;
  TrainingCaches caches;
  for (int i = 0; i < 20; ++i) caches.items.push_back({fmt::format("{}.png", i)});
  caches.t5_length = 4;
  caches.write(folder.path());
  std::reverse(caches.items.begin(), caches.items.end());
  caches.write(other.path());  // the same items in another order
  const auto names = [](const TemporaryFolder& where, uint64_t seed, int64_t epoch) {
    const TrainingData data(where / "latents", where / "text", {.seed = seed});
    std::vector<std::string> out;
    for (const auto& visits : data.epoch_batches(epoch))
      out.push_back(data.load(epoch, 0, visits).names.at(0));
    return out;
  };
  EXPECT_EQ(names(folder, 1, 0), names(folder, 1, 0));
  EXPECT_EQ(names(folder, 1, 0), names(other, 1, 0));
  EXPECT_NE(names(folder, 1, 0), names(folder, 1, 1));
  EXPECT_NE(names(folder, 1, 0), names(folder, 2, 0));
}

TEST(TrainingData, ScalesLatentsAndDrawsFromThePosterior) {
  TemporaryFolder folder;
  TrainingCaches caches;
  caches.items = {{"a.png", 32, 32}};
  caches.t5_length = 4;
  caches.write(folder.path());
  const auto latents = [&](bool sample, int64_t epoch) {
    const TrainingData data(folder / "latents", folder / "text", {.sample_posterior = sample});
    return data.load(epoch, 0, {{0, 0}}).latents;
  };
  const at::Tensor mean = latents(false, 0);
  EXPECT_NEAR((mean / 0.3611 + 0.1159).std().item<double>(), 1, 0.05);
  EXPECT_TRUE(at::equal(mean, latents(false, 1)));
  const at::Tensor noise = (latents(true, 0) - mean) / 0.3611;
  EXPECT_NEAR(noise.std().item<double>(), std::exp(-1.0), 0.01);  // log-variance -2
  EXPECT_NEAR(noise.mean().item<double>(), 0, 0.01);
  EXPECT_FALSE(at::equal(latents(true, 0), latents(true, 1)));
  EXPECT_TRUE(at::equal(latents(true, 3), latents(true, 3)));
}

TEST(TrainingData, TakesVariantsByWeightAndDropsCaptionsAtTheRate) {
  TemporaryFolder folder;
  TrainingCaches caches;
  caches.items = {{"a.png"}};
  caches.items[0].num_captions = 2;
  caches.items[0].flipped_too = true;
  caches.items[0].repeats = 400;
  caches.t5_length = 4;
  caches.empty_caption = true;
  caches.plan["subsets"][0]["caption_dropout_rate"] = 0.25;
  caches.write(folder.path());
  const TrainingData data(folder / "latents",
                          folder / "text",
                          {.seed = 5, .batch_size = 400, .sample_posterior = false});
  const Batch batch = data.load(0, 0, data.epoch_batches(0).at(0));
  std::map<float, int> captions;
  for (int64_t i = 0; i < 400; ++i) {
    const float value = batch.pooled_embedding[i][0].item<float>();
    EXPECT_EQ(batch.prompt_embedding[i][3][7].item<float>(), value);
    ++captions[value];
  }
  EXPECT_EQ(captions.size(), 3u);
  EXPECT_NEAR(captions[0], 100, 30);
  EXPECT_NEAR(captions[1], 150, 35);
  EXPECT_NEAR(captions[2], 150, 35);
  const at::Tensor first = batch.latents.select(1, 0).flatten(1).select(1, 0);
  const int64_t plain = (first == first[0]).sum().item<int64_t>();
  EXPECT_NEAR(static_cast<double>(plain), 200, 40);
}

TEST(TrainingData, GivesTheLossMaskOfSamplesThatHaveOneAndOnesForTheRest) {
  TemporaryFolder folder;
  TrainingCaches caches = five_items();  // a, b, d (twice) of 8x8; c, e of 8x12
  caches.items[1].masked = true;
  caches.write(folder.path());
  const TrainingData data(folder / "latents", folder / "text", {.batch_size = 4});
  int num_masked = 0;
  for (const auto& visits : data.epoch_batches(0)) {
    const Batch batch = data.load(0, 0, visits);
    if (batch.latents.size(3) == 12) {
      EXPECT_FALSE(batch.loss_mask.defined());
      continue;
    }
    ASSERT_EQ(batch.loss_mask.sizes(), (std::vector<int64_t>{4, 1, 8, 8}));
    for (int64_t row = 0; row < 4; ++row) {
      const bool masked = batch.names[static_cast<size_t>(row)] == "b.png";
      num_masked += masked;
      EXPECT_TRUE(at::equal(batch.loss_mask[row].flatten(),
                            masked ? at::arange(64, at::kFloat) / 64 : at::ones(64)));
    }
  }
  EXPECT_EQ(num_masked, 1);
}

TEST(TrainingData, RefusesWeightsThatAreNoProbabilities) {
  for (const double weight : {0.4, 0.5 + 1e-5}) {
    TemporaryFolder folder;
    TrainingCaches caches = five_items();
    caches.items[2].flipped_too = true;
    caches.flip_weight = weight;
    caches.write(folder.path());
    EXPECT_THAT(message_of(folder), AllOf(HasSubstr("c.png"), HasSubstr("sum to"))) << weight;
  }
}

TEST(TrainingData, DropsAllCaptionsOfEveryNthEpoch) {
  TemporaryFolder folder;
  TrainingCaches caches;
  caches.items = {{"a.png"}};
  caches.t5_length = 4;
  caches.empty_caption = true;
  caches.plan["subsets"][0]["caption_dropout_every_n_epochs"] = 3;
  caches.write(folder.path());
  const TrainingData data(folder / "latents", folder / "text", {});
  for (int64_t epoch = 0; epoch < 6; ++epoch) {
    const float value = data.load(epoch, 0, {{0, 0}}).pooled_embedding[0][0].item<float>();
    EXPECT_EQ(value == 0, epoch % 3 == 2) << epoch;
  }
}

TEST(TrainingData, MasksTextOnlyWhereTheCacheDoes) {
  for (const std::string policy : {"full", "masked"}) {
    TemporaryFolder folder;
    TrainingCaches caches = five_items();
    caches.pad_policy = policy;
    caches.write(folder.path());
    const Batch batch = TrainingData(folder / "latents", folder / "text", {}).load(0, 0, {{0, 0}});
    ASSERT_EQ(batch.text_mask.defined(), policy == "masked");
    if (batch.text_mask.defined()) {
      EXPECT_EQ(batch.text_mask[0].sum().item<int64_t>(), 3);
    }
  }
}

TEST(TrainingData, LeavesOutTextThatNoSampleOfTheBatchAttendsTo) {
  TemporaryFolder folder;
  TrainingCaches caches = five_items();
  caches.t5_length = 6;
  caches.items[1].t5_tokens = 5;
  caches.write(folder.path());
  const TrainingData all(folder / "latents", folder / "text", {});
  const TrainingData masked(folder / "latents", folder / "text", {.text_mask = true});
  const auto visit_of = [&](const std::string& name) -> Visit {
    int64_t item = 0;
    while (all.load(0, 0, {{item, 0}}).names.at(0) != name) ++item;
    return {item, 0};
  };
  const std::vector<Visit> both{visit_of("a.png"), visit_of("b.png")};
  EXPECT_EQ(all.load(0, 0, both).prompt_embedding.size(1), 6);
  const Batch batch = masked.load(0, 0, both);
  const Batch one = masked.load(0, 0, {visit_of("a.png")});
  EXPECT_TRUE(
      at::equal(batch.prompt_embedding, all.load(0, 0, both).prompt_embedding.narrow(1, 0, 5)));
  EXPECT_TRUE(at::equal(batch.text_mask.sum(1), at::tensor({3, 5})));
  EXPECT_EQ(one.prompt_embedding.size(1), 3);
  EXPECT_TRUE(one.text_mask.all().item<bool>());
  EXPECT_EQ(all.longest_text(), 6);
  EXPECT_EQ(masked.longest_text(), 5);
}

TEST(TrainingData, WeighsRegularisationAndLeavesOutValidation) {
  TemporaryFolder folder;
  TrainingCaches caches = five_items();
  caches.items[0].flags = cache::kItemRegularization;
  caches.items[1].flags = cache::kItemValidation;
  caches.write(folder.path());
  const TrainingData data(
      folder / "latents", folder / "text", {.batch_size = 8, .prior_loss_weight = 0.5});
  EXPECT_EQ(data.num_items(), 4);
  EXPECT_EQ(data.num_validation(), 1);
  EXPECT_EQ(data.num_regularization(), 1);
  for (const auto& visits : data.epoch_batches(0)) {
    const Batch batch = data.load(0, 0, visits);
    for (size_t i = 0; i < batch.names.size(); ++i) {
      EXPECT_EQ(batch.loss_weight[static_cast<int64_t>(i)].item<float>(),
                batch.names[i] == "a.png" ? 0.5f : 1.0f);
    }
  }
}

TEST(TrainingData, LeavesOutWhatOneCacheHasQuarantined) {
  TemporaryFolder folder;
  TrainingCaches caches = five_items();
  caches.in_latents = [](const std::string& name) { return name != "b.png"; };
  caches.quarantined = {{dataset::item_digest(0, "b.png"), 0, "b.png", "truncated"}};
  caches.write(folder.path());
  const TrainingData data(folder / "latents", folder / "text", {});
  EXPECT_EQ(data.num_items(), 4);
  EXPECT_EQ(data.num_quarantined(), 1);
}

TEST(TrainingData, RefusesItemsThatOneCacheLacks) {
  TemporaryFolder folder;
  TrainingCaches caches = five_items();
  caches.in_text = [](const std::string& name) { return name == "a.png"; };
  caches.write(folder.path());
  EXPECT_THAT(message_of(folder),
              testing::AllOf(HasSubstr("4 items"), HasSubstr("b.png"), HasSubstr("e.png")));

  TemporaryFolder other;
  caches.in_text = [](const std::string&) { return true; };
  caches.in_latents = [](const std::string& name) { return name == "a.png"; };
  caches.write(other.path());
  EXPECT_THAT(message_of(other),
              testing::AllOf(HasSubstr("4 items"), HasSubstr("text"), HasSubstr("c.png")));

  TemporaryFolder one;
  caches.in_latents = [](const std::string& name) { return name != "b.png"; };
  caches.write(one.path());
  EXPECT_THAT(
      message_of(one),
      testing::AllOf(HasSubstr("1 item of "), HasSubstr(" is not in "), HasSubstr("b.png")));
}

TEST(TrainingData, RefusesPlansThatDiffer) {
  TemporaryFolder folder;
  TrainingCaches caches = five_items();
  caches.write_latents(folder / "latents");
  caches.plan["datasets"][0]["batch_size"] = 2;
  caches.write_text(folder / "text");
  EXPECT_THAT(message_of(folder),
              testing::AllOf(HasSubstr("batch_size"), HasSubstr("2"), HasSubstr("1")));
}

TEST(TrainingData, NamesEachFieldOfThePlansThatDiffers) {
  TemporaryFolder folder;
  TrainingCaches caches = five_items();
  caches.write_latents(folder / "latents");
  caches.plan["subsets"][0]["num_repeats"] = 5;
  caches.plan["subsets"][0]["flip_aug"] = true;
  caches.plan["datasets"][0]["validation_seed"] = 9;
  caches.write_text(folder / "text");
  const std::string message = message_of(folder), text = (folder / "text").native();
  EXPECT_THAT(message,
              AllOf(HasSubstr("plan.subsets.0.num_repeats: "),
                    HasSubstr(text + ": 5"),
                    HasSubstr("plan.subsets.0.flip_aug: "),
                    HasSubstr(text + ": true"),
                    HasSubstr("plan.datasets.0.validation_seed: ")));
  EXPECT_THAT(message, testing::Not(HasSubstr("plan_digest")));
}

TEST(TrainingData, SaysHowToMergeAPart) {
  TemporaryFolder folder;
  TrainingCaches caches = five_items();
  caches.write(folder.path());
  cache::Manifest manifest = cache::read_manifest(folder / "latents");
  manifest.shard = {1, 3};
  write_file_atomic(folder / "latents" / cache::kManifestName, cache::manifest_text(manifest));
  EXPECT_THAT(message_of(folder),
              AllOf(HasSubstr("is shard 1 of 3"),
                    HasSubstr("flux-cache merge " + (folder / "latents").native() +
                              " ... --out DIR with all 3 parts")));
}

TEST(TrainingData, SaysHowToMendADamagedFrame) {
  TemporaryFolder folder;
  five_items().write(folder.path());
  const TrainingData data(folder / "latents", folder / "text", {});
  for (const auto& entry : data.latents_manifest().segments) {
    const auto file = folder / "latents" / entry.name;
    std::string bytes = read_file(file);
    const size_t frame = bytes.find("\x28\xB5\x2F\xFD");  // zstd's mark
    ASSERT_NE(frame, std::string::npos);
    for (size_t i = frame + 16; i < frame + 32; ++i) bytes[i] = static_cast<char>(~bytes[i]);
    write_file_atomic(file, bytes);
  }
  try {
    for (int64_t i = 0; i < data.num_items(); ++i) data.load(0, i, {{i, 0}});
    FAIL();
  } catch (const CacheError& error) {
    EXPECT_THAT(error.what(),
                HasSubstr("hint: flux-cache repair " + (folder / "latents").native() +
                          ", then run the caching tool again"));
  }
}

TEST(TrainingData, RefusesDropoutWithoutAnEmptyCaption) {
  TemporaryFolder folder;
  TrainingCaches caches = five_items();
  caches.plan["subsets"][0]["caption_dropout_rate"] = 0.1;
  caches.write(folder.path());
  EXPECT_THAT(message_of(folder), HasSubstr("empty caption"));
}

TEST(TrainingData, RefusesAbsentCachesAndCachesOfTheOtherKind) {
  TemporaryFolder folder;
  five_items().write(folder.path());
  EXPECT_THROW(TrainingData(folder / "nothing", folder / "text", {}), CacheError);
  EXPECT_THROW(TrainingData(folder / "text", folder / "latents", {}), CacheError);
}

std::set<std::string> trained_on(const TrainingData& data) {
  std::set<std::string> names;
  for (int64_t epoch = 0; epoch < 2; ++epoch)
    for (const auto& visits : data.epoch_batches(epoch))
      for (const std::string& name : data.load(epoch, 0, visits).names) names.insert(name);
  return names;
}

std::set<std::string> held_out(const TrainingData& data) {
  std::set<std::string> names;
  for (int64_t i = 0; i < data.num_held_out_batches(); ++i)
    for (const std::string& name : data.load_held_out(i).names)
      EXPECT_TRUE(names.insert(name).second) << name;
  return names;
}

TEST(TrainingData, HoldsOutWhatTheCachesSayOrAShareByHash) {
  TemporaryFolder folder;
  TrainingCaches caches;
  for (int i = 0; i < 60; ++i)
    caches.items.push_back({.name = fmt::format("{}.png", i), .columns = i % 3 ? 8u : 12u});
  caches.items[7].flags = cache::kItemRegularization;
  caches.t5_length = 4;
  caches.write(folder / "few");
  const auto split = [&](const char* name, double share, uint64_t seed, int64_t samples = 0) {
    return TrainingData(folder / name / "latents",
                        folder / name / "text",
                        {.batch_size = 4,
                         .validation_split = share,
                         .validation_seed = seed,
                         .validation_samples = samples});
  };
  std::set<std::string> few;
  {
    const TrainingData data = split("few", 0.25, 0);
    few = held_out(data);
    EXPECT_EQ(std::ssize(few), data.num_validation());
    EXPECT_EQ(data.num_held_out(), data.num_validation());
    EXPECT_GT(few.size(), 6u);
    EXPECT_LT(few.size(), 26u);
    EXPECT_FALSE(few.contains("7.png"));
    const auto trained = trained_on(data);
    EXPECT_EQ(trained.size() + few.size(), 60u);
    for (const std::string& name : few) EXPECT_FALSE(trained.contains(name)) << name;
    EXPECT_NE(held_out(split("few", 0.25, 1)), few);
    const TrainingData limited = split("few", 0.25, 0, 3);
    EXPECT_EQ(held_out(limited).size(), 3u);
    EXPECT_EQ(limited.num_held_out(), 3);
    EXPECT_EQ(trained_on(limited), trained);
  }
  // more samples move none
  for (int i = 60; i < 90; ++i) caches.items.push_back({.name = fmt::format("{}.png", i)});
  caches.write(folder / "more");
  const auto more = held_out(split("more", 0.25, 0));
  EXPECT_GT(more.size(), few.size());
  for (int i = 0; i < 60; ++i) {
    const std::string name = fmt::format("{}.png", i);
    EXPECT_EQ(more.contains(name), few.contains(name)) << name;
  }
  // of a share too small for any, one
  EXPECT_EQ(held_out(split("more", 1e-6, 0)).size(), 1u);
  caches.items[3].flags = caches.items[8].flags = cache::kItemValidation;
  caches.write(folder / "said");
  EXPECT_EQ(held_out(split("said", 0, 0)), (std::set<std::string>{"3.png", "8.png"}));
  EXPECT_THROW(split("said", 0.25, 0), UsageError);
}

TEST(TrainingData, HeldOutSamplesAreTheSameWheneverTheyAreRead) {
  TemporaryFolder folder;
  TrainingCaches caches = five_items();
  for (auto& item : caches.items) item.num_captions = 3, item.flipped_too = true;
  caches.items[0].flags = caches.items[1].flags = caches.items[2].flags = cache::kItemValidation;
  caches.plan["subsets"][0]["caption_dropout_rate"] = 1.0;
  caches.empty_caption = true;
  caches.write(folder.path());
  const auto open = [&](uint64_t seed, uint64_t validation_seed) {
    return TrainingData(
        folder / "latents",
        folder / "text",
        {.seed = seed, .batch_size = 1, .input_noise = 0.5, .validation_seed = validation_seed});
  };
  const TrainingData one = open(1, 0), two = open(2, 0), three = open(1, 3);
  ASSERT_EQ(one.num_held_out_batches(), 3);
  EXPECT_EQ(one.held_out_buckets(), (std::vector<BucketVisits>{{64, 64, 2}, {96, 64, 1}}));
  std::set<float> noises;
  for (int64_t i = 0; i < 3; ++i) {
    const Batch a = one.load_held_out(i), b = two.load_held_out(i);
    EXPECT_EQ(a.names, b.names);
    EXPECT_TRUE(at::equal(a.latents, b.latents));
    EXPECT_TRUE(at::equal(a.prompt_embedding, b.prompt_embedding));
    EXPECT_GT(a.prompt_embedding.min().item<float>(), 0) << "the caption was dropped";
    EXPECT_FALSE(a.noise.defined());
    EXPECT_FALSE(a.loss_weight.defined());
    for (int64_t sigma = 0; sigma < 3; ++sigma) {
      const at::Tensor noise = one.held_out_noise(a, sigma);
      EXPECT_TRUE(at::equal(noise, two.held_out_noise(b, sigma)));
      EXPECT_FALSE(at::equal(noise, three.held_out_noise(a, sigma)));
      EXPECT_NEAR(noise.std().item<double>(), 1, 0.1);
      EXPECT_TRUE(noises.insert(noise.flatten()[0].item<float>()).second);
    }
  }
}

TEST(TrainingData, MarksBothCachesAsBeingRead) {
  TemporaryFolder folder;
  five_items().write(folder.path());
  for (const char* name : {"latents", "text"}) {
    {
      const TrainingData data(folder / "latents", folder / "text", {});
      EXPECT_THROW(cache::require_no_readers(folder / name), CacheError);
    }
    EXPECT_TRUE(cache::require_no_readers(folder / name).empty());
  }
}

TEST(TrainingData, DigestsChangeWithTheDataAlone) {
  TemporaryFolder one, two, three;
  five_items().write(one.path());
  five_items().write(two.path());
  TrainingCaches changed = five_items();
  changed.items[2].num_captions = 2;
  changed.write(three.path());
  const TrainingData a(one / "latents", one / "text", {}), b(two / "latents", two / "text", {});
  const TrainingData c(three / "latents", three / "text", {});
  EXPECT_EQ(a.latents_digest(), b.latents_digest());
  EXPECT_EQ(a.text_digest(), b.text_digest());
  EXPECT_EQ(a.latents_digest(), c.latents_digest());
  EXPECT_NE(a.text_digest(), c.text_digest());
}

}  // namespace
}  // namespace flux
