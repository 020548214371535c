#include "pipelines/text/run.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "common/tensor/tensor.h"
#include "formats/cache/reader.h"
#include "pipelines/model/tiny.h"
#include "pipelines/text/memory.h"
#include "pipelines/text/nets.h"
#include "tests/support/temporary_folder.h"

namespace flux {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;
using text::Options;

/// Small models, made once.
const fs::path& models() {
  static const test::TemporaryFolder folder;
  static const bool made = [] {
    model::TinyOptions options;
    options.out = folder.path();
    options.seed = 3;
    model::tiny(options);
    return true;
  }();
  (void)made;
  return folder.path();
}

class TextPipeline : public testing::Test {
 protected:
  TextPipeline() {
    options.data.images = folder.path() / "images";
    options.t5 = models() / "t5.safetensors";
    options.clip = models() / "clip.safetensors";
    options.encode.out = folder.path() / "cache";
    options.encode.device = DeviceChoice::kCpu;
    options.command_line = "test";
    fs::create_directory(options.data.images);
    setenv("XDG_CACHE_HOME", (folder.path() / "home").c_str(), 1);
  }
  ~TextPipeline() override { cancel::set(std::nullopt); }

  /// In which T5 streams: what the message of a refusal says, and a little.
  int64_t smallest_budget() {
    const t5::File file(options.t5);
    Options one = options;
    one.encode.batch_size = 1;
    one.host_memory = int64_t{1} << 40;
    const auto resident =
        text::plan_t5(file, at::kFloat, at::kCPU, one, text::process_bytes()).bytes;
    one.host_memory = resident - 1;
    return text::plan_t5(file, at::kFloat, at::kCPU, one, text::process_bytes()).bytes + (1 << 20);
  }

  void image(const std::string& name, const std::string& caption) const {
    image_alone(name);
    folder.write("images/" + name + ".txt", caption);
  }
  // no picture is opened by this stage
  void image_alone(const std::string& name) const {
    folder.write("images/" + name + ".png", "picture");
  }
  void dataset(const std::string& subset_keys) {
    options.data.images.clear();
    options.data.dataset = folder.write(
        "dataset.toml",
        "[general]\nresolution = 64\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = '" +
            (folder.path() / "images").native() + "'\n" + subset_keys);
  }
  /// The caption -> its decoded tensors.
  std::map<std::string, std::vector<std::vector<std::byte>>> samples() const {
    const cache::Cache cache(options.encode.out, cache::Kind::kText);
    std::map<std::string, std::vector<std::vector<std::byte>>> out;
    for (const auto& variant : cache.index().variants()) {
      auto sample = cache.read(variant);
      out[sample.info.text] = std::move(sample.tensors);
    }
    return out;
  }
  std::string error_of() const {
    try {
      text::run(options);
    } catch (const Error& error) {
      return std::to_string(static_cast<int>(error.exit_code())) + " " + error.what();
    }
    return "no error";
  }

