// tests/bench/plan_check.cpp - the plan against what runs take, for random settings of small models.
//
//   plan_check [--count 40] [--seed 0]
//
// Every setting is planned and runs three steps in a process of its own, as flux-train would: random inputs, no
// caches. A line each: planned and measured peak of tensors and arenas, whose difference must be within
// max(1 %, 1 MiB) in float32 and max(3 %, 4 MiB) in bfloat16; and the process (VmHWM), which must not exceed its
// plan by more than 5 %. Exits 1 if one does.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <fmt/format.h>
#include <stdlib.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/engine/plan.h"
#include "common/engine/trainer.h"
#include "common/models/flux/names.h"
#include "common/tensor/memory.h"
#include "common/tensor/weight_file.h"
#include "pipelines/train/load.h"
#include "pipelines/train/options.h"
#include "pipelines/train/plan.h"
#include "tests/support/random_batch.h"

namespace flux {
namespace {
namespace fs = std::filesystem;

/// Widths in FLUX's proportions: 4, 29 and 117 million parameters.
constexpr int64_t kNumModels = 3;
dit::Config model_config(int64_t model) {
  dit::Config c;
  c.hidden = std::array<int64_t, kNumModels>{256, 512, 768}[static_cast<size_t>(model)];
  c.num_heads = c.hidden / 128;
  c.mlp = 4 * c.hidden;
  c.prompt_dim = c.hidden * 4 / 3 / 64 * 64;
  c.pooled_dim = c.hidden / 4;
  c.num_double_blocks = model + 1;
  c.num_single_blocks = 2 * c.num_double_blocks;
  return c;
}

/// Random weights of every tensor, bfloat16.
void write_model(const dit::Config& config, const fs::path& path) {
  const auto gen = at::make_generator<at::CPUGeneratorImpl>(4);
  TensorMap tensors;
  for (const auto& [name, shape] : dit::tensor_shapes(config)) {
    const double size = shape.size() == 2 ? 0.7 / std::sqrt(static_cast<double>(shape[1])) : 0.3;
    tensors[name] = at::randn(shape, gen).mul_(size).to(at::kBFloat16);
  }
  write_weights(path, tensors, {});
}

struct Setting {
  int64_t model = 0;
  train::Options options;
  engine::StepShape shape;
  std::string text;
};

/// The `number`-th of a seed, the same in every process.
Setting draw(int64_t seed, int64_t number) {
  std::mt19937_64 gen(static_cast<uint64_t>(seed) * 1000003 + static_cast<uint64_t>(number));
  const auto below = [&](int64_t n) {
    return static_cast<int64_t>(gen() % static_cast<uint64_t>(n));
  };
  Setting s;
  train::Options& o = s.options;
  engine::StepShape& shape = s.shape;
  s.model = below(kNumModels);
  const dit::Config config = model_config(s.model);
  const int64_t num_blocks = config.num_double_blocks + config.num_single_blocks;
  o.method = below(2) ? train::Method::kFull : train::Method::kLora;
  const bool full = o.method == train::Method::kFull;
  o.precision = below(2) ? train::Precision::kBF16 : train::Precision::kF32;
  o.optimizer = std::array{train::OptimizerKind::kAdamW,
                           train::OptimizerKind::kAdamW8bit,
                           train::OptimizerKind::kAdafactor}[static_cast<size_t>(below(3))];
  o.clip = std::array{engine::ClipMode::kGlobal,
                      engine::ClipMode::kPerParameter,
                      engine::ClipMode::kNone}[static_cast<size_t>(below(3))];
  o.rank = int64_t{1} << (2 + below(4));
  const int64_t base = below(3);
  if (!full)
    o.base = std::array{train::BasePrecision::kAsComputed,
                        train::BasePrecision::kFp8,
                        train::BasePrecision::kNf4}[static_cast<size_t>(base)];
  o.gradient_accumulation = shape.micro_batches = 1 + below(3);
  // half of the models stay as a whole
  o.resident_blocks = below(2) ? num_blocks : below(num_blocks);
  o.kept_graphs = below(2) ? 0 : below(*o.resident_blocks + 3);
  o.ring_slots = 2 + below(3);
  o.stream_adapters = !full && below(2);
  o.stream_states = full && below(2);
  o.block_inputs = below(2) ? engine::InputPlace::kDisk : engine::InputPlace::kDevice;
  o.stream_from = below(4) ? engine::StreamFrom::kFile : engine::StreamFrom::kHost;
  // chosen before: what is asked for is what is measured
  o.host_memory = int64_t{1} << 42;
  shape.batch = 1 + below(2);
  shape.width = 16 * (8 + below(13));
  shape.height = 16 * (8 + below(13));
  shape.text_length = 64 * (1 + below(4));
  shape.text_mask = below(2);
  shape.loss_mask = below(3) == 0;
  shape.text_type = below(2) ? at::kBFloat16 : at::kFloat;
  shape.input_noise = below(3) == 0;
  o.loss.type = std::array{
      LossType::kL2, LossType::kL2, LossType::kL1, LossType::kHuber}[static_cast<size_t>(below(4))];
  o.loss.huber_schedule = below(2) ? HuberSchedule::kSnr : HuberSchedule::kExponential;
  o.loss.prediction = std::array{Prediction::kRaw,
                                 Prediction::kAdditive,
                                 Prediction::kSigmaScaled}[static_cast<size_t>(below(3))];
  o.masked_loss = below(2) ? train::MaskedLoss::kRenormalised : train::MaskedLoss::kAuto;
  o.timesteps.weighting = below(2) ? WeightingScheme::kCosmap : WeightingScheme::kNone;
  // a plain LoRA in two of five
  const int64_t form = std::max<int64_t>(below(5) - 1, 0);
  if (!full && form > 0) {
    o.lora_form.dora = form != 2;
    if (form > 1) o.lora_form.algorithm = lora::Algorithm::kLokr;
    o.lora_form.factor = below(2) ? 8 : -1;
  }
  // the last draws, so that settings stay what they were without
  if (below(2)) {
    o.ema_decay = 0.9;
    o.ema_dtype = below(2) ? train::StateDtype::kF32 : train::StateDtype::kBF16;
  }
  const auto yes = [](bool is, const char* word) { return is ? word : ""; };
  s.text = fmt::format(
      "{}M {} {}{} {} clip{} {}x{}x{}x{} txt{}{}{}{} loss{}{} {}/{}res {}kept {}slots{}{}{}{}{}",
      config.num_parameters() / 1000000,
      full ? "full"
           : fmt::format("{}{}{}",
                         yes(o.lora_form.dora, "dora-"),
                         o.lora_form.algorithm == lora::Algorithm::kLokr ? "lokr" : "lora",
                         o.rank),
      o.precision == train::Precision::kBF16 ? "bf16" : "f32",
      o.base == train::BasePrecision::kFp8   ? "+fp8"
      : o.base == train::BasePrecision::kNf4 ? "+nf4"
                                             : "",
      o.optimizer == train::OptimizerKind::kAdamW       ? "adamw"
      : o.optimizer == train::OptimizerKind::kAdamW8bit ? "adamw8bit"
                                                        : "adafactor",
      static_cast<int>(*o.clip),
      shape.width,
      shape.height,
      shape.batch,
      shape.micro_batches,
      shape.text_length,
      yes(shape.text_mask, "m"),
      yes(shape.loss_mask, " lossmask"),
      yes(shape.input_noise, " noise"),
      static_cast<int>(o.loss.type),
      static_cast<int>(o.loss.prediction),
      *o.resident_blocks,
      num_blocks,
      *o.kept_graphs,
      *o.ring_slots,
      yes(o.stream_adapters, " adapters"),
      yes(o.stream_states, " states"),
      yes(*o.block_inputs == engine::InputPlace::kDisk, " disk"),
      yes(*o.stream_from == engine::StreamFrom::kHost, " host"),
      o.ema_decay == 0                         ? ""
      : o.ema_dtype == train::StateDtype::kF32 ? " ema"
                                               : " ema16");
  return s;
}

std::string model_name(int64_t model) { return fmt::format("{}.safetensors", model); }

/// In a process of its own: plans and runs; prints one JSON object.
void run_one(const Setting& s, const fs::path& folder) {
  count_tensor_memory();
  train::Options o = s.options;
  o.scratch = folder;
  engine::TrainerOptions wanted = train::trainer_options(
      o, at::kCPU, o.precision == train::Precision::kBF16 ? at::kBFloat16 : at::kFloat);
  engine::ModelFileOptions read;
  read.dtype = wanted.compute;
  read.quant = wanted.base;
  const auto file = std::make_shared<engine::ModelFile>(folder / model_name(s.model), read);
  const dit::Config config = file->config();
  const train::Choice choice = train::choose(o, config, file.get(), wanted, s.shape);
  if (!choice.fits) throw std::logic_error("a setting does not fit 4 TiB");
  wanted.residency = choice.residency;
  reset_cpu_peak();
  const int64_t before = cpu_memory().live;
  {
    engine::Trainer trainer(config, file, wanted);
    std::vector<FlowInputs> batches;
    for (int64_t i = 0; i < s.shape.micro_batches; ++i)
      batches.push_back(test::random_batch(config, s.shape));
    for (int64_t step = 1; step <= 3; ++step) trainer.step(batches, step, 1e-5);
    // as validation does; the plan of steps must cover it
    trainer.evaluate(std::span(batches).first(1));
  }
  const MemoryUse use = cpu_memory();
  engine::MemoryPlan plan = choice.plan;
  // on a CPU what weights stream from is memory of the same machine
  plan.causes[static_cast<size_t>(MemoryCause::kWeights)] += plan.host_store_bytes;
  nlohmann::json causes = nlohmann::json::object();
  for (size_t i = 0; i < kNumMemoryCauses; ++i)
    causes[std::string(memory_cause_name(static_cast<MemoryCause>(i)))] = {plan.causes[i],
                                                                           use.causes[i]};
  fmt::print("{}\n",
             nlohmann::json{{"planned", plan.device_bytes()},
                            {"measured", use.peak - before},
                            {"planned_process", choice.needed},
                            {"process", peak_rss_bytes()},
                            {"causes", causes}}
                 .dump());
}

nlohmann::json output_of(const std::string& command) {
  std::FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) throw ResourceError("cannot start a process", "free some memory");
  std::string text;
  for (char piece[4096]; std::fgets(piece, sizeof piece, pipe);) text += piece;
  if (const int status = pclose(pipe); status != 0)
    throw std::runtime_error(fmt::format("{} ended with status {}", command, status));
  return nlohmann::json::parse(text);
}

double mib(double bytes) { return bytes / (1 << 20); }

/// Prints the line of a setting; returns whether it is within its bounds.
bool compare(const Setting& s, const nlohmann::json& result) {
  const double planned = result.at("planned"), measured = result.at("measured");
  const double planned_process = result.at("planned_process"), process = result.at("process");
  const double bound = s.options.precision == train::Precision::kF32
                           ? std::max(0.01 * measured, 1048576.0)
                           : std::max(0.03 * measured, 4 * 1048576.0);
  const bool good = std::abs(planned - measured) <= bound && process <= 1.05 * planned_process;
  fmt::print("{:9.3f} {:9.3f} {:8.3f} {:6.2f} {:8.1f} {:8.1f} {:6.1f}%  {}  {}\n",
             mib(planned),
             mib(measured),
             mib(planned - measured),
             mib(bound),
             mib(planned_process),
             mib(process),
             100 * (process / planned_process - 1),
             good ? "ok " : "OUT",
             s.text);
  if (!good)
    for (const auto& [name, pair] : result.at("causes").items())
      if (pair.at(0) != pair.at(1))
        fmt::print("    {:18} planned {:>12} measured {:>12}\n",
                   name,
                   pair.at(0).get<int64_t>(),
                   pair.at(1).get<int64_t>());
  std::fflush(stdout);
  return good;
}

ExitCode run(Tool& tool) {
  int64_t count = 40, seed = 0, only = -1;
  fs::path folder;
  tool.flag("count", count, "N", "settings to try", 1, 100000);
  tool.flag("seed", seed, "S", "of the settings", 0, 1 << 30);
  tool.flag("only", only, "I", "run this one in this process and print a JSON object", -1, 100000);
  tool.flag("folder", folder, "DIR", "of the models, with --only");
  if (!tool.parse()) return ExitCode::kOk;
  if (only >= 0) {
    run_one(draw(seed, only), folder);
    return ExitCode::kOk;
  }
  std::string name = (fs::temp_directory_path() / "plan_check.XXXXXX").string();
  if (!mkdtemp(name.data()))
    throw ResourceError(fmt::format("cannot make {}", show(name)), "set TMPDIR");
  for (int64_t model = 0; model < kNumModels; ++model)
    write_model(model_config(model), fs::path(name) / model_name(model));
  fmt::print("{:>9} {:>9} {:>8} {:>6} {:>8} {:>8} {:>7}       MiB\n",
             "planned",
             "measured",
             "diff",
             "bound",
             "process",
             "VmHWM",
             "over");
  int64_t num_out = 0;
  const std::string self = fs::read_symlink("/proc/self/exe").string();
  for (int64_t i = 0; i < count; ++i)
    num_out += !compare(
        draw(seed, i),
        output_of(fmt::format("'{}' --only {} --seed {} --folder '{}'", self, i, seed, name)));
  fs::remove_all(name);
  fmt::print("{} of {} outside their bounds\n", num_out, count);
  return num_out ? ExitCode::kDiffers : ExitCode::kOk;
}

}  // namespace
}  // namespace flux

int main(int argc, char** argv) { return flux::run_tool("plan_check", argc, argv, flux::run); }
