#include "pipelines/sample/run.h"

#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <future>
#include <nlohmann/json.hpp>
#include <vector>

#include "common/core/cancel.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/core/log.h"
#include "common/core/process.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/data/prompts.h"
#include "common/data/stored_picture.h"
#include "common/engine/budget.h"
#include "common/engine/model_file.h"
#include "common/engine/sampler.h"
#include "common/models/lora/layouts.h"
#include "common/models/lora/lora.h"
#include "common/models/lora/weighted_file.h"
#include "common/ops/attention.h"
#include "common/tensor/memory.h"
#include "common/tensor/memory_errors.h"
#include "common/tensor/weight_file.h"
#include "common/train/euler.h"
#include "common/train/sampler.h"
#include "formats/cache/folder.h"
#include "formats/samples/samples.h"
#include "pipelines/sample/plan.h"

namespace flux::sample {
namespace {

using Clock = std::chrono::steady_clock;

/// What the options mean for this model.
struct Settings {
  Schedule schedule = Schedule::kDev;
  int64_t steps = 28;
  double guidance = 3.5;
};

Settings settings_of(const Options& o, const dit::Config& config) {
  if (o.guidance && !config.guidance)
    throw UsageError(
        fmt::format("--guidance has no effect: {} has no guidance input", show(o.model)),
        "leave it out");
  Settings s;
  s.schedule = o.schedule.value_or(config.guidance ? Schedule::kDev : Schedule::kSchnell);
  s.steps = o.steps.value_or(s.schedule == Schedule::kDev ? 28 : 4);
  s.guidance = o.guidance.value_or(3.5);
  return s;
}

engine::SamplerOptions sampler_options(const Options& o, at::Device device) {
  engine::SamplerOptions s;
  s.device = device;
  const bool bf16 =
      o.precision == Precision::kBF16 || (o.precision == Precision::kAuto && !device.is_cpu());
  s.compute = bf16 ? at::kBFloat16 : at::kFloat;
  if (o.base == BasePrecision::kFp8) s.base = QuantFormat::kFp8;
  if (o.base == BasePrecision::kNf4) s.base = QuantFormat::kNf4;
  s.lookahead = o.ring_slots.value_or(2) - 1;
  s.stream_from = o.stream_from.value_or(device.is_cuda() ? engine::StreamFrom::kHost
                                                          : engine::StreamFrom::kFile);
  return s;
}

std::shared_ptr<engine::ModelFile> open_model(const Options& o, engine::SamplerOptions& wanted) {
  auto file = std::make_shared<engine::ModelFile>(
      o.model, engine::ModelFileOptions{.dtype = wanted.compute, .quant = wanted.base});
  wanted.base = file->quant();
  return file;
}

std::vector<engine::WeightedAdapters> read_adapters(const Options& o, const dit::Config& config) {
  std::vector<engine::WeightedAdapters> out;
  for (const std::string& text : o.lora) {
    const auto lora = lora::weighted_file(text);
    WeightFile file = read_weights(lora.file);
    try {
      lora::add_peft_config(lora.file, file.metadata);
      out.push_back({lora::from_tensors(file.tensors, file.metadata, config), lora.weight});
    } catch (const InputError& error) {
      throw InputError(fmt::format("{}: {}", show(lora.file), error.what()));
    }
    log::info("{}: {} modules, weight {}",
              show(lora.file),
              out.back().adapters.modules.size(),
              lora.weight);
  }
  return out;
}

/// One picture that is wanted.
struct Wanted {
  const Prompt* prompt = nullptr;
  int64_t index = 0;
};

at::Tensor on(const at::Tensor& tensor, at::Device device) {
  return tensor.defined() ? tensor.to(device) : tensor;
}

/// The file, written anew now and then, so that a kill loses a minute.
class Output {
 public:
  Output(const Options& options, samples::Header header)
      : path_(options.out), header_(std::move(header)) {}
  void add(samples::Record record) { records_.push_back(std::move(record)); }
  int64_t size() const { return std::ssize(records_); }
  void write_if_due() {
    constexpr std::chrono::seconds kEvery{60};
    if (Clock::now() - written_ >= kEvery) write();
  }
  void write(const std::string& model_sha256 = {}) {
    if (records_.empty()) return;
    header_.model_sha256 = model_sha256;
    header_.created = cache::utc_now();
    const auto bytes = samples::encode(header_, records_);
    AtomicFile file(path_);
    file.write(bytes);
    file.commit();
    written_ = Clock::now();
  }

