#include "pipelines/check/run.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/tensor/weight_file.h"
#include "tests/support/shared_data.h"
#include "tests/support/temporary_folder.h"

namespace flux::check {
namespace {

namespace fs = std::filesystem;
using test::TemporaryFolder;
using testing::AllOf;
using testing::Contains;
using testing::EndsWith;
using testing::HasSubstr;

const fs::path kGolden = fs::path(FLUX_SOURCE_DIR) / "tests/golden";

struct Outcome {
  Report report;
  std::vector<std::string> lines;
  ExitCode code() const { return report.exit_code(); }
};

Outcome run_on(const std::vector<std::string>& folders, Precision precision = Precision::kF32) {
  std::vector<std::string> lines;
  Options options;
  options.folders = folders;
  options.precision = precision;
  options.device = DeviceChoice::kCpu;
  Report report = run(options, [&](const std::string& line) { lines.push_back(line); });
  return {std::move(report), std::move(lines)};
}

std::string failures(const Outcome& outcome) {
  std::string out = outcome.report.line();
  for (const std::string& line : outcome.lines) {
    if (!line.ends_with("  ok")) out += "\n" + line;
  }
  return out;
}

TEST(CheckErrors, AreRelativeToTheGoldenTensor) {  // worked by hand
  const Errors errors = errors_of(at::tensor({3.0f, 4.5f}), at::tensor({3.0f, 4.0f}));
  EXPECT_DOUBLE_EQ(errors.rel, 0.1);
  EXPECT_DOUBLE_EQ(errors.max, 0.125);
  EXPECT_EQ(errors_of(at::zeros({3}), at::zeros({3})).rel, 0);
  EXPECT_TRUE(std::isinf(errors_of(at::ones({3}), at::zeros({3})).rel));
  EXPECT_TRUE(std::isnan(errors_of(at::full({1}, NAN), at::ones({1})).max));
}

TEST(CheckErrors, SamplesStrideThroughTheTensor) {
  const at::Tensor tensor = at::arange(10000, at::kLong).view({100, 100});
  const at::Tensor samples = samples_of(tensor, 3);  // 1000003 mod 10000 = 3
  EXPECT_TRUE(samples.equal(at::tensor({0, 3, 6}, at::kLong)));
}

TEST(CheckReport, JudgesByEveryLimitGiven) {
  const auto judged = [](Errors errors, Limits limits) {
    Report report([](const std::string&) {});
    report.start("case", "kind");
    report.judge("tensor", errors, limits);
    return report.exit_code() == ExitCode::kOk;
  };
  EXPECT_TRUE(judged({1e-6, 1e-5}, {1e-6, 1e-5}));
  EXPECT_FALSE(judged({1.1e-6, 1e-5}, {1e-6, 1e-5}));
  EXPECT_FALSE(judged({1e-6, 1.1e-5}, {1e-6, 1e-5}));
  EXPECT_TRUE(judged({1e-6, 1}, {1e-6, std::nullopt}));
  EXPECT_FALSE(judged({NAN, 0}, {1e-6, std::nullopt}));
  EXPECT_FALSE(judged({0, 0}, {}));  // no limit: nothing was judged
}

/// A picture of one column, (6, 5, 4) above (3, 2, 1), as BMP.
std::string two_pixels() {
  std::string head = "BM";
  const auto add = [&](uint32_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) head += static_cast<char>(value >> (8 * i));
  };
  add(62, 4), add(0, 4), add(54, 4);                        // file
  add(40, 4), add(1, 4), add(2, 4), add(1, 2), add(24, 2);  // picture
  for (int i = 0; i < 6; ++i) add(0, 4);
  return head + std::string("\x01\x02\x03\0\x04\x05\x06\0", 8);
}

class FluxCheck : public testing::Test {
 protected:
  /// A copy of a committed case, to be damaged.
  fs::path copy(const std::string& name) {
    fs::create_directories((folder / name).parent_path());
    fs::copy(kGolden / name, folder / name, fs::copy_options::recursive);
    return folder / name;
  }
  /// Adds `delta` to the tensor `name` of a file.
  static void disturb(const fs::path& file, const std::string& name, double delta) {
    TensorMap tensors;
    for (const auto& [key, tensor] : read_weights(file).tensors) tensors[key] = tensor.clone();
    tensors.at(name) = tensors.at(name) + delta;
    write_weights(file, tensors, {});
  }
  TemporaryFolder folder;
};

TEST_F(FluxCheck, FailsOnOneDisturbedTensor) {
  const std::tuple<const char*, const char*, const char*, double> kCases[] = {
      {"models/ops", "vectors.safetensors", "rms_norm_qk.grad_weight", 1e-4},
      {"models/timesteps", "vectors.safetensors", "sigma.flux_shift.scale1.0.latent64x64", 1e-5},
      {"models/clip", "vectors.safetensors", "pooler_output", 1e-3},
      {"models/t5", "vectors.safetensors", "bias.corner", 1e-3},
      {"models/timesteps", "vectors.safetensors", "density.none.index", 1},
      {"optim", "adafactor_fp32.safetensors", "p/3/4", 1e-5},
      {"optim", "lion_fp32.safetensors", "p/10/5", 1e-7},
      {"optim", "blockwise8.safetensors", "normal/signed/absmax", 1e-5},
  };
  for (const auto& [name, file, tensor, delta] : kCases) {
    TemporaryFolder other;
    fs::copy(kGolden / name, other / "case", fs::copy_options::recursive);
    ASSERT_EQ(run_on({other.path()}).code(), ExitCode::kOk) << name;
    disturb(other / "case" / file, tensor, delta);
    const Outcome outcome = run_on({other.path()});
    EXPECT_EQ(outcome.code(), ExitCode::kDiffers) << tensor;
    EXPECT_EQ(outcome.report.num_failed(), 1) << failures(outcome);
    EXPECT_THAT(outcome.lines, Contains(AllOf(HasSubstr(tensor), EndsWith("FAIL"))));
  }
}

TEST_F(FluxCheck, ChecksWhatIsThere) {
  const fs::path clip = copy("models/clip"), ops = copy("models/ops"),
                 tokenizers = copy("tokenizers-tiny");
  TensorMap one{
      {"silu.x", read_weights(ops / "vectors.safetensors").tensors.at("silu.x").clone()},
      {"silu.output", read_weights(ops / "vectors.safetensors").tensors.at("silu.output").clone()}};
  write_weights(ops / "vectors.safetensors", one, {});
  fs::remove(tokenizers / "tokens.jsonl");
  const Outcome outcome = run_on({ops, tokenizers});
  EXPECT_EQ(outcome.code(), ExitCode::kOk) << failures(outcome);
  EXPECT_THAT(outcome.lines, Contains(HasSubstr("silu.output")));
}

TEST_F(FluxCheck, FailsIfACaseHoldsNothing) {
  const fs::path ops = copy("models/ops");
  fs::remove(ops / "vectors.safetensors");
  const Outcome outcome = run_on({folder.path()});
  EXPECT_EQ(outcome.code(), ExitCode::kDiffers);
  EXPECT_THAT(outcome.lines, Contains(HasSubstr("nothing")));
}

TEST_F(FluxCheck, FailsWhereARecordedThingHoldsNothingToCompare) {
  const std::string bmp = two_pixels(),
                    toml =
                        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "
                        "\"cats\"\nclass_tokens = \"x\"\n";
  const std::string config =
      R"({"config": 3, "resolution": [128, 128], "min": 64, "max": 256, "steps": 64, "no_upscale": false)";
  const auto with_config = [&](const std::string& more) {
    return R"({"configs": [)" + config + more + "}]}";
  };
  using Files = std::vector<std::pair<std::string, std::string>>;
  const std::tuple<const char*, Files, const char*> kCases[] = {
      {"data-buckets", {{"buckets.json", R"({"configs": []})"}}, "buckets.json"},
      {"data-buckets", {{"buckets.json", with_config("")}}, "buckets.json"},
      {"data-buckets",
       {{"buckets.json", with_config(", \"min_adjusted\": 64")}, {"select.jsonl", ""}},
       "select.jsonl"},
      {"data-buckets",
       {{"buckets.json", with_config(", \"min_adjusted\": 64")},
        {"select.jsonl", R"({"config": 3, "wh": [100, 90]})"}},
       "select.jsonl"},
      {"data-buckets",
       {{"buckets.json", with_config(", \"min_adjusted\": 64")},
        {"batches.json", R"({"cases": []})"}},
       "batches.json"},
      {"data-captions",
       {{"captions.jsonl", ""},
        {"validation_split.json",
         R"({"cases": [{"n": 4, "split": 0.25, "train": 3, "validation": 1}]})"}},
       "captions.jsonl"},
      {"data-images",
       {{"a.bmp", bmp}, {"expected.json", R"({"images": [{"file": "a.bmp", "lossless": true}]})"}},
       "a.bmp"},
      {"data-plans",
       {{"one.toml", toml},
        {"../sets/cats/a.bmp", bmp},
        {"one.json",
         R"({"train": [{"batch_size": 1, "subsets": [{}], "images": [{"key": "cats/a.bmp"}]}]})"}},
       "one.toml"}};
  for (const auto& [kind, files, named] : kCases) {
    SCOPED_TRACE(std::string(kind) + " " + named);
    TemporaryFolder tree;
    tree.write("case/case.json", fmt::format(R"({{"kind": "{}"}})", kind));
    for (const auto& [file, text] : files) tree.write("case/" + file, text);
    const Outcome outcome = run_on({tree / "case"});
    EXPECT_EQ(outcome.code(), ExitCode::kDiffers);
    EXPECT_EQ(outcome.report.num_failed(), 1) << failures(outcome);
    EXPECT_THAT(outcome.lines, Contains(AllOf(HasSubstr(named), EndsWith("FAIL"))));
  }
}

TEST_F(FluxCheck, StopsAtASignalDuringTheLastCaseToo) {
  Options options;
  options.folders = {kGolden / "models/timesteps"};
  options.device = DeviceChoice::kCpu;
  EXPECT_THROW(run(options, [](const std::string&) { cancel::set(ExitCode::kTerminate); }),
               Interrupted);
  cancel::set(std::nullopt);
}

TEST_F(FluxCheck, NamesUnknownKinds) {
  folder.write("a/case.json", R"({"kind": "later"})");
  const Outcome outcome = run_on({folder.path()});
  EXPECT_EQ(outcome.code(), ExitCode::kTooManyFailed);
  EXPECT_THAT(outcome.report.line(), HasSubstr("unknown_kinds=later"));
}

TEST_F(FluxCheck, NamesAMissingVocabularyAndRunsTheRest) {
  const fs::path tokenizers = copy("tokenizers-tiny");
  copy("models/ops");
  fs::remove_all(tokenizers / "vocabularies" / "clip");
  const Outcome outcome = run_on({tokenizers, folder / "models"});
  EXPECT_EQ(outcome.code(), ExitCode::kInput);
  EXPECT_THAT(outcome.lines,
              Contains(AllOf(HasSubstr("vocabularies/clip"), HasSubstr("is not there"))));
  EXPECT_GT(outcome.report.num_checked(), 40);
}

TEST_F(FluxCheck, RefusesFoldersWithoutCases) {
  EXPECT_THROW(run_on({folder.path()}), InputError);
  try {
    run_on({folder / "absent.json"});
    FAIL();
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(), HasSubstr("absent.json: no such file or folder"));
  }
  folder.write("a/case.json", "{");
  EXPECT_EQ(run_on({folder.path()}).code(), ExitCode::kInput);
}

