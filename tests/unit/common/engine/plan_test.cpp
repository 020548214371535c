// The plan against what a step really takes.
#include "common/engine/plan.h"

#include <ATen/ops/full.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include "tests/support/random_batch.h"
#include "tests/unit/common/engine/small_model.h"

namespace flux::engine {
namespace {

std::string table(const MemoryByCause& planned, const MemoryByCause& measured) {
  std::string text;
  for (size_t i = 0; i < planned.size(); ++i)
    text += fmt::format("{:16} {:12} {:12}\n",
                        memory_cause_name(static_cast<MemoryCause>(i)),
                        planned[i],
                        measured[i]);
  return text;
}

class PlanTest : public ::testing::Test {
 protected:
  void SetUp() override {
    count_tensor_memory();
    config_.hidden = 256;
    config_.num_heads = 2;
    config_.mlp = 1024;
    config_.axes = {16, 56, 56};
    std::string name = (std::filesystem::temp_directory_path() / "plan_test.XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
    write_small_model(config_, folder_ / "flux.safetensors");
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  /// Peak of three steps beyond what was there before.
  MemoryUse measure(const TrainerOptions& options, const StepShape& shape) {
    ModelFileOptions read;
    read.dtype = options.compute;
    read.quant = options.base;
    const int64_t before = cpu_memory().live;
    reset_cpu_peak();
    auto file = std::make_shared<ModelFile>(folder_ / "flux.safetensors", read);
    TrainerOptions with_count = options;
    with_count.several_micro_batches = shape.micro_batches > 1;
    with_count.scratch = folder_;
    Trainer trainer(config_, file, with_count);
    std::vector<FlowInputs> batches;
    for (int64_t i = 0; i < shape.micro_batches; ++i)
      batches.push_back(test::random_batch(config_, shape));
    for (int64_t step = 1; step <= 3; ++step) trainer.step(batches, step, 1e-4);
    MemoryUse use = cpu_memory();
    use.peak -= before;
    return use;
  }

  dit::Config config_ = small_config(2, 4);
  std::filesystem::path folder_;
};

TEST_F(PlanTest, IsWhatAStepTakes) {
  struct Case {
    const char* name;
    TrainerOptions options;
    StepShape shape;
  };
  const auto lora = [](at::ScalarType compute, Residency residency) {
    TrainerOptions o;
    o.compute = compute;
    o.residency = residency;
    return o;
  };
  const auto full = [](at::ScalarType compute, Residency residency, OptimizerOptions optimizer) {
    TrainerOptions o;
    o.compute = compute;
    o.full = true;
    o.optimizer = optimizer;
    o.residency = residency;
    return o;
  };
  Residency all, streamed, kept, disk, adapters, states;
  streamed.resident_blocks = 1;
  streamed.kept_graphs = 2;
  kept.kept_graphs = 6;
  adapters.resident_blocks = 0;
  adapters.stream_adapters = true;
  states.stream_states = true;
  disk.resident_blocks = 0;
  disk.inputs = InputPlace::kDisk;
  StepShape one, two;
  one.width = one.height = 256;
  one.text_length = 64;
  two = one;
  two.batch = 2;
  two.micro_batches = 2;
  two.width = 320;
  const auto with_options = [&](Residency residency, lora::Family blocks) {
    TrainerOptions o = lora(at::kFloat, residency);
    o.selection = {.blocks = blocks,
                   .ranks_of_types = lora::module_ranks("single=64,img_in=8,vector_in=8")};
    if (blocks == lora::Family::kSingle) o.selection.ranks_of_types = {{"single", 64}};
    o.max_weight_norm = 0.5;
    o.dropout = {.values = 0.2, .ranks = 0.1};
    return o;
  };
  const auto averaged = [](TrainerOptions o, at::ScalarType type) {
    o.ema_decay = 0.9;
    o.ema_dtype = type;
    return o;
  };
  const Case cases[] = {
      {"lora f32 averaged", averaged(lora(at::kFloat, all), at::kFloat), two},
      {"lora f32 averaged, adapters streamed",
       averaged(lora(at::kFloat, adapters), at::kBFloat16),
       one},
      {"full f32 schedulefree averaged",
       averaged(full(at::kFloat, all, ScheduleFreeOptions{}), at::kFloat),
       one},
      {"full bf16 adamw8bit averaged, streamed",
       averaged(full(at::kBFloat16, streamed, AdamW8bitOptions{}), at::kBFloat16),
       two},
      {"lora f32 with its options", with_options(all, lora::Family::kAll), two},
      {"lora f32 of single blocks, kept", with_options(kept, lora::Family::kSingle), two},
      {"lora f32 with its options, streamed", with_options(adapters, lora::Family::kAll), one},
      {"lora f32", lora(at::kFloat, all), one},
      {"lora f32 streamed", lora(at::kFloat, streamed), one},
      {"lora f32 kept", lora(at::kFloat, kept), two},
      {"lora f32 disk", lora(at::kFloat, disk), two},
      {"full f32 adamw", full(at::kFloat, all, AdamWOptions{}), one},
      {"full f32 adamw8bit streamed", full(at::kFloat, streamed, AdamW8bitOptions{}), two},
      {"full f32 adafactor streamed", full(at::kFloat, streamed, AdafactorOptions{}), one},
      {"full f32 adamw, states streamed", full(at::kFloat, states, AdamWOptions{}), two},
      {"full bf16 adamw8bit, states streamed",
       full(at::kBFloat16, states, AdamW8bitOptions{}),
       one},
      {"lora f32 adapters streamed", lora(at::kFloat, adapters), one},
      {"lora bf16", lora(at::kBFloat16, all), one},
      {"lora bf16 streamed", lora(at::kBFloat16, streamed), two},
      {"full bf16 adafactor", full(at::kBFloat16, all, AdafactorOptions{}), one},
      {"full bf16 adamw8bit streamed", full(at::kBFloat16, streamed, AdamW8bitOptions{}), one},
  };
  for (const Case& c : cases) {
    const MemoryPlan plan = plan_memory(config_, nullptr, c.options, c.shape);
    const MemoryUse use = measure(c.options, c.shape);
    const double bound = c.options.compute == at::kFloat
                             ? std::max(0.01 * static_cast<double>(use.peak), 1048576.0)
                             : std::max(0.03 * static_cast<double>(use.peak), 4 * 1048576.0);
    EXPECT_NEAR(static_cast<double>(plan.device_bytes()), static_cast<double>(use.peak), bound)
        << c.name << "\n"
        << table(plan.causes, use.causes);
  }
}

TEST_F(PlanTest, SaysWhatEvaluatingTakes) {
  Residency all, streamed, adapters, states;
  streamed.resident_blocks = 1;
  adapters.resident_blocks = 0;
  adapters.stream_adapters = true;
  states.stream_states = true;
  StepShape shape;
  shape.width = shape.height = 256;
  shape.text_length = 64;
  shape.batch = 2;
  for (const bool full : {false, true})
    for (const Residency& residency : {all, streamed, full ? states : adapters})
      for (const bool averages : {false, true}) {
        TrainerOptions o;
        o.compute = at::kFloat;
        o.full = full;
        o.residency = residency;
        o.scratch = folder_;
        if (averages) o.optimizer = ScheduleFreeOptions{};
        const MemoryPlan step = plan_memory(config_, nullptr, o, shape);
        MemoryPlan planned = step;
        for (const int64_t count : {1, 4}) {
          planned.causes = evaluation_memory(config_, o, shape, count);
          ModelFileOptions read;
          read.dtype = o.compute;
          const int64_t before = cpu_memory().live;
          reset_cpu_peak();
          auto file = std::make_shared<ModelFile>(folder_ / "flux.safetensors", read);
          Trainer trainer(config_, file, o);
          std::vector<FlowInputs> batches;
          for (int64_t i = 0; i < count; ++i) batches.push_back(test::random_batch(config_, shape));
          trainer.evaluate(batches);
          const MemoryUse use = cpu_memory();
          const auto peak = static_cast<double>(use.peak - before);
          EXPECT_NEAR(static_cast<double>(planned.device_bytes()), peak, std::max(0.01 * peak, 1048576.0))
              << full << averages << residency.resident_blocks << count << "\n"
              << table(planned.causes, use.causes);
          if (count == 1) {
            EXPECT_LE(planned.device_bytes(), step.device_bytes());
          }
        }
      }
}

TEST_F(PlanTest, AveragesOfAGpuAreInHostMemory) {
  TrainerOptions with;
  with.compute = at::kFloat;
  StepShape shape;
  shape.width = shape.height = 64;
  shape.text_length = 64;
  for (const at::DeviceType device : {at::kCPU, at::kCUDA}) {
    with.device = device;
    with.ema_decay = 0;
    const MemoryPlan before = plan_memory(config_, nullptr, with, shape);
    with.ema_decay = 0.9;
    const MemoryPlan after = plan_memory(config_, nullptr, with, shape);
    const int64_t on_device = after.device_bytes() - before.device_bytes(),
                  on_host = after.host_store_bytes - before.host_store_bytes;
    const bool cpu = device == at::kCPU;
    EXPECT_EQ(on_host == 0, cpu);
    EXPECT_EQ(on_device == 0, !cpu);
    // half of AdamW's two moments
    const auto optimizer = static_cast<size_t>(MemoryCause::kOptimizer);
    EXPECT_GE(cpu ? on_device : on_host, before.causes[optimizer] / 2);
    EXPECT_LE(cpu ? on_device : on_host,
              before.causes[optimizer] / 2 + 4 * config_.hidden * 16 * 7);
  }
}

}  // namespace
}  // namespace flux::engine
