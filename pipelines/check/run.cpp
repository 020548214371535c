#include "pipelines/check/run.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <algorithm>
#include <exception>

#include "common/core/cancel.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "pipelines/check/case.h"

namespace flux::check {
namespace {

struct Kind {
  std::string_view name;
  void (*check)(const Case& c);
};

constexpr Kind kKinds[] = {
    {"ops", check_ops},
    {"flux", check_flux},
    {"vae", check_vae},
    {"t5", check_t5},
    {"clip", check_clip},
    {"lora", check_lora},
    {"train", check_train},
    {"timesteps", check_timesteps},
    {"euler", check_euler},
    {"tokenizers", check_tokenizers},
    {"data-buckets", check_buckets},
    {"data-captions", check_captions},
    {"data-images", check_images},
    {"data-resize", check_resize},
    {"data-plans", check_plans},
    {"optim", check_optim},
    {"hostile-safetensors", check_hostile_safetensors},
    {"hostile-images", check_hostile_images},
    {"hostile-captions", check_hostile_captions},
    {"hostile-hdf5", check_hostile_hdf5},
};

bool has_bf16_limits(const Case& c) {
  return c.json.contains("limits") && c.json["limits"].is_object() &&
         c.json["limits"].contains("bf16");
}

void run_case(const std::filesystem::path& folder,
              const Options& options,
              c10::Device device,
              Report& report) {
  Case c;
  try {
    c = Case::read(folder);
  } catch (const InputError& error) {
    report.start(show(folder), "");
    log::error("{}", error.what());
    return report.error(error.what());
  }
  const auto* const kind = std::find_if(
      std::begin(kKinds), std::end(kKinds), [&](const Kind& k) { return k.name == c.kind; });
  if (kind == std::end(kKinds)) return report.unknown_kind(c.title, c.kind);
  c.bf16 = options.precision == Precision::kBF16;
  c.device = device;
  c.report = &report;
  if (c.bf16 && !has_bf16_limits(c)) return report.skip_kind(c.title, c.kind);
  report.start(c.title, c.kind);
  try {
    kind->check(c);
    if (report.num_in_case() == 0)
      report.verdict("case", false, "holds nothing that can be checked");
  } catch (const InputError& error) {
    log::error("{}", error.what());
    report.error(error.what());
  } catch (const Error&) {
    throw;  // no memory, no device, a signal: not the case's fault
  } catch (const std::exception& error) {
    report.verdict("case", false, error.what());
  }
}

}  // namespace

Report run(const Options& options, Report::Print print) {
  const auto folders = find_cases(options.folders);
  const c10::Device device = resolve_device(options.device);
  // The vectors were made with one thread, and AdamW makes steps of the sign of a near-zero
  // gradient, which another order of its sum can turn: the verdict is that of the arithmetic, the
  // same on any number of cores.
  if (device.is_cpu()) at::set_num_threads(1);
  log::info("{} {} on {} in {}",
            folders.size(),
            folders.size() == 1 ? "case" : "cases",
            device.str(),
            options.precision == Precision::kBF16 ? "bf16" : "f32");
  Report report(std::move(print));
  for (const auto& folder : folders) {
    cancel::check();
    run_case(folder, options, device, report);
  }
  cancel::check();  // a signal during the last case is no other than one before it
  return report;
}

}  // namespace flux::check
