#include "pipelines/train/run.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>

#include "common/core/cancel.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/core/process.h"
#include "common/core/text.h"
#include "common/tensor/weight_file.h"
#include "formats/cache/lock.h"
#include "formats/checkpoint/checkpoint.h"
#include "formats/safetensors/reader.h"
#include "pipelines/train/reproduce.h"
#include "tests/support/training_scene.h"

namespace flux::train {
namespace {

using test::message_of;
using test::small_caches;
using testing::AllOf;
using testing::HasSubstr;
using Scene = test::TrainingScene;

std::vector<nlohmann::json> metrics(const std::filesystem::path& run) {
  std::vector<nlohmann::json> out;
  for (const std::string& line : split(read_file(run / "metrics.jsonl"), '\n')) {
    if (!line.empty()) out.push_back(nlohmann::json::parse(line));
  }
  return out;
}

TEST(Train, WritesCheckpointMetricsAndReport) {
  Scene scene;
  scene.options.save_every.steps = 2;
  const Report report = run(scene.options);
  EXPECT_EQ(report.exit_code, ExitCode::kOk);
  EXPECT_EQ(report.steps, 3);
  EXPECT_GT(*report.loss_first, 0);
  EXPECT_GT(*report.seconds_to_first_step, 0);
  EXPECT_GT(report.peak_rss_bytes, 1u << 20);
  EXPECT_EQ(checkpoint::steps_in(scene.options.out), (std::vector<int64_t>{2, 3}));
  const auto lines = metrics(scene.options.out);
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[0]["loss"], *report.loss_first);
  EXPECT_EQ(lines[2]["loss"], *report.loss_last);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(lines[i]["step"], i + 1);
    EXPECT_EQ(lines[i]["epoch"], 1);
    EXPECT_EQ(lines[i]["samples"], 1);
    EXPECT_GT(lines[i]["grad_norm"], 0.0);
    EXPECT_GE(lines[i]["seconds"], lines[i]["data_wait_seconds"]);
  }
}

TEST(Train, SavesALoraInSdScriptsLayoutWithItsMetadata) {
  Scene scene;
  scene.options.alpha = 2;
  run(scene.options);
  const auto file = scene.options.out / "step-000003/lora.safetensors";
  const WeightFile lora = read_weights(file);
  EXPECT_EQ(lora.tensors.size(), 3u * (10 + 3));  // a double and a single block
  const at::Tensor& down =
      lora.tensors.at("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight");
  EXPECT_EQ(down.sizes(), (at::IntArrayRef{4, 128}));
  EXPECT_EQ(down.scalar_type(), at::kBFloat16);
  EXPECT_EQ(lora.tensors.at("lora_unet_single_blocks_0_linear1.alpha").item<float>(), 2);
  const auto& up = lora.tensors.at("lora_unet_single_blocks_0_linear1.lora_up.weight");
  EXPECT_GT(up.abs().max().item<float>(), 0);
  for (const auto& [key, value] :
       std::map<std::string, std::string>{{"ss_network_module", "networks.lora_flux"},
                                          {"ss_network_dim", "4"},
                                          {"ss_network_alpha", "2.0"},
                                          {"ss_base_model_version", "flux1"},
                                          {"ss_steps", "3"},
                                          {"ss_guidance_scale", "1.0"},
                                          {"ss_timestep_sampling", "flux_shift"},
                                          {"ss_model_prediction_type", "raw"},
                                          {"ss_apply_t5_attn_mask", "False"},
                                          {"ss_num_train_images", "3"},
                                          {"modelspec.architecture", "flux-1-dev/lora"}}) {
    EXPECT_EQ(lora.metadata.at(key), value) << key;
  }
  const auto made = nlohmann::json::parse(lora.metadata.at("flux_stages.run"));
  const auto state = nlohmann::json::parse(read_file(scene.options.out / "step-000003/state.json"));
  for (const char* key : {"options", "precision", "latents_sha256", "text_sha256"})
    EXPECT_EQ(made.at(key), state.at(key)) << key;
  EXPECT_EQ(made["options"]["learning-rate"], 1e-3);
  EXPECT_EQ(lora.metadata.at("flux_stages.run").find(scene.folder.path().native()),
            std::string::npos);
  Sha256 hash;
  const auto opened = safetensors::File::open(file);
  for (const auto& tensor : opened->tensors()) hash.add(tensor.bytes);
  EXPECT_EQ(lora.metadata.at("sshs_model_hash"), to_hex(hash.digest()));
  EXPECT_EQ(lora.metadata.at("sshs_legacy_hash").size(), 8u);
}