  test::TemporaryFolder folder;
  Options options;
};

TEST_F(TextPipeline, EncodesEachDistinctCaptionOnce) {
  image("a", "a red circle"), image("b", "a blue square"), image("c", "a red circle");
  const auto report = text::run(options);
  EXPECT_EQ(report.encoded, 2);
  EXPECT_EQ(report.kept, 0);
  EXPECT_EQ(report.exit_code, ExitCode::kOk);
  const cache::Cache cache(options.encode.out, cache::Kind::kText);
  EXPECT_EQ(cache.manifest().num_items, 3);
  EXPECT_EQ(cache.manifest().num_samples, 2);
  EXPECT_EQ(cache.index().path(0), "a.png");
  EXPECT_EQ(cache.index().variants(0)[0].key, cache.index().variants(2)[0].key);
  EXPECT_EQ(cache.info(cache.index().variants(1)[0]).text, "a blue square");
}

TEST_F(TextPipeline, SecondRunEncodesNothingAndKeepsTheManifest) {
  image("a", "a red circle"), image("b", "a blue square");
  text::run(options);
  const auto before = file_stamp(options.encode.out / "manifest.json");
  const auto report = text::run(options);
  EXPECT_EQ(report.encoded, 0);
  EXPECT_EQ(report.kept, 2);
  EXPECT_EQ(file_stamp(options.encode.out / "manifest.json"), before);
}

TEST_F(TextPipeline, EncodesTheEditedCaptionAlone) {
  image("a", "a red circle"), image("b", "a blue square");
  text::run(options);
  image("b", "a green square");
  const auto report = text::run(options);
  EXPECT_EQ(report.encoded, 1);
  EXPECT_EQ(report.changed, 1);
  EXPECT_EQ(report.kept, 1);
  EXPECT_EQ(report.unwanted, 1);
}

TEST_F(TextPipeline, StoresWhatTheNetsGive) {
  image("a", "a photo of the dog");
  options.encode.dtype = DType::kF32;
  options.t5_length_tokens = 256;
  text::run(options);
  text::ClipFiles clip = text::read_clip(options);
  text::T5Files t5 = text::read_t5(options);
  const auto tensor_of = [](const std::vector<int32_t>& ids) {
    return at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong).unsqueeze(0);
  };
  const auto clip_ids =
      tensor_of(clip.tokenizer.padded(clip.tokenizer.encode("a photo of the dog"), 77).ids);
  const auto t5_ids =
      tensor_of(t5.tokenizer.padded(t5.tokenizer.encode("a photo of the dog"), 256).ids);
  const auto pooled = clip::TextModel::load(clip.weights, clip.config, at::kFloat, at::kCPU)
                          .encode(clip_ids)
                          .pooled;
  const auto prompt = t5.weights.load(at::kFloat, at::kCPU).encode(t5_ids);
  const auto stored = samples().at("a photo of the dog");
  const auto bytes = [](const at::Tensor& t) {
    const auto host = host_bytes(t);
    return std::vector<std::byte>(host.begin(), host.end());
  };
  EXPECT_EQ(stored[0], bytes(prompt.contiguous()));
  EXPECT_EQ(stored[1], bytes(pooled.contiguous()));
}

TEST_F(TextPipeline, BitsDoNotDependOnTheBatch) {
  for (int i = 0; i < 5; ++i)
    image("i" + std::to_string(i),
          "a photo of " + std::string(static_cast<size_t>(i), 'x') + " dogs");
  text::run(options);
  const auto alone = samples();
  options.encode.out = folder.path() / "batched";
  options.encode.batch_size = 3;
  text::run(options);
  EXPECT_EQ(alone, samples());
}

TEST_F(TextPipeline, BitsDoNotDependOnWhereT5Is) {
  for (int i = 0; i < 11; ++i)
    image("i" + std::to_string(i),
          "a photo of " + std::string(static_cast<size_t>(i), 'x') + " dogs");
  for (const auto policy : {text::PadPolicy::kFull, text::PadPolicy::kMasked}) {
    options.pad_policy = policy;
    options.encode.out = folder.path() / ("resident" + std::to_string(static_cast<int>(policy)));
    options.host_memory = int64_t{1} << 40;
    options.encode.batch_size = 1;
    text::run(options);
    const auto resident = samples();
    for (const int64_t batch : {1, 4, 256}) {
      options.encode.out = folder.path() / ("streamed" + std::to_string(static_cast<int>(policy)) +
                                            std::to_string(batch));
      options.host_memory = smallest_budget();
      options.encode.batch_size = batch;
      text::run(options);
      EXPECT_TRUE(resident == samples()) << batch;
    }
  }
}

TEST_F(TextPipeline, PlansWhatFits) {
  const t5::File file(options.t5);
  const auto plan = [&](int64_t budget, int64_t batch) {
    options.host_memory = budget;
    options.encode.batch_size = batch;
    return text::plan_t5(file, at::kFloat, at::kCPU, options, /*fixed=*/1000);
  };
  const auto roomy = plan(int64_t{1} << 40, 1);
  EXPECT_FALSE(roomy.streams);
  EXPECT_EQ(roomy.captions, 1);
  EXPECT_EQ(plan(roomy.bytes, 1).bytes, roomy.bytes);
  const auto streamed = plan(roomy.bytes - 1, 1);
  EXPECT_TRUE(streamed.streams);
  EXPECT_LE(streamed.bytes, roomy.bytes - 1);
  const auto many = plan(int64_t{1} << 40, 256);
  EXPECT_EQ(many.captions, 256);
  const auto fewer = plan(many.bytes / 2, 256);
  EXPECT_TRUE(fewer.streams);
  EXPECT_LT(fewer.captions, 256);
  EXPECT_GT(fewer.captions, 1);
  EXPECT_LE(fewer.bytes, many.bytes / 2);
  try {
    plan(2000, 1);
    FAIL() << "nothing fits 2000 bytes";
  } catch (const ResourceError& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("T5 needs"), HasSubstr("--host-memory gives")));
  }
}

