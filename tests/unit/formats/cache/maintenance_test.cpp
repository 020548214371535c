// What flux-cache does to caches: merged, verified, repaired, tidied and copied, also by processes
// that are killed at any moment.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <map>
#include <set>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/rng.h"
#include "formats/cache/copy.h"
#include "formats/cache/files.h"
#include "formats/cache/folder.h"
#include "formats/cache/gc.h"
#include "formats/cache/journal.h"
#include "formats/cache/lock.h"
#include "formats/cache/merge.h"
#include "formats/cache/reader.h"
#include "formats/cache/repair.h"
#include "formats/cache/segment_reader.h"
#include "formats/cache/segment_writer.h"
#include "formats/cache/verify.h"
#include "tests/support/cache_samples.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/unprivileged.h"

namespace flux::cache {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;

const Provenance kMerger = {"flux-cache merge", "0.0.0", "flux-cache merge a b", ""};

WantedItem item_of(const test::SampleData& data, uint64_t i) {
  WantedItem item = test::wanted(data, i);
  item.variants[0].height = data.info.height;
  item.variants[0].width = data.info.width;
  return item;
}

struct Part {
  Shard shard;
  std::set<uint64_t> bad = {};     // items that this part could not encode
  std::set<uint64_t> absent = {};  // items that this part has never heard of
};

// Fills `folder` with the part's samples of 0 to `end` - 1.
void make_part(const fs::path& folder, const Recipe& recipe, uint64_t end, const Part& part) {
  Writer writer(folder, recipe, test::provenance(), {.shard = part.shard});
  const Layout layout = layout_of(recipe.kind, recipe.parameters);
  std::vector<WantedItem> items;
  std::vector<Quarantined> quarantined;
  for (uint64_t i = 0; i < end; ++i) {
    if (part.absent.contains(i)) continue;
    const auto data = test::sample(layout, i);
    const WantedItem item = item_of(data, i);
    if (part.bad.contains(i)) {
      quarantined.push_back({item.item, item.subset, item.path, "cannot be decoded"});
      continue;
    }
    if (writer.wants(data.info.key)) writer.add(data.info, data.spans());
    items.push_back(item);
  }
  auto publication = test::publication(std::move(items));
  publication.quarantined = std::move(quarantined);
  publication.stage_seconds = {{"encode", 2.0}};
  writer.publish(publication);
}

std::vector<fs::path> make_parts(const fs::path& folder,
                                 const Recipe& recipe,
                                 uint64_t end,
                                 int64_t count) {
  std::vector<fs::path> parts;
  for (int64_t i = 0; i < count; ++i) {
    parts.push_back(folder / ("part-" + std::to_string(i)));
    make_part(parts.back(), recipe, end, {{i, count}});
  }
  return parts;
}

std::map<std::string, std::string> files_of(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(folder))
    files[entry.path().filename()] = read_file(entry.path());
  return files;
}

std::vector<std::string> names_of(const fs::path& folder, const std::string& start) {
  std::vector<std::string> names;
  for (const auto& [name, bytes] : files_of(folder)) {
    if (name.starts_with(start)) names.push_back(name);
  }
  return names;
}

// The cache has exactly the samples of `expected`, in this order, each with its bits.
void expect_samples(const fs::path& folder, Kind kind, const std::vector<uint64_t>& expected) {
  const Cache cache(folder, kind);
  ASSERT_EQ(cache.index().num_items(), std::ssize(expected));
  EXPECT_EQ(cache.manifest().shard, Shard());
  for (size_t k = 0; k < expected.size(); ++k) {
    const auto data = test::sample(cache.layout(), expected[k]);
    const auto variants = cache.index().variants(static_cast<int64_t>(k));
    ASSERT_EQ(variants.size(), 1u);
    ASSERT_EQ(variants[0].key, data.info.key) << expected[k];
    ASSERT_EQ(cache.read(variants[0]).tensors, data.tensors) << expected[k];
  }
}

std::vector<uint64_t> numbers(uint64_t end, const std::set<uint64_t>& without = {}) {
  std::vector<uint64_t> out;
  for (uint64_t i = 0; i < end; ++i) {
    if (!without.contains(i)) out.push_back(i);
  }
  return out;
}

void expect_verified(const fs::path& folder) {
  for (const auto& finding : verify_cache(folder, true))
    ADD_FAILURE() << finding.file << ": " << finding.sample << ": " << finding.what;
}

