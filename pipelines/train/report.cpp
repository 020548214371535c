#include "pipelines/train/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <vector>

#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/core/version.h"
#include "common/tensor/memory.h"
#include "pipelines/train/charts.h"
#include "pipelines/train/metrics.h"

namespace flux::train {
namespace {

constexpr size_t kMostPoints = 20'000;               // of a curve; then every k-th step is shown
constexpr size_t kMostValidations = 200;             // rows of the table, the newest
constexpr size_t kSigmaBins = 10;                    // of [0, 1]
constexpr uint64_t kMostPictureBytes = 24ull << 20;  // of all pictures; browsers are slow beyond

constexpr char kHead[] = R"(<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>flux-train report</title>
<style>
:root { color-scheme: light dark; --back: #fff; --text: #1d2127; --faint: #6b7280; --line: #e2e5ea; --c0: #9db8e8;
  --c1: #c2410c; --only: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --back: #15181d; --text: #e6e8eb; --faint: #9aa3af; --line: #2d333b;
  --c0: #3f5f9c; --c1: #fb923c; --only: #60a5fa; } }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; max-width: 50rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
figure { margin: 1rem 0; } figcaption { font-weight: 600; }
svg.chart { width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 11px; }
  text.y { text-anchor: end; } text.x { text-anchor: middle; }
.grid { stroke: var(--line); } .cursor { stroke: var(--faint); visibility: hidden; }
.curve { fill: none; stroke: var(--only); stroke-width: 1.2; } .dot, .bar { fill: var(--only); }
svg[data-curves*=" "] .c0 { stroke: var(--c0); } svg[data-curves*=" "] .c1 { stroke: var(--c1); stroke-width: 1.8; }
.legend { color: var(--faint); margin: 0; min-height: 1.5em; } .key { display: inline-block; width: 1em;
  height: .25em; margin: 0 .4em .2em 0; background: var(--c0); } .key.c1 { background: var(--c1); }
  .key:only-of-type { background: var(--only); }
table { border-collapse: collapse; display: block; overflow-x: auto; } th, td { text-align: left;
  padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; } .n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; } .pictures figure { margin: 0; }
  .pictures img { max-width: 15rem; height: auto; } .pictures figcaption { font-weight: 400; color: var(--faint); }
</style></head><body>
)";

// Shows the values of the step under the pointer.
constexpr char kTail[] = R"(<script>
"use strict";
const data = JSON.parse(document.getElementById("curves").textContent);
for (const svg of document.querySelectorAll("svg[data-curves]")) {
  const names = svg.dataset.curves.split(" "), steps = data[svg.dataset.steps], shown = svg.parentNode.querySelector("output"), cursor = svg.querySelector(".cursor");
  const first = steps[0], last = steps[steps.length - 1], left = 70, right = 750;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * 760;
    const wanted = first + (x - left) / (right - left) * (last - first);
    let low = 0, high = steps.length - 1;
    while (low < high) { const middle = (low + high) >> 1; if (steps[middle] < wanted) low = middle + 1;
  else high = middle; }
    if (low > 0 && wanted - steps[low - 1] < steps[low] - wanted) --low;
    const at = last > first ? left + (steps[low] - first) / (last - first) * (right - left) : (left + right) / 2;
    cursor.setAttribute("x1", at); cursor.setAttribute("x2", at); cursor.style.visibility = "visible";
    shown.textContent = "step " + steps[low] + ": " + names.map(n => data[n][low] === null ? "-" : data[n][low].toPrecision(5)).join(", ");
  });
  svg.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; shown.textContent = ""; });
}
</script>
</body></html>
)";

std::string bytes_text(int64_t bytes) { return show_bytes(static_cast<uint64_t>(bytes)); }

/// What the report takes of metrics.jsonl.
struct History {
  std::vector<int64_t> steps;
  std::vector<Curve> curves{{"loss", "loss of a step", {}},
                            {"loss_smoothed", "smoothed", {}},
                            {"learning_rate", "learning rate", {}},
                            {"grad_norm", "norm before clipping", {}}};
  std::vector<Validation> validations;
  StepMetrics last;
  int64_t num_steps = 0;
  double seconds = 0, data_wait_seconds = 0;
  std::array<int64_t, kSigmaBins> sigma_samples{};
  std::array<double, kSigmaBins> sigma_losses{};