TEST_F(TextPipeline, RefusesABudgetBeforeItEncodes) {
  image("a", "a red circle");
  options.host_memory = 1 << 20;
  EXPECT_THROW(text::run(options), ResourceError);
  EXPECT_FALSE(fs::exists(options.encode.out));
}

TEST_F(TextPipeline, MaskedRowsAreZeroAndAnotherSample) {
  image("a", "a red circle");
  text::run(options);
  options.pad_policy = text::PadPolicy::kMasked;
  const auto report = text::run(options);
  EXPECT_EQ(report.encoded, 1);
  EXPECT_EQ(report.unwanted, 1);
  const cache::Cache cache(options.encode.out, cache::Kind::kText);
  const auto sample = cache.read(cache.index().variants(0)[0]);
  const size_t row_bytes = sample.tensors[0].size() / 512, live = sample.info.t5_tokens * row_bytes;
  ASSERT_GT(live, 0u);
  const auto is_zero = [](std::byte b) { return b == std::byte{0}; };
  EXPECT_TRUE(std::all_of(sample.tensors[0].begin() + static_cast<std::ptrdiff_t>(live),
                          sample.tensors[0].end(),
                          is_zero));
  EXPECT_FALSE(std::all_of(sample.tensors[0].begin(),
                           sample.tensors[0].begin() + static_cast<std::ptrdiff_t>(live),
                           is_zero));
  EXPECT_EQ(cache.manifest().recipe.parameters.at("pad_policy"), "masked");
}

TEST_F(TextPipeline, MissingCaptionsEndTheRunByName) {
  image("a", "a red circle");
  for (int i = 0; i < 7; ++i) image_alone("no" + std::to_string(i));
  EXPECT_THAT(error_of(),
              AllOf(HasSubstr(": 7 of 8 images have no caption: no0.png, no1.png"),
                    HasSubstr("no4.png and 2 more"),
                    HasSubstr("hint: write NAME.txt beside each, or use --missing-caption")));
  EXPECT_FALSE(fs::exists(options.encode.out / "manifest.json"));
  options.missing_caption = text::MissingCaption::kEmpty;
  EXPECT_EQ(text::run(options).encoded, 2);
  EXPECT_TRUE(samples().contains(""));
}

TEST_F(TextPipeline, AMissingCaptionIsNamedBySubsetAndMendedWhereItIsRead) {
  image_alone("a");
  dataset("");
  EXPECT_THAT(
      error_of(),
      AllOf(HasSubstr("[[datasets]] 1: [[datasets.subsets]] 1: 1 of 1 images has no caption"),
            HasSubstr("NAME.caption beside each, give class_tokens in the dataset file")));
  const fs::path metadata = folder.write("m.json", R"({"a.png": {}})");
  dataset("metadata_file = '" + metadata.native() + "'\n");
  EXPECT_THAT(error_of(),
              AllOf(HasSubstr("give each a caption or tags in " + metadata.native()),
                    testing::Not(HasSubstr("class_tokens"))));
}

TEST_F(TextPipeline, ClassTokensStandForMissingCaptions) {
  image_alone("a");
  dataset("class_tokens = 'sks dog'\n");
  EXPECT_EQ(text::run(options).encoded, 1);
  EXPECT_TRUE(samples().contains("sks dog"));
}

TEST_F(TextPipeline, DropoutNeedsTheEmptyCaption) {
  image("a", "a red circle");
  dataset("caption_extension = '.txt'\ncaption_dropout_rate = 0.1\n");
  EXPECT_EQ(text::run(options).encoded, 2);
  const cache::Cache cache(options.encode.out, cache::Kind::kText);
  EXPECT_EQ(cache.manifest().num_items, 1);
  ASSERT_EQ(cache.index().num_items(), 2);
  EXPECT_EQ(cache.index().item(1).flags, cache::kItemEmptyCaption);
  EXPECT_EQ(cache.info(cache.index().variants(1)[0]).text, "");
}