TEST_F(FluxCheck, FindsCasesBehindLinksOnce) {
  const fs::path ops = copy("models/ops");
  fs::create_directory_symlink(folder.path(), folder / "cycle");
  fs::create_directory_symlink(ops, folder / "again");
  int64_t num_lines = 0;
  for (const std::string& line : run_on({folder.path()}).lines)
    num_lines += line.find("silu.output") != std::string::npos;
  EXPECT_EQ(num_lines, 1);
}

TEST_F(FluxCheck, SkipsKindsWithoutBf16LimitsByName) {
  const Outcome outcome =
      run_on({kGolden / "models/clip", kGolden / "models/ops"}, Precision::kBF16);
  EXPECT_EQ(outcome.code(), ExitCode::kOk) << failures(outcome);
  EXPECT_THAT(outcome.report.line(), HasSubstr("skipped_kinds=ops"));
  EXPECT_EQ(outcome.report.num_checked(), 2);
}

TEST_F(FluxCheck, RefusesAHostileFileThatIsRead) {
  const fs::path hostile = copy("hostile");
  fs::copy_file(hostile / "safetensors/ok_two.safetensors",
                hostile / "safetensors/bad_hole.safetensors",
                fs::copy_options::overwrite_existing);
  const Outcome outcome = run_on({folder.path()});
  EXPECT_EQ(outcome.report.num_failed(), 1);
  EXPECT_THAT(outcome.lines, Contains(AllOf(HasSubstr("bad_hole"), EndsWith("FAIL"))));
}

