#include "pipelines/train/metrics.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/tensor/memory.h"

namespace flux::train {
namespace {

constexpr double kSmoothing = 0.98;  // the last 50 steps are two thirds of the mean

/// Drops what a resumed run will make anew. Returns the smoothed loss of what stays.
SmoothedLoss keep_up_to(const std::filesystem::path& file, int64_t last_step) {
  SmoothedLoss smoothed;
  std::string kept;
  int64_t last = 0, num_kept = 0;
  std::ifstream lines(last_step > 0 ? file : std::filesystem::path());
  for (std::string text; std::getline(lines, text);) {
    const auto line =
        StepMetrics::from_line(nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false));
    if (!line || line->step <= last || line->step > last_step) continue;
    last = line->step;
    ++num_kept;
    smoothed.add(line->loss);
    kept += text + "\n";
  }
  if (num_kept < last_step)
    log::warn("{} holds {} of the {} steps done: the others are in no curve",
              show(file),
              num_kept,
              last_step);
  write_file_if_changed(file, kept);
  return smoothed;
}

}  // namespace

double StepMetrics::images_per_second() const {
  return seconds > 0 ? static_cast<double>(samples) / seconds : 0;
}

double StepMetrics::data_wait_share() const {
  return seconds > 0 ? data_wait_seconds / seconds : 0;
}

nlohmann::json StepMetrics::line() const {
  nlohmann::json out{{"step", step},
                     {"epoch", epoch},
                     {"loss", loss},
                     {"loss_smoothed", loss_smoothed},
                     {"learning_rate", learning_rate},
                     {"learning_rates", learning_rates},
                     {"grad_norm", grad_norm ? nlohmann::json(*grad_norm) : nlohmann::json()},
                     {"samples", samples},
                     {"images_per_second", images_per_second()},
                     {"seconds", seconds},
                     {"data_wait_seconds", data_wait_seconds},
                     {"data_wait_share", data_wait_share()},
                     {"memory_peak_bytes", memory_peak_bytes},
                     {"sigma", sigma},
                     {"sample_loss", sample_loss}};
  if (validation) out["validation"] = validation->object();
  return out;
}

std::optional<StepMetrics> StepMetrics::from_line(const nlohmann::json& line) try {
  StepMetrics out;
  if (!line.at("step").is_number_integer()) return std::nullopt;
  line.at("step").get_to(out.step);
  line.at("loss").get_to(out.loss);
  // what older versions did not write is left at zero
  out.epoch = line.value("epoch", int64_t{0});
  out.loss_smoothed = line.value("loss_smoothed", out.loss);
  out.learning_rate = line.value("learning_rate", 0.0);
  out.learning_rates = line.value("learning_rates", std::map<std::string, double>());
  if (const auto norm = line.value("grad_norm", nlohmann::json()); norm.is_number())
    out.grad_norm = norm.get<double>();
  out.samples = line.value("samples", int64_t{0});
  out.seconds = line.value("seconds", 0.0);
  out.data_wait_seconds = line.value("data_wait_seconds", 0.0);
  out.memory_peak_bytes = line.value("memory_peak_bytes", int64_t{0});
  out.sigma = line.value("sigma", std::vector<double>());
  out.sample_loss = line.value("sample_loss", std::vector<double>());
  out.validation = Validation::from_object(line.value("validation", nlohmann::json()));
  return out;
} catch (const nlohmann::json::exception&) {
  return std::nullopt;
}

std::vector<std::pair<std::string, double>> StepMetrics::curves() const {
  std::vector<std::pair<std::string, double>> out{
      {"loss/step", loss},
      {"loss/smoothed", loss_smoothed},
      {"learning_rate", learning_rate},
      {"speed/images_per_second", images_per_second()},
      {"speed/data_wait_share", data_wait_share()},
      {"memory/peak_bytes", static_cast<double>(memory_peak_bytes)}};
  if (grad_norm) out.emplace_back("grad_norm", *grad_norm);
  for (const auto& [group, rate] : learning_rates) out.emplace_back("learning_rate/" + group, rate);
  if (validation) std::ranges::copy(validation->curves(), std::back_inserter(out));
  return out;
}

double SmoothedLoss::add(double loss) {
  sum_ = kSmoothing * sum_ + (1 - kSmoothing) * loss;
  weight_ = kSmoothing * weight_ + (1 - kSmoothing);
  return sum_ / weight_;
}

Metrics::Metrics(const std::filesystem::path& file, int64_t last_step)
    : smoothed_(keep_up_to(file, last_step)), file_(file) {}

void Metrics::write(StepMetrics& step) {
  step.loss_smoothed = smoothed_.add(step.loss);
  file_.write(step.line().dump() + "\n");
}

int64_t device_peak_bytes(const c10::Device& device) {
  if (device.is_cpu()) return cpu_memory().peak;
  return c10::getDeviceAllocator(device.type())
      ->getDeviceStats(device.index())
      .allocated_bytes[0]
      .peak;
}

int64_t planned_peak_bytes(const Session& session) {
  const int64_t on_host = session.device.is_cpu() ? session.plan.host_store_bytes : 0;
  return session.plan.device_bytes() + on_host;
}

}  // namespace flux::train