TEST_F(TextPipeline, EnumeratesShuffledTags) {
  image("a", "one, two, three");
  dataset("caption_extension = '.txt'\nshuffle_caption = true\n");
  EXPECT_EQ(text::run(options).encoded, 6);
  const cache::Cache cache(options.encode.out, cache::Kind::kText);
  for (const auto& variant : cache.index().variants(0)) EXPECT_DOUBLE_EQ(variant.weight, 1.0 / 6);
  options.text_variants = 2;
  EXPECT_LE(text::run(options).kept, 2);
}

TEST_F(TextPipeline, ReadsPromptsLineByLine) {
  options.data.images.clear();
  options.prompts = folder.write(
      "prompts.txt", "\uFEFFa red circle\r\n\n  # a comment\n a blue square \na red circle");
  EXPECT_EQ(text::run(options).encoded, 2);
  const cache::Cache cache(options.encode.out, cache::Kind::kText);
  ASSERT_EQ(cache.manifest().num_items, 3);
  std::vector<std::string> captions;
  for (int64_t i = 0; i < 3; ++i) captions.push_back(cache.info(cache.index().variants(i)[0]).text);
  EXPECT_THAT(captions, ElementsAre("a red circle", "a blue square", "a red circle"));
  EXPECT_EQ(cache.manifest().plan.at("kind"), "prompts");
  options.prompts = folder.write("empty.txt", "\n# nothing\n");
  EXPECT_THAT(error_of(), HasSubstr("3 " + show(options.prompts) + ": has no prompt"));
  options.prompts = folder.write("bad.txt", "good\nb\xFF");
  EXPECT_THAT(error_of(), HasSubstr("not UTF-8 at byte 6"));
}

TEST_F(TextPipeline, BadCaptionsAreQuarantinedAndCounted) {
  image("a", "a red circle"), image("b", "caf\xE9"), image("c", "a blue square");
  const auto refused = text::run(options);
  EXPECT_EQ(refused.exit_code, ExitCode::kTooManyFailed);
  EXPECT_EQ(refused.failed, 1);
  EXPECT_EQ(refused.encoded, 2);
  EXPECT_FALSE(fs::exists(options.encode.out / "manifest.json"));
  EXPECT_THAT(read_file(options.encode.out / "quarantine.jsonl"), HasSubstr("b.png"));
  options.encode.max_failed = 1;
  const auto allowed = text::run(options);
  EXPECT_EQ(allowed.exit_code, ExitCode::kOk);
  EXPECT_EQ(allowed.kept, 2);
  EXPECT_EQ(allowed.failed, 1);
  const auto manifest = cache::read_manifest(options.encode.out);
  EXPECT_EQ(manifest.num_items, 2);
  ASSERT_EQ(manifest.quarantined.size(), 1u);
  EXPECT_EQ(manifest.quarantined[0].path, "b.png");
  EXPECT_EQ(manifest.quarantined[0].reason, "b.txt: not UTF-8 at byte 3");  // wherever it lies
}

TEST_F(TextPipeline, CountsWhatIsCutOff) {
  std::string longer = "the";
  for (int i = 0; i < 299; ++i) longer += " dog";
  image("a", longer), image("b", "a red circle");
  options.t5_length_tokens = 256;
  text::run(options);
  const cache::Cache cache(options.encode.out, cache::Kind::kText);
  const auto info = cache.info(cache.index().variants(0)[0]);
  EXPECT_EQ(info.t5_tokens, 256u);
  EXPECT_EQ(info.t5_lost, 301u - 256u);
  EXPECT_EQ(info.clip_tokens, 77u);
  EXPECT_EQ(info.clip_lost, 302u - 77u);
  const auto truncated = cache.manifest().provenance.at("truncated");
  EXPECT_EQ(truncated.at("t5_256"),
            (nlohmann::json{{"captions", 1}, {"tokens_used", 256 + 4}, {"tokens_lost", 45}}));
  EXPECT_EQ(truncated.at("t5_512").at("tokens_lost"), 0);
  EXPECT_EQ(truncated.at("clip_77").at("tokens_lost"), 302 - 77);
  ASSERT_EQ(truncated.at("worst").size(), 1u);
  EXPECT_EQ(truncated.at("worst")[0].at("t5_tokens"), 301);
  EXPECT_EQ(truncated.at("worst")[0].at("t5_lost_256"), 45);
  EXPECT_EQ(truncated.at("worst")[0].at("clip_lost_77"), 302 - 77);
}

