#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <thread>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/rng.h"
#include "common/core/sanitizer.h"
#include "common/image/bucket.h"
#include "common/models/vae/vae.h"
#include "common/tensor/tensor.h"
#include "common/tensor/weight_file.h"
#include "formats/cache/reader.h"
#include "pipelines/latents/encode.h"
#include "pipelines/latents/options.h"
#include "pipelines/latents/run.h"
#include "pipelines/latents/scan.h"
#include "pipelines/stage/halving.h"
#include "pipelines/stage/times.h"
#include "pipelines/stage/write_queue.h"
#include "tests/support/temporary_folder.h"

namespace flux::latents {
namespace {

namespace fs = std::filesystem;

std::string le(uint32_t value, int bytes) {
  std::string out;
  for (int i = 0; i < bytes; ++i) out += static_cast<char>(i < 4 ? value >> (8 * i) : 0);
  return out;
}

/// A BMP file of noise.
std::string picture(uint32_t width, uint32_t height, uint64_t seed) {
  const RandomStream random(seed, Purpose::kDemo);
  std::string rows;
  for (uint32_t y = 0; y < height; ++y) {
    for (uint32_t x = 0; x < (width * 3 + 3) / 4 * 4; ++x)
      rows += static_cast<char>(random.bits(y * 4096 + x));
  }
  return "BM" + le(54 + static_cast<uint32_t>(rows.size()), 4) + le(0, 4) + le(54, 4) + le(40, 4) +
         le(width, 4) + le(height, 4) + le(1, 2) + le(24, 2) + le(0, 24) + rows;
}

/// An autoencoder of one narrow block a level.
void write_autoencoder(const fs::path& path, uint64_t seed) {
  vae::Config config;
  config.channels = 32, config.channel_mult = {1, 1, 1, 1}, config.num_res_blocks = 1,
  config.has_decoder = false;
  TensorMap tensors;
  uint64_t number = 0;
  for (const auto& [name, shape] : vae::tensor_shapes(config)) {
    auto tensor = at::empty(shape);
    RandomStream(seed, Purpose::kTinyModel, number++)
        .fill_normal({tensor.data_ptr<float>(), static_cast<size_t>(tensor.numel())});
    tensors[name] = tensor * 0.1;
  }
  write_weights(path, tensors, {});
}

class Latents : public testing::Test {
 protected:
  Latents() {
    setenv("XDG_CACHE_HOME", (folder / "user-cache").c_str(), 1);
    write_autoencoder(folder / "ae.safetensors", 1);
    options.ae = folder / "ae.safetensors";
    options.data.images = folder / "photos";
    options.encode.out = folder / "cache";
    options.encode.device = DeviceChoice::kCpu;
    options.width = options.height = 64;
  }
  void three_photos() {
    folder.write("photos/a.bmp", picture(64, 64, 1)),
        folder.write("photos/b.bmp", picture(90, 60, 2));
    folder.write("photos/c.bmp", picture(40, 80, 3));
  }
  fs::path manifest() const { return options.encode.out / "manifest.json"; }
  /// Bytes of an item's variant, by the item's place.
  std::vector<std::byte> latents(int64_t item, size_t variant = 0) const {
    const cache::Cache cache(options.encode.out, cache::Kind::kLatents);
    return cache.read(cache.index().variants(item)[variant]).tensors.at(0);
  }

  int64_t segment_bytes() const {
    uintmax_t bytes = 0;
    for (const auto& entry : fs::directory_iterator(options.encode.out)) {
      if (entry.path().filename().native().starts_with("seg-")) bytes += entry.file_size();
    }
    return static_cast<int64_t>(bytes);
  }