  void add(const StepMetrics& step, size_t stride) {
    last = step;
    seconds += step.seconds;
    data_wait_seconds += step.data_wait_seconds;
    for (size_t i = 0; i < std::min(step.sigma.size(), step.sample_loss.size()); ++i) {
      const double place = std::clamp(step.sigma[i], 0.0, 1.0) * kSigmaBins;
      const size_t bin = std::min(static_cast<size_t>(place), kSigmaBins - 1);
      ++sigma_samples[bin];
      sigma_losses[bin] += step.sample_loss[i];
    }
    if (step.validation) validations.push_back(*step.validation);
    if (static_cast<size_t>(num_steps++) % stride != 0) return;
    steps.push_back(step.step);
    const double none = std::numeric_limits<double>::quiet_NaN();
    const std::array<double, 4> values{
        step.loss, step.loss_smoothed, step.learning_rate, step.grad_norm.value_or(none)};
    for (size_t k = 0; k < values.size(); ++k) curves[k].values.push_back(values[k]);
  }
};

History read_history(const std::filesystem::path& file, int64_t num_steps) {
  History out;
  const size_t stride = 1 + static_cast<size_t>(num_steps) / kMostPoints;
  std::ifstream lines(file);
  for (std::string text; std::getline(lines, text);) {
    if (const auto step = StepMetrics::from_line(
            nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false)))
      out.add(*step, stride);
  }
  return out;
}

std::string section(std::string_view id, std::string_view title, std::string_view content) {
  return fmt::format("<section id=\"{}\"><h2>{}</h2>\n{}</section>\n", id, title, content);
}

std::string summary_section(const Session& session, const History& history) {
  const Options& o = session.options;
  const StepMetrics& last = history.last;
  return "<h1>flux-train: " + html_text(show(o.out)) + "</h1>\n" +
         html_table(
             {},
             {{"steps", fmt::format("{} of {}", session.step, o.max_steps)},
              {"epoch", std::to_string(last.epoch)},
              {"loss", fmt::format("{:.6g}, smoothed {:.6g}", last.loss, last.loss_smoothed)},
              {"time in steps", show_seconds(history.seconds)},
              {"speed", fmt::format("{:.3g} images/s in the last step", last.images_per_second())},
              {"waiting for data",
               fmt::format("{:.1f} % of the time",
                           history.seconds > 0 ? 100 * history.data_wait_seconds / history.seconds
                                               : 0.0)}});
}

std::string curve_sections(const History& history) {
  const std::span curves(history.curves);
  std::string charts = curve_chart("Loss", history.steps, curves.subspan(0, 2)) +
                       curve_chart("Learning rate", history.steps, curves.subspan(2, 1)) +
                       curve_chart("Gradient norm", history.steps, curves.subspan(3, 1));
  if (static_cast<int64_t>(history.steps.size()) < history.num_steps)
    charts +=
        fmt::format("<p>{} of {} steps are shown.</p>\n", history.steps.size(), history.num_steps);
  nlohmann::json data{{"step", history.steps}};
  for (const Curve& curve : history.curves) data[curve.name] = curve.values;  // NaN becomes null
  if (!history.validations.empty()) {
    std::vector<int64_t> steps;
    Curve curve{"validation_loss", "mean loss of the held-out samples", {}};
    for (const Validation& v : history.validations) {
      steps.push_back(v.step);
      curve.values.push_back(v.loss);
    }
    charts += curve_chart("Validation loss", steps, std::span(&curve, 1), "validation_step");
    data["validation_step"] = steps;
    data[curve.name] = curve.values;
  }
  charts +=
      fmt::format("<script type=\"application/json\" id=\"curves\">{}</script>\n", data.dump());
  return section("training", "Training", charts);
}

/// Losses of the held-out samples by step and noise level; nothing without any.
std::string validation_section(const Session& session, const History& history) {
  const auto& all = history.validations;
  if (all.empty()) return {};
  const std::vector<double>& sigmas = all.back().sigmas;
  std::vector<std::string> head{"step", "mean"};
  for (const double sigma : sigmas) head.push_back(fmt::format("sigma {}", sigma));
  head.push_back("samples");
  head.push_back("");
  std::vector<std::vector<std::string>> rows;
  size_t left_out = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    const Validation& v = all[i];
    const bool best = session.best && session.best->step == v.step;
    if (v.sigmas != sigmas || (i + kMostValidations < all.size() && !best)) {
      ++left_out;
      continue;
    }
    std::vector<std::string> row{std::to_string(v.step), fmt::format("{:.6g}", v.loss)};
    for (const double loss : v.losses) row.push_back(fmt::format("{:.6g}", loss));
    row.push_back(std::to_string(v.samples));
    row.push_back(best ? "best checkpoint" : "");
    rows.push_back(std::move(row));
  }
  std::string content = html_table(head, rows);
  if (left_out) content += fmt::format("<p>{} older ones are in metrics.jsonl.</p>\n", left_out);
  return section("validation", "Validation", content);
}

