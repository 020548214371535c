// flux-cache export: every sample as a file that others read, bit for bit; equal files are kept.
#include "pipelines/cache/export.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "formats/safetensors/reader.h"
#include "pipelines/cache/stats.h"
#include "tests/support/cache_samples.h"
#include "tests/support/temporary_folder.h"

namespace flux::cache {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

ExportReport run(const fs::path& cache,
                 const fs::path& out,
                 ExportFormat format = ExportFormat::kSafetensors) {
  return export_cache(look_into(cache, false), {{cache.native()}, out, format});
}

std::map<std::string, std::pair<std::string, fs::file_time_type>> snapshot(const fs::path& folder) {
  std::map<std::string, std::pair<std::string, fs::file_time_type>> out;
  for (const auto& entry : fs::directory_iterator(folder))
    out[entry.path().filename()] = {read_file(entry.path()), fs::last_write_time(entry.path())};
  return out;
}

std::vector<Json> lines_of(const fs::path& path) {
  std::vector<Json> out;
  std::istringstream lines(read_file(path));
  for (std::string line; std::getline(lines, line);) out.push_back(Json::parse(line));
  return out;
}

class ExportOf : public testing::TestWithParam<std::pair<Kind, std::string>> {};
INSTANTIATE_TEST_SUITE_P(Kinds,
                         ExportOf,
                         testing::Values(std::pair(Kind::kLatents, "bf16"),
                                         std::pair(Kind::kLatents, "f16"),
                                         std::pair(Kind::kText, "bf16"),
                                         std::pair(Kind::kText, "f32")));

TEST_P(ExportOf, GivesEverySampleInItsDtype) {
  const auto& [kind, dtype] = GetParam();
  const test::TemporaryFolder folder;
  const Recipe how = test::recipe(kind, dtype);
  const Layout layout = layout_of(kind, how.parameters);
  test::make_cache(folder / "cache", how, 0, 140);
  const ExportReport report = run(folder / "cache", folder / "out");
  EXPECT_EQ(report.num_samples, 140);
  EXPECT_EQ(report.written, 140);
  const auto lines = lines_of(folder / "out" / "index.jsonl");
  ASSERT_EQ(lines.size(), 140u);
  for (uint64_t i = 0; i < 140; ++i) {
    SCOPED_TRACE(testing::Message() << "sample " << i);
    const auto expected = test::sample(layout, i);
    const Json& line = lines[i];
    EXPECT_EQ(line["path"], printable(expected.info.text));  // its bytes are no UTF-8
    EXPECT_EQ(line["subset"], i % 2);
    EXPECT_EQ(line["repeats"], 1 + i % 3);
    ASSERT_EQ(line["variants"].size(), 1u);
    const Json& variant = line["variants"][0];
    EXPECT_EQ(variant["key"], to_hex(expected.info.key));
    EXPECT_EQ(variant["weight"], 1.0);
    const auto file = safetensors::File::open(folder / "out" / variant["file"].get<std::string>());
    std::map<std::string, std::vector<std::byte>> want;
    if (kind == Kind::kLatents) {
      EXPECT_EQ(variant["bucket"], bucket_text(expected.info.height, expected.info.width));
      EXPECT_EQ(variant["flipped"], i % 2 == 1);
      const auto& bytes = expected.tensors[0];
      const auto half = bytes.begin() + static_cast<std::ptrdiff_t>(bytes.size() / 2);
      want["mean"].assign(bytes.begin(), half), want["logvar"].assign(half, bytes.end());
      EXPECT_EQ(file->find("mean")->shape,
                (safetensors::Shape{16, expected.info.height, expected.info.width}));
    } else {
      EXPECT_EQ(variant["caption"], printable(expected.info.text));
      EXPECT_EQ(variant["tokens"]["t5"], expected.info.t5_tokens);
      want["t5"] = expected.tensors[0], want["clip"] = expected.tensors[1];
      want["t5_mask"].assign(test::kT5Length, std::byte{0});
      std::fill_n(want["t5_mask"].begin(), expected.info.t5_tokens, std::byte{1});
      EXPECT_EQ(file->find("t5")->shape, (safetensors::Shape{test::kT5Length, test::kT5Width}));
    }
    EXPECT_EQ(file->tensors().size(), want.size());
    for (const auto& [name, bytes] : want) {
      const auto* tensor = file->find(name);
      ASSERT_NE(tensor, nullptr) << name;
      EXPECT_TRUE(std::ranges::equal(tensor->bytes, bytes)) << name;
      EXPECT_EQ(tensor->dtype, name == "t5_mask" ? DType::kU8 : layout.dtype);
    }
  }
}

TEST(Export, GivesMasksWhereThereAreAny) {
  const test::TemporaryFolder folder;
  const Recipe how = test::recipe(Kind::kLatents);
  const Layout layout = layout_of(how.kind, how.parameters);
  auto masked = test::sample(layout, 0), plain = test::sample(layout, 3);  // of one bucket
  masked.info.flags |= kSampleMasked;
  const std::vector<float> mask(masked.info.height * masked.info.width, 0.25f);
  const auto bytes = std::as_bytes(std::span(mask));
  masked.tensors.emplace_back(bytes.begin(), bytes.end());
  {
    Writer writer(folder / "cache", how, test::provenance());
    writer.add(masked.info, masked.spans());
    writer.add(plain.info, plain.spans());
    writer.publish(test::publication({test::wanted(masked, 0), test::wanted(plain, 3)}));
  }
  run(folder / "cache", folder / "out");
  const auto file = [&](const test::SampleData& sample) {
    return safetensors::File::open(folder / "out" / (to_hex(sample.info.key) + ".safetensors"));
  };
  const auto with = file(masked);
  ASSERT_NE(with->find("mask"), nullptr);
  EXPECT_TRUE(std::ranges::equal(with->find("mask")->bytes, bytes));
  EXPECT_EQ(with->find("mask")->dtype, DType::kF32);
  EXPECT_EQ(with->find("mask")->shape, (safetensors::Shape{masked.info.height, masked.info.width}));
  EXPECT_EQ(file(plain)->find("mask"), nullptr);
  const Stats found = stats(look_into(folder / "cache", false));
  ASSERT_EQ(found.tensors.size(), 3u);
  EXPECT_EQ(found.tensors[2].name, "mask");
  EXPECT_EQ(found.tensors[2].all().mean, 0.25);
  EXPECT_EQ(found.tensors[2].all().count, static_cast<int64_t>(mask.size()));
}

TEST(Export, KeepsFilesThatAreEqual) {
  const test::TemporaryFolder folder;
  test::make_cache(folder / "cache", test::recipe(Kind::kText), 0, 9);
  for (const auto format : {ExportFormat::kSafetensors, ExportFormat::kNpz}) {
    const auto out = folder / (format == ExportFormat::kNpz ? "npz" : "safetensors");
    EXPECT_EQ(run(folder / "cache", out, format).written, 9);
    const auto before = snapshot(out);
    ASSERT_EQ(before.size(), 10u);
    const ExportReport again = run(folder / "cache", out, format);
    EXPECT_EQ(again.written, 0);
    EXPECT_EQ(again.kept, 9);
    EXPECT_EQ(snapshot(out), before);
    // a damaged file, one that is gone and what a killed run left
    const auto first = std::next(before.begin())->first, name = before.begin()->first;
    std::ofstream(out / first, std::ios::app) << "x";
    fs::remove(out / name);
    std::ofstream(out / ("." + name + ".tmp-0123456789abcdef")) << "x";
    EXPECT_EQ(run(folder / "cache", out, format).written, 2);
    const auto after = snapshot(out);
    ASSERT_EQ(after.size(), 10u);
    for (const auto& [file, content] : before) EXPECT_EQ(after.at(file).first, content.first);
  }
}

TEST(Export, FollowsTheCache) {
  const test::TemporaryFolder folder;
  test::make_cache(folder / "cache", test::recipe(Kind::kLatents), 0, 5);
  run(folder / "cache", folder / "out");
  test::make_cache(folder / "cache", test::recipe(Kind::kLatents), 3, 8);
  const ExportReport report = run(folder / "cache", folder / "out");
  EXPECT_EQ(report.written, 3);
  EXPECT_EQ(report.kept, 2);
  EXPECT_EQ(report.left, 3);
  EXPECT_EQ(lines_of(folder / "out" / "index.jsonl").size(), 5u);
}

TEST(Export, RefusesAFolderWithOtherFiles) {
  const test::TemporaryFolder folder;
  test::make_cache(folder / "cache", test::recipe(Kind::kText), 0, 2);
  const auto file = folder.write("out/notes.txt", "mine");
  EXPECT_THROW(run(folder / "cache", folder / "out"), InputError);
  EXPECT_EQ(snapshot(folder / "out").size(), 1u);
  EXPECT_EQ(read_file(file), "mine");
  EXPECT_THROW(run(folder / "cache", folder / "cache"), InputError);
  run(folder / "cache", folder / "npz", ExportFormat::kNpz);
  EXPECT_THROW(run(folder / "cache", folder / "npz"), InputError);  // one folder, one format
}

TEST(Export, RefusesAnUnfinishedCache) {
  const test::TemporaryFolder folder;
  test::make_cache(folder / "cache", test::recipe(Kind::kText), 0, 2);
  fs::remove(folder / "cache" / kManifestName);
  EXPECT_THROW(run(folder / "cache", folder / "out"), CacheError);
  EXPECT_FALSE(fs::exists(folder / "out"));
}

TEST(Export, SaysWhatToDoAboutADamagedSample) {
  const test::TemporaryFolder folder;
  test::make_cache(folder / "cache", test::recipe(Kind::kLatents), 0, 5);
  const auto contents = look_into(folder / "cache", false);
  const fs::path path = folder / "cache" / contents.segments[0].name;
  std::string bytes = read_file(path);
  const size_t frame = bytes.rfind("\x28\xb5\x2f\xfd");
  bytes[frame + 40] ^= 1;
  write_file_atomic(path, bytes);
  ExportOptions options;
  options.out = folder / "out";
  try {
    export_cache(contents, options);
    ADD_FAILURE() << "exported";
  } catch (const CacheError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("hint: flux-cache repair"));
  }
  EXPECT_FALSE(fs::exists(folder / "out" / "index.jsonl"));
}

}  // namespace
}  // namespace flux::cache