TEST(Train, ResumesBitForBit) {
  Scene straight, halves;
  straight.options.max_steps = 6;
  run(straight.options);
  run(halves.options);
  halves.options.max_steps = 6;
  halves.options.resume = true;
  const Report report = run(halves.options);
  EXPECT_EQ(report.steps, 6);
  for (const char* name : {"step-000006/lora.safetensors", "step-000006/state.safetensors"}) {
    EXPECT_EQ(read_file(straight.options.out / name), read_file(halves.options.out / name)) << name;
  }
  const auto a = metrics(straight.options.out), b = metrics(halves.options.out);
  ASSERT_EQ(a.size(), 6u);
  ASSERT_EQ(b.size(), 6u);
  for (size_t i = 0; i < 6; ++i) {
    for (const char* field : {"step", "epoch", "loss", "grad_norm", "learning_rate"})
      EXPECT_EQ(a[i][field], b[i][field]) << i;
  }
  EXPECT_EQ(a[5]["epoch"], 2);
}

TEST(Train, ResumingAFinishedRunDoesNothing) {
  Scene scene;
  run(scene.options);
  scene.options.resume = true;
  const Report report = run(scene.options);
  EXPECT_EQ(report.steps, 3);
  EXPECT_FALSE(report.loss_first);
  EXPECT_EQ(report.object()["loss_last"], nullptr);
  scene.options.max_steps = 2;
  EXPECT_THAT(message_of(scene.options), HasSubstr("--max-steps 2"));
}

TEST(Train, DropsMetricsThatWereNotSaved) {
  Scene scene;
  run(scene.options);
  std::ofstream(scene.options.out / "metrics.jsonl", std::ios::app) << R"({"step":4,"loss":9})"
                                                                    << "\n{\"step\":5,\"lo";
  scene.options.resume = true;
  scene.options.max_steps = 4;
  run(scene.options);
  const auto lines = metrics(scene.options.out);
  ASSERT_EQ(lines.size(), 4u);
  EXPECT_NE(lines[3]["loss"], 9);
}

test::TrainingCaches twelve_items() {
  test::TrainingCaches caches;
  for (int i = 0; i < 12; ++i)
    caches.items.push_back(
        {.name = fmt::format("{}.png", i), .rows = 4, .columns = i % 3 == 0 ? 6u : 4u});
  caches.items[5].flags = cache::kItemRegularization;
  return caches;
}

TEST(Train, DoesNotDependOnReaderThreadsAndPrefetch) {
  for (const auto method : {Method::kLora, Method::kFull}) {
    std::string first;
    for (const int64_t threads : {1, 2, 4}) {
      for (const int64_t prefetch : {1, 3, 16}) {
        Scene scene(twelve_items());
        scene.options.method = method;
        scene.options.max_steps = 7;  // across the end of an epoch
        scene.options.gradient_accumulation = 2;
        scene.options.reader_threads = threads;
        scene.options.prefetch = prefetch;
        run(scene.options);
        const std::string state = read_file(scene.options.out / "step-000007/state.safetensors");
        if (first.empty()) first = state;
        EXPECT_TRUE(state == first) << threads << " threads, " << prefetch << " ahead";
      }
    }
  }
}

/// The size of what `b` has otherwise than `a`, over the size of a.
double difference(const at::Tensor& a, const at::Tensor& b) {
  const double size = a.norm().item<double>();
  return (a - b).norm().item<double>() / (size > 0 ? size : 1);
}