TEST_F(TextPipeline, AnEditedCaptionIsNamedAsTheReason) {
  image("a", "a red circle"), image("b", "a blue square");
  text::run(options);
  image("a", "a green circle");
  const auto report = text::run(options);
  EXPECT_EQ(report.encoded, 1);
  EXPECT_EQ(report.changed_by, (nlohmann::json{{"caption", 1}}));
  EXPECT_TRUE(report.changed_fields.empty());
  options.t5_length_tokens = 256;
  const auto shorter = text::run(options);
  EXPECT_EQ(shorter.encoded, 2);
  EXPECT_EQ(shorter.changed_by, (nlohmann::json{{"parameters.t5_length", 2}}));
  ASSERT_EQ(shorter.changed_fields.size(), 1u);
  EXPECT_NE(shorter.changed_fields[0].find("parameters.t5_length"), std::string::npos);
}

TEST_F(TextPipeline, EveryFieldThatChangesIsNamed) {
  image("a", "one, two, three, four");
  const auto shuffled = [&] { dataset("caption_extension = '.txt'\nshuffle_caption = true\n"); };
  const auto plain = [&] { dataset("caption_extension = '.txt'\n"); };
  model::TinyOptions tiny;
  tiny.out = folder.path() / "models2";
  tiny.seed = 4;
  model::tiny(tiny);
  struct Change {
    const char* field;
    std::function<void()> before, make;
  };
  const std::vector<Change> changes{
      {"parameters.t5_length", plain, [&] { options.t5_length_tokens = 256; }},
      {"parameters.pad_policy", plain, [&] { options.pad_policy = text::PadPolicy::kMasked; }},
      {"parameters.precision", plain, [&] { options.encode.precision = stage::Precision::kBF16; }},
      {"parameters.dtype", plain, [&] { options.encode.dtype = DType::kF32; }},
      {"weights.t5", plain, [&] { options.t5 = folder.path() / "models2/t5.safetensors"; }},
      {"weights.clip", plain, [&] { options.clip = folder.path() / "models2/clip.safetensors"; }},
      {"caption", plain, [&] { image("a", "one, two"); }},
      {"parameters.text_variants", shuffled, [&] { options.text_variants = 24; }}};
  const auto base = options;
  int number = 0;
  for (const auto& change : changes) {
    SCOPED_TRACE(change.field);
    options = base;
    image("a", "one, two, three, four");
    change.before();
    options.encode.out = folder.path() / ("cache" + std::to_string(number++));
    text::run(options);
    change.make();
    const auto report = text::run(options);
    EXPECT_GE(report.changed, 1);
    EXPECT_EQ(report.changed_by, (nlohmann::json{{change.field, report.changed}}));
  }
  shuffled();
  options.text_variants = 2;  // fewer: nothing to encode perhaps, but it is said
  const auto fewer = text::run(options);
  EXPECT_THAT(fewer.changed_fields, ElementsAre(HasSubstr("parameters.text_variants")));
}

TEST_F(TextPipeline, VariantsWithoutRandomPartsAreWarnedOf) {
  image("a", "one, two");
  options.text_variants = 4;
  testing::internal::CaptureStderr();
  text::run(options);
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("--text-variants 4 has no effect"));
  dataset("caption_extension = '.txt'\nshuffle_caption = true\n");
  for (const int64_t variants : {1, 4}) {
    options.text_variants = variants;
    testing::internal::CaptureStderr();
    text::run(options);
    EXPECT_THAT(testing::internal::GetCapturedStderr(), Not(HasSubstr("has no effect")));
  }
}