// The message of the error that `body` throws.
template <class Body>
std::string refusal(Body body) {
  try {
    body();
  } catch (const CacheError& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was refused";
  return {};
}

// Flips bits in the middle of the frame of one sample's first tensor. Returns the segment's name.
std::string damage_sample(const fs::path& folder, Kind kind, uint64_t number) {
  std::string name, bytes;
  {
    const Cache cache(folder, kind);
    const auto key = test::sample(cache.layout(), number).info.key;
    for (const auto& variant : cache.index().variants()) {
      if (variant.key != key) continue;
      name = cache.manifest().segments[variant.segment].name;
      const Record record = Segment(folder / name).record(variant.row);
      const std::string frame(reinterpret_cast<const char*>(record.frames[0].data()),
                              record.frames[0].size());
      bytes = read_file(folder / name);
      const size_t at = bytes.find(frame);
      EXPECT_NE(at, std::string::npos);
      bytes[at + frame.size() / 2] ^= 0x55;
    }
  }
  write_file_atomic(folder / name, bytes);
  return name;
}

class Maintenance : public testing::TestWithParam<Kind> {
 protected:
  const Kind kind = GetParam();
  const Recipe recipe = test::recipe(kind);
  const Layout layout = layout_of(recipe.kind, recipe.parameters);
  const test::TemporaryFolder temporary;
  const fs::path out = temporary.path() / "out";

  MergeReport merge(const std::vector<fs::path>& parts, bool strict = false) const {
    return merge_caches(parts, out, kMerger, strict);
  }
  std::string key(uint64_t number) const { return to_hex(test::sample(layout, number).info.key); }
};
TEST_P(Maintenance, RepairSealsWhatAFirstRunLeftInItsJournal) {
  {
    Writer killed(out, recipe, test::provenance());
    for (uint64_t i = 0; i < 3; ++i) {
      const auto data = test::sample(layout, i);
      killed.add(data.info, data.spans());
    }
  }
  EXPECT_EQ(repair_cache(out).recovered, 3);
}

INSTANTIATE_TEST_SUITE_P(Kinds, Maintenance, testing::Values(Kind::kLatents, Kind::kText));

TEST_P(Maintenance, ThreeShardsMergedAreTheWholeCache) {
  auto parts = make_parts(temporary.path(), recipe, 300, 3);
  std::vector<std::map<std::string, std::string>> before;
  for (const auto& part : parts) before.push_back(files_of(part));
  for (const auto& part : parts) {  // a part is a cache that can be kept like any other
    expect_verified(part);
    EXPECT_FALSE(repair_cache(part).changed);
    EXPECT_TRUE(collect_garbage(part, false).removed.empty());
  }
  const MergeReport report = merge(parts, true);
  EXPECT_TRUE(report.changed);
  EXPECT_EQ(report.num_items, 300);
  EXPECT_EQ(report.num_samples, 300);
  EXPECT_EQ(report.linked + report.copied, report.num_segments);
  EXPECT_EQ(report.duplicates, 0);
  EXPECT_EQ(report.conflicts, 0);
  expect_samples(out, kind, numbers(300));
  expect_verified(out);
  const Manifest manifest = read_manifest(out);
  EXPECT_EQ(manifest.provenance["tool"], "flux-cache merge");
  EXPECT_EQ(manifest.provenance["stage_seconds"], nlohmann::json({{"encode", 6.0}}));
  for (size_t i = 0; i < parts.size(); ++i) EXPECT_EQ(files_of(parts[i]), before[i]);

  // again, in another order, one part twice: nothing changes
  const auto written = fs::last_write_time(out / kManifestName);
  fs::last_write_time(out / kManifestName, written - std::chrono::hours(1));
  const auto merged = files_of(out);
  std::swap(parts[0], parts[2]);
  parts.push_back(parts[1]);
  const MergeReport again = merge(parts);
  EXPECT_FALSE(again.changed);
  EXPECT_EQ(again.linked + again.copied, 0);
  EXPECT_EQ(files_of(out), merged);
  EXPECT_EQ(fs::last_write_time(out / kManifestName), written - std::chrono::hours(1));

  // the caching tool finds everything
  Writer writer(out, recipe, test::provenance());
  std::vector<WantedItem> items;
  for (uint64_t i = 0; i < 300; ++i) items.push_back(item_of(test::sample(layout, i), i));
  EXPECT_EQ(writer.compare(items).kept, 300);
  EXPECT_FALSE(writer.publish(test::publication(items)));
}

TEST_P(Maintenance, MergeNamesTheMissingShard) {
  const auto parts = make_parts(temporary.path(), recipe, 20, 3);
  EXPECT_THAT(refusal([&] {
                merge({parts[0], parts[2]});
              }),
              AllOf(HasSubstr("shard 1 of 3 is missing"), testing::Not(HasSubstr("shard 2"))));
  EXPECT_THAT(refusal([&] { merge({parts[1]}); }),
              AllOf(HasSubstr("shard 0 of 3 is missing"), HasSubstr("shard 2 of 3 is missing")));
  EXPECT_FALSE(fs::exists(out)) << "something was made before the parts were known to fit";
}

TEST_P(Maintenance, MergeNamesWhatPartsDisagreeIn) {
  const auto parts = make_parts(temporary.path(), recipe, 20, 2);
  Recipe other = recipe;
  other.parameters["precision"] = "f32";
  const fs::path bad = temporary.path() / "bad";
  make_part(bad, other, 20, {{1, 2}});
  EXPECT_THAT(refusal([&] {
                merge({parts[0], bad});
              }),
              AllOf(HasSubstr("parameters.precision"), HasSubstr("\"f32\"")));
  fs::remove_all(bad);
  make_part(bad, recipe, 20, {{1, 2}, {}, {7}});
  EXPECT_THAT(refusal([&] {
                merge({parts[0], bad});
              }),
              AllOf(HasSubstr("an item"), HasSubstr(to_hex(sha256("item 7")).substr(0, 16))));
  EXPECT_THAT(refusal([&] {
                merge({bad, parts[0]});
              }),
              HasSubstr(to_hex(sha256("item 7")).substr(0, 16)));
  EXPECT_FALSE(fs::exists(out));
}

TEST_P(Maintenance, MergeNeverWritesIntoAPart) {
  const auto parts = make_parts(temporary.path(), recipe, 20, 2);
  const auto before = files_of(parts[0]);
  const fs::path alias = temporary.path() / "alias";
  fs::create_directory_symlink(parts[0], alias);
  for (const fs::path& folder : {parts[0], alias}) {
    try {
      merge_caches(parts, folder, kMerger, false);
      ADD_FAILURE() << "merged into a part";
    } catch (const UsageError& error) {
      EXPECT_THAT(error.what(), AllOf(HasSubstr("is one of the parts"), HasSubstr("hint: ")));
    }
  }
  EXPECT_EQ(files_of(parts[0]), before);
}

// What repair, gc, merge, copy and the caching tools say about a folder that they write to.
std::vector<std::string> refusals_of_all(const fs::path& folder,
                                         const fs::path& whole,
                                         const Recipe& recipe) {
  return {refusal([&] { repair_cache(folder); }),
          refusal([&] { collect_garbage(folder, false); }),
          refusal([&] { merge_caches(std::vector{whole}, folder, kMerger, false); }),
          refusal([&] { copy_cache(whole, folder, true); }),
          refusal([&] { Writer(folder, recipe, test::provenance()); })};
}

TEST_P(Maintenance, WhatIsNotOursIsNeitherReplacedNorRemoved) {
  const fs::path whole = temporary.path() / "whole";
  make_part(whole, recipe, 10, {});
  const std::map<std::string, std::string> foreign = {
      {"manifest.json", R"({"name": "an app", "version": 2})"},
      {"seg-ffffffffffffffff.h5", "notes about the flux-cache"},
      {"seg-eeeeeeeeeeeeeeee.h5", std::string("\x89HDF\r\n\x1a\n", 8) + std::string(500, 'x')},
      {".journal-ffffffffffffffff", "dear diary"},
      {"last-run.json", R"({"km": 12, "seconds": 3600})"}};
  for (const auto& [name, bytes] : foreign) {
    SCOPED_TRACE(name);
    fs::remove_all(out);
    fs::copy(whole, out, fs::copy_options::recursive);
    write_file_atomic(out / name, bytes);
    const auto before = files_of(out);
    for (const auto& text : refusals_of_all(out, whole, recipe)) {
      EXPECT_THAT(text,
                  AllOf(HasSubstr(name), HasSubstr("nothing was changed"), HasSubstr("hint: ")));
    }
    EXPECT_EQ(files_of(out), before);
  }
  // beside a segment of ours alone, too
  for (const std::string name : {"index.h5", "quarantine.jsonl"}) {
    SCOPED_TRACE(name);
    fs::remove_all(out);
    fs::copy(whole, out, fs::copy_options::recursive);
    fs::remove(out / kManifestName);
    write_file_atomic(out / name, "mine\n");
    const auto before = files_of(out);
    for (const auto& text : refusals_of_all(out, whole, recipe)) {
      EXPECT_THAT(text, AllOf(HasSubstr(name), HasSubstr("nothing was changed")));
    }
    EXPECT_EQ(files_of(out), before);
  }
  // names that only look like ours are let alone
  fs::remove_all(out);
  fs::copy(whole, out, fs::copy_options::recursive);
  for (const std::string name :
       {".seg-notes.tmp-old", ".journal-notes", "seg-1.h5", ".index.h5.tmp-x"})
    write_file_atomic(out / name, "mine");
  const auto before = files_of(out);
  repair_cache(out);
  collect_garbage(out, false);
  Writer(out, recipe, test::provenance());
  EXPECT_EQ(files_of(out), before);
}

TEST_P(Maintenance, WhatMayNotBeReadIsNeitherDamagedNorAnothers) {
  const fs::path whole = temporary.path() / "whole";
  make_part(whole, recipe, 10, {});
  for (const std::string& name :
       {std::string(kManifestName), std::string(kIndexName), names_of(whole, "seg-")[0]}) {
    SCOPED_TRACE(name);
    fs::remove_all(out);
    fs::copy(whole, out, fs::copy_options::recursive);
    const auto before = files_of(out);
    fs::permissions(out / name, fs::perms::none);
    const fs::path part = temporary.path() / "part", copied = temporary.path() / "copied";
    fs::remove_all(part);
    fs::remove_all(copied);
    std::vector<std::string> said, of_readers;
    {
      const test::Unprivileged user(temporary.path());
      of_readers = {refusal([&] { verify_cache(out, false); }),
                    refusal([&] { verify_cache(out, true); }),
                    refusal([&] { copy_cache(out, copied, false); }),
                    refusal([&] { merge_caches(std::vector{out}, part, kMerger, false); }),
                    refusal([&] {
                      const Cache cache(out, recipe.kind);
                      for (const auto& variant : cache.index().variants()) cache.read(variant);
                    })};
      said = {refusal([&] { repair_cache(out); }),
              refusal([&] { collect_garbage(out, false); }),
              refusal([&] { Writer(out, recipe, test::provenance()); })};
    }
    for (const auto& text : said) {
      EXPECT_THAT(
          text,
          AllOf(HasSubstr(name + ": cannot be read: Permission denied; nothing was changed"),
                HasSubstr("hint: check its permissions")));
    }
    for (const auto& text : of_readers) {
      EXPECT_THAT(text,
                  AllOf(HasSubstr(name + ": cannot be read: Permission denied"),
                        HasSubstr("permissions"),
                        testing::Not(HasSubstr("repair"))));
    }
    fs::permissions(out / name, fs::perms::owner_read | fs::perms::owner_write);
    EXPECT_EQ(files_of(out), before);
  }
}

TEST_P(Maintenance, NothingToWriteIsNoErrorInAFolderThatCannotBeWritten) {
  make_part(out, recipe, 3, {});
  const auto before = files_of(out);
  {
    const test::Unprivileged user(temporary.path());
    const auto forbid = [&] {
      fs::permissions(out, fs::perms::owner_read | fs::perms::owner_exec);
    };
    const auto allow = [&] { fs::permissions(out, fs::perms::owner_all); };
    forbid();
    EXPECT_NO_THROW(make_part(out, recipe, 3, {}));
    EXPECT_THROW(make_part(out, recipe, 2, {}), ResourceError);
    EXPECT_THROW(make_part(out, recipe, 4, {}), ResourceError);
    {
      const Writer writer(out, recipe, test::provenance());
      EXPECT_FALSE(writer.can_write());
      EXPECT_THROW(writer.require_writable(), ResourceError);
    }
    allow();
    {  // a writer that lives is respected there, too
      const WriterLock other(out);
      forbid();
      EXPECT_THAT(refusal([&] { Writer(out, recipe, test::provenance()); }),
                  HasSubstr("another writer is at work"));
      allow();
    }
    EXPECT_TRUE(Writer(out, recipe, test::provenance()).can_write());
  }
  EXPECT_EQ(files_of(out), before);
}

TEST_P(Maintenance, DamagedFilesOfOursAreRepaired) {
  const fs::path whole = temporary.path() / "whole";
  make_part(whole, recipe, 10, {{}, {3}});
  const std::string segment = names_of(whole, "seg-")[0];
  const auto text = read_file(whole / kManifestName);
  const std::vector<std::pair<std::string, std::string>> damaged = {
      {"manifest.json", ""},
      {"manifest.json", std::string(100, '\0')},
      {"manifest.json", "garbage"},
      {"manifest.json", text.substr(0, 60)},
      {"manifest.json", text.substr(1)},
      {segment, ""},
      {segment, "garbage where the manifest names a segment"},
      {"index.h5", "garbage"},
      {"quarantine.jsonl", "garbage"},
      {".journal-ffffffffffffffff", ""},
      {".journal-ffffffffffffffff", std::string("FXC\0\0\0\0\0\0", 9)}};
  for (const auto& [name, bytes] : damaged) {
    SCOPED_TRACE(name + " " + bytes);
    fs::remove_all(out);
    fs::copy(whole, out, fs::copy_options::recursive);
    write_file_atomic(out / name, bytes);
    repair_cache(out);
    EXPECT_EQ(fs::exists(out / segment), name != segment);
    make_part(out, recipe, 10, {{}, {3}});
    expect_samples(out, kind, numbers(10, {3}));
    expect_verified(out);
  }
}

TEST_P(Maintenance, ADamagedIndexCostsTheManifestButNoSample) {
  make_part(out, recipe, 10, {});
  const auto whole = files_of(out);
  for (const bool absent : {false, true}) {
    if (absent)
      fs::remove(out / kIndexName);
    else
      write_file_atomic(out / kIndexName, whole.at(kIndexName).substr(0, 3000));
    const auto findings = verify_cache(out, true);
    ASSERT_EQ(findings.size(), 1u);
    EXPECT_EQ(findings[0].file, kIndexName);
    const RepairReport report = repair_cache(out);
    EXPECT_THAT(report.unreadable, HasSubstr("index.h5: "));
    EXPECT_FALSE(report.complete);
    EXPECT_TRUE(report.lost.empty());
    EXPECT_EQ(report.num_samples, 10);
    Writer writer(out, recipe, test::provenance());
    std::vector<WantedItem> items;
    for (uint64_t i = 0; i < 10; ++i) items.push_back(item_of(test::sample(layout, i), i));
    EXPECT_EQ(writer.compare(items).kept, 10);
    writer.publish(test::publication(items));
  }
}

TEST_P(Maintenance, RepairSaysThatItWroteTheQuarantineList) {
  make_part(out, recipe, 10, {{}, {3}});
  const std::string list = read_file(out / kQuarantineName);
  write_file_atomic(out / kQuarantineName, list + list);
  EXPECT_TRUE(repair_cache(out).changed);
  EXPECT_EQ(read_file(out / kQuarantineName), list);
  EXPECT_FALSE(repair_cache(out).changed);
}

TEST_P(Maintenance, NoManifestComesBeforeItsIndexWasChecked) {
  make_part(out, recipe, 10, {});
  const std::string text = read_file(out / kManifestName), index = read_file(out / kIndexName);
  EXPECT_THROW(publish_files(out,
                             text,
                             as_bytes(index),
                             [&] {
                               EXPECT_FALSE(fs::exists(out / kManifestName));
                               EXPECT_EQ(read_file(out / kIndexName), index);
                               throw CacheError("does not read back");
                             }),
               CacheError);
  EXPECT_FALSE(fs::exists(out / kManifestName));
}

TEST_P(Maintenance, TheWritersLockMayBeNoFile) {
  make_part(out, recipe, 10, {});
  fs::create_directory(out / kWriterLockName);
  for (const auto& text : {refusal([&] { Writer(out, recipe, test::provenance()); }),
                           refusal([&] { repair_cache(out); }),
                           refusal([&] { collect_garbage(out, false); })}) {
    EXPECT_THAT(text,
                AllOf(HasSubstr(".writer.lock"), HasSubstr("not a file"), HasSubstr("hint:")));
  }
}

TEST_P(Maintenance, MergeNamesEachFieldAndNotWholeLists) {
  const auto parts = make_parts(temporary.path(), recipe, 20, 2);
  Recipe other = recipe;
  other.parameters["precision"] = "f32";
  other.weights.begin().value() = std::string(64, 'c');
  const fs::path bad = temporary.path() / "bad";
  {
    Writer writer(bad, other, test::provenance(), {.shard = {1, 2}});
    auto publication = test::publication({});
    publication.plan = {{"subsets", {{{"index", 0}, {"num_repeats", 7}}}}};
    writer.publish(publication);
  }
  EXPECT_THAT(refusal([&] {
                merge({parts[0], bad});
              }),
              AllOf(HasSubstr("parameters.precision: " + bad.native() + ": \"f32\", " +
                              parts[0].native() + ": nothing"),
                    HasSubstr("weights." + other.weights.begin().key()),
                    HasSubstr("plan.subsets.0.num_repeats: " + bad.native() + ": 7, "),
                    testing::Not(HasSubstr("plan_digest")),
                    testing::Not(HasSubstr("index\":"))));
}

TEST_P(Maintenance, MergeLeavesOutWhatAnyPartQuarantined) {
  std::vector<fs::path> parts;
  for (int64_t i = 0; i < 2; ++i) {
    parts.push_back(temporary.path() / std::to_string(i));
    // item 3 fails in the part that has to encode it, item 4 is unreadable for all
    std::set<uint64_t> bad = {4};
    if (shard_of(test::sample(layout, 3).info.key, 2) == i) bad.insert(3);
    make_part(parts.back(), recipe, 20, {{i, 2}, bad});
  }
  const MergeReport report = merge(parts);
  EXPECT_EQ(report.num_quarantined, 2);
  EXPECT_EQ(report.num_items, 18);
  expect_samples(out, kind, numbers(20, {3, 4}));
  expect_verified(out);
}

TEST_P(Maintenance, MergeOfWholeCachesCountsDuplicates) {
  const std::vector<fs::path> parts = {temporary.path() / "a", temporary.path() / "b"};
  for (const auto& part : parts) make_part(part, recipe, 30, {});
  EXPECT_EQ(merge(parts, true).duplicates, 30);
  expect_samples(out, kind, numbers(30));
  expect_verified(out);
}

TEST_P(Maintenance, MergeTakesTheFirstOfDifferentBitsUnlessStrict) {
  const std::vector<fs::path> parts = {temporary.path() / "a", temporary.path() / "b"};
  make_part(parts[0], recipe, 30, {});
  {  // another device gave other bits for sample 5
    Writer writer(parts[1], recipe, test::provenance());
    std::vector<WantedItem> items;
    for (uint64_t i = 0; i < 30; ++i) {
      auto data = test::sample(layout, i);
      if (i == 5) data.tensors[0][0] ^= std::byte{1};
      writer.add(data.info, data.spans());
      items.push_back(item_of(data, i));
    }
    writer.publish(test::publication(items));
  }
  EXPECT_THAT(refusal([&] { merge(parts, true); }),
              AllOf(HasSubstr("1 sample"), HasSubstr(key(5))));
  EXPECT_FALSE(fs::exists(out));
  const MergeReport report = merge(parts);
  EXPECT_EQ(report.conflicts, 1);
  EXPECT_EQ(report.duplicates, 29);
  ASSERT_EQ(report.conflict_keys.size(), 1u);
  EXPECT_THAT(report.conflict_keys[0], HasSubstr(key(5)));
  expect_verified(out);
  const fs::path& first =
      names_of(parts[0], "seg-")[0] < names_of(parts[1], "seg-")[0] ? parts[0] : parts[1];
  const Cache merged(out, kind), from(first, kind);
  EXPECT_EQ(merged.read(merged.index().variants(5)[0]).tensors,
            from.read(from.index().variants(5)[0]).tensors);
}

TEST_P(Maintenance, MergeRefusesADamagedPart) {
  const auto parts = make_parts(temporary.path(), recipe, 20, 2);
  const std::string name = names_of(parts[1], "seg-")[0];
  std::string bytes = read_file(parts[1] / name);
  bytes[bytes.size() / 2] ^= 1;
  write_file_atomic(parts[1] / name, bytes);
  EXPECT_THAT(refusal([&] { merge(parts); }),
              AllOf(HasSubstr(name), HasSubstr("flux-cache repair")));
  EXPECT_FALSE(fs::exists(out / kManifestName));
}

TEST_P(Maintenance, VerifyFindsADamagedSampleAndRepairDropsItAlone) {
  make_part(out, recipe, 200, {});
  expect_verified(out);
  const std::string name = damage_sample(out, kind, 150);

  const auto plain = verify_cache(out, false);
  ASSERT_EQ(plain.size(), 1u);
  EXPECT_EQ(plain[0].file, name);
  EXPECT_THAT(plain[0].what, HasSubstr("XXH3-128"));
  const auto deep = verify_cache(out, true);
  ASSERT_EQ(deep.size(), 2u);
  EXPECT_THAT(deep[1].sample, HasSubstr(key(150)));
  const Cache cache(out, kind);
  EXPECT_THAT(refusal([&] { cache.read(cache.index().variants(150)[0]); }),
              AllOf(HasSubstr(name), HasSubstr("hint: flux-cache repair")));

  const RepairReport report = repair_cache(out);
  ASSERT_EQ(report.lost.size(), 1u);
  EXPECT_EQ(to_hex(*report.lost[0].key), key(150));
  EXPECT_TRUE(report.lost[0].wanted);
  EXPECT_EQ(report.lost[0].file, name);
  EXPECT_FALSE(report.complete);
  EXPECT_TRUE(report.changed);
  EXPECT_EQ(report.num_samples, 199);
  EXPECT_EQ(report.removed_segments, 1);
  EXPECT_FALSE(fs::exists(out / name));
  EXPECT_FALSE(fs::exists(out / kManifestName));
  EXPECT_FALSE(repair_cache(out).changed);

  Writer writer(out, recipe, test::provenance());
  for (uint64_t i = 0; i < 200; ++i)
    EXPECT_EQ(writer.contains(test::sample(layout, i).info.key), i != 150) << i;
}

TEST_P(Maintenance, RepairOfAWholeCacheChangesNothing) {
  make_part(out, recipe, 200, {});
  const auto before = files_of(out);
  const auto written = fs::last_write_time(out / kManifestName);
  const RepairReport report = repair_cache(out);
  EXPECT_FALSE(report.changed);
  EXPECT_TRUE(report.complete);
  EXPECT_TRUE(report.lost.empty());
  EXPECT_EQ(files_of(out), before);
  EXPECT_EQ(fs::last_write_time(out / kManifestName), written);
}

TEST_P(Maintenance, RepairKeepsTheManifestWhereNothingWantedIsLost) {
  make_part(out, recipe, 10, {});
  const std::string name = damage_sample(out, kind, 7);
  const std::string damaged = read_file(out / name);
  fs::remove_all(out);
  make_part(out, recipe, 10, {});
  write_file_atomic(out / name, damaged);  // a second segment, with a bad copy of sample 7
  const RepairReport report = repair_cache(out);
  EXPECT_TRUE(report.lost.empty()) << "sample 7 is in the other segment";
  EXPECT_TRUE(report.complete);
  EXPECT_EQ(report.removed_segments, 1);
  EXPECT_EQ(report.salvaged, 0) << "all of it is in the other segment";
  expect_samples(out, kind, numbers(10));
  expect_verified(out);
}

TEST_P(Maintenance, RepairNamesTheSamplesOfAFileThatIsGoneOrCannotBeOpened) {
  make_part(out, recipe, 300, {});
  const auto segments = names_of(out, "seg-");
  ASSERT_EQ(segments.size(), 3u);
  fs::remove(out / segments[0]);
  write_file_atomic(out / segments[1], read_file(out / segments[1]).substr(0, 1000));
  std::set<std::string> expected;
  {
    const Manifest manifest = read_manifest(out);
    const Index index = read_index(out / kIndexName, kind);
    for (const auto& variant : index.variants()) {
      if (manifest.segments[variant.segment].name != segments[2])
        expected.insert(to_hex(variant.key));
    }
  }
  EXPECT_GE(verify_cache(out, false).size(), 2u);
  std::set<std::string> lost;
  for (const auto& sample : repair_cache(out).lost) lost.insert(to_hex(*sample.key));
  EXPECT_EQ(lost, expected);
  EXPECT_EQ(names_of(out, "seg-"), std::vector{segments[2]});
}

TEST_P(Maintenance, VerifyFindsAWrongIndexManifestAndList) {
  make_part(out, recipe, 20, {{}, {3}});
  const auto whole = files_of(out);
  const auto findings = [&](const std::string& file) {
    std::set<std::string> files;
    for (const auto& finding : verify_cache(out, true)) files.insert(finding.file);
    EXPECT_TRUE(files.contains(file)) << file;
    write_file_atomic(out / file, whole.at(file));
  };
  for (const std::string file : {"index.h5", "manifest.json", "quarantine.jsonl"}) {
    std::string bytes = whole.at(file);
    bytes[bytes.size() / 2] ^= 1;
    write_file_atomic(out / file, bytes);
    findings(file);
  }
  fs::remove(out / "quarantine.jsonl");
  findings("quarantine.jsonl");
  expect_verified(out);
  fs::remove(out / kManifestName);
  EXPECT_THROW(verify_cache(out, false), CacheError);
  EXPECT_THROW(verify_cache(temporary.path() / "nothing", false), CacheError);
}

TEST_P(Maintenance, VerifyFindsValuesThatAreNotFinite) {
  Writer writer(out, recipe, test::provenance());
  auto data = test::sample(layout, 1);
  data.tensors[0][2] = std::byte{0x80}, data.tensors[0][3] = std::byte{0x7F};  // bf16 infinity
  writer.add(data.info, data.spans());
  writer.publish(test::publication({item_of(data, 1)}));
  EXPECT_TRUE(verify_cache(out, false).empty());
  const auto deep = verify_cache(out, true);
  ASSERT_EQ(deep.size(), 1u);
  EXPECT_THAT(deep[0].what, HasSubstr("1 values that are not finite"));
}

// Samples 0 to 199, of which the manifest wants the even ones below 128, and a journal.
void make_untidy(const fs::path& folder, const Recipe& recipe) {
  const Layout layout = layout_of(recipe.kind, recipe.parameters);
  make_part(folder, recipe, 200, {});
  Writer writer(folder, recipe, test::provenance());
  std::vector<WantedItem> items;
  for (uint64_t i = 0; i < 128; i += 2) items.push_back(item_of(test::sample(layout, i), i));
  writer.publish(test::publication(items));
  const auto data = test::sample(layout, 1000);
  writer.add(data.info, data.spans());  // stays in the journal
}

std::vector<uint64_t> tidy_numbers() {
  std::vector<uint64_t> out;
  for (uint64_t i = 0; i < 128; i += 2) out.push_back(i);
  return out;
}

TEST_P(Maintenance, GcKeepsExactlyWhatIsWanted) {
  make_untidy(out, recipe);
  const auto before = files_of(out);
  const GcReport planned = collect_garbage(out, true);
  EXPECT_EQ(files_of(out), before) << "--dry-run changed something";
  const GcReport report = collect_garbage(out, false);
  EXPECT_EQ(report.removed, planned.removed);
  EXPECT_EQ(report.kept_samples, 64);
  EXPECT_EQ(report.removed_samples, 200 - 64 + 1);
  EXPECT_EQ(report.removed_segments, 1);
  EXPECT_EQ(report.rewritten_segments, 1);
  EXPECT_EQ(report.removed_others, 1);
  EXPECT_LT(report.bytes_after, report.bytes_before);
  expect_samples(out, kind, tidy_numbers());
  expect_verified(out);
  EXPECT_EQ(files_of(out).size(), 3u);  // segment, index, manifest
  int64_t samples = 0;
  for (const auto& name : names_of(out, "seg-")) samples += Segment(out / name).num_samples();
  EXPECT_EQ(samples, 64);

  const auto tidy = files_of(out);
  EXPECT_TRUE(collect_garbage(out, false).removed.empty());
  EXPECT_EQ(files_of(out), tidy);
}

TEST_P(Maintenance, GcAndRepairStopWhereTheirProgressSaysSoAndGoOn) {
  const fs::path untidy = temporary.path() / "untidy";
  make_untidy(untidy, recipe);
  for (int at = 0;; ++at) {
    ASSERT_LT(at, 100);
    fs::remove_all(out);
    fs::copy(untidy, out, fs::copy_options::recursive);
    int calls = 0;
    try {
      collect_garbage(out, false, [&](int64_t done, int64_t total) {
        EXPECT_LE(done, total);
        if (calls++ == at) throw Interrupted(ExitCode::kInterrupt);
      });
      EXPECT_GT(at, 3) << "it looks too seldom";
      break;
    } catch (const Interrupted&) {
      expect_samples(out, kind, tidy_numbers());
      collect_garbage(out, false);
      expect_samples(out, kind, tidy_numbers());
      EXPECT_EQ(files_of(out).size(), 3u);
    }
  }
  expect_samples(out, kind, tidy_numbers());
  expect_verified(out);
  damage_sample(out, kind, 8);
  int calls = 0;
  EXPECT_THROW(repair_cache(out,
                            [&](int64_t, int64_t) {
                              if (++calls == 2) throw Interrupted(ExitCode::kInterrupt);
                            }),
               Interrupted);
  EXPECT_EQ(repair_cache(out).num_samples, 63);
}

TEST(ReadUnchanged, TellsWhatAnotherToolChangedFromDamage) {
  const test::TemporaryFolder temporary;
  const fs::path out = temporary.path() / "out";
  test::make_cache(out, test::recipe(Kind::kText), 0, 3);
  const auto fail = [] { throw CacheError("a segment cannot be read"); };
  EXPECT_EQ(refusal([&] { read_unchanged({out}, fail); }), "a segment cannot be read");
  EXPECT_THAT(refusal([&] {
                read_unchanged({temporary.path(), out}, [&] {
                  test::make_cache(out, test::recipe(Kind::kText), 0, 4);
                  fail();
                });
              }),
              AllOf(HasSubstr(out.native() + ": has changed while it was read"),
                    HasSubstr("hint: run this again")));
}

TEST(FilesOfACache, AreKnownByName) {
  for (const char* name : {"manifest.json",
                           "index.h5",
                           "quarantine.jsonl",
                           "seg-0123456789abcdef.h5",
                           ".journal-0123456789abcdef",
                           ".writer.lock",
                           "last-run.json",
                           ".reader-0123456789abcdef.lock"}) {
    EXPECT_TRUE(is_file_of_cache(name)) << name;
    const std::string temporary = std::string(".") + name + ".tmp-0123456789abcdef";
    EXPECT_EQ(is_temporary_name(temporary), !is_journal_name(name)) << temporary;
  }
  // as the locks' files are called
  EXPECT_TRUE(is_temporary_name(".writer.lock.tmp-0123456789abcdef"));
  EXPECT_TRUE(is_temporary_name(".reader-0123456789abcdef.lock.tmp-0123456789abcdef"));
  for (const char* name : {"seg-1.h5",
                           "notes",
                           ".journal-x",
                           ".tmp-0123456789abcdef",
                           "",
                           ".seg-x.h5.tmp-0123456789abcdef",
                           ".manifest.json.tmp-1"})
    EXPECT_FALSE(is_file_of_cache(name)) << name;
}

TEST(MaintenanceOfMasks, KeepsThemThroughMergeGcAndRepair) {
  const test::TemporaryFolder temporary;
  const fs::path part = temporary.path() / "part", out = temporary.path() / "out";
  const Recipe recipe = test::recipe(Kind::kLatents);
  const Layout layout = layout_of(recipe.kind, recipe.parameters);
  std::vector<test::SampleData> samples;
  for (uint64_t i = 0; i < 6; ++i) {
    test::SampleData data = test::sample(layout, i);
    if (i % 2 == 0) {
      data.info.flags |= kSampleMasked;
      const std::vector<float> mask(size_t{data.info.height} * data.info.width, 0.25f);
      const auto bytes = std::as_bytes(std::span(mask));
      data.tensors.emplace_back(bytes.begin(), bytes.end());
    }
    samples.push_back(std::move(data));
  }
  const auto make = [&](const fs::path& folder, uint64_t begin) {
    Writer writer(folder, recipe, test::provenance());
    std::vector<WantedItem> items;
    for (uint64_t i = begin; i < 6; ++i) {
      writer.add(samples[i].info, samples[i].spans());
      items.push_back(item_of(samples[i], i));
    }
    writer.publish(test::publication(items));
  };
  make(part, 0);
  make(part, 3);  // 0 to 2 are not wanted any more
  merge_caches(std::vector{part}, out, kMerger, true);
  const auto expect_whole = [&] {
    expect_verified(out);
    const Cache cache(out, Kind::kLatents);
    EXPECT_EQ(cache.manifest().required_features, std::vector<std::string>{kMasksFeature});
    for (uint64_t i = 3; i < 6; ++i) {
      const auto variants = cache.index().variants(static_cast<int64_t>(i - 3));
      EXPECT_EQ(cache.read(variants[0]).tensors, samples[i].tensors) << i;
    }
  };
  expect_whole();
  EXPECT_EQ(collect_garbage(out, false).removed_samples, 3);
  expect_whole();
  EXPECT_FALSE(repair_cache(out).changed);
  damage_sample(out, Kind::kLatents, 3);
  const RepairReport report = repair_cache(out);
  ASSERT_EQ(report.lost.size(), 1u);
  EXPECT_EQ(report.salvaged, 2);
  make(out, 3);
  expect_whole();
}

// Runs `body` in a process of its own.
pid_t start(const std::function<void()>& body) {
  const pid_t pid = fork();
  if (pid != 0) return pid;
  int result = 0;
  try {
    body();
  } catch (...) {
    result = 99;
  }
  _exit(result);
}

int wait_for(pid_t pid) {
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFSIGNALED(status) ? 256 + WTERMSIG(status) : WEXITSTATUS(status);
}

TEST_P(Maintenance, GcRefusesWhileAReaderLivesAndRemovesADeadOnesLock) {
  make_untidy(out, recipe);
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t reader = start([&] {
    prctl(PR_SET_PDEATHSIG, SIGKILL);  // not left behind by a test that fails
    const ReaderLock lock(out);
    if (write(ready[1], "+", 1) == 1) pause();
  });
  char byte = 0;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  close(ready[0]), close(ready[1]);
  const auto before = files_of(out);
  for (const bool dry_run : {true, false}) {
    EXPECT_THAT(refusal([&] { collect_garbage(out, dry_run); }),
                AllOf(HasSubstr("a reader is at work: process " + std::to_string(reader)),
                      HasSubstr(".reader-")));
  }
  EXPECT_EQ(files_of(out), before);
  const auto copied = temporary.path() / "copied";
  fs::copy(out, copied);
  ASSERT_EQ(names_of(copied, ".reader-").size(), 1u);
  EXPECT_EQ(collect_garbage(copied, false).kept_samples, 64) << "nobody reads the copy";
  EXPECT_TRUE(names_of(copied, ".reader-").empty());
  kill(reader, SIGKILL);
  EXPECT_EQ(wait_for(reader), 256 + SIGKILL);
  ASSERT_EQ(names_of(out, ".reader-").size(), 1u) << "the dead reader left its lock";
  EXPECT_EQ(collect_garbage(out, false).kept_samples, 64);
  EXPECT_TRUE(names_of(out, ".reader-").empty());
  {
    const ReaderLock lock(out);
    EXPECT_TRUE(lock.held());
    EXPECT_EQ(names_of(out, ".reader-").size(), 1u);
  }
  EXPECT_TRUE(names_of(out, ".reader-").empty());
  write_file_atomic(out / ".reader-0123456789abcdef.lock", R"({"host":"elsewhere x","pid":1})");
  EXPECT_THAT(refusal([&] { collect_garbage(out, false); }), HasSubstr("process 1 on elsewhere"));
  EXPECT_FALSE(ReaderLock(out / "absent").held());
}

TEST_P(Maintenance, CopyIsTheSameCacheAndGoesOn) {
  const fs::path from = temporary.path() / "from";
  make_part(from, recipe, 300, {{}, {9}});
  const auto before = files_of(from);
  const CopyReport report = copy_cache(from, out, true);
  EXPECT_EQ(report.copied, 3);
  EXPECT_TRUE(report.changed);
  EXPECT_EQ(files_of(out), before);
  EXPECT_EQ(files_of(from), before);
  int64_t bytes = 0;
  for (const auto& [name, content] : before) bytes += std::ssize(content);
  EXPECT_EQ(report.num_bytes, bytes);
  EXPECT_EQ(report.copied_bytes, bytes);

  const CopyReport again = copy_cache(from, out, true);
  EXPECT_FALSE(again.changed);
  EXPECT_EQ(again.copied_bytes, 0);
  EXPECT_EQ(again.already, 3);

  const auto segments = names_of(out, "seg-");
  fs::remove(out / segments[0]);  // one is missing, one was damaged on the way
  std::string damaged = before.at(segments[1]);
  damaged[damaged.size() / 2] ^= 1;
  write_file_atomic(out / segments[1], damaged);
  EXPECT_EQ(copy_cache(from, out, true).copied, 2);
  EXPECT_EQ(files_of(out), before);

  write_file_atomic(from / segments[2], damaged);
  fs::remove(out / segments[2]);
  EXPECT_THAT(refusal([&] { copy_cache(from, out, false); }),
              AllOf(HasSubstr(segments[2]), HasSubstr("flux-cache repair")));
  try {
    copy_cache(from, from, false);
    ADD_FAILURE() << "copied onto itself";
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), HasSubstr("to be copied"));
  }
}

