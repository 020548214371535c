// The CUDA kernels of optimizers against their CPU twins. Skipped where there is no GPU.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "common/optim/ema.h"
#include "common/optim/optimizer.h"
#include "common/tensor/device.h"
#include "tests/support/golden.h"

namespace flux {
namespace {

class CudaOptimizers : public testing::Test {
 protected:
  void SetUp() override {
    if (!device_->is_cuda())
      GTEST_SKIP() << "no GPU or no libflux_cuda.so: the CUDA kernels are not tested";
  }
  // before the first tensor: LibTorch takes the library only then
  static void SetUpTestSuite() { device_ = resolve_device(DeviceChoice::kAuto); }
  static inline std::optional<at::Device> device_;
};

TEST_F(CudaOptimizers, EqualTheirCpuTwins) {
  const OptimizerOptions kinds[] = {AdamWOptions{},
                                    AdamW8bitOptions{},
                                    AdafactorOptions{},
                                    AdafactorOptions{.beta1 = 0.9, .scale_parameter = true},
                                    LionOptions{},
                                    ProdigyOptions{.d0 = 1e-3},
                                    ScheduleFreeOptions{},
                                    SgdOptions{}};
  for (const auto& shape : {std::vector<int64_t>{7}, {301, 77}, {1000, 130}, {3, 20, 100}}) {
    for (const auto& options : kinds) {
      for (const WeightMode mode : {WeightMode::kStochastic,
                                    WeightMode::kNearest,
                                    WeightMode::kKahan,
                                    WeightMode::kMaster}) {
        std::vector<at::Tensor> results;
        std::string name;
        for (const auto device : {at::Device(at::kCPU), *device_}) {
          at::manual_seed(1);
          const auto optimizer = make_optimizer(options, {.weights = mode});
          name = optimizer->name();
          Slot slot;
          slot.parameter = at::randn(shape).to(at::kBFloat16).to(device);
          for (const StateTensor& s : optimizer->state_layout(shape, at::kBFloat16))
            slot.states.push_back(at::zeros(s.shape, at::device(device).dtype(s.dtype)));
          for (int64_t t = 1; t <= 3; ++t) {
            const StepScalars step{.step = t, .learning_rate = 1e-2, .seed = 5};
            slot.gradient = at::randn(shape).to(device);
            optimizer->begin_step(step);
            if (optimizer->two_phase()) {
              optimizer->observe(slot, step);
              optimizer->end_observe();
            }
            optimizer->step(slot, step);
          }
          results.push_back(slot.parameter.cpu());
        }
        // equal random numbers: only values within a float32's last place of a border differ, by one
        // place of bfloat16
        const auto differ = results[0].ne(results[1]);
        EXPECT_LE(differ.sum().item<int64_t>(), 2 + differ.numel() / 500) << name;
        EXPECT_LT(test::relative_error(results[1], results[0]), 1e-3) << name;
      }
    }
  }
}

TEST_F(CudaOptimizers, AverageAsTheirCpuTwin) {
  at::manual_seed(2);
  const at::Tensor start = at::randn({5000}).to(at::kBFloat16), weights = at::randn({5000});
  const at::Tensor cpu = start.clone(), cuda = start.to(*device_);
  ema_update(cpu, weights, 0.9, 1, 2, 3);
  ema_update(cuda, weights.to(*device_), 0.9, 1, 2, 3);
  EXPECT_LE(cuda.cpu().ne(cpu).sum().item<int64_t>(), 5);
}

TEST_F(CudaOptimizers, KeepAveragesInHostMemoryToo) {
  at::manual_seed(3);
  const at::Tensor start = at::randn({301, 77}).to(at::kBFloat16);
  const auto optimizer = make_optimizer(AdamWOptions{});
  optimizer->keep_average({.decay = 0.7}, at::kFloat);
  std::vector<at::Tensor> averages;
  for (const auto average_on : {at::Device(at::kCPU), *device_}) {
    Slot slot;
    slot.parameter = start.to(*device_);
    for (const StateTensor& s : optimizer->state_layout(start.sizes(), at::kBFloat16))
      slot.states.push_back(
          at::zeros(s.shape, at::device(s.on_host ? average_on : *device_).dtype(s.dtype)));
    for (int64_t t = 1; t <= 3; ++t) {
      const StepScalars step{.step = t, .learning_rate = 1e-2, .seed = 5};
      at::manual_seed(static_cast<uint64_t>(t));
      slot.gradient = at::randn(start.sizes()).to(*device_);
      optimizer->step(slot, step);
      optimizer->average(slot, step);
    }
    EXPECT_EQ(slot.states.back().device(), average_on);
    EXPECT_EQ(optimizer->averaged_weights(slot).scalar_type(), at::kBFloat16);
    averages.push_back(slot.states.back().cpu());
  }
  EXPECT_LT(test::relative_error(averages[1], averages[0]), 1e-6);
}

}  // namespace
}  // namespace flux