// The tolerances are those that docs/training.md states.
TEST(Train, StepsAreTheSameHoweverTheyAreCutIntoMicroBatches) {
  for (const auto method : {Method::kLora, Method::kFull}) {
    Scene whole(twelve_items()), halves(twelve_items()), ones(twelve_items());
    for (Scene* scene : {&whole, &halves, &ones}) {
      Options& o = scene->options;
      o.method = method;
      o.precision = Precision::kF32;
      o.lora_dtype = SaveDtype::kF32;
      o.max_steps = 8;  // 12 samples a bucket-wise epoch of 3 steps
      o.timesteps.stratified = true;
      o.prior_loss_weight = 0.3;
      if (method == Method::kLora) o.network_dropout = o.rank_dropout = o.module_dropout = 0.2;
    }
    whole.options.batch_size = 4;
    halves.options.batch_size = halves.options.gradient_accumulation = 2;
    ones.options.batch_size = 1;
    ones.options.gradient_accumulation = 4;
    const char* const file =
        method == Method::kFull ? "step-000008/model.safetensors" : "step-000008/lora.safetensors";
    run(whole.options);
    const auto expected = metrics(whole.options.out);
    const auto weights = read_weights(whole.options.out / file);
    for (Scene* scene : {&halves, &ones}) {
      run(scene->options);
      const auto lines = metrics(scene->options.out);
      ASSERT_EQ(lines.size(), expected.size());
      for (size_t i = 0; i < lines.size(); ++i) {
        for (const char* field : {"loss", "grad_norm"}) {
          const double a = expected[i][field], b = lines[i][field];
          EXPECT_NEAR(a, b, 1e-5 * a) << field << " of step " << i + 1;
        }
        EXPECT_EQ(lines[i]["samples"], 4);
        EXPECT_EQ(lines[i]["epoch"], expected[i]["epoch"]);
      }
      for (const auto& [name, tensor] : read_weights(scene->options.out / file).tensors)
        EXPECT_LT(difference(weights.tensors.at(name), tensor), 1e-3) << name;
    }
  }
}

TEST(Train, SeedAndOptionsChangeTheResult) {
  Scene one, other;
  other.options.seed = 6;
  EXPECT_NE(*run(one.options).loss_first, *run(other.options).loss_first);
}

TEST(Train, RefusesADamagedOrEditedCheckpoint) {
  Scene scene;
  run(scene.options);
  scene.options.resume = true;
  scene.options.max_steps = 4;
  const auto with = [&](const char* name, const std::function<void(std::string&)>& edit) {
    const auto file = scene.options.out / "step-000003" / name;
    const std::string good = read_file(file);
    std::string bad = good;
    edit(bad);
    write_file_atomic(file, bad);
    const std::string message = message_of(scene.options);
    write_file_atomic(file, good);
    return message;
  };
  EXPECT_THAT(with("state.safetensors", [](std::string& s) { s.back() ^= 1; }),
              AllOf(HasSubstr("state.safetensors"), HasSubstr("damaged")));
  EXPECT_THAT(with("state.json",
                   [](std::string& s) {
                     const auto at = s.find("\"epoch\": 1");
                     ASSERT_NE(at, std::string::npos);
                     s[at + 9] = '0';
                   }),
              AllOf(HasSubstr("state.json"), HasSubstr("edited")));
  scene.options.guidance = 1;  // what it was started with, by default
  EXPECT_EQ(run(scene.options).steps, 4);
}

TEST(Train, KeepsAFinishedRunUnlessToldOtherwise) {
  Scene scene;
  run(scene.options);
  const std::string before = read_file(scene.options.out / "step-000003/state.json");
  EXPECT_THAT(before, HasSubstr("\"attention\": \"flash-cpu\""));
  EXPECT_THAT(message_of(scene.options),
              AllOf(HasSubstr("--resume"), HasSubstr("--replace"), HasSubstr("step 3")));
  EXPECT_EQ(read_file(scene.options.out / "step-000003/state.json"), before);
  scene.options.replace = true;
  scene.options.max_steps = 1;
  run(scene.options);
  EXPECT_EQ(checkpoint::steps_in(scene.options.out), (std::vector<int64_t>{1}));
  EXPECT_EQ(checkpoint::steps_in(scene.folder / "run.old-1"), (std::vector<int64_t>{3}));
}

TEST(Train, ReplacesNothingIfTheNewRunCannotStart) {
  Scene scene;
  run(scene.options);
  scene.options.replace = true;
  scene.options.model = scene.folder / "absent.safetensors";
  EXPECT_THAT(message_of(scene.options), HasSubstr("absent"));
  EXPECT_EQ(checkpoint::steps_in(scene.options.out), (std::vector<int64_t>{3}));
}