TEST(FluxCheckShared, AgreesWithTheWholeReferenceSet) {
  FLUX_SHARED_DATA_OR_SKIP(golden, "golden");
  for (const Precision precision : {Precision::kF32, Precision::kBF16}) {
    const Outcome outcome = run_on(
        {golden / "models", golden / "tokenizers", golden / "hostile/safetensors"}, precision);
    EXPECT_EQ(outcome.code(), ExitCode::kOk) << failures(outcome);
  }
  const Outcome outcome = run_on({golden / "data", golden / "hostile"});
  EXPECT_EQ(outcome.code(), ExitCode::kOk) << failures(outcome);
  EXPECT_GT(outcome.report.num_checked(), 9);
}

// ---- kinds about data: files that agree, and the same with one thing changed

struct DataCase {
  const char* name;
  std::vector<std::pair<std::string, std::string>> files;
  // each makes the case fail: file, what is in it, what is there instead
  std::vector<std::array<std::string, 3>> changes;
};
std::ostream& operator<<(std::ostream& out, const DataCase& c) { return out << c.name; }

class DataKinds : public testing::TestWithParam<DataCase> {};

TEST_P(DataKinds, FailIfOneRecordedThingIsChanged) {
  const DataCase& c = GetParam();
  const auto write_all = [&](const TemporaryFolder& folder) {
    for (auto [file, text] : c.files) {
      if (file.ends_with(".jsonl")) std::replace(text.begin(), text.end(), '\n', ' ');
      folder.write("tree/" + file, text);
    }
  };
  TemporaryFolder good;
  write_all(good);
  const Outcome outcome = run_on({good / "tree"});
  EXPECT_EQ(outcome.code(), ExitCode::kOk) << failures(outcome);
  EXPECT_GT(outcome.report.num_checked(), 0);
  for (const auto& [file, from, to] : c.changes) {
    SCOPED_TRACE(file + ": " + from + " -> " + to);
    TemporaryFolder folder;
    write_all(folder);
    std::string text = read_file(folder / "tree" / file);
    ASSERT_NE(text.find(from), std::string::npos);
    folder.write("tree/" + file, text.replace(text.find(from), from.size(), to));
    const Outcome changed = run_on({folder / "tree"});
    EXPECT_EQ(changed.code(), ExitCode::kDiffers) << failures(changed);
    EXPECT_EQ(changed.report.num_failed(), 1) << failures(changed);
  }
}

