// A cache that is not whole, not of one piece, or not the other's partner is refused with both
// values.
#include "formats/cache/reader.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zstd.h>

#include <atomic>
#include <bit>
#include <fstream>
#include <functional>
#include <thread>

#include "common/core/error.h"
#include "common/core/file.h"
#include "formats/cache/codec.h"
#include "formats/cache/manifest.h"
#include "formats/cache/segment_writer.h"
#include "tests/support/cache_samples.h"
#include "tests/support/temporary_folder.h"

namespace flux::cache {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

std::string refusal(const std::function<void()>& body) {
  try {
    body();
  } catch (const CacheError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(CacheReader, RefusesAFolderThatIsNotACompleteCache) {
  const test::TemporaryFolder folder;
  EXPECT_THAT(refusal([&] { Cache(folder / "absent", Kind::kText); }),
              HasSubstr("there is no such folder"));
  EXPECT_THAT(refusal([&] { Cache(folder.path(), Kind::kText); }),
              HasSubstr("not a complete cache: it has no manifest.json"));
  test::make_cache(folder.path(), test::recipe(Kind::kText), 0, 3);
  EXPECT_THAT(refusal([&] { Cache(folder.path(), Kind::kLatents); }),
              HasSubstr("is a text cache, expected latents"));
}

TEST(CacheReader, RefusesAbsentShortenedAndExchangedSegments) {
  const test::TemporaryFolder folder;
  for (const char* name : {"a", "b"}) {
    test::make_cache(
        folder / name, test::recipe(Kind::kText), name[0] == 'a' ? 0 : 5, name[0] == 'a' ? 5 : 10);
  }
  const fs::path a = folder / "a" / read_manifest(folder / "a").segments[0].name;
  const fs::path b = folder / "b" / read_manifest(folder / "b").segments[0].name;
  const std::string good = read_file(a);
  // another cache's segment, whole in itself, under this one's name, and a manifest that does not
  // notice
  folder.write("a/" + a.filename().native(), read_file(b));
  const std::string manifest = read_file(folder / "a/manifest.json");
  auto object = nlohmann::json::parse(manifest);
  object["segments"][0]["bytes"] = fs::file_size(a);
  object.erase("checksum");
  object["checksum"] = xxh3_128_hex(as_bytes(canonical_json(object)));
  folder.write("a/manifest.json", object.dump());
  EXPECT_THAT(refusal([&] {
                const Cache cache(folder / "a", Kind::kText);
                cache.read(cache.index().variants(0)[0]);
              }),
              HasSubstr("the index says"));
  folder.write("a/manifest.json", manifest);
  folder.write("a/" + a.filename().native(), good.substr(0, 500));
  EXPECT_THAT(refusal([&] { Cache(folder / "a", Kind::kText); }),
              HasSubstr("has 500 bytes, the manifest says"));
  fs::remove(a);
  EXPECT_THAT(refusal([&] { Cache(folder / "a", Kind::kText); }),
              HasSubstr("cannot be read: No such file"));
}

TEST(CacheReader, RefusesAnotherCachesIndex) {
  const test::TemporaryFolder folder;
  test::make_cache(folder / "a", test::recipe(Kind::kText), 0, 5);
  test::make_cache(folder / "b", test::recipe(Kind::kText), 0, 4);
  fs::copy_file(
      folder / "b" / kIndexName, folder / "a" / kIndexName, fs::copy_options::overwrite_existing);
  EXPECT_THAT(refusal([&] { Cache(folder / "a", Kind::kText); }),
              HasSubstr("index.h5: is damaged: XXH3-128"));
  // the writer makes a new one from what is there
  test::make_cache(folder / "a", test::recipe(Kind::kText), 0, 5);
  EXPECT_EQ(Cache(folder / "a", Kind::kText).index().num_items(), 5);
}

TEST(CacheReader, ReadsFromManyThreadsAndMoreSegmentsThanStayOpen) {
  const test::TemporaryFolder folder;
  const Recipe recipe = test::recipe(Kind::kLatents);
  const Layout layout = layout_of(recipe.kind, recipe.parameters);
  constexpr uint64_t kSegments = 140;  // 128 stay open
  {
    Writer writer(folder.path(), recipe, test::provenance());
    std::vector<WantedItem> items;
    for (uint64_t i = 0; i < kSegments; ++i) {
      const auto data = test::sample(layout, i);
      writer.add(data.info, data.spans());
      writer.seal();
      items.push_back(test::wanted(data, i));
    }
    writer.publish(test::publication(items));
  }
  const Cache cache(folder.path(), Kind::kLatents);
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const RandomStream random(t, Purpose::kShuffle);
      for (const uint64_t i : random.permutation(kSegments)) {
        wrong += cache.read(cache.index().variants(static_cast<int64_t>(i))[0]).tensors !=
                 test::sample(layout, i).tensors;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(CacheWriter, DoesNotTouchANewerManifest) {
  const test::TemporaryFolder folder;
  folder.write(
      "manifest.json",
      R"({"format":"flux-cache","schema_version":2,"provenance":{"tool":"t","tool_version":"9"}})");
  EXPECT_THAT(
      refusal([&] { Writer(folder.path(), test::recipe(Kind::kText), test::provenance()); }),
      HasSubstr("schema 2, this build reads 1 to 1\n  written by t 9"));
}

TEST(CacheWriter, SaysWhatToDoAboutADamagedSegment) {
  const test::TemporaryFolder folder;
  folder.write("seg-0123456789abcdef.h5", std::string("\x89HDF\r\n\x1a\n cut off", 16));
  EXPECT_THAT(
      refusal([&] { Writer(folder.path(), test::recipe(Kind::kText), test::provenance()); }),
      HasSubstr("hint: flux-cache repair"));
}

TEST(NewestParameters, AreThoseOfTheLatestSegmentOrJournal) {
  const test::TemporaryFolder folder;
  Recipe recipe = test::recipe(Kind::kText);
  const auto layout = layout_of(recipe.kind, recipe.parameters);
  const auto data = test::sample(layout, 1);
  const std::vector<Record> records = {prepare(layout, data.info, data.spans())};
  EXPECT_EQ(newest_parameters(folder.path()), nlohmann::json::object());
  EXPECT_EQ(newest_parameters(folder / "absent"), nlohmann::json::object());
  for (int i = 0; i < 8; ++i) {  // whatever order the folder has
    recipe.parameters["number"] = i;
    const auto bytes = encode_segment(
        {recipe, test::provenance(), fmt::format("2024-01-0{}T00:00:00Z", i == 4 ? 9 : i + 1)},
        records);
    folder.write(new_segment_name(), {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  }
  folder.write("seg-0000000000000000.h5", "damaged");
  EXPECT_EQ(newest_parameters(folder.path())["number"], 4);
  recipe.parameters["number"] = 10;
  {
    Writer killed(folder / "killed", recipe, test::provenance());
    killed.add(data.info, data.spans());
  }
  for (const auto& entry : fs::directory_iterator(folder / "killed"))
    fs::copy(entry.path(), folder.path());
  EXPECT_EQ(newest_parameters(folder.path())["number"], 10);
}

TEST(Join, NamesTheFieldAndBothValues) {
  const test::TemporaryFolder folder;
  test::make_cache(folder / "latents", test::recipe(Kind::kLatents), 0, 2);
  test::make_cache(folder / "text", test::recipe(Kind::kText), 0, 2);
  Manifest latents = read_manifest(folder / "latents"), text = read_manifest(folder / "text");
  EXPECT_EQ(refusal([&] { require_joinable(latents, "L", text, "T"); }), "accepted");
  EXPECT_THAT(refusal([&] { require_joinable(text, "T", latents, "L"); }),
              HasSubstr("T: is a text cache, expected latents"));
  text.plan["batch_size"] = 4;
  latents.plan["batch_size"] = 2;
  EXPECT_THAT(refusal([&] { require_joinable(latents, "L", text, "T"); }),
              HasSubstr("plan.batch_size: L: 2, T: 4"));
  text.plan = latents.plan;
  text.shard = {1, 3};
  EXPECT_THAT(refusal([&] { require_joinable(latents, "L", text, "T"); }),
              HasSubstr("T: is shard 1 of 3"));
}

TEST(Differences, AreListedByDottedName) {
  EXPECT_THAT(differences("p",
                          {{"a", 1}, {"b", {{"c", "x"}, {"d", true}}}},
                          "now",
                          {{"a", 1}, {"b", {{"c", "y"}}}, {"e", 2.5}},
                          "before"),
              testing::ElementsAre("p.b.c: now: \"x\", before: \"y\"",
                                   "p.b.d: now: true, before: nothing",
                                   "p.e: now: nothing, before: 2.5"));
}

TEST(Differences, OfListsNameTheElementAndNotTheWholeList) {
  const nlohmann::json a = {{"subsets", {{{"repeats", 1}, {"flip", true}}, {{"repeats", 2}}}}},
                       b = {{"subsets", {{{"repeats", 3}, {"flip", true}}}}};
  EXPECT_THAT(differences("plan", a, "A", b, "B"),
              testing::ElementsAre("plan.subsets.0.repeats: A: 1, B: 3",
                                   "plan.subsets.1: A: {\"repeats\":2}, B: nothing"));
}

TEST(Differences, AreRefusedWithValuesThenNamesThenACount) {
  nlohmann::json a, b;
  for (int i = 10; i < 18; ++i) a[fmt::format("f{}", i)] = i, b[fmt::format("f{}", i)] = -i;
  EXPECT_EQ(refusal([&] { require_equal("p", a, "A", b, "B", "do this"); }),
            "caches do not fit: p.f10: A: 10, B: -10\n  p.f11: A: 11, B: -11\n"
            "  p.f12: A: 12, B: -12\n  p.f13: A: 13, B: -13\n  p.f14: A: 14, B: -14\n"
            "  and 3 more: p.f15, p.f16, p.f17\n  hint: do this");
  EXPECT_EQ(refusal([&] { require_equal("p", a, "A", a, "B", "do this"); }), "accepted");
}

TEST(Manifest, IsRefusedByName) {
  const test::TemporaryFolder folder;
  test::make_cache(folder.path(), test::recipe(Kind::kText), 0, 2);
  const auto good = nlohmann::json::parse(read_file(folder.path() / kManifestName));
  const auto says = [&](const std::function<void(nlohmann::json&)>& change) {
    auto object = good;
    change(object);
    object.erase("checksum");
    object["checksum"] = xxh3_128_hex(as_bytes(canonical_json(object)));
    return refusal([&] { parse_manifest(object.dump(), "m.json"); });
  };
  using nlohmann::json;
  EXPECT_EQ(says([](json&) {}), "accepted");
  EXPECT_EQ(says([](json& m) { m["x_note"] = "kept for others"; }), "accepted");
  EXPECT_THAT(says([](json& m) { m["note"] = 1; }),
              HasSubstr("m.json: 'note' is not a field of a manifest"));
  EXPECT_THAT(says([](json& m) { m["format"] = "other"; }),
              HasSubstr("'format' is \"other\", expected flux-cache"));
  EXPECT_THAT(
      says([](json& m) { m["schema_version"] = 3; }),
      HasSubstr(
          "m.json: schema 3, this build reads 1 to 1\n  written by cache_test 0.0.0\n  hint: "));
  EXPECT_THAT(says([](json& m) { m["required_features"] = {"magic"}; }),
              HasSubstr("needs the feature \"magic\", which this build does not know"));
  EXPECT_THAT(says([](json& m) { m.erase("plan"); }), HasSubstr("'plan' is absent"));
  EXPECT_THAT(says([](json& m) { m["complete"] = false; }),
              HasSubstr("'complete' is false, expected true"));
  EXPECT_THAT(says([](json& m) { m["num_items"] = -1; }), HasSubstr("'num_items' is -1"));
  EXPECT_THAT(says([](json& m) { m["num_items"] = 1.5; }), HasSubstr("'num_items' is 1.5"));
  EXPECT_THAT(says([](json& m) { m["num_items"] = UINT64_MAX; }),
              HasSubstr("'num_items' is 18446744073709551615"));
  EXPECT_THAT(says([](json& m) { m["segments"][0]["name"] = "../../etc/passwd"; }),
              HasSubstr("which is no segment"));
  EXPECT_THAT(says([](json& m) { m["segments"].push_back(m["segments"][0]); }),
              HasSubstr("not sorted by name"));
  EXPECT_THAT(says([](json& m) { m["weights"]["t5"] = "abc"; }),
              HasSubstr("weights: 't5' is not 64 hex digits"));
  EXPECT_THAT(says([](json& m) { m["parameters"]["dtype"] = "int8"; }),
              HasSubstr("'dtype' is \"int8\", expected bf16, f16 or f32"));
  EXPECT_THAT(says([](json& m) {
                m["parameters"]["more"] = {1, 2};
              }),
              HasSubstr("'more' is a JSON array"));
  EXPECT_THAT(refusal([&] { parse_manifest(R"({"a": 1, "a": 2})", "m.json"); }),
              HasSubstr("'a' is there twice"));
  EXPECT_THAT(refusal([&] { parse_manifest("{\"format\": ", "m.json"); }),
              HasSubstr("is not JSON"));
  auto edited = good;
  edited["num_items"] = 3;
  EXPECT_THAT(refusal([&] { parse_manifest(edited.dump(), "m.json"); }),
              HasSubstr("is damaged or was edited: checksum"));
}

TEST(Frame, GivesBackAnyBytes) {  // property
  for (uint64_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const RandomStream random(seed, Purpose::kNoise);
    const int64_t width = int64_t{1} << random.below(0, 4);
    std::vector<std::byte> data(static_cast<size_t>(width) * random.below(1, 3000));
    for (size_t i = 0; i < data.size(); ++i)
      data[i] = std::byte(random.below(2 + i, seed % 7 == 0 ? 2 : 256));
    const auto frame = encode_frame(data, width);
    std::vector<std::byte> out(data.size());
    ASSERT_EQ(decode_frame(frame, width, out), "");
    ASSERT_EQ(out, data);
    std::vector<std::byte> longer(data.size() + 1);
    ASSERT_NE(decode_frame(frame, 1, longer), "");
    ASSERT_NE(decode_frame(std::span(frame).first(frame.size() - 1), width, out), "");
  }
}

TEST(Frame, IsReadWithoutItsChecksumOnRequestOnly) {
  std::vector<std::byte> data(5000, std::byte{3}), out(data.size());
  auto frame = encode_frame(data, 2);
  frame.back() ^= std::byte{1};  // of the checksum
  for (int i = 0; i < 2; ++i) {  // one choice does not stay for the next
    EXPECT_THAT(decode_frame(frame, 2, out), HasSubstr("is damaged"));
    EXPECT_EQ(decode_frame(frame, 2, out, nullptr, FrameChecksum::kSkip), "");
    EXPECT_EQ(out, data);
  }
}

// What zstd level 1 makes of `values` after the shuffle, by its plain interface.
size_t level_1_bytes(std::span<const uint16_t> values) {
  std::vector<unsigned char> shuffled, frame(ZSTD_compressBound(2 * values.size()));
  for (const int shift : {0, 8}) {
    for (const uint16_t value : values)
      shuffled.push_back(static_cast<unsigned char>(value >> shift));
  }
  return ZSTD_compress(frame.data(), frame.size(), shuffled.data(), shuffled.size(), 1);
}

TEST(Frame, OfNoiseHasNoChanceRepeatsAndOfRepeatsAll) {
  constexpr size_t kCount = 300000;
  const RandomStream random(1, Purpose::kNoise);
  std::vector<uint16_t> noise(kCount), repeats(kCount);
  for (size_t i = 0; i < kCount; ++i) {  // bfloat16
    noise[i] =
        static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(random.normal(i))) >> 16);
    repeats[i] = noise[i % 5003];
  }
  EXPECT_LT(static_cast<double>(encode_frame(std::as_bytes(std::span(noise)), 2).size()),
            0.99 * static_cast<double>(level_1_bytes(noise)));
  EXPECT_LE(static_cast<double>(encode_frame(std::as_bytes(std::span(repeats)), 2).size()),
            1.01 * static_cast<double>(level_1_bytes(repeats)) + 20);
}

TEST(Index, GivesBackAnyItems) {  // property
  const test::TemporaryFolder folder;
  for (uint64_t seed = 0; seed < 30; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const RandomStream random(seed, Purpose::kNoise);
    Index index;
    const uint64_t num_items = random.below(0, 3000);
    uint64_t draw = 1;
    for (uint64_t i = 0; i < num_items; ++i) {
      std::vector<IndexVariant> variants(1 + random.below(draw++, 4));
      for (auto& variant : variants) {
        variant.key = sha256(std::to_string(draw));
        variant.segment = random.bits(draw++), variant.row = random.bits(draw++);
        variant.height = random.bits(draw++), variant.width = random.bits(draw++),
        variant.flags = random.bits(draw++);
        variant.weight = random.uniform(draw++);
      }
      IndexItem item;
      item.item = sha256("item" + std::to_string(i));
      item.subset = random.bits(draw++), item.repeats = random.bits(draw++),
      item.flags = random.bits(draw++);
      index.add(item, std::string(random.below(draw++, 50), static_cast<char>(i)), variants);
    }
    const auto bytes = encode_index(index, Kind::kText);
    EXPECT_EQ(encode_index(index, Kind::kText), bytes) << "equal content, other bytes";
    const auto path =
        folder.write("index.h5", {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    EXPECT_EQ(read_index(path, Kind::kText), index);
  }
}

}  // namespace
}  // namespace flux::cache