TEST(Train, ResumeRefusesWhatWouldChangeTheResult) {
  Scene scene;
  run(scene.options);
  scene.options.resume = true;
  scene.options.max_steps = 6;
  const auto with = [&](const std::function<void(Options&)>& change) {
    Options options = scene.options;
    change(options);
    return message_of(options);
  };
  EXPECT_THAT(
      with([](Options& o) { o.lr.learning_rate = 1e-4; }),
      AllOf(HasSubstr("--learning-rate is 0.0001"), HasSubstr("0.001"), HasSubstr("step-000003")));
  EXPECT_THAT(with([](Options& o) { o.rank = 8; }), AllOf(HasSubstr("8"), HasSubstr("4")));
  EXPECT_THAT(with([](Options& o) { o.guidance = 2; }), HasSubstr("--guidance"));
  EXPECT_THAT(with([](Options& o) { o.precision = Precision::kBF16; }), HasSubstr("--precision"));
  const auto other_model = test::write_tiny_flux(scene.folder / "other.safetensors", true, 2);
  EXPECT_THAT(with([&](Options& o) { o.model = other_model; }),
              AllOf(HasSubstr("other.safetensors"), HasSubstr("weights_sha256")));
  test::TrainingCaches changed = small_caches();
  changed.items[1].num_captions = 2;
  changed.write_text(scene.folder / "other-text");
  EXPECT_THAT(with([&](Options& o) { o.text = scene.folder / "other-text"; }),
              HasSubstr("other-text"));
  EXPECT_EQ(message_of(scene.options), "no error");
}

TEST(Train, ResumeStartsARunWhereNoCheckpointIs) {
  Scene plain, resumed;
  resumed.options.resume = true;
  run(plain.options);
  run(resumed.options);
  for (const char* name : {"state.safetensors", "lora.safetensors"})
    EXPECT_EQ(read_file(plain.options.out / "step-000003" / name),
              read_file(resumed.options.out / "step-000003" / name));
}

TEST(Train, AFinishedRunIsNotChanged) {
  Scene scene;
  run(scene.options);
  const auto contents = [&] {
    std::map<std::string, std::pair<std::string, FileStamp>> out;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(scene.options.out))
      if (entry.is_regular_file())
        out[entry.path()] = {read_file(entry.path()), file_stamp(entry.path())};
    return out;
  };
  const auto before = contents();
  scene.options.resume = true;
  scene.options.save_every.steps = 2;  // would be another run.toml
  const Report report = run(scene.options);
  EXPECT_EQ(report.exit_code, ExitCode::kOk);
  EXPECT_EQ(report.steps, 3);
  EXPECT_EQ(report.object()["loss_first"], nullptr);
  EXPECT_TRUE(contents() == before);
  scene.options.model = test::write_tiny_flux(scene.folder / "other.safetensors", true, 2);
  EXPECT_THAT(message_of(scene.options), HasSubstr("weights_sha256"));
}

TEST(Train, SavesAtTheEndsOfEpochs) {
  Scene scene;  // three batches an epoch
  scene.options.max_steps = 7;
  scene.options.save_every.epochs = 2;
  run(scene.options);
  EXPECT_EQ(checkpoint::steps_in(scene.options.out), (std::vector<int64_t>{6, 7}));
  Scene
      across;  // two batches an update: the second, third and fifth reach into the next epoch or end one
  across.options.max_steps = 4;
  across.options.gradient_accumulation = 2;
  across.options.save_every.epochs = 1;
  run(across.options);
  EXPECT_EQ(checkpoint::steps_in(across.options.out), (std::vector<int64_t>{2, 3, 4}));
  across.options.resume = true;
  across.options.max_steps = 6;
  run(across.options);
  EXPECT_EQ(checkpoint::steps_in(across.options.out), (std::vector<int64_t>{2, 3, 4, 5, 6}));
}