TEST_F(TextPipeline, PromptsAndCaptionsDoNotReplaceEachOther) {
  image("a", "a red circle");
  text::run(options);
  const auto before = read_file(options.encode.out / "manifest.json");
  const auto images = options.data.images;
  options.data.images.clear();
  options.prompts = folder.write("prompts.txt", "a red circle\n");
  EXPECT_THAT(error_of(), AllOf(HasSubstr("4 "), HasSubstr("this run writes prompts")));
  EXPECT_EQ(read_file(options.encode.out / "manifest.json"), before);
  options.encode.out = folder.path() / "prompts";
  EXPECT_EQ(error_of(), "no error");
  options.prompts.clear();
  options.data.images = images;
  EXPECT_THAT(error_of(), AllOf(HasSubstr("4 "), HasSubstr("is a cache of prompts")));
}

TEST_F(TextPipeline, TimesOfARunWithoutManifestAreKept) {
  image("a", "a red circle"), image("b", "caf\xE9");
  EXPECT_EQ(text::run(options).exit_code, ExitCode::kTooManyFailed);
  options.encode.max_failed = 1;
  EXPECT_EQ(text::run(options).encoded, 0);
  const auto provenance = cache::read_manifest(options.encode.out).provenance;
  EXPECT_GT(provenance.at("captions_per_second").get<double>(), 0);
  EXPECT_GT(provenance.at("stage_seconds").at("t5").get<double>(), 0);
  EXPECT_FALSE(provenance.at("limit").get<std::string>().empty());
  EXPECT_EQ(provenance.at("truncated").at("clip_77").at("tokens_used"), 5);
  image("a", std::string("a red circle and a square"));
  text::run(options);
  image("a", "a red circle");
  EXPECT_EQ(text::run(options).encoded, 0);  // what it was before; so is what is said about it
  EXPECT_EQ(cache::read_manifest(options.encode.out).provenance.at("truncated"),
            provenance.at("truncated"));
}

TEST_F(TextPipeline, PredictsTheBytesOfAnyNet) {
  for (int i = 0; i < 12; ++i)
    image("i" + std::to_string(i), "a photo of" + std::string(static_cast<size_t>(4 * i), 'x'));
  for (const auto policy : {text::PadPolicy::kFull, text::PadPolicy::kMasked}) {
    for (const auto dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      options.pad_policy = policy, options.encode.dtype = dtype;
      options.encode.out = folder.path() / ("cache" + std::to_string(static_cast<int>(policy)) +
                                            std::to_string(static_cast<int>(dtype)));
      const auto predicted = static_cast<double>(text::run(options).predicted_bytes);
      double bytes = 0;
      for (const auto& segment : cache::read_manifest(options.encode.out).segments)
        bytes += static_cast<double>(segment.bytes);
      EXPECT_NEAR(predicted, bytes, 0.25 * bytes);
    }
  }
}

TEST_F(TextPipeline, PartsHoldEveryCaptionOnce) {
  for (int i = 0; i < 9; ++i) image("i" + std::to_string(i), "photo " + std::to_string(i));
  int64_t sum = 0;
  for (int64_t part = 0; part < 3; ++part) {
    options.encode.out = folder / ("part" + std::to_string(part));
    options.encode.shard = {part, 3};
    sum += text::run(options).encoded;
    EXPECT_EQ(text::run(options).encoded, 0);
    const auto manifest = cache::read_manifest(options.encode.out);
    EXPECT_EQ(manifest.shard, options.encode.shard);
    EXPECT_EQ(manifest.num_items, 9);
  }
  EXPECT_EQ(sum, 9);
}

TEST_F(TextPipeline, ReproducesItsOwnBits) {
  for (int i = 0; i < 5; ++i) image("i" + std::to_string(i), "photo " + std::to_string(i));
  text::run(options);
  options.encode.reproduce = 3;
  options.encode.batch_size = 2;
  const auto report = text::run(options);
  ASSERT_TRUE(report.drift);
  EXPECT_EQ(report.drift->num_samples, 3);
  EXPECT_EQ(report.drift->num_equal, 3);
  EXPECT_EQ(report.exit_code, ExitCode::kOk);
}

TEST_F(TextPipeline, AFolderKeepsItsPrecision) {
  image("a", "a red circle");
  options.encode.precision = stage::Precision::kBF16;
  text::run(options);
  options.encode.precision.reset();
  EXPECT_EQ(text::run(options).kept, 1);
  options.encode.precision = stage::Precision::kF32;
  EXPECT_EQ(text::run(options).encoded, 1);
}

