#include "formats/checkpoint/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "tests/support/temporary_folder.h"

namespace flux::checkpoint {
namespace {

using test::TemporaryFolder;
using testing::ElementsAre;
using testing::HasSubstr;

// Tensors whose bytes are 0, 1, 2 ...; enough for 1.2 MiB where `large`.
struct Data {
  explicit Data(bool large = false) {
    for (const char* name : {"b.lora_up.weight", "a.lora_down.weight"}) {
      std::vector<std::byte> bytes(large ? 600'000 : 64);
      for (size_t i = 0; i < bytes.size(); ++i)
        bytes[i] = static_cast<std::byte>(i * 31 + values.size());
      values.push_back(std::move(bytes));
      tensors.push_back(
          {{name, DType::kBF16, {static_cast<int64_t>(values.back().size() / 2)}}, {}});
    }
    for (size_t i = 0; i < values.size(); ++i) tensors[i].bytes = values[i];
  }
  std::vector<std::vector<std::byte>> values;
  std::vector<Tensor> tensors;
};

void save(const std::filesystem::path& run,
          int64_t step,
          const nlohmann::json& state = {{"seed", 1}}) {
  const Data data;
  Writer writer(run, step);
  writer.add("lora.safetensors", data.tensors, {{"ss_seed", "1"}});
  writer.commit(state);
}

TEST(Checkpoint, IsReadBackFromTheHighestStep) {
  TemporaryFolder run;
  save(run.path(), 9);
  save(run.path(), 1'000'000, {{"seed", 7}});
  save(run.path(), 500);
  EXPECT_THAT(steps_in(run.path()), ElementsAre(9, 500, 1'000'000));
  const Checkpoint found = read_latest(run.path()).value();
  EXPECT_EQ(found.step, 1'000'000);
  EXPECT_EQ(found.folder, run / "step-1000000");
  EXPECT_EQ(found.state.at("seed"), 7);
  EXPECT_TRUE(std::filesystem::exists(run / "step-000009/lora.safetensors"));
}

TEST(Checkpoint, RefusesEveryFlippedBit) {
  for (const char* name : {"lora.safetensors", "state.json"}) {
    TemporaryFolder run;
    save(run.path(), 7);
    const auto file = run / "step-000007" / name;
    const std::string good = read_file(file);
    for (size_t i = 0; i < good.size(); ++i) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ 1 << i % 8);
      write_file_atomic(file, bad);
      if (std::string_view(name) == "state.json" && std::isspace(good[i]) && std::isspace(bad[i]))
        continue;  // another blank is the same state
      EXPECT_THROW(read_latest(run.path()), CacheError) << name << " byte " << i;
    }
    write_file_atomic(file, good);
    EXPECT_EQ(read_latest(run.path())->step, 7);
    std::filesystem::remove(file);
    EXPECT_THROW(read_latest(run.path()), CacheError) << name;
  }
}

TEST(Checkpoint, LeavesNothingWithoutCommit) {
  TemporaryFolder run;
  {
    const Data data;
    Writer writer(run.path(), 5);
    writer.add("lora.safetensors", data.tensors, {});
  }
  EXPECT_TRUE(std::filesystem::is_empty(run.path()));
}

TEST(Checkpoint, MakesRoomForTheSameStep) {
  TemporaryFolder run;
  save(run.path(), 5);
  save(run.path(), 5, {{"seed", 2}});
  EXPECT_EQ(read_latest(run.path())->state.at("seed"), 2);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(run.path()), {}), 1);
}

TEST(Checkpoint, IgnoresFoldersThatAreNoCheckpoints) {
  TemporaryFolder run;
  for (const char* name :
       {"step-", "step-5", "step-00005x", "step-000005.tmp", ".step-000005.abc", "other"}) {
    std::filesystem::create_directory(run / name);
  }
  EXPECT_TRUE(steps_in(run.path()).empty());
  EXPECT_TRUE(steps_in(run / "absent").empty());
  EXPECT_EQ(read_latest(run.path()), std::nullopt);
}