TEST(Train, SavesByTheClockChangeNothing) {
  for (const bool full : {false, true}) {
    Scene plain, timed;
    for (Scene* scene : {&plain, &timed}) {
      scene->options.max_steps = 5;
      scene->options.resident_blocks = 0;  // updates wait for the next step
      scene->options.method = full ? Method::kFull : Method::kLora;
    }
    plain.options.save_every.minutes = 1e6;
    timed.options.save_every.minutes = 1e-9;
    run(plain.options);
    run(timed.options);
    EXPECT_EQ(checkpoint::steps_in(plain.options.out), (std::vector<int64_t>{5}));
    EXPECT_EQ(checkpoint::steps_in(timed.options.out), (std::vector<int64_t>{1, 2, 3, 4, 5}));
    for (const char* name :
         {"state.safetensors", full ? "model.safetensors" : "lora.safetensors"}) {
      EXPECT_EQ(read_file(plain.options.out / "step-000005" / name),
                read_file(timed.options.out / "step-000005" / name));
    }
  }
}

TEST(Train, KeepsTheNewestCheckpointsAndTheOneItResumed) {
  Scene scene;
  scene.options.save_every.steps = 1;
  scene.options.keep_last = 2;
  run(scene.options);
  EXPECT_EQ(checkpoint::steps_in(scene.options.out), (std::vector<int64_t>{2, 3}));
  scene.options.resume = true;
  scene.options.max_steps = 7;
  run(scene.options);
  EXPECT_EQ(checkpoint::steps_in(scene.options.out), (std::vector<int64_t>{3, 6, 7}));
}

TEST(Train, OneRunAFolder) {
  Scene scene;
  std::filesystem::create_directory(scene.options.out);
  const auto lock = scene.options.out / ".writer.lock";
  std::string owner;
  {
    const cache::WriterLock other(scene.options.out);
    owner = read_file(lock);
    EXPECT_THROW(run(scene.options), CacheError);
    EXPECT_THAT(message_of(scene.options),
                AllOf(HasSubstr("run: another writer is at work: process"), HasSubstr("hint: ")));
    EXPECT_EQ(read_file(lock), owner);
  }
  auto dead = nlohmann::json::parse(owner);
  dead["boot"] = "another";
  std::ofstream(lock) << dead.dump();
  run(scene.options);
  EXPECT_FALSE(std::filesystem::exists(lock));
  scene.options.replace = true;
  run(scene.options);
  for (const char* name : {"run", "run.old-1"})
    EXPECT_FALSE(std::filesystem::exists(scene.folder / name / ".writer.lock")) << name;
}

TEST(Train, NamesAWeightThatIsNotFinite) {
  for (const auto method : {Method::kLora, Method::kFull}) {
    Scene scene;
    auto file = read_weights(scene.options.model);
    const std::string name = "double_blocks.0.txt_mlp.0.weight";
    file.tensors.at(name) = file.tensors.at(name).clone();
    file.tensors.at(name)[1][2] = std::nan("");
    scene.options.model = scene.folder / "spoilt.safetensors";
    write_weights(scene.options.model, file.tensors, file.metadata);
    scene.options.method = method;
    EXPECT_THAT(message_of(scene.options), AllOf(HasSubstr("spoilt.safetensors"), HasSubstr(name)));
    EXPECT_TRUE(checkpoint::steps_in(scene.options.out).empty());
    scene.options.reproduce = scene.options.out / "not-finite-000001.safetensors";
    const Reproduction again = reproduce(scene.options);
    EXPECT_TRUE(again.same()) << again.line();
    EXPECT_THAT(again.first, AllOf(HasSubstr("weight " + name + ": 1 of"), HasSubstr("is nan")));
  }
}

TEST(Train, ResumeRefusesADamagedState) {
  Scene scene;
  run(scene.options);
  scene.options.resume = true;
  scene.options.max_steps = 6;
  const auto file = scene.options.out / "step-000003/state.safetensors";
  const std::string whole = read_file(file);
  scene.folder.write("run/step-000003/state.safetensors", whole.substr(0, whole.size() / 2));
  EXPECT_THAT(message_of(scene.options), HasSubstr("state.safetensors"));
}