INSTANTIATE_TEST_SUITE_P(
    AllKinds,
    DataKinds,
    testing::Values(
        DataCase{
            "Buckets",
            {{"b/case.json", R"({"kind": "data-buckets"})"},
             {"b/buckets.json",
              R"({"configs": [{"config": 3, "resolution": [128, 128], "min": 65, "max": 256, "steps": 64,
                       "no_upscale": false, "min_adjusted": 64, "max_adjusted": 256,
                       "buckets": [[64, 192], [64, 256], [128, 128], [192, 64], [256, 64]]},
                      {"config": 4, "resolution": [128, 128], "min": 256, "max": 256, "steps": 64,
                       "no_upscale": false, "error": "ValueError"}]})"},
             {"b/select.jsonl",
              R"({"config": 3, "wh": [100, 90], "bucket": [128, 128], "resized": [142, 128], "crop_xy": [7, 0],
                       "filter": "lanczos"})"},
             {"b/batches.json",
              R"({"cases": [{"bucket_counts": [7, 20], "batch_size": 2, "batches": 14}]})"}},
            {{"b/buckets.json", "\"min_adjusted\": 64", "\"min_adjusted\": 65"},
             {"b/buckets.json", "[256, 64]]", "[256, 128]]"},
             {"b/buckets.json", "\"error\"", "\"warning\""},
             {"b/select.jsonl", "[7, 0]", "[8, 0]"},
             {"b/select.jsonl", "lanczos", "area"},
             {"b/batches.json", "14", "13"}}},
        DataCase{
            "Captions",
            {{"c/case.json", R"({"kind": "data-captions"})"},
             {"c/captions.jsonl",
              R"({"id": 0, "caption": "a,b,c", "shuffle_caption": true, "keep_tokens": 1, "current_epoch": 1,
                       "current_step": 0, "max_train_steps": 9, "draws": [{"shuffle": [1, 0]}], "result": "a, c, b"})"},
             {"c/validation_split.json",
              R"({"cases": [{"n": 4, "split": 0.25, "train": 3, "validation": 1, "disjoint": true}]})"}},
            {{"c/captions.jsonl", "a, c, b", "a, b, c"},
             {"c/captions.jsonl", "[1, 0]", "[0, 1]"},
             {"c/captions.jsonl", "[{\"shuffle\": [1, 0]}]", "[]"},
             {"c/validation_split.json", "\"train\": 3", "\"train\": 2"}}},
        DataCase{
            "Images",
            {{"i/case.json", R"({"kind": "data-images"})"},
             {"i/a.bmp", two_pixels()},
             {"i/b.bmp", two_pixels().substr(0, 60)},
             {"i/expected.json",
              R"({"images": [{"file": "a.bmp", "lossless": true, "exif_orientation": null, "kohya": {"width": 1,
                       "height": 2, "mean": [4.5, 3.5, 2.5],
                       "sha256": ")" +
                  to_hex(sha256(std::string_view("\x06\x05\x04\x03\x02\x01"))) +
                  R"("}}, {"file": "b.bmp", "refuse": true}, {"file": "absent.bmp"}]})"}},
            {{"i/expected.json", "\"height\": 2", "\"height\": 3"},
             {"i/expected.json", "4.5", "4.6"},
             {"i/expected.json", "\"sha256\": \"", "\"sha256\": \"0"},
             {"i/expected.json", "null", "6"}}},
        DataCase{
            "Plans",
            {{"p/case.json", R"({"kind": "data-plans"})"},
             {"sets/cats/a.bmp", two_pixels()},
             {"sets/cats/a.txt", "a cat"},
             {"p/one.toml",
              "# args: --train_batch_size 2\n[[datasets]]\nresolution = 64\n"
              "[[datasets.subsets]]\nimage_dir = \"cats\"\ncaption_extension = "
              "\".txt\"\nnum_repeats = 3\n"},
             {"p/one.json",
              R"({"train": [{"batch_size": 2, "resolution": [64, 64], "num_train_images": 3, "text_cacheable": true,
                       "batches_per_epoch": 2, "subsets": [{"image_dir": "cats", "img_count": 1, "keep_tokens": 0}],
                       "images": [{"key": "cats/a.bmp", "caption": "a cat", "size": [1, 2], "bucket": [64, 64],
                                   "resized": [64, 128]}],
                       "buckets": [{"resolution": [64, 64], "count": 3}]}], "batches_per_epoch": 2, "validation": []})"},
             {"p/two.toml", "[[datasets]]\nresolutoin = 64\n"},
             {"p/two.json", R"({"expect": "unknown key"})"}},
            {{"p/one.json", "a cat", "a dog"},
             {"p/one.json", "\"batch_size\": 2", "\"batch_size\": 1"},
             {"p/one.json", "true", "false"},
             {"p/one.json", "[64, 128]", "[64, 127]"},
             {"p/one.json", "\"count\": 3", "\"count\": 4"},
             {"p/one.json", "\"keep_tokens\": 0", "\"keep_tokens\": 1"},
             {"p/one.json", "cats/a.bmp", "cats/b.bmp"},
             {"p/one.json", "\"train\"", "\"expect\": \"no\", \"train\""},
             {"p/two.toml",
              "resolutoin = 64",
              "resolution = 64\n[[datasets.subsets]]\nimage_dir = \"cats\"\ncaption_extension = "
              "\".txt\""}}},
        DataCase{
            "Hostile",
            {{"h/images/case.json", R"({"kind": "hostile-images", "index": "../index.json"})"},
             {"h/captions/case.json", R"({"kind": "hostile-captions", "index": "../index.json"})"},
             {"h/hdf5/case.json", R"({"kind": "hostile-hdf5", "index": "../index.json"})"},
             {"h/images/a.bmp", two_pixels()},
             {"h/captions/a.txt", "a cat\nb"},
             {"h/hdf5/a.h5", "not one"},
             {"h/index.json",
              R"({"images": [{"file": "images/a.bmp", "expect": "accept", "size": [1, 2]},
                                  {"file": "images/absent.bmp", "expect": "accept"}],
                       "captions": [{"file": "captions/a.txt", "expect": "accept", "text": "a cat"}],
                       "hdf5": [{"file": "hdf5/a.h5", "expect": "refuse"}]})"}},
            {{"h/index.json", "[1, 2]", "[2, 1]"},
             {"h/index.json", "accept", "refuse"},
             {"h/index.json", "a cat", "a dog"},
             {"h/index.json", "refuse", "accept"},
             {"h/index.json", "\"expect\": \"refuse\"", "\"expect\": \"?\""}}}),
    [](const auto& tested) { return tested.param.name; });