  test::TemporaryFolder folder;
  Options options;
};

TEST_F(Latents, SecondRunEncodesNothingAndTouchesNothing) {
  three_photos();
  const auto first = run(options);
  EXPECT_EQ(first.encoded, 3);
  EXPECT_EQ(first.kept, 0);
  EXPECT_EQ(first.exit_code, ExitCode::kOk);
  const auto time = fs::last_write_time(manifest());
  const auto second = run(options);
  EXPECT_EQ(second.encoded, 0);
  EXPECT_EQ(second.kept, 3);
  EXPECT_EQ(second.changed, 0);
  EXPECT_EQ(second.unwanted, 0);
  EXPECT_EQ(fs::last_write_time(manifest()), time);
  options.encode.rehash = true;
  EXPECT_EQ(run(options).encoded, 0);
}

TEST_F(Latents, EditedImageIsEncodedAlone) {
  three_photos();
  run(options);
  const auto before = latents(1), other = latents(0);
  folder.write("photos/b.bmp", picture(90, 60, 22));
  const auto report = run(options);
  EXPECT_EQ(report.encoded, 1);
  EXPECT_EQ(report.changed, 1);
  EXPECT_EQ(report.kept, 2);
  EXPECT_EQ(report.unwanted, 1);
  EXPECT_NE(latents(1), before);
  EXPECT_EQ(latents(0), other);
}

TEST_F(Latents, WhatChangedIsNamed) {
  three_photos();
  run(options);
  folder.write("photos/b.bmp", picture(90, 60, 22));
  auto report = run(options);
  EXPECT_EQ(report.changed_by, (nlohmann::json{{"source_sha256", 1}}));
  options.encode.dtype = DType::kF32;
  report = run(options);
  EXPECT_EQ(report.encoded, 3);
  EXPECT_EQ(report.changed_by, (nlohmann::json{{"parameters.dtype", 3}}));
  write_autoencoder(folder / "ae.safetensors", 2);
  EXPECT_EQ(run(options).changed_by, (nlohmann::json{{"weights.ae", 3}}));
  options.width = options.height = 96;
  report = run(options);
  EXPECT_EQ(report.changed_by.at("bucket"), 3);
  EXPECT_EQ(report.changed_by.at("parameters.resolution"), 3);
}

TEST_F(Latents, PartsHoldEverySampleOnce) {
  for (int i = 0; i < 8; ++i)
    folder.write("photos/" + std::to_string(i) + ".bmp", picture(64, 64, 10 + i));
  std::set<Sha256Digest> keys;
  for (int64_t part = 0; part < 3; ++part) {
    options.encode.out = folder / ("part" + std::to_string(part));
    options.encode.shard = {part, 3};
    run(options);
    const cache::Cache cache(options.encode.out, cache::Kind::kLatents);
    EXPECT_EQ(cache.index().num_items(), 8);
    for (const auto& variant : cache.index().variants()) {
      EXPECT_EQ(variant.segment == cache::kOtherShard, cache::shard_of(variant.key, 3) != part);
      EXPECT_EQ(variant.height, 8u);
      if (variant.segment == cache::kOtherShard) continue;
      EXPECT_TRUE(keys.insert(variant.key).second);
    }
  }
  EXPECT_EQ(keys.size(), 8u);
}

TEST_F(Latents, StopsBeforeTooManyBytesAndGoesOn) {
  three_photos();
  options.encode.max_bytes = 22'000;
  EXPECT_THROW(run(options), ResourceError);
  EXPECT_FALSE(fs::exists(manifest()));
  options.encode.max_bytes = 0;
  const auto report = run(options);
  EXPECT_EQ(report.encoded + report.kept, 3);
  EXPECT_GE(report.kept, 1);
}

TEST_F(Latents, ReproduceMeasuresDriftAndWritesNothing) {
  three_photos();
  options.encode.reproduce = 2;
  EXPECT_THROW(run(options), CacheError);  // no cache yet
  options.encode.reproduce = 0;
  run(options);
  const auto time = fs::last_write_time(manifest());
  options.encode.reproduce = 100;  // all
  auto report = run(options);
  ASSERT_TRUE(report.drift);
  EXPECT_EQ(report.drift->num_equal, 3);
  EXPECT_EQ(report.exit_code, ExitCode::kOk);
  EXPECT_EQ(fs::last_write_time(manifest()), time);
  EXPECT_FALSE(fs::exists(options.encode.out / ".writer.lock"));

  // a cache that other weights made, but that says these did
  write_autoencoder(folder / "ae.safetensors", 2);
  EXPECT_THROW(run(options), CacheError);
}

TEST_F(Latents, AnimationsAreAChoice) {
  using namespace std::string_literals;
  std::string gif = "GIF89a\1\0\1\0\x80\0\0\0\0\0\xFF\xFF\xFF"s;
  for (int i = 0; i < 2; ++i) gif += "\x2C\0\0\0\0\1\0\1\0\0\2\2\x44\1\0"s;
  folder.write("photos/a.gif", gif + ";");
  folder.write("photos/b.bmp", picture(64, 64, 1));
  EXPECT_EQ(run(options).encoded, 2);
  options.animated = Animated::kRefuse;
  options.encode.max_failed = 1;
  for (int twice = 0; twice < 2; ++twice) {  // the second time from the memo
    const auto report = run(options);
    EXPECT_EQ(report.failed, 1);
    EXPECT_EQ(report.kept, 1);
  }
  EXPECT_NE(read_file(options.encode.out / "quarantine.jsonl").find("several frames"),
            std::string::npos);
}

TEST_F(Latents, AlphaBecomesALossMask) {
  // 32 bits a pixel with a V4 head: left half transparent
  const uint32_t side = 64;
  std::string rows;
  for (uint32_t y = 0; y < side; ++y) {
    for (uint32_t x = 0; x < side; ++x)
      rows += std::string{'\x40', '\x80', '\x20', static_cast<char>(x < side / 2 ? 0 : 255)};
  }
  const std::string bmp = "BM" + le(122 + static_cast<uint32_t>(rows.size()), 4) + le(0, 4) +
                          le(122, 4) + le(108, 4) + le(side, 4) + le(side, 4) + le(1, 2) +
                          le(32, 2) + le(3, 4) + le(0, 20) + le(0x00FF0000, 4) + le(0x0000FF00, 4) +
                          le(0x000000FF, 4) + le(0xFF000000, 4) + le(0, 52) + rows;
  folder.write("photos/a.bmp", bmp);
  folder.write("photos/b.bmp", picture(64, 64, 1));
  const auto toml = folder.write("d.toml",
                                 "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n"
                                 "image_dir = '" +
                                     (folder / "photos").string() +
                                     "'\n"
                                     "alpha_mask = true\nflip_aug = true\n");
  options.data.images.clear();
  options.data.dataset = toml;
  options.width = options.height = 0;
  EXPECT_EQ(run(options).encoded, 4);
  const cache::Cache cache(options.encode.out, cache::Kind::kLatents);
  EXPECT_EQ(cache.manifest().required_features, std::vector<std::string>{"masks"});
  const auto mask = [&](int64_t item, size_t variant) {
    const auto sample = cache.read(cache.index().variants(item)[variant]);
    EXPECT_EQ(sample.tensors.size(), 2u);
    std::vector<float> values(64);
    std::memcpy(values.data(), sample.tensors.at(1).data(), 256);
    return values;
  };
  const auto plain = mask(0, 0), flipped = mask(0, 1);
  for (size_t i = 0; i < 64; ++i) {
    EXPECT_EQ(plain[i], i % 8 < 4 ? 0.0f : 1.0f) << i;
    EXPECT_EQ(flipped[i], i % 8 < 4 ? 1.0f : 0.0f) << i;
  }
  EXPECT_EQ(mask(1, 0), std::vector<float>(64, 1.0f));
  EXPECT_EQ(run(options).encoded, 0);
}

/// A BMP of two colours: `left` in the left half. Values are red; blue and green are another.
std::string halves(uint32_t width, uint32_t height, uint8_t left, uint8_t right) {
  std::string rows;
  for (uint32_t y = 0; y < height; ++y)
    for (uint32_t x = 0; x < width; ++x)
      rows += std::string{'\x11', '\x22', static_cast<char>(x < width / 2 ? left : right)};
  return "BM" + le(54 + static_cast<uint32_t>(rows.size()), 4) + le(0, 4) + le(54, 4) + le(40, 4) +
         le(width, 4) + le(height, 4) + le(1, 2) + le(24, 2) + le(0, 24) + rows;
}

TEST_F(Latents, MaskPicturesBecomeLossMasks) {
  for (const char* name : {"a", "b", "c", "d"})
    folder.write(fmt::format("photos/{}.bmp", name),
                 picture(128, 128, static_cast<uint64_t>(name[0])));
  folder.write("masks/a.bmp", halves(128, 128, 0, 255));
  folder.write("masks/b.bmp", halves(128, 128, 255, 51));
  folder.write("masks/c.bmp", halves(64, 128, 255, 51));
  options.data.images.clear();
  options.data.dataset =
      folder.write("d.toml",
                   "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n"
                   "image_dir = '" +
                       (folder / "photos").string() + "'\nconditioning_data_dir = '" +
                       (folder / "masks").string() + "'\nflip_aug = true\n");
  options.width = options.height = 0;
  options.encode.max_failed = 2;
  const auto first = run(options);
  EXPECT_EQ(first.encoded, 4);
  const std::string bad = read_file(options.encode.out / "quarantine.jsonl");
  EXPECT_NE(bad.find("c.bmp is 64x128, the picture 128x128"), std::string::npos) << bad;
  EXPECT_NE(bad.find("no mask: "), std::string::npos) << bad;
  const auto mask = [&](int64_t item, size_t variant) {
    const cache::Cache cache(options.encode.out, cache::Kind::kLatents);
    const auto sample = cache.read(cache.index().variants(item)[variant]);
    EXPECT_EQ(sample.tensors.size(), 2u);
    std::vector<float> values(64);
    std::memcpy(values.data(), sample.tensors.at(1).data(), 256);
    return values;
  };
  for (const size_t flip : {0u, 1u})
    for (size_t i = 0; i < 64; ++i) {
      const bool left = (i % 8 < 4) == (flip == 0);
      EXPECT_EQ(mask(0, flip)[i], left ? 0.0f : 1.0f) << i;
      EXPECT_FLOAT_EQ(mask(1, flip)[i], left ? 1.0f : 0.2f) << i;
    }
  EXPECT_EQ(run(options).encoded, 0);
  // an edited mask: its sample and its mirror image, no other
  folder.write("masks/b.bmp", halves(128, 128, 102, 51));
  const auto edited = run(options);
  EXPECT_EQ(edited.encoded, 2);
  EXPECT_EQ(edited.changed_by, (nlohmann::json{{"mask", 2}}));
  EXPECT_FLOAT_EQ(mask(1, 0)[0], 0.4f);
  // one that cannot be read, and a mask that comes later
  folder.write("masks/b.bmp", "no picture");
  folder.write("masks/d.bmp", halves(128, 128, 0, 255));
  EXPECT_EQ(run(options).encoded, 2);
  EXPECT_NE(read_file(options.encode.out / "quarantine.jsonl").find("its mask: "),
            std::string::npos);
}

TEST(Halving, TriesSmallerBatchesUntilOneFits) {
  std::vector<int64_t> tried, done;
  int64_t batch_size = 8;
  const auto compute = [&](int64_t limit) {
    return [&, limit](int64_t begin, int64_t count) {
      tried.push_back(count);
      if (count > limit) throw c10::OutOfMemoryError({__func__, __FILE__, 1}, "no memory");
      std::vector<int64_t> part(static_cast<size_t>(count));
      std::iota(part.begin(), part.end(), begin);
      return part;
    };
  };
  const auto take = [&](int64_t begin, int64_t count, const std::vector<int64_t>& part) {
    EXPECT_EQ(std::ssize(part), count);
    EXPECT_EQ(part.front(), begin);
    done.insert(done.end(), part.begin(), part.end());
  };
  stage::encode_in_batches(11, batch_size, compute(3), take);
  EXPECT_EQ(batch_size, 2);
  EXPECT_EQ(tried, (std::vector<int64_t>{8, 4, 2, 2, 2, 2, 2, 1}));
  std::vector<int64_t> all(11);
  std::iota(all.begin(), all.end(), 0);
  EXPECT_EQ(done, all);
  EXPECT_THROW(stage::encode_in_batches(3, batch_size, compute(0), take), OutOfMemory);
  EXPECT_EQ(batch_size, 1);
  // what comes later is no shortage of the net's memory
  EXPECT_THROW(
      stage::encode_in_batches(
          3, batch_size, compute(3), [](int64_t, int64_t, const auto&) { throw std::bad_alloc(); }),
      std::bad_alloc);
}

TEST(StageTimes, NameTheStageWhoseThreadsAreBusiest) {
  stage::StageTimes times;
  EXPECT_EQ(times.limit(), "");
  auto &many = times.add("decode", 4), &one = times.add("encode");
  using namespace std::chrono_literals;
  many.count(40ms);
  one.count(20ms);
  EXPECT_EQ(times.limit(), "encode");  // 20 ms of one thread, 10 ms of each of the four
  EXPECT_EQ(times.seconds(), (nlohmann::json{{"decode", 0.04}, {"encode", 0.02}}));
  const std::string line = times.progress();
  EXPECT_TRUE(line.starts_with("limited by encode (decode ")) << line;
  EXPECT_NE(line.find("%, encode "), std::string::npos) << line;
  const auto before = one.busy_seconds();
  { const stage::StageTime::Scope busy(one); }
  EXPECT_GE(one.busy_seconds(), before);
}

#if !FLUX_ADDRESS_SANITIZER
// Exit code 7: a queue in a process with room for `stacks` more threads is an error, and ends.
[[noreturn]] void make_queue(const fs::path& out, double stacks) {
  cache::Recipe recipe;
  recipe.parameters = {{"dtype", "bf16"}, {"channels", 32}};
  cache::Writer writer(out, recipe, {});
  rlimit stack{};
  getrlimit(RLIMIT_STACK, &stack);
  std::ifstream statm("/proc/self/statm");
  rlim_t pages = 0;
  statm >> pages;
  const rlim_t room = pages * static_cast<rlim_t>(sysconf(_SC_PAGESIZE)) +
                      static_cast<rlim_t>(stacks * static_cast<double>(stack.rlim_cur));
  const rlimit space{room, RLIM_INFINITY};
  setrlimit(RLIMIT_AS, &space);
  alarm(120);  // a hang
  try {
    stage::StageTimes times;
    stage::WriteQueue queue(
        writer, cache::layout_of(recipe.kind, recipe.parameters), times, "images", 0);
  } catch (const ResourceError&) {
    std::_Exit(7);
  }
  std::_Exit(1);
}

TEST_F(Latents, AQueueWithoutThreadsIsAnError) {
  rlimit stack{};
  getrlimit(RLIMIT_STACK, &stack);
  if (stack.rlim_cur == RLIM_INFINITY) GTEST_SKIP() << "stacks of unlimited size";
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  for (const double stacks : {0.5, 1.5})
    EXPECT_EXIT(make_queue(folder / "queue", stacks), testing::ExitedWithCode(7), "");
}
#endif

TEST_F(Latents, RenamedFolderOrCopyEncodesNothing) {
  three_photos();
  run(options);
  const auto time = fs::last_write_time(manifest());
  fs::rename(folder / "photos", folder / "my photos");
  options.data.images = folder / "my photos";
  EXPECT_EQ(run(options).encoded, 0);
  EXPECT_EQ(fs::last_write_time(manifest()), time);
  fs::copy_file(folder / "my photos/a.bmp",
                folder / "my photos/d.bmp");  // a new item, no new latents
  const auto report = run(options);
  EXPECT_EQ(report.encoded, 0);
  EXPECT_EQ(report.kept, 3);
  EXPECT_EQ(latents(0), latents(3));
}

TEST_F(Latents, ParametersAndWeightsDecideWhatIsKept) {
  three_photos();
  run(options);
  auto changed = options;
  changed.width = 96;
  EXPECT_GT(run(changed).encoded, 0);
  EXPECT_EQ(run(options).encoded, 0);  // both live in one folder
  changed = options;
  changed.encode.dtype = DType::kF32;
  EXPECT_EQ(run(changed).encoded, 3);
  changed = options;
  write_autoencoder(folder / "other.safetensors", 2);
  changed.ae = folder / "other.safetensors";
  const auto report = run(changed);
  EXPECT_EQ(report.encoded, 3);
  EXPECT_EQ(report.changed, 3);
  fs::copy_file(options.ae, folder / "copy.safetensors");
  changed.ae = folder / "copy.safetensors";
  EXPECT_EQ(run(changed).encoded, 0);
}

TEST_F(Latents, BadImageIsQuarantinedAndStopsNothing) {
  three_photos();
  folder.write("photos/bad.png", "no picture");
  folder.write("photos/cut.bmp", picture(64, 64, 9).substr(0, 4000));
  const auto report = run(options);
  EXPECT_EQ(report.encoded, 3);
  EXPECT_EQ(report.failed, 2);
  EXPECT_EQ(report.exit_code, ExitCode::kTooManyFailed);
  EXPECT_FALSE(fs::exists(manifest()));
  EXPECT_TRUE(fs::exists(options.encode.out / "quarantine.jsonl"));
  options.encode.max_failed = 2;
  const auto again = run(options);
  EXPECT_EQ(again.encoded, 0);
  EXPECT_EQ(again.kept, 3);
  EXPECT_EQ(again.exit_code, ExitCode::kOk);
  const auto published = cache::read_manifest(options.encode.out);
  EXPECT_EQ(published.num_items, 3);
  ASSERT_EQ(published.quarantined.size(), 2u);
  EXPECT_NE(published.quarantined[0].reason.find("not a picture"), std::string::npos);
}

TEST_F(Latents, MovedFolderWithBadImagesTouchesNothing) {
  three_photos();
  options.data.images = folder / "my photos";  // shown in quotes
  fs::rename(folder / "photos", options.data.images);
  folder.write("my photos/bad.png", "no picture");
  fs::create_symlink("nowhere", options.data.images / "link.png");
  options.encode.max_failed = 2;
  EXPECT_EQ(run(options).failed, 2);
  const auto time = fs::last_write_time(manifest());
  const auto published = cache::read_manifest(options.encode.out);
  ASSERT_EQ(published.quarantined.size(), 2u);
  EXPECT_EQ(published.quarantined[1].reason, "link.png: cannot be read: No such file or directory");
  fs::rename(options.data.images, folder / "moved");
  options.data.images = folder / "moved";
  EXPECT_EQ(run(options).encoded, 0);
  EXPECT_EQ(fs::last_write_time(manifest()), time);
}

TEST_F(Latents, BadImageIsNeitherNewNorChanged) {
  three_photos();
  run(options);
  folder.write("photos/a.bmp", picture(64, 64, 9).substr(0, 4000));
  folder.write("photos/b.bmp", picture(90, 60, 22));
  for (uint8_t i = 0; i < 3; ++i)
    folder.write("photos/new" + std::to_string(i) + ".bmp", picture(64, 64, 30 + i));
  options.encode.max_failed = 1;
  const auto report = run(options);
  EXPECT_EQ(report.failed, 1);
  EXPECT_EQ(report.encoded, 4);
  EXPECT_EQ(report.changed, 1);
  EXPECT_EQ(report.changed_by, (nlohmann::json{{"source_sha256", 1}}));
}

/// Of the manifest: what it says about the last run that encoded something.
nlohmann::json last_run(const fs::path& out) {
  const auto all = cache::read_manifest(out).provenance;
  nlohmann::json some;
  for (const char* name : {"stage_seconds", "limit", "images_per_second"})
    some[name] = all.at(name);
  return some;
}

TEST_F(Latents, TimesAreThoseOfTheLastRunThatEncoded) {
  three_photos();
  run(options);
  const auto first = last_run(options.encode.out);
  EXPECT_GT(first.at("images_per_second").get<double>(), 0);
  EXPECT_GT(first.at("stage_seconds").at("encode").get<double>(), 0);
  EXPECT_FALSE(first.at("limit").get<std::string>().empty());
  fs::remove(folder / "photos/c.bmp");
  EXPECT_EQ(run(options).encoded, 0);
  EXPECT_EQ(cache::read_manifest(options.encode.out).num_items, 2);  // it was written again
  EXPECT_EQ(last_run(options.encode.out), first);
  // a picture that becomes bad takes the manifest away, but not the times
  folder.write("photos/bad.png", "no picture");
  EXPECT_EQ(run(options).exit_code, ExitCode::kTooManyFailed);
  options.encode.max_failed = 1;
  EXPECT_EQ(run(options).encoded, 0);
  EXPECT_EQ(last_run(options.encode.out), first);
  EXPECT_FALSE(fs::exists(options.encode.out / "last-run.json"));
}

TEST_F(Latents, TimesOfARunWithoutManifestAreKept) {
  three_photos();
  folder.write("photos/bad.png", "no picture");
  EXPECT_EQ(run(options).exit_code, ExitCode::kTooManyFailed);
  options.encode.max_failed = 1;
  EXPECT_EQ(run(options).encoded, 0);
  const auto first = last_run(options.encode.out);
  EXPECT_GT(first.at("stage_seconds").at("encode").get<double>(), 0);
  // likewise of a run that was stopped by an error, when the rest is not wanted any more
  folder.write("photos/d.bmp", picture(64, 64, 4)),
      folder.write("photos/e.bmp", picture(64, 64, 5));
  constexpr int64_t kOneMore = 10'000;  // below what a new segment with two takes
  options.encode.max_bytes = segment_bytes() + kOneMore;
  EXPECT_THROW(run(options), ResourceError);
  options.encode.max_bytes = 0;
  for (const char* name : {"photos/d.bmp", "photos/e.bmp", "photos/a.bmp"})
    fs::remove(folder / name);
  EXPECT_EQ(run(options).encoded, 0);
  EXPECT_NE(last_run(options.encode.out), first);
}

TEST_F(Latents, PredictsTheBytesOfAnyNet) {
  for (int i = 0; i < 12; ++i)
    folder.write("photos/" + std::to_string(i) + ".bmp",
                 picture(90, i % 2 ? 60 : 120, 100 + static_cast<uint64_t>(i)));
  for (const auto store : {Store::kMeanLogvar, Store::kSample}) {
    for (const auto dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      options.store = store, options.encode.dtype = dtype;
      options.encode.out = folder / ("cache" + std::to_string(static_cast<int>(store)) +
                                     std::to_string(static_cast<int>(dtype)));
      const auto predicted = static_cast<double>(run(options).predicted_bytes);
      const auto bytes = static_cast<double>(segment_bytes());
      EXPECT_NEAR(predicted, bytes, 0.25 * bytes);
    }
  }
}

TEST_F(Latents, NoItemLeftIsNoCache) {
  folder.write("photos/bad.png", "no picture");
  options.encode.max_failed = 5;
  const auto report = run(options);
  EXPECT_EQ(report.failed, 1);
  EXPECT_EQ(report.exit_code, ExitCode::kTooManyFailed);
  EXPECT_FALSE(fs::exists(manifest()));
  EXPECT_TRUE(fs::exists(options.encode.out / "quarantine.jsonl"));
}

TEST_F(Latents, AWholeCacheBecomesNoPart) {
  three_photos();
  run(options);
  const auto before = read_file(manifest());
  options.encode.shard = {0, 2};
  EXPECT_THROW(run(options), CacheError);
  EXPECT_EQ(read_file(manifest()), before);
  options.encode.out = folder / "part";
  EXPECT_NO_THROW(run(options));
  EXPECT_NO_THROW(run(options));
  options.encode.shard = {1, 2};
  EXPECT_THROW(run(options), CacheError);
  options.encode.shard = {};
  EXPECT_EQ(run(options).exit_code, ExitCode::kOk);  // a part may become whole
}

TEST_F(Latents, EveryFieldThatChangesIsNamed) {
  three_photos();
  const auto file = [&](const std::string& keys) {
    options.data.images.clear();
    options.data.dataset = folder.write("d.toml",
                                        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '" +
                                            (folder / "photos").string() + "'\n" + keys);
  };
  file("");
  const auto base = options;
  write_autoencoder(folder / "other.safetensors", 2);
  struct Change {
    const char* field;
    std::function<void()> make;
    int64_t count = 3;
  };
  const std::vector<Change> changes{
      {"parameters.dtype", [&] { options.encode.dtype = DType::kF16; }},
      {"parameters.precision", [&] { options.encode.precision = stage::Precision::kBF16; }},
      {"parameters.store", [&] { options.store = Store::kSample; }},
      {"parameters.profile", [&] { options.data.profile = Profile::kKohya; }},
      {"parameters.background",
       [&] {
         options.background = {0, 0, 0};
       }},
      {"parameters.resolution", [&] { options.width = options.height = 96; }},
      {"parameters.resize_interpolation", [&] { file("resize_interpolation = 'cubic'\n"); }},
      {"flip_aug", [&] { file("flip_aug = true\n"); }},
      {"alpha_mask", [&] { file("alpha_mask = true\n"); }},
      {"weights.ae", [&] { options.ae = folder / "other.safetensors"; }},
      {"source_sha256", [&] { folder.write("photos/a.bmp", picture(64, 64, 9)); }, 1}};
  int number = 0;
  for (const auto& change : changes) {
    SCOPED_TRACE(change.field);
    options = base;
    file("");
    options.encode.out = folder / ("cache" + std::to_string(number++));
    run(options);
    change.make();
    const auto report = run(options);
    EXPECT_EQ(report.changed_by.value(change.field, int64_t{0}), change.count)
        << report.changed_by.dump();
    EXPECT_FALSE(report.changed_by.contains("flags"));
    if (change.count == 3 && std::string_view(change.field) != "parameters.profile" &&
        std::string_view(change.field) != "parameters.store" &&
        std::string_view(change.field) != "parameters.resolution") {
      EXPECT_EQ(report.changed_by.size(), 1u) << report.changed_by.dump();
    }
  }
  // and back: a field that is not there any more
  options = base;
  options.encode.out = folder / "back";
  file("resize_interpolation = 'cubic'\n");
  run(options);
  file("");
  EXPECT_EQ(run(options).changed_by, (nlohmann::json{{"parameters.resize_interpolation", 3}}));
}

TEST_F(Latents, PictureThatFailsWhenDecodedIsQuarantined) {
  three_photos();
  auto file = picture(64, 64, 9);
  file[28] = 16, file[30] = 3;  // bits and masks that its head does not have room for: the size can
                                // be read, the pixels not
  folder.write("photos/bad.bmp", file);
  const auto report = run(options);
  EXPECT_EQ(report.encoded, 3);
  EXPECT_EQ(report.failed, 1);
}

TEST_F(Latents, OddFileNamesAreEncodedLikeOthers) {
  const std::string names[] = {"a b\n.bmp", "\xFF\xFE.bmp", "-- \"quoted\" 'x'.BMP", "\\x41.bmp"};
  uint64_t seed = 0;
  for (const auto& name : names) folder.write("photos/" + name, picture(64, 64, ++seed));
  EXPECT_EQ(run(options).encoded, 4);
  const cache::Cache cache(options.encode.out, cache::Kind::kLatents);
  std::vector<std::string> found;
  for (int64_t i = 0; i < cache.index().num_items(); ++i) found.emplace_back(cache.index().path(i));
  EXPECT_TRUE(std::is_permutation(found.begin(), found.end(), std::begin(names), std::end(names)));
  EXPECT_EQ(run(options).encoded, 0);
}

TEST_F(Latents, BitsDoNotDependOnTheBatch) {
  for (int i = 0; i < 5; ++i)
    folder.write("photos/" + std::to_string(i) + ".bmp",
                 picture(64, 64, 100 + static_cast<uint64_t>(i)));
  run(options);
  std::vector<std::vector<std::byte>> one_by_one;
  for (int64_t i = 0; i < 5; ++i) one_by_one.push_back(latents(i));
  options.encode.out = folder / "batched";
  options.encode.batch_size = 3;
  run(options);
  for (int64_t i = 0; i < 5; ++i) EXPECT_EQ(latents(i), one_by_one[static_cast<size_t>(i)]) << i;
}

TEST_F(Latents, AreThePosteriorOfThePlacedPixels) {
  folder.write("photos/b.bmp", picture(90, 60, 2));
  options.encode.dtype = DType::kF32;
  run(options);
  image::BucketOptions bucket;
  bucket.resolution = {64, 64}, bucket.min_side = 32, bucket.max_side = 256, bucket.steps = 16;
  const auto file = picture(90, 60, 2);
  const auto rgb = image::decode(as_bytes(file));
  const auto placement = image::Buckets(bucket).place(rgb.size);
  const auto placed = image::place(rgb, placement, image::Interpolation::kAuto);
  auto pixels = at::empty({1, 3, placed.size.height, placed.size.width});
  image::to_pixels(placed, {pixels.data_ptr<float>(), static_cast<size_t>(pixels.numel())});
  const auto weights = vae::canonical(take_net(read_weights(options.ae), NetKind::kAutoEncoder));
  const auto encoder = vae::Encoder::load(
      weights, vae::Config::from_weights(weights, options.ae), at::kFloat, at::kCPU);
  const auto posterior = encoder.encode(pixels);
  const auto expected = at::cat({posterior.mean[0], posterior.logvar[0]}).contiguous();
  const auto stored = latents(0);
  ASSERT_EQ(stored.size(), static_cast<size_t>(expected.numel()) * 4);
  EXPECT_EQ(std::memcmp(stored.data(), expected.data_ptr(), stored.size()), 0);
}

TEST_F(Latents, StoredSampleDependsOnSeedAlone) {
  folder.write("photos/a.bmp", picture(64, 64, 1));
  options.store = Store::kSample;
  options.seed = 5;
  EXPECT_EQ(run(options).encoded, 1);
  const auto first = latents(0);
  EXPECT_EQ(first.size(), 16u * 8 * 8 * 2);
  options.encode.out = folder / "again";
  run(options);
  EXPECT_EQ(latents(0), first);
  options.seed = 6;
  EXPECT_EQ(run(options).encoded, 1);
  EXPECT_NE(latents(0), first);
}

TEST_F(Latents, FlipAugAddsTheMirroredImage) {
  three_photos();
  options.data.dataset =
      folder.write("set.toml",
                   "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '" +
                       (folder / "photos").native() + "'\nflip_aug = true\nnum_repeats = 2\n");
  options.data.images.clear();
  options.width = options.height = 0;
  EXPECT_EQ(run(options).encoded, 6);
  const cache::Cache cache(options.encode.out, cache::Kind::kLatents);
  ASSERT_EQ(cache.index().num_items(), 3);
  EXPECT_EQ(cache.index().item(0).repeats, 2u);
  const auto variants = cache.index().variants(0);
  ASSERT_EQ(variants.size(), 2u);
  EXPECT_EQ(variants[0].weight, 0.5);
  EXPECT_EQ(variants[1].flags, cache::kSampleFlipped);
  EXPECT_NE(latents(0, 0), latents(0, 1));
}

TEST_F(Latents, KeyIsTheOneOfTheFormat) {  // golden: canonical JSON written by hand
  Sample s;
  s.source_sha256 = sha256("picture");
  s.placement = {{96, 64}, {64, 64}, 16, 0};
  KeyParameters p;
  p.weights_sha256 = "ab", p.precision = "f32", p.dtype = "bf16", p.store = "mean_logvar",
  p.seed = 9;
  const std::string head =
      R"({"background":"#ffffff","bucket":[64,64],"crop":[0,16],"dtype":"bf16","flip":false,)";
  const std::string tail =
      R"("kind":"latents","precision":"f32","profile":"default","resized":[64,96],"revision":1,)";
  const std::string source = R"("source_sha256":")" + to_hex(s.source_sha256) +
                             R"(","store":"mean_logvar","weights":"ab"})";
  EXPECT_EQ(sample_key(s, p), sha256(head + tail + source));
  s.interpolation = image::Interpolation::kCubic;
  EXPECT_EQ(sample_key(s, p), sha256(head + R"("interpolation":"cubic",)" + tail + source));
}