TEST(Train, RefusesCachesThatDoNotFitTheModelFieldByField) {
  const auto message = [](const std::function<void(test::TrainingCaches&)>& change,
                          bool guidance = true) {
    test::TrainingCaches caches = small_caches();
    change(caches);
    const Scene scene(caches, guidance);
    const std::string text = message_of(scene.options);
    EXPECT_FALSE(std::filesystem::exists(scene.options.out)) << text;
    return text;
  };
  EXPECT_THAT(message([](auto& c) { c.t5_width = 32; }),
              AllOf(HasSubstr("t5_width is 32"), HasSubstr("16")));
  EXPECT_THAT(message([](auto& c) { c.clip_width = 4; }),
              AllOf(HasSubstr("clip_width is 4"), HasSubstr("8")));
  EXPECT_THAT(message([](auto& c) { c.t5_length = 256; }),
              AllOf(HasSubstr("t5_length is 256"), HasSubstr("512")));
  EXPECT_THAT(message([](auto& c) { c.t5_width = 32, c.clip_width = 4, c.t5_length = 256; }),
              AllOf(HasSubstr("t5_width is 32"),
                    HasSubstr("clip_width is 4"),
                    HasSubstr("t5_length is 256")));
  EXPECT_THAT(message([](auto& c) { c.t5_length = 128; }, false),
              AllOf(HasSubstr("t5_length is 128"), HasSubstr("512")));
  EXPECT_THAT(message([](auto& c) { c.plan["datasets"][0]["batch_size"] = nullptr; }),
              HasSubstr("batch_size"));
}

TEST(Train, TakesSchnellWithShortAndLongText) {
  for (const int64_t length : {256, 512}) {
    test::TrainingCaches caches = small_caches();
    caches.t5_length = length;
    Scene scene(caches, false);
    scene.options.max_steps = 1;
    EXPECT_EQ(run(scene.options).steps, 1);
    EXPECT_EQ(read_weights(scene.options.out / "step-000001/lora.safetensors")
                  .metadata.at("modelspec.architecture"),
              "flux-1-schnell/lora");
    scene.options.replace = true;
    scene.options.guidance = 3.5;
    EXPECT_THAT(message_of(scene.options), HasSubstr("--guidance has no effect"));
  }
}

TEST(Train, TakesMaskedTextOneStoredSampleAndBFloat16) {
  test::TrainingCaches caches = small_caches();
  caches.pad_policy = "masked";
  caches.store = "sample";
  Scene scene(caches);
  scene.options.precision = Precision::kBF16;
  scene.options.batch_size = 2;
  const Report report = run(scene.options);
  EXPECT_TRUE(std::isfinite(*report.loss_last));
  const WeightFile lora = read_weights(scene.options.out / "step-000003/lora.safetensors");
  EXPECT_EQ(lora.metadata.at("ss_apply_t5_attn_mask"), "True");
  EXPECT_EQ(lora.metadata.at("ss_mixed_precision"), "bf16");
}

TEST(Train, SavesAndStopsOnASignal) {
  Scene scene;
  scene.options.max_steps = 1'000'000;
  std::jthread signal([&] {
    while (!std::filesystem::exists(scene.options.out / "metrics.jsonl") ||
           metrics(scene.options.out).size() < 2) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    cancel::set(ExitCode::kInterrupt);
  });
  const Report report = run(scene.options);
  cancel::set(std::nullopt);
  EXPECT_EQ(report.exit_code, ExitCode::kInterrupt);
  EXPECT_GE(report.steps, 2);
  EXPECT_EQ(checkpoint::steps_in(scene.options.out), (std::vector<int64_t>{report.steps}));
}

TEST(Train, SavesBeforeItsTimeIsOverAndGoesOn) {
  Scene scene, whole;
  scene.options.max_steps = 1'000'000;
  const double limit = process_seconds() + 6;
  scene.options.time_limit = limit;
  const Report report = run(scene.options);
  EXPECT_EQ(report.exit_code, ExitCode::kTerminate);
  EXPECT_LT(process_seconds(), limit);
  EXPECT_GT(process_seconds(), limit - 5) << "it need not have ended yet";
  EXPECT_GE(report.steps, 2);
  EXPECT_EQ(checkpoint::steps_in(scene.options.out), (std::vector<int64_t>{report.steps}));
  scene.options.resume = true;
  scene.options.time_limit = process_seconds() + 1000;
  scene.options.max_steps = whole.options.max_steps = report.steps + 2;
  EXPECT_EQ(run(scene.options).exit_code, ExitCode::kOk);
  EXPECT_EQ(run(whole.options).exit_code, ExitCode::kOk);
  const auto name = fmt::format("step-{:06d}", report.steps + 2);
  EXPECT_EQ(read_file(scene.options.out / name / "state.safetensors"),
            read_file(whole.options.out / name / "state.safetensors"));
}