std::string sigma_section(const History& history) {
  std::vector<Bar> bars;
  std::vector<std::vector<std::string>> rows;
  for (size_t i = 0; i < kSigmaBins; ++i) {
    const int64_t n = history.sigma_samples[i];
    const double mean = n ? history.sigma_losses[i] / static_cast<double>(n) : 0;
    const std::string range = fmt::format("{:.1f} to {:.1f}",
                                          static_cast<double>(i) / kSigmaBins,
                                          static_cast<double>(i + 1) / kSigmaBins);
    const std::string loss = n ? fmt::format("{:.6g}", mean) : "";
    bars.push_back({range, fmt::format("{}: {} samples, mean loss {}", range, n, loss), mean});
    rows.push_back({range, std::to_string(n), loss});
  }
  return section("sigma",
                 "Loss by noise level",
                 bar_chart("Mean training loss by sigma (0: clean, 1: noise)", bars) +
                     html_table({"sigma", "samples", "mean loss"}, rows));
}

std::string data_section(const Session& session) {
  const TrainingData& data = *session.data;
  std::vector<std::vector<std::string>> subsets, buckets;
  for (const SubsetItems& s : data.subsets()) {
    const double repeats =
        s.items ? static_cast<double>(s.visits) / static_cast<double>(s.items) : 0;
    subsets.push_back({std::to_string(s.subset),
                       std::to_string(s.dataset),
                       std::to_string(s.items),
                       fmt::format("{:.4g}", repeats),
                       std::to_string(s.visits),
                       s.regularization ? "regularisation" : "training"});
  }
  for (const BucketVisits& b : data.buckets())
    buckets.push_back(
        {std::to_string(b.width), std::to_string(b.height), std::to_string(b.visits)});
  return section(
      "data",
      "Data set",
      fmt::format("<p>{} samples, {} visits in {} batches an epoch; {} held out for validation, {} "
                  "in quarantine.</p>\n",
                  data.num_items(),
                  data.num_visits(),
                  data.num_batches(),
                  data.num_validation(),
                  data.num_quarantined()) +
          html_table({"subset", "data set", "samples", "repeats", "visits an epoch", "use"},
                     subsets) +
          html_table({"width", "height", "visits an epoch"}, buckets));
}

/// A number of a manifest's provenance, which nothing checks.
std::string number_text(const nlohmann::json& object, const char* name) {
  const auto value = object.is_object() ? object.value(name, nlohmann::json()) : nlohmann::json();
  return value.is_number_integer() ? value.dump() : "unknown";
}

std::string truncation_section(const Session& session) {
  const auto& provenance = session.data->text_manifest().provenance;
  const auto truncated = provenance.value("truncated", nlohmann::json());
  if (!truncated.is_object())
    return section("truncation",
                   "Truncated captions",
                   "<p>The text cache does not say what was cut off.</p>\n");
  std::vector<std::vector<std::string>> limits, worst;
  for (const auto& [name, words] :
       {std::pair{"clip_77", "CLIP, 77 tokens"}, {"t5_256", "T5, 256"}, {"t5_512", "T5, 512"}}) {
    const auto limit = truncated.value(name, nlohmann::json());
    limits.push_back({words,
                      number_text(limit, "captions"),
                      number_text(limit, "tokens_used"),
                      number_text(limit, "tokens_lost")});
  }
  const auto list = truncated.value("worst", nlohmann::json::array());
  for (const auto& entry : list) {
    const auto caption =
        entry.is_object() ? entry.value("caption", nlohmann::json()) : nlohmann::json();
    worst.push_back({caption.is_string() ? caption.get<std::string>() : "unknown",
                     number_text(entry, "t5_tokens"),
                     number_text(entry, "clip_tokens")});
  }
  std::string content =
      html_table({"limit", "captions beyond", "tokens used", "tokens cut off"}, limits);
  if (!worst.empty()) content += html_table({"caption", "T5 tokens", "CLIP tokens"}, worst);
  return section("truncation", "Truncated captions", content);
}

std::string memory_section(const Session& session) {
  const engine::MemoryPlan& plan = session.plan;
  const bool cpu = session.device.is_cpu();
  const MemoryUse use = cpu_memory();
  std::vector<std::vector<std::string>> rows;
  for (size_t i = 0; i < kNumMemoryCauses; ++i) {
    if (plan.causes[i] == 0 && (!cpu || use.causes[i] == 0)) continue;
    std::string name(memory_cause_name(static_cast<MemoryCause>(i)));
    std::ranges::replace(name, '_', ' ');
    // the counters of a GPU do not know causes
    rows.push_back({name, bytes_text(plan.causes[i]), cpu ? bytes_text(use.causes[i]) : ""});
  }
  if (plan.host_store_bytes > 0)
    rows.push_back({"weights in host memory", bytes_text(plan.host_store_bytes), ""});
  rows.push_back({"all tensors, at their peak",
                  bytes_text(planned_peak_bytes(session)),
                  bytes_text(device_peak_bytes(session.device))});
  rows.push_back({"the process", "", show_bytes(peak_rss_bytes())});
  return section(
      "memory", "Memory", html_table({"on " + session.device.str(), "planned", "measured"}, rows));
}