TEST_F(FluxCheck, ComparesScaledPictures) {
  const fs::path file = folder / "resize.safetensors";
  folder.write("case.json", R"({"kind": "data-resize"})");
  const auto write = [&](const char* rule) {
    folder.write(
        "resize.json",
        fmt::format(R"({{"cases": [{{"id": 5, "src": [2, 1], "resized": [2, 1], "bucket": [1, 1],
                                 "rule": "{}"}}]}})",
                    rule));
  };
  const at::Tensor source = at::tensor({1, 2, 3, 4, 5, 6}, at::kByte).view({1, 2, 3}),
                   out = source.slice(1, 0, 1).contiguous();
  write("none");
  write_weights(file, {{"5/src", source}, {"5/out", out}}, {});
  EXPECT_EQ(run_on({folder.path()}).code(), ExitCode::kOk);
  write_weights(file, {{"5/src", source}, {"5/out", out + 1}}, {});
  EXPECT_EQ(run_on({folder.path()}).code(), ExitCode::kDiffers);
  folder.write("case.json", R"({"kind": "data-resize", "limits": {"out": {"max": 1}}})");
  EXPECT_EQ(run_on({folder.path()}).code(), ExitCode::kOk);
  write("area");
  EXPECT_EQ(run_on({folder.path()}).code(), ExitCode::kDiffers);
  folder.write("resize.json", R"({"cases": [{"id": 5, "resized": [2, 1], "bucket": [1, 1]}]})");
  write_weights(file, {{"5/src", source}}, {});
  const Outcome nothing = run_on({folder.path()});
  EXPECT_EQ(nothing.code(), ExitCode::kDiffers);
  EXPECT_THAT(nothing.lines, Contains(AllOf(HasSubstr("nothing is recorded"), EndsWith("FAIL"))));
}

TEST_F(FluxCheck, TakesACaseFileAndRunsWhatIsNamedTwiceOnce) {
  const fs::path ops = copy("models/ops");
  const Outcome once = run_on({ops}), file = run_on({ops / "case.json"}),
                twice = run_on({ops, folder.path(), ops / "case.json", ops});
  EXPECT_GT(once.report.num_checked(), 0);
  EXPECT_EQ(file.report.num_checked(), once.report.num_checked());
  EXPECT_EQ(twice.report.num_checked(), once.report.num_checked());
  try {
    run_on({ops / "vectors.safetensors"});
    FAIL();
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("a file, not a folder"), HasSubstr("case.json")));
  }
}

}  // namespace
}  // namespace flux::check
