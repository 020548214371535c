// What people watch: metrics.jsonl, TensorBoard's event files, report.html.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "common/core/file.h"
#include "common/core/text.h"
#include "pipelines/train/charts.h"
#include "pipelines/train/metrics.h"
#include "pipelines/train/run.h"
#include "pipelines/train/tensorboard.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/training_scene.h"

namespace flux::train {
namespace {

using testing::HasSubstr;
using testing::Not;

test::TrainingCaches caches_with_repeats() {
  test::TrainingCaches caches = test::small_caches();
  caches.items[1].repeats = 2;
  return caches;
}

struct Watched : test::TrainingScene {
  Watched() : TrainingScene(caches_with_repeats()) {
    options.command_line = "flux-train --out '<b>&'";
  }
  std::vector<nlohmann::json> lines() const {
    std::vector<nlohmann::json> out;
    for (const std::string& line : split(read_file(options.out / "metrics.jsonl"), '\n'))
      if (!line.empty()) out.push_back(nlohmann::json::parse(line));
    return out;
  }
  std::string report() const { return read_file(options.out / "report.html"); }
  size_t num_event_files() const {
    if (!std::filesystem::exists(options.out / "tensorboard")) return 0;
    return static_cast<size_t>(
        std::distance(std::filesystem::directory_iterator(options.out / "tensorboard"), {}));
  }
};

TEST(Metrics, SayWhatEachSampleLostAtWhichNoiseLevel) {
  Watched w;
  w.options.batch_size = 2;
  w.options.gradient_accumulation = 2;
  run(w.options);
  for (const auto& line : w.lines()) {
    const auto sigma = line["sigma"].get<std::vector<double>>();
    const auto losses = line["sample_loss"].get<std::vector<double>>();
    ASSERT_EQ(sigma.size(), line["samples"].get<size_t>());
    ASSERT_EQ(losses.size(), sigma.size());
    double sum = 0;
    for (size_t i = 0; i < losses.size(); ++i) {
      EXPECT_GT(sigma[i], 0);
      EXPECT_LE(sigma[i], 1);
      sum += losses[i];
    }
    EXPECT_NEAR(sum / static_cast<double>(losses.size()), line["loss"].get<double>(), 1e-5);
    EXPECT_GT(line["memory_peak_bytes"], 100'000);
    EXPECT_NEAR(line["images_per_second"].get<double>() * line["seconds"].get<double>(),
                line["samples"].get<double>(),
                1e-9);
    EXPECT_GE(line["data_wait_share"], 0.0);
    EXPECT_LE(line["data_wait_share"], 1.0);
  }
}

TEST(Metrics, SmoothTheLossOverAResumeAsWithoutIt) {
  Watched straight, halves;
  straight.options.max_steps = halves.options.max_steps = 6;
  run(straight.options);
  halves.options.max_steps = 3;
  run(halves.options);
  halves.options.max_steps = 6;
  halves.options.resume = true;
  run(halves.options);
  const auto a = straight.lines(), b = halves.lines();
  ASSERT_EQ(a.size(), 6u);
  ASSERT_EQ(b.size(), 6u);
  double sum = 0, weight = 0;
  for (size_t i = 0; i < 6; ++i) {
    sum = 0.98 * sum + 0.02 * a[i]["loss"].get<double>();
    weight = 0.98 * weight + 0.02;
    EXPECT_NEAR(a[i]["loss_smoothed"].get<double>(), sum / weight, 1e-12);
    EXPECT_EQ(a[i]["loss_smoothed"], b[i]["loss_smoothed"]) << i;
  }
}

TEST(Metrics, KeepEachSavedStepOnceAndDropTheRest) {
  test::TemporaryFolder folder;
  const auto file = folder / "metrics.jsonl";
  std::ofstream(file)
      << "{\"step\":1,\"loss\":2}\n{\"step\":1,\"loss\":9}\nno json\n{\"step\":2,\"loss\":4}\n"
         "{\"step\":3,\"loss\":8}\n{\"step\":4,\"lo";
  StepMetrics next{.step = 3, .loss = 1};
  Metrics(file, 2).write(next);
  std::vector<nlohmann::json> lines;
  for (const std::string& line : split(read_file(file), '\n'))
    if (!line.empty()) lines.push_back(nlohmann::json::parse(line));
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[0]["loss"], 2);
  EXPECT_EQ(lines[1]["loss"], 4);
  EXPECT_EQ(lines[2]["loss"], 1.0);
  EXPECT_EQ(lines[2]["grad_norm"], nullptr);
}

TEST(TensorBoard, ChecksumsAreMaskedCrc32c) {
  EXPECT_EQ(masked_crc32c("123456789"),
            std::rotr(0xE3069283u, 15) + 0xA282EAD8u);  // RFC 3720's CRC-32C
}

TEST(TensorBoard, FilesAreOnUnlessLeftOutAndEachStartAddsOne) {
  Watched w;
  run(w.options);
  EXPECT_EQ(w.num_event_files(), 1u);
  w.options.resume = true;
  run(w.options);  // nothing to do
  EXPECT_EQ(w.num_event_files(), 1u);
  w.options.max_steps = 4;
  run(w.options);
  EXPECT_EQ(w.num_event_files(), 2u);
  w.options.no_tensorboard = true;
  w.options.max_steps = 5;
  run(w.options);
  EXPECT_EQ(w.num_event_files(), 2u);
  EXPECT_THAT(run_toml(w.options), HasSubstr("no-tensorboard = true"));
}

TEST(Report, ShowsTheRunAndEscapesWhatUsersWrote) {
  Watched w;
  run(w.options);
  const std::string html = w.report();
  EXPECT_THAT(html, HasSubstr("3 samples, 4 visits"));
  EXPECT_THAT(html, HasSubstr("flux-train --out &#39;&lt;b&gt;&amp;&#39;"));
  EXPECT_THAT(html, Not(HasSubstr("<b>")));
  EXPECT_THAT(html, HasSubstr("<td>learning-rate</td><td class=\"n\">0.001</td>"));
  EXPECT_THAT(html, Not(HasSubstr("id=\"samples\"")));  // there are none yet
}

TEST(Report, IsThereAtEachCheckpointAndShowsPicturesByStep) {
  Watched w;
  run(w.options);
  std::filesystem::create_directory(w.options.out / "samples");
  w.folder.write("run/samples/step-000002-1.png", "two");
  w.folder.write("run/samples/step-000010-1.png", "ten");
  w.folder.write("run/samples/notes.txt", "none");
  w.options.resume = true;
  w.options.max_steps = 4;
  run(w.options);
  const std::string html = w.report();
  EXPECT_THAT(html, HasSubstr("4 of 4"));
  const size_t two = html.find("data:image/png;base64,dHdv\""),
               ten = html.find("data:image/png;base64,dGVu\"");
  ASSERT_NE(two, std::string::npos);
  ASSERT_NE(ten, std::string::npos);
  EXPECT_LT(ten, two);
  EXPECT_THAT(html, HasSubstr("step 10: step-000010-1.png"));
}

TEST(Report, SaysSoWhereThereIsNoGradientNorm) {
  Watched w;
  w.options.method = Method::kFull;
  w.options.clip = engine::ClipMode::kNone;
  run(w.options);
  EXPECT_EQ(w.lines().at(0)["grad_norm"], nullptr);
  EXPECT_THAT(w.report(), HasSubstr("not computed in this run"));
}

TEST(Charts, DrawEachValueOnceAndNamePoints) {
  const std::vector<int64_t> steps{1, 2, 3, 4};
  const std::vector<Curve> curves{{"loss", "loss", {1, 2, NAN, 4}}};
  const std::string svg = curve_chart("A & B", steps, curves);
  const size_t begin = svg.find("points=\"") + 8, end = svg.find('"', begin);
  EXPECT_EQ(split(svg.substr(begin, end - begin), ' ').size(), 3u);
  EXPECT_THAT(svg, HasSubstr("A &amp; B"));
  // no tick lies between them
  const std::vector<Curve> flat{{"loss", "loss", {0.5, std::nextafter(0.5, 1.0), 0.5, 0.5}}};
  EXPECT_LT(curve_chart("flat", steps, flat).size(), 10000u);
  for (const auto& [bytes, text] : std::vector<std::pair<std::string, std::string>>{
           {"", ""}, {"f", "Zg=="}, {"fo", "Zm8="}, {"foo", "Zm9v"}, {"foob", "Zm9vYg=="}})
    EXPECT_EQ(base64(bytes), text);  // RFC 4648, section 10
}

}  // namespace
}  // namespace flux::train
