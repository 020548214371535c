// Its own program: the allocators must be in place before the first tensor. What blocks hold on Meta is what they hold on
// the CPU, so a plan made on Meta is the run's.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <string>

#include "common/models/flux/transformer.h"
#include "common/ops/attention.h"
#include "common/ops/gelu.h"
#include "common/ops/linear.h"
#include "common/ops/modulate.h"
#include "common/ops/qk_norm_rope.h"
#include "common/tensor/memory.h"

namespace flux {
namespace {

struct Use {
  int64_t peak = 0, held = 0;  // bytes beyond what was live before
};

/// The bytes of `run`, which returns what it wants to be held.
Use use_of(at::DeviceType device, const std::function<std::vector<at::Tensor>()>& run) {
  const auto now = [&] { return device == at::kMeta ? meta_memory() : cpu_memory(); };
  const int64_t before = now().live;
  device == at::kMeta ? reset_meta_peak() : reset_cpu_peak();
  const auto held = run();
  return {now().peak - before, now().live - before};
}

struct Case {
  at::ScalarType type;
  int64_t batch, text, image, heads, head;
  bool masked;
  enum Train { kNone, kLora, kAll } train;

  int64_t hidden() const { return heads * head; }
  std::string text_of() const {
    return std::string(c10::toString(type)) + " batch " + std::to_string(batch) + " text " +
           std::to_string(text) + " image " + std::to_string(image) + " heads " +
           std::to_string(heads) + " of " + std::to_string(head) + (masked ? " masked" : "") +
           (train == kNone   ? " forward"
            : train == kLora ? " lora"
                             : " full");
  }
};

/// One double or single block of a case on a device: its weights, and what runs it.
class Block {
 public:
  Block(const Case& c, at::DeviceType device) : c_(c), device_(device) {
    rope_ = {make({1, c.text + c.image, c.head / 2}, at::kFloat),
             make({1, c.text + c.image, c.head / 2}, at::kFloat)};
    vec_ = make({c.batch, c.hidden()}, at::kFloat).requires_grad_(c.train == Case::kAll);
    if (c.masked) {
      mask_ = at::ones({c.batch, c.text + c.image}, options(at::kBool));
      if (device == at::kCPU) mask_->narrow(1, 0, 1).fill_(false);
    }
  }

  Use run_double() {
    const auto stream = [&] {
      return dit::Stream{layer(6 * c_.hidden(), c_.hidden()),
                         layer(3 * c_.hidden(), c_.hidden()),
                         leaf({c_.head}),
                         leaf({c_.head}),
                         layer(c_.hidden(), c_.hidden()),
                         layer(4 * c_.hidden(), c_.hidden()),
                         layer(c_.hidden(), 4 * c_.hidden())};
    };
    const dit::DoubleBlock weights{stream(), stream()};
    const dit::Streams in{input(c_.image), input(c_.text)};
    const auto grad_img = make({c_.batch, c_.image, c_.hidden()}, c_.type),
               grad_txt = make({c_.batch, c_.text, c_.hidden()}, c_.type);
    return use_of(device_, [&]() -> std::vector<at::Tensor> {
      auto out = dit::double_block(weights, in, vec_, rope_, mask_);
      if (c_.train == Case::kNone) return {out.img, out.txt};
      torch::autograd::backward({out.img, out.txt}, {grad_img, grad_txt});
      return {};
    });
  }

  Use run_single() {
    const dit::SingleBlock weights{layer(3 * c_.hidden(), c_.hidden()),
                                   layer(7 * c_.hidden(), c_.hidden()),
                                   layer(c_.hidden(), 5 * c_.hidden()),
                                   leaf({c_.head}),
                                   leaf({c_.head})};
    const auto x = input(c_.text + c_.image);
    const auto grad = make({c_.batch, c_.text + c_.image, c_.hidden()}, c_.type);
    return use_of(device_, [&]() -> std::vector<at::Tensor> {
      auto out = dit::single_block(weights, x, vec_, rope_, mask_);
      if (c_.train == Case::kNone) return {out};
      torch::autograd::backward({out}, {grad});
      return {};
    });
  }

 private:
  at::TensorOptions options(at::ScalarType type) const {
    return at::TensorOptions(device_).dtype(type);
  }
  at::Tensor make(at::IntArrayRef shape, at::ScalarType type) const {
    return at::full(shape, 0.01, options(type));
  }
  at::Tensor leaf(at::IntArrayRef shape) const {
    return make(shape, c_.type).requires_grad_(c_.train == Case::kAll);
  }
  at::Tensor input(int64_t tokens) const {
    return make({c_.batch, tokens, c_.hidden()}, c_.type).requires_grad_(c_.train != Case::kNone);
  }
  Linear layer(int64_t out, int64_t in) const {
    Linear result{leaf({out, in}), leaf({out}), {}};
    if (c_.train != Case::kLora) return result;
    result.lora = {
        make({4, in}, at::kFloat).requires_grad_(), make({out, 4}, at::kFloat).requires_grad_(), 1};
    return result;
  }

  Case c_;
  at::DeviceType device_;
  dit::Rope rope_;
  at::Tensor vec_;
  std::optional<at::Tensor> mask_;
};

void expect_equal(const Use& cpu, const Use& meta, const Case& c) {
  // Of attention's backward: a sum a row of a block of queries, in threads that hold theirs at the same time or do not;
  // and in bfloat16 what oneDNN takes for the products of a block, which depends on the CPU (measured: up to 340 kB a
  // thread).
  const int64_t threads = at::get_num_threads();
  const int64_t sums = threads > 1 ? 1024 * threads : 64;
  const auto near = [&](int64_t a, int64_t b) {
    if (c.type == at::kFloat) return std::abs(a - b) <= sums;
    const int64_t products = c.train == Case::kNone ? 0 : threads * (int64_t{350} << 10);
    return std::abs(a - b) <= std::max(a / 100, products);
  };
  EXPECT_TRUE(near(cpu.peak, meta.peak)) << "peak " << cpu.peak << " on the CPU, " << meta.peak
                                         << " on Meta: " << meta.peak - cpu.peak;
  EXPECT_TRUE(near(cpu.held, meta.held)) << cpu.held << " " << meta.held;
}

std::vector<Case> cases() {
  std::vector<Case> out;
  for (const auto type : {at::kFloat, at::kBFloat16})
    for (const auto train : {Case::kNone, Case::kLora, Case::kAll})
      for (const bool masked : {false, true}) {
        out.push_back({type, 1, 16, 48, 2, 32, masked, train});
        out.push_back({type, 2, 13, 37, 3, 48, masked, train});
        out.push_back({type, 1, 77, 250, 4, 64, masked, train});
        out.push_back({type, 2, 130, 700, 4, 128, masked, train});
      }
  return out;
}

TEST(BlockMemory, OfADoubleBlockIsTheSameOnMeta) {
  count_tensor_memory();
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.text_of());
    const at::AutoGradMode grad(c.train != Case::kNone);
    expect_equal(Block(c, at::kCPU).run_double(), Block(c, at::kMeta).run_double(), c);
  }
}

TEST(BlockMemory, OfASingleBlockIsTheSameOnMeta) {
  count_tensor_memory();
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.text_of());
    const at::AutoGradMode grad(c.train != Case::kNone);
    expect_equal(Block(c, at::kCPU).run_single(), Block(c, at::kMeta).run_single(), c);
  }
}

}  // namespace
}  // namespace flux
