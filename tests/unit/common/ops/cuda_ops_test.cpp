// The CUDA kernels of libflux_cuda.so against their CPU twins. Skipped where there is no GPU.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "common/ops/linear.h"
#include "common/ops/loss.h"
#include "common/ops/qk_norm_rope.h"
#include "common/optim/adamw.h"
#include "common/quant/quant.h"
#include "common/tensor/device.h"
#include "tests/support/golden.h"

namespace flux {
namespace {

class Cuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!device_->is_cuda())
      GTEST_SKIP() << "no GPU or no libflux_cuda.so: the CUDA kernels are not tested";
  }
  // before the first tensor: LibTorch takes the library only then
  static void SetUpTestSuite() { device_ = resolve_device(DeviceChoice::kAuto); }
  static inline std::optional<at::Device> device_;
};

TEST_F(Cuda, QkNormRopeEqualsItsCpuTwin) {
  at::manual_seed(1);
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const double limit = type == at::kFloat ? 1e-6 : 3e-3;
    // a slice of a wider Linear, and tables of each sample
    const auto wide = at::randn({2, 77, 3 * 4 * 128 + 32}).to(type);
    const auto scale = at::randn({2, 128}) + 1, angles = at::rand({2, 77, 64}) * 6,
               weight = at::randn({2, 77, 4, 128});
    const auto run = [&](at::Device device) {
      const auto leaf = wide.to(device).requires_grad_(),
                 scales = scale.to(device).requires_grad_();
      const auto out = qk_norm_rope(leaf.narrow(2, 0, 3 * 4 * 128),
                                    scales[0],
                                    scales[1],
                                    angles.cos().to(device),
                                    angles.sin().to(device));
      const auto w = weight.to(device);
      ((out.q * w).sum() + (out.k * w * 2).sum() + (out.v * w * 3).sum()).backward();
      return std::vector<at::Tensor>{out.q, out.k, out.v, leaf.grad(), scales.grad()};
    };
    const auto cpu = run(at::kCPU), cuda = run(*device_);
    for (size_t i = 0; i < cpu.size(); ++i)
      EXPECT_LT(test::relative_error(cuda[i].cpu(), cpu[i]), limit) << "result " << i;
  }
}

TEST_F(Cuda, LossEqualsItsCpuTwin) {
  at::manual_seed(7);
  for (const auto type : {LossType::kL2, LossType::kL1, LossType::kHuber, LossType::kSmoothL1}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const auto x = at::randn({2, 77, 67}).to(dtype), target = at::randn({2, 77, 67}),
                 mask = at::rand({2, 77, 67}), c = at::tensor({0.1f, 2.0f});
      const auto run = [&](at::Device device) {
        const auto leaf = x.to(device).requires_grad_();
        const auto sums = loss_sums(type, leaf, target.to(device), c.to(device), mask.to(device));
        sums.sum().backward();
        return std::vector<at::Tensor>{sums.detach(), leaf.grad()};
      };
      const auto cpu = run(at::kCPU), cuda = run(*device_);
      for (size_t i = 0; i < cpu.size(); ++i)
        EXPECT_LT(test::relative_error(cuda[i].cpu(), cpu[i]),
                  i && dtype != at::kFloat ? 3e-3 : 1e-6);
    }
  }
}

TEST_F(Cuda, AdamWEqualsItsCpuTwin) {
  at::manual_seed(2);
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const auto start = at::randn({4, 1000}).to(type);
    const auto gradient = at::randn({4, 1000}).to(type);
    std::vector<at::Tensor> results;
    for (const auto device : {at::Device(at::kCPU), *device_}) {
      const auto p = start.to(device, type, false, /*copy=*/true), g = gradient.to(device);
      const auto m = at::zeros_like(p), v = at::zeros_like(p);
      for (int64_t step = 1; step <= 3; ++step) adamw_step(p, g, m, v, 1e-2, {}, step);
      results.push_back(p.cpu());
    }
    EXPECT_LT(test::relative_error(results[1], results[0]), type == at::kFloat ? 1e-7 : 1e-3);
  }
}

TEST_F(Cuda, QuantisedWeightsHaveTheBitsOfTheCpuTwin) {
  at::manual_seed(3);
  for (const auto format : {QuantFormat::kFp8, QuantFormat::kNf4})
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      auto weight = (at::randn({257, 200}) * 0.02).to(type);
      weight[3].zero_();
      const auto cpu = quantize(weight, format), cuda = quantize(weight.to(*device_), format);
      EXPECT_TRUE(at::equal(cuda.codes.cpu().view(at::kByte), cpu.codes.view(at::kByte)));
      EXPECT_TRUE(at::equal(cuda.scales.cpu(), cpu.scales));
      EXPECT_TRUE(at::equal(dequantize(cuda, type).cpu(), dequantize(cpu, type)));
      const auto x = at::randn({3, 200}).to(type).to(*device_);
      EXPECT_TRUE(
          at::equal(linear({{}, {}, {}, cuda}, x), linear({dequantize(cuda, type), {}, {}}, x)));
    }
}

}  // namespace
}  // namespace flux