// Runs `body` in processes that are killed at random moments, then once to its end.
void kill_and_finish(
    const std::function<void()>& body, const std::function<void()>& after_each = [] {}) {
  const RandomStream random(11, Purpose::kShuffle, 0);
  for (uint64_t i = 0; i < 20; ++i) {
    const pid_t pid = start(body);
    usleep(static_cast<useconds_t>(random.below(i, 30'000)));
    kill(pid, SIGKILL);
    const int result = wait_for(pid);
    ASSERT_TRUE(result == 256 + SIGKILL || result == 0) << result;
    ASSERT_NO_FATAL_FAILURE(after_each());
  }
  ASSERT_EQ(wait_for(start(body)), 0) << "the same call does not complete";
}

TEST_P(Maintenance, KilledMergeIsFinishedByTheSameCall) {
  const auto parts = make_parts(temporary.path(), recipe, 600, 3);
  kill_and_finish([&] { merge(parts); },
                  [&] {
                    if (fs::exists(out / kManifestName)) expect_samples(out, kind, numbers(600));
                    // every second time from the start
                    static int round = 0;
                    if (++round % 2) fs::remove_all(out);
                  });
  expect_samples(out, kind, numbers(600));
  expect_verified(out);
  EXPECT_TRUE(names_of(out, ".").empty());
}

TEST_P(Maintenance, KilledCopyIsFinishedByTheSameCall) {
  const fs::path from = temporary.path() / "from";
  make_part(from, recipe, 600, {});
  kill_and_finish([&] { copy_cache(from, out, true); },
                  [&] {
                    static int round = 0;
                    if (++round % 2) fs::remove_all(out);
                  });
  EXPECT_EQ(files_of(out), files_of(from));
}

TEST_P(Maintenance, KilledGcIsFinishedByTheSameCall) {
  const fs::path untidy = temporary.path() / "untidy";
  make_untidy(untidy, recipe);
  const auto restore = [&] {
    fs::remove_all(out);
    fs::copy(untidy, out, fs::copy_options::recursive);
  };
  restore();
  kill_and_finish([&] { collect_garbage(out, false); },
                  [&] {
                    ASSERT_EQ(wait_for(start([&] { collect_garbage(out, false); })), 0);
                    expect_samples(out, kind, tidy_numbers());
                    restore();
                  });
  expect_verified(out);
  EXPECT_EQ(files_of(out).size(), 3u);
}

TEST_P(Maintenance, KilledRepairIsFinishedByTheSameCall) {
  const fs::path damaged = temporary.path() / "damaged";
  make_part(damaged, recipe, 300, {});
  damage_sample(damaged, kind, 150);
  damage_sample(damaged, kind, 10);
  const auto restore = [&] {
    fs::remove_all(out);
    fs::copy(damaged, out, fs::copy_options::recursive);
  };
  const auto expect_repaired = [&] {
    std::multiset<std::string> keys;
    for (const auto& name : names_of(out, "seg-")) {
      const Segment segment(out / name);
      for (int64_t row = 0; row < segment.num_samples(); ++row) {
        segment.read(row);
        keys.insert(to_hex(segment.samples()[static_cast<size_t>(row)].key));
      }
    }
    std::multiset<std::string> expected;
    for (const uint64_t i : numbers(300, {10, 150})) expected.insert(key(i));
    ASSERT_EQ(keys, expected);
    ASSERT_FALSE(fs::exists(out / kManifestName));
  };
  restore();
  kill_and_finish([&] { repair_cache(out); },
                  [&] {
                    ASSERT_EQ(wait_for(start([&] { repair_cache(out); })), 0);
                    ASSERT_NO_FATAL_FAILURE(expect_repaired());
                    restore();
                  });
  expect_repaired();
}

}  // namespace
}  // namespace flux::cache