TEST_F(Latents, FolderKeepsItsPrecision) {
  folder.write("photos/a.bmp", picture(64, 64, 1));
  options.encode.precision = stage::Precision::kBF16;
  EXPECT_EQ(run(options).encoded, 1);
  options.encode.precision.reset();
  EXPECT_EQ(run(options).encoded, 0);
  options.encode.precision = stage::Precision::kF32;
  EXPECT_EQ(run(options).encoded, 1);
}

TEST_F(Latents, NextRunGoesOnAfterASignal) {
  three_photos();
  cancel::set(ExitCode::kInterrupt);
  EXPECT_THROW(run(options), Interrupted);
  cancel::set(std::nullopt);
  EXPECT_FALSE(fs::exists(manifest()));
  EXPECT_EQ(run(options).encoded, 3);
}

TEST_F(Latents, NotANumberIsAFailedItem) {
  three_photos();
  auto weights = read_weights(options.ae).tensors;
  weights["encoder.conv_in.bias"] = at::full({32}, std::nan(""));
  write_weights(folder / "nan.safetensors", weights, {});
  options.ae = folder / "nan.safetensors";
  const auto report = run(options);
  EXPECT_EQ(report.encoded, 0);
  EXPECT_EQ(report.failed, 3);
  EXPECT_EQ(report.exit_code, ExitCode::kTooManyFailed);
}