 private:
  std::filesystem::path path_;
  samples::Header header_;
  std::vector<samples::Record> records_;
  Clock::time_point written_ = Clock::now();
};

void require_replaceable(const std::filesystem::path& out) {
  std::error_code ignored;
  if (!std::filesystem::exists(out, ignored)) {
    if (out.has_parent_path()) make_folder(out.parent_path());
    return;
  }
  if (!samples::is_samples_file(out))
    throw UsageError(fmt::format("--out: {} is there and no file of samples", show(out)),
                     "give another name");
}

nlohmann::json settings_json(const Options& o, const Settings& s, const dit::Config& config) {
  const auto name = [](const std::filesystem::path& path) {
    return printable(path.filename().native());
  };
  nlohmann::json loras = nlohmann::json::array();
  for (const std::string& text : o.lora) {
    const auto lora = lora::weighted_file(text);
    loras.push_back(fmt::format("{}:{}", name(lora.file), lora.weight));
  }
  nlohmann::json out{{"model", name(o.model)},
                     {"schedule", s.schedule == Schedule::kDev ? "dev" : "schnell"},
                     {"steps", s.steps},
                     {"cfg-scale", o.cfg_scale}};
  if (config.guidance) out["guidance"] = s.guidance;
  if (!loras.empty()) out["lora"] = loras;
  return out;
}

/// Text beside a picture's noise, on the device.
void add_prompt(SampleInputs& in, const PromptEmbedding& text, at::Device device) {
  in.prompt_embedding = on(text.prompt, device);
  in.pooled_embedding = on(text.pooled, device);
  in.text_mask = on(text.mask, device);
}

Report run_in_memory(const Options& o) {
  const at::Device device = resolve_device(o.device);
  engine::SamplerOptions wanted = sampler_options(o, device);
  log::info("version {} device={} precision={} command: {}",
            tool_version(),
            device.str(),
            wanted.compute == at::kFloat ? "f32" : "bf16",
            o.command_line);
  require_replaceable(o.out);
  const Prompts prompts(o.text);
  const auto file = open_model(o, wanted);
  const dit::Config& config = file->config();
  const Settings settings = settings_of(o, config);
  prompts.require_fit(o.model, config.prompt_dim, config.pooled_dim, config.guidance);
  std::optional<Prompt> negative;
  if (o.negative_prompt) negative = prompts.find(*o.negative_prompt, "--negative-prompt");
  std::vector<Wanted> pictures;
  for (const Prompt& prompt : prompts.all())
    for (int64_t i = 0; i < o.count; ++i)
      if (!negative || prompt.number != negative->number) pictures.push_back({&prompt, i});
  if (pictures.empty())
    throw UsageError(fmt::format("{} holds the negative prompt alone", show(o.text)),
                     "add prompts to sample, and run flux-cache-text again");
  engine::limit_threads(config);

  engine::SampleShape shape;
  shape.batch = std::min(o.batch_size, std::ssize(pictures));
  shape.width = o.width;
  shape.height = o.height;
  shape.text_length = prompts.t5_length();
  shape.text_mask = prompts.masked();
  shape.negative = negative.has_value();
  shape.text_type = prompts.type();
  auto adapters = read_adapters(o, config);
  const Choice choice = choose(o, *file, wanted, adapters, shape);
  const int64_t num_blocks = file->num_records();
  if (!choice.fits)
    throw ResourceError(fmt::format("{} would take {}, {} may take {}",
                                    show(o.model),
                                    show_bytes(static_cast<uint64_t>(choice.needed)),
                                    choice.budget_name,
                                    show_bytes(static_cast<uint64_t>(choice.budget))),
                        choice.hint);
  log::info("plan: {}", choice.describe(num_blocks));
  cancel::check();
  engine::Sampler sampler(config, file, choice.sampler, adapters);
  adapters.clear();
  log::info("{}; {} pictures of {} prompts, {}x{}, {} steps, schedule {}",
            config.describe(),
            pictures.size(),
            std::ssize(pictures) / o.count,
            o.width,
            o.height,
            settings.steps,
            settings.schedule == Schedule::kDev ? "dev" : "schnell");
  auto model_sha256 =
      std::async(std::launch::async, [&] { return to_hex(file->weights_sha256(o.rehash)); });

  const EulerOptions euler{
      .sigmas = sampler_schedule(
          settings.steps, o.width / 16 * (o.height / 16), settings.schedule == Schedule::kDev),
      .guidance = settings.guidance,
      .cfg_scale = o.cfg_scale};
  Output output(
      o,
      {.settings = settings_json(o, settings, config),
       .provenance = {"flux-sample", std::string(tool_version()), o.command_line, device.str()}});
  PromptEmbedding negative_text;
  if (negative) negative_text = prompts.load(*negative);
  const auto predict = [&](std::span<const dit::Inputs> inputs) {
    cancel::check();
    return sampler(inputs);
  };
  Report report;
  report.out = o.out;
  report.wanted = std::ssize(pictures);
  report.prompts = std::ssize(pictures) / o.count;
  report.steps = settings.steps;
  const auto start = Clock::now();
  {
    const int64_t all_steps = report.wanted * settings.steps;
    Progress progress("sampling", "steps", all_steps);
    for (int64_t first = 0; first < report.wanted && !cancel::requested(); first += o.batch_size) {
      const int64_t count = std::min(o.batch_size, report.wanted - first);
      std::vector<SampleInputs> inputs;
      for (int64_t i = first; i < first + count; ++i) {
        const Wanted& picture = pictures[static_cast<size_t>(i)];
        const MemoryScope scope(MemoryCause::kData);
        SampleInputs in;
        in.noise = sample_noise(static_cast<uint64_t>(o.seed),
                                picture.prompt->id,
                                static_cast<uint64_t>(picture.index),
                                samples::kChannels,
                                o.height / 8,
                                o.width / 8)
                       .to(device);
        add_prompt(in, prompts.load(*picture.prompt), device);
        if (negative) {
          in.negative_embedding = on(negative_text.prompt, device);
          in.negative_pooled = on(negative_text.pooled, device);
          in.negative_mask = on(negative_text.mask, device);
        }
        inputs.push_back(std::move(in));
      }
      std::vector<at::Tensor> latents;
      try {
        latents =
            euler_sample(predict, euler, inputs, [&](int64_t done, std::span<const at::Tensor>) {
              progress.update(first * settings.steps + done * count,
                              fmt::format("picture {} of {}", first + 1, report.wanted));
            });
      } catch (const Interrupted&) {
        break;  // finished pictures stay
      }
      for (int64_t i = 0; i < count; ++i) {
        const Wanted& picture = pictures[static_cast<size_t>(first + i)];
        output.add(stored_picture(latents[static_cast<size_t>(i)],
                                  *picture.prompt,
                                  picture.index,
                                  o.seed,
                                  negative ? negative->text : std::string()));
      }
      output.write_if_due();
    }
  }
  report.pictures = output.size();
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  if (report.pictures > 0)
    report.seconds_per_step = seconds / static_cast<double>(report.pictures * settings.steps);
  if (const auto signal = cancel::requested()) {
    report.exit_code = *signal;
    output.write();  // the hash may take minutes
  } else {
    output.write(model_sha256.get());
  }
  log::info("memory: tensors {} at most, {} planned; process {}",
            show_bytes(static_cast<uint64_t>(device.is_cpu() ? cpu_memory().peak
                                                             : choice.plan.device_bytes())),
            show_bytes(static_cast<uint64_t>(choice.plan.device_bytes())),
            show_bytes(peak_rss_bytes()));
  report.seconds = process_seconds();
  report.peak_rss_bytes = peak_rss_bytes();
  return report;
}

}  // namespace

std::string Report::line() const {
  return fmt::format(
      "pictures={} of {} prompts={} steps={} seconds_per_step={:.3g} seconds={:.1f} "
      "peak_rss={} out={}",
      pictures,
      wanted,
      prompts,
      steps,
      seconds_per_step,
      seconds,
      show_bytes(peak_rss_bytes),
      show(out));
}

nlohmann::json Report::object() const {
  return {{"pictures", pictures},
          {"wanted", wanted},
          {"prompts", prompts},
          {"steps", steps},
          {"seconds", seconds},
          {"seconds_per_step", seconds_per_step},
          {"peak_rss_bytes", peak_rss_bytes},
          {"out", printable(out.native())}};
}

Report run(const Options& options) {
  count_tensor_memory();
  return with_memory_errors(
      "out of memory",
      "give a smaller --host-memory or --device-memory, so that less stays there, or a smaller "
      "--batch-size or --size",
      [&] { return run_in_memory(options); });
}

ExitCode run_plan(const Options& o) {
  count_tensor_memory();
  // no GPU is needed to plan for one
  const bool cuda = o.device == DeviceChoice::kCuda;
  if (cuda && o.device_memory == 0)
    throw UsageError("--plan --device cuda needs --device-memory",
                     "give the GPU's memory, 24GiB for one");
  engine::SamplerOptions wanted = sampler_options(o, at::Device(cuda ? at::kCUDA : at::kCPU));
  const auto file = open_model(o, wanted);
  settings_of(o, file->config());
  engine::SampleShape shape;
  shape.batch = o.batch_size;
  shape.width = o.width;
  shape.height = o.height;
  shape.negative = o.negative_prompt.has_value();
  if (!o.text.empty()) {
    const Prompts prompts(o.text);
    shape.text_length = prompts.t5_length();
    shape.text_mask = prompts.masked();
    shape.text_type = prompts.type();
  }
  const auto adapters = read_adapters(o, file->config());
  const Choice choice = choose(o, *file, wanted, adapters, shape);
  if (o.plan == PlanOutput::kJson)
    std::printf("%s\n", choice.object(file->num_records()).dump().c_str());
  else
    std::fputs(choice.table(file->num_records()).c_str(), stdout);
  return choice.fits ? ExitCode::kOk : ExitCode::kResource;
}

}  // namespace flux::sample