TEST(Train, ALimitInWhichNoStepFitsMakesNone) {
  Scene scene;
  scene.options.time_limit = process_seconds() + 1;
  EXPECT_EQ(run(scene.options).exit_code, ExitCode::kTerminate);
  EXPECT_TRUE(checkpoint::steps_in(scene.options.out).empty());
  scene.options.time_limit = 1e-9;  // over before anything was read
  EXPECT_THROW(run(scene.options), Interrupted);
  scene.options.time_limit = 0;
  scene.options.replace = true;
  EXPECT_EQ(run(scene.options).exit_code, ExitCode::kOk) << "a limit is of one run";
}

TEST(Train, SavesWhatIsDoneIfASegmentIsDamaged) {
  test::TrainingCaches caches = small_caches();
  for (int i = 0; i < 300; ++i)
    caches.items.push_back({fmt::format("{}.png", i), 4, 4});  // several segments
  caches.t5_length = 256;
  Scene scene(caches, false);
  scene.options.max_steps = 300;
  auto segment = std::filesystem::path();
  uintmax_t smallest = UINTMAX_MAX;
  for (const auto& entry : std::filesystem::directory_iterator(scene.folder / "latents")) {
    if (!entry.path().filename().string().starts_with("seg-") || entry.file_size() >= smallest)
      continue;
    smallest = entry.file_size();
    segment = entry.path();
  }
  std::fstream file(segment, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(smallest / 2));
  file << std::string(2000, 'x');
  file.close();
  EXPECT_THAT(message_of(scene.options), HasSubstr(segment.filename().string()));
  const auto lines = metrics(scene.options.out);
  ASSERT_FALSE(lines.empty());
  EXPECT_EQ(checkpoint::steps_in(scene.options.out), (std::vector<int64_t>{lines.back()["step"]}));
}

TEST(Train, StopsWithTheSamplesNamesIfTheLossIsNotFinite) {
  Scene scene;
  scene.options.lr.learning_rate = 1e30;
  scene.options.max_steps = 20;
  EXPECT_THAT(message_of(scene.options),
              AllOf(HasSubstr("loss is"), HasSubstr(".png"), HasSubstr("--learning-rate")));
}

/// The dump that a run left, if it left one.
std::filesystem::path dump_of(const Options& options) {
  std::filesystem::path found;
  for (const auto& entry : std::filesystem::directory_iterator(options.out)) {
    if (!entry.path().filename().native().starts_with("not-finite-")) continue;
    EXPECT_TRUE(found.empty());
    found = entry.path();
  }
  return found;
}