TEST_F(Latents, RefusesWhatItCannotRead) {
  fs::create_directories(folder / "photos");
  EXPECT_THROW(run(options), InputError);  // no images
  three_photos();
  auto wrong = options;
  wrong.ae = folder / "absent.safetensors";
  testing::internal::CaptureStderr();
  EXPECT_THROW(run(wrong), InputError);
  EXPECT_NE(testing::internal::GetCapturedStderr().find("info: version "),
            std::string::npos);  // said before the weights are read and hashed
  wrong = options;
  wrong.data.images.clear();
  wrong.data.dataset =
      folder.write("set.toml",
                   "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '" +
                       (folder / "photos").native() + "'\n");
  EXPECT_THROW(run(wrong), UsageError);  // --resolution without effect
  EXPECT_FALSE(fs::exists(options.encode.out));
}

TEST(LatentsOptions, ParseSizesAndColours) {
  EXPECT_EQ(parse_resolution("512x768"), (std::pair<int64_t, int64_t>{512, 768}));
  EXPECT_EQ(parse_resolution("512"), (std::pair<int64_t, int64_t>{512, 512}));
  for (const char* bad : {"", "x", "512x", "16x512", "512x512x512", "-512", "9000", "5e2"}) {
    EXPECT_THROW(parse_resolution(bad), UsageError) << bad;
  }
  EXPECT_EQ(parse_background("#0a0B0c"), (std::array<uint8_t, 3>{10, 11, 12}));
  for (const char* bad : {"", "red", "#12345", "#12345g", "0a0b0c"})
    EXPECT_THROW(parse_background(bad), UsageError) << bad;
}

}  // namespace
}  // namespace flux::latents
