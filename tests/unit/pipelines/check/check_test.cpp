#include "pipelines/check/run.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "common/core/error.h"
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
  EXPECT_THROW(run_on({folder / "absent"}), InputError);
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
}

}  // namespace
}  // namespace flux::check