std::string settings_section(const Options& options) {
  std::vector<std::vector<std::string>> rows;
  for (const std::string& line : split(run_toml(options), '\n')) {
    const size_t middle = line.find(" = ");
    if (middle == std::string::npos || line.starts_with('#')) continue;
    rows.push_back({line.substr(0, middle), line.substr(middle + 3)});
  }
  return section("settings", "Settings", html_table({"option", "value"}, rows));
}

std::string provenance_section(const Session& session) {
  std::vector<std::vector<std::string>> rows{
      {"program", fmt::format("flux-train {}, commit {}", tool_version(), commit())},
      {"command", session.options.command_line},
      {"device", session.device.str()},
      {"precision", precision_word(session.compute)},
      {"model", show(session.options.model)},
      {"model's weights_sha256", session.model_sha256.get()},
      {"plan_digest of the data set", session.data->latents_manifest().plan_digest}};
  for (const auto* manifest : {&session.data->latents_manifest(), &session.data->text_manifest()}) {
    const char* const cache = manifest == &session.data->latents_manifest() ? "latents" : "text";
    for (const auto& [name, hash] : manifest->recipe.weights.items())
      rows.push_back({fmt::format("{} cache, weights_sha256 of {}", cache, name),
                      hash.is_string() ? hash.get<std::string>() : hash.dump()});
    for (const char* name : {"tool", "tool_version", "created"})
      if (const auto value = manifest->provenance.value(name, nlohmann::json()); value.is_string())
        rows.push_back({fmt::format("{} cache, {}", cache, name), value.get<std::string>()});
  }
  return section("provenance", "Provenance", html_table({}, rows));
}

struct Picture {
  int64_t step = -1;
  std::filesystem::path file;
};

/// The step in a name: the number after "step", or the first one.
int64_t step_in(const std::string& name) {
  const size_t word = name.find("step");
  const size_t begin = name.find_first_of("0123456789", word == std::string::npos ? 0 : word);
  int64_t step = -1;
  if (begin != std::string::npos)
    std::from_chars(name.data() + begin, name.data() + name.size(), step);
  return step;
}

/// Newest steps first; nothing while there are none.
std::string picture_section(const std::filesystem::path& folder) {
  std::vector<Picture> pictures;
  std::error_code none;
  // flux-decode's table, of small pictures
  if (const auto table = folder / "pictures.html"; std::filesystem::is_regular_file(table, none))
    return section("samples", "Samples", read_file(table, kMostPictureBytes));
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder, none)) {
    if (entry.path().extension() != ".png" || !entry.is_regular_file(none)) continue;
    pictures.push_back({step_in(entry.path().lexically_relative(folder).native()), entry.path()});
  }
  if (pictures.empty()) return {};
  std::ranges::sort(pictures, [](const Picture& a, const Picture& b) {
    return a.step != b.step ? a.step > b.step : a.file < b.file;
  });
  std::string content = "<div class=\"pictures\">\n";
  uint64_t total = 0;
  size_t left_out = 0;
  for (const Picture& picture : pictures) {
    const uint64_t size = std::filesystem::file_size(picture.file, none);
    if (none || total + size > kMostPictureBytes) {
      ++left_out;
      continue;
    }
    total += size;
    content += fmt::format(
        "<figure><img alt=\"{}\" src=\"data:image/png;base64,{}\"><figcaption>step {}: "
        "{}</figcaption></figure>\n",
        html_text(show(picture.file.filename())),
        base64(read_file(picture.file)),
        picture.step,
        html_text(show(picture.file.filename())));
  }
  content += "</div>\n";
  if (left_out)
    content += fmt::format("<p>{} more are in {}.</p>\n", left_out, html_text(show(folder)));
  return section("samples", "Samples", content);
}

}  // namespace

void write_report(const Session& session) {
  const Options& o = session.options;
  const History history = read_history(o.out / "metrics.jsonl", session.step);
  write_file_atomic(o.out / "report.html",
                    kHead + summary_section(session, history) + curve_sections(history) +
                        validation_section(session, history) + picture_section(o.out / "samples") +
                        sigma_section(history) + data_section(session) +
                        truncation_section(session) + memory_section(session) +
                        settings_section(o) + provenance_section(session) + kTail);
}

}  // namespace flux::train