TEST(Train, AStepWithASpoiltSampleIsDumpedAndMadeAgain) {
  for (const auto method : {Method::kLora, Method::kFull}) {
    for (const auto optimizer : {OptimizerKind::kAdamW, OptimizerKind::kScheduleFree}) {
      test::TrainingCaches caches = twelve_items();
      caches.items[7].spoilt = true;
      Scene scene(caches);
      Options& o = scene.options;
      o.method = method;
      o.optimizer = optimizer;
      o.max_steps = 12;
      o.gradient_accumulation = 2;
      o.network_dropout = method == Method::kLora ? 0.3 : 0;
      EXPECT_THAT(
          message_of(o),
          AllOf(HasSubstr("loss is not finite"), HasSubstr("7.png"), HasSubstr("--reproduce")));
      o.reproduce = dump_of(o);
      ASSERT_FALSE(o.reproduce.empty());
      const WeightFile dump = read_weights(o.reproduce);
      const auto about = nlohmann::json::parse(dump.metadata.at("flux_stages.step"));
      EXPECT_EQ(about["loss"], "nan");
      EXPECT_EQ(about["samples"].size(), 2u);
      EXPECT_EQ(dump.tensors.count("lora.double_blocks.0.img_attn.qkv.up"),
                method == Method::kLora ? 1u : 0u);
      // the caches are not needed
      std::filesystem::remove_all(o.latents);
      std::filesystem::remove_all(o.text);
      const Reproduction again = reproduce(o);
      EXPECT_TRUE(again.same()) << again.line();
      EXPECT_EQ(again.step, about["step"]);
      EXPECT_THAT(
          again.line(),
          AllOf(HasSubstr("loss=nan as in the run"), HasSubstr("first: latents of 7.png: 1 of")));
      Options other = o;
      TensorMap some = dump.tensors;
      some["0.noise"] = some.at("0.noise")[0];
      other.reproduce = scene.folder / "other.safetensors";
      write_weights(other.reproduce, some, dump.metadata);
      EXPECT_THAT([&] { reproduce(other); },
                  testing::ThrowsMessage<InputError>(HasSubstr("is no dump of a step")));
      other = o;
      other.lr.learning_rate = 1e-4;
      EXPECT_THAT([&] { reproduce(other); },
                  testing::ThrowsMessage<CacheError>(HasSubstr("--learning-rate is 0.0001")));
      other = o;
      other.model = test::write_tiny_flux(scene.folder / "other.safetensors", true, 2);
      EXPECT_THAT([&] { reproduce(other); },
                  testing::ThrowsMessage<CacheError>(HasSubstr("other.safetensors")));
    }
  }
}

TEST(Train, AStepWhoseWeightsAreTooLargeIsMadeAgainWithThem) {
  for (const auto method : {Method::kLora, Method::kFull}) {
    for (const bool streams : {false, true}) {
      Scene scene;
      Options& o = scene.options;
      o.method = method;
      o.lr.learning_rate = 1e12;
      o.max_steps = 20;
      if (streams) {
        o.resident_blocks = 0;
        o.stream_adapters = method == Method::kLora;
      }
      EXPECT_THAT(message_of(o), HasSubstr("--learning-rate"));
      o.reproduce = dump_of(o);
      ASSERT_FALSE(o.reproduce.empty());
      const Reproduction again = reproduce(o);
      EXPECT_TRUE(again.same()) << again.line();
      EXPECT_GT(again.step, 1);
      EXPECT_THAT(again.first, HasSubstr("micro-batch 0")) << again.first;
      // less in memory, the same numbers
      o.resident_blocks = 1;
      EXPECT_EQ(reproduce(o).line(), again.line());
      // without what had made it so, the step is fine: the test would see weights that are not taken
      if (method == Method::kFull) {
        std::filesystem::remove_all(o.out / checkpoint::step_name(again.step - 1));
        EXPECT_THROW(reproduce(o), Error);
      }
    }
  }
}

TEST(Train, WhatIsNoDumpOrHasNoWeightsIsNotMadeAgain) {
  Scene scene;
  scene.options.reproduce = scene.options.model;
  EXPECT_THAT([&] { reproduce(scene.options); },
              testing::ThrowsMessage<InputError>(HasSubstr("is no dump of a step")));
  // a gradient whose squares overflow where the loss does not, and the block behind was updated by then
  test::TrainingCaches caches = small_caches();
  for (auto& item : caches.items) item.flags = cache::kItemRegularization;
  Scene gone(caches);
  Options& o = gone.options;
  o.method = Method::kFull;
  o.clip = engine::ClipMode::kPerParameter;
  o.prior_loss_weight = 1e15;
  auto file = read_weights(o.model);
  for (const auto& [name, factor] :
       {std::pair{"0.weight", 1e-7}, {"0.bias", 1e-7}, {"2.weight", 1e7}}) {
    at::Tensor& tensor = file.tensors.at(std::string("double_blocks.0.img_mlp.") + name);
    tensor = tensor * factor;
  }
  o.model = gone.folder / "steep.safetensors";
  write_weights(o.model, file.tensors, file.metadata);
  EXPECT_THAT(message_of(o), HasSubstr("the gradient of double_blocks.0.img_mlp.0"));
  o.reproduce = dump_of(o);
  EXPECT_THAT([&] { reproduce(o); }, testing::ThrowsMessage<CacheError>(HasSubstr("--resume")));
}

}  // namespace
}  // namespace flux::train