TEST(RemoveLeftovers, RemovesWhatAKillLeavesAndNothingElse) {
  TemporaryFolder run;
  save(run.path(), 5);
  std::filesystem::create_directory(run / ".step-000006.0123456789abcdef");
  run.write(".metrics.jsonl.tmp-0123456789abcdef", "half");
  run.write(".run.toml.tmp-fedcba9876543210", "half");
  const std::vector<std::string> kept{
      ".notes", "metrics.jsonl", ".x.tmp-0123", "y.tmp-0123456789abcdef"};
  for (const std::string& name : kept) run.write(name, "mine");
  remove_leftovers(run.path());
  for (const std::string& name : kept) EXPECT_TRUE(std::filesystem::exists(run / name)) << name;
  EXPECT_EQ(read_latest(run.path())->step, 5);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(run.path()), {}), 5);
}

TEST(RemoveOlder, KeepsTheNewestTheNeededAndWhatIsLater) {
  TemporaryFolder run;
  for (const int64_t step : {1, 2, 3, 5, 8, 9}) save(run.path(), step);
  remove_older(run.path(), 8, 10, {});
  EXPECT_EQ(steps_in(run.path()).size(), 6u);
  remove_older(run.path(), 8, 2, {2, 7});
  EXPECT_THAT(steps_in(run.path()), ElementsAre(2, 5, 8, 9));
  remove_older(run.path(), 9, 1, {});
  EXPECT_THAT(steps_in(run.path()), ElementsAre(9));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(run.path()), {}), 1);
}

TEST(StartRun, NamesAFileInTheWayAndWhatToDo) {
  TemporaryFolder folder;
  folder.write("plain", "a file");
  for (const char* name : {"plain", "plain/below"}) {
    try {
      start_run(folder / name);
      ADD_FAILURE() << name;
    } catch (const ResourceError& error) {
      EXPECT_THAT(error.what(),
                  AllOf(HasSubstr(name), HasSubstr("not a folder"), HasSubstr("hint:")));
    }
  }
}

TEST(StartRun, MovesAnOldRunAsideAndCleansUp) {
  TemporaryFolder folder;
  const auto run = folder / "run";
  EXPECT_EQ(start_run(run), std::nullopt);
  std::filesystem::create_directory(run / ".step-000001.0123456789abcdef");
  EXPECT_EQ(start_run(run), std::nullopt);
  EXPECT_TRUE(std::filesystem::is_empty(run));
  save(run, 5);
  EXPECT_EQ(start_run(run), folder / "run.old-1");
  save(run, 6);
  EXPECT_EQ(start_run(run / ""), folder / "run.old-2");
  EXPECT_TRUE(std::filesystem::is_empty(run));
  EXPECT_EQ(read_latest(folder / "run.old-1")->step, 5);
  EXPECT_EQ(read_latest(folder / "run.old-2")->step, 6);
}

TEST(ReadLatest, RefusesDamagedForeignAndNewerStates) {
  const std::vector<std::pair<std::string, std::string>> cases{
      {"", "not JSON"},
      {"[1]", "not a state"},
      {R"({"format":"other"})", "not a state"},
      {R"({"format":"flux-checkpoint","schema_version":2,"step":5})",
       "schema 2, this build reads 1"},
      {R"({"format":"flux-checkpoint","schema_version":1,"step":6})", "is of step 6, not 5"}};
  for (const auto& [text, wanted] : cases) {
    TemporaryFolder run;
    save(run.path(), 5);
    run.write("step-000005/state.json", text);
    try {
      read_latest(run.path());
      ADD_FAILURE() << text;
    } catch (const CacheError& error) {
      EXPECT_THAT(error.what(), HasSubstr(wanted));
    }
  }
  TemporaryFolder run;
  save(run.path(), 5);
  std::filesystem::remove(run / "step-000005/state.json");
  EXPECT_THROW(read_latest(run.path()), CacheError);
}