TEST_F(TextPipeline, ASignalKeepsWhatIsFinished) {
  // on a crowded machine the run may end before the signal comes: then with more captions
  int captions = 120;
  for (int made = 0;; captions *= 4) {
    for (; made < captions; ++made)
      image("i" + std::to_string(made), "photo " + std::to_string(made));
    std::jthread watch(
        [&](const std::stop_token& stop) {  // a signal once the first sample is in the journal
          while (!stop.stop_requested()) {
            std::error_code ignored;
            for (fs::directory_iterator entry(options.encode.out, ignored), end; entry != end;
                 entry.increment(ignored)) {
              if (entry->path().filename().native().starts_with(".journal-"))
                return cancel::set(ExitCode::kInterrupt);
            }
            std::this_thread::yield();
          }
        });
    const std::string error = error_of();
    watch.request_stop();
    watch.join();
    cancel::set(std::nullopt);
    if (error != "no error") {
      EXPECT_THAT(error, HasSubstr("130 "));
      break;
    }
    ASSERT_LT(captions, 10'000);
  }
  const auto report = text::run(options);
  EXPECT_GT(report.kept, 0);
  EXPECT_GT(report.encoded, 0);
  EXPECT_EQ(report.kept + report.encoded, captions);
}

TEST_F(TextPipeline, FindsTokenizersInADiffusersFolder) {
  image("a", "a red circle");
  text::run(options);  // models() has them in `tokenizers`
  const fs::path model = folder.path() / "FLUX.1-dev";
  for (const char* name : {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"})
    fs::create_directories(model / name);
  fs::copy_file(options.clip, model / "text_encoder/model.safetensors");
  fs::copy_file(options.t5, model / "text_encoder_2/model.safetensors");
  for (const char* name : {"vocab.json", "merges.txt"})
    fs::copy_file(models() / "tokenizers/clip" / name, model / "tokenizer" / name);
  fs::copy_file(models() / "tokenizers/t5/spiece.model", model / "tokenizer_2/spiece.model");
  options.clip = model / "text_encoder/model.safetensors";
  options.t5 = model / "text_encoder_2/model.safetensors";
  EXPECT_EQ(text::run(options).kept, 1);  // identity is content, not place
  fs::remove_all(model / "tokenizer_2");
  EXPECT_THAT(error_of(), HasSubstr("2 --t5-tokenizer FILE is required"));
}

TEST_F(TextPipeline, RefusesATokenizerOfOtherWeights) {
  image("a", "a red circle");
  auto vocab = nlohmann::json::parse(read_file(models() / "tokenizers/clip/vocab.json"));
  vocab["surplus</w>"] = vocab.size();
  folder.write("clip/vocab.json", vocab.dump());
  folder.write("clip/merges.txt", read_file(models() / "tokenizers/clip/merges.txt"));
  options.clip_tokenizer = folder.path() / "clip";
  EXPECT_THAT(error_of(),
              AllOf(HasSubstr("3 "), HasSubstr("ids, but CLIP has"), HasSubstr("rows")));
}

TEST_F(TextPipeline, RefusesSwappedWeights) {
  image("a", "a red circle");
  std::swap(options.t5, options.clip);
  options.t5_tokenizer = models() / "tokenizers/t5/spiece.model";
  options.clip_tokenizer = models() / "tokenizers/clip";
  EXPECT_THAT(error_of(), HasSubstr("3 "));
}

TEST(TextOptions, RefuseWhatHasNoEffect) {
  Options options;
  options.t5 = "t5", options.clip = "clip", options.encode.out = "out";
  EXPECT_THROW(text::check(options), UsageError);  // nothing to read
  options.prompts = "prompts";
  EXPECT_NO_THROW(text::check(options));
  options.data.images = "images";
  EXPECT_THROW(text::check(options), UsageError);
  options.data.images.clear();
  options.text_variants = 3;
  EXPECT_THROW(text::check(options), UsageError);
  options.text_variants.reset();
  options.missing_caption = text::MissingCaption::kEmpty;
  EXPECT_THROW(text::check(options), UsageError);
}

}  // namespace
}  // namespace flux