TEST(ReadUnchecked, ReadsWhatTheStateSaysAndNothingElse) {
  TemporaryFolder run;
  for (const int64_t step : {3, 5}) save(run.path(), step);
  std::filesystem::remove(run / "step-000003/lora.safetensors");
  const Checkpoint found = read_unchecked(run.path(), 3);
  EXPECT_EQ(found.step, 3);
  EXPECT_EQ(found.folder, run / "step-000003");
  EXPECT_EQ(found.state.at("step"), 3);
  run.write("step-000005/state.json", "{}");
  for (const int64_t step : {4, 5}) EXPECT_THROW(read_unchecked(run.path(), step), CacheError);
}

TEST(ReadLatest, TakesTheNewestGoodOneAndNamesTheBad) {
  TemporaryFolder run;
  for (const int64_t step : {3, 5, 9}) save(run.path(), step);
  const auto warned = [&](int64_t expected) {
    testing::internal::CaptureStderr();
    const auto found = read_latest(run.path());
    EXPECT_EQ(found.value().step, expected);
    return testing::internal::GetCapturedStderr();
  };
  EXPECT_EQ(warned(9), "");
  const auto file = run / "step-000009/lora.safetensors";
  std::string bytes = read_file(file);
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  write_file_atomic(file, bytes);
  EXPECT_THAT(warned(5), HasSubstr("step-000009/lora.safetensors: damaged: xxh3_128"));
  std::filesystem::remove(run / "step-000005/state.json");
  EXPECT_THAT(warned(3), AllOf(HasSubstr("step-000009"), HasSubstr("step-000005/state.json")));
  run.write("step-000003/state.json", "{}");
  try {
    read_latest(run.path());
    ADD_FAILURE() << "none is good";
  } catch (const CacheError& error) {
    EXPECT_THAT(error.what(),
                AllOf(HasSubstr("step-000009"),
                      HasSubstr("no older checkpoint is good"),
                      HasSubstr("--replace")));
  }
  // what a newer program wrote is not damaged: nothing is silently trained again
  save(run.path(), 3);
  run.write("step-000009/state.json",
            R"({"format":"flux-checkpoint","schema_version":2,"step":9})");
  EXPECT_THROW(read_latest(run.path()), CacheError);
}

// By the definition: the whole serialisation with the ss_ entries alone, hashed behind the header
// and in the window.
TEST(LoraHashes, AreThoseOfTheSerialisationWithTrainingMetadataAlone) {
  for (const bool large : {false, true}) {
    TemporaryFolder folder;
    const Data data(large);
    const safetensors::Metadata training{{"ss_network_dim", "4"}, {"ss_seed", "1"}};
    std::vector<safetensors::TensorSpec> specs;
    for (const Tensor& tensor : data.tensors) specs.push_back(tensor.spec);
    safetensors::Writer writer(folder / "reference.safetensors", specs, training);
    writer.write("a.lora_down.weight", data.values[1]);
    writer.write("b.lora_up.weight", data.values[0]);
    writer.commit();
    const std::string file = read_file(folder / "reference.safetensors");
    const size_t header = 8 + static_cast<size_t>(static_cast<unsigned char>(file[0])) +
                          (static_cast<size_t>(static_cast<unsigned char>(file[1])) << 8);
    const std::string model = to_hex(sha256(std::string_view(file).substr(header)));
    const std::string window = file.size() > 0x100000 ? file.substr(0x100000, 0x10000) : "";

    safetensors::Metadata all = training;
    all["modelspec.title"] = "changes nothing";
    const LoraHashes hashes = lora_hashes(data.tensors, all);
    EXPECT_EQ(hashes.model_hash, model);
    EXPECT_EQ(hashes.legacy_hash, to_hex(sha256(window)).substr(0, 8));
    EXPECT_EQ(hashes.legacy_hash == "e3b0c442", !large);  // SHA-256 of nothing
  }
}

}  // namespace
}  // namespace flux::checkpoint
