// Its own program: the allocators must be in place before the first tensor.
#include "common/tensor/memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "common/core/file.h"

namespace flux {
namespace {

at::Tensor bytes(int64_t count, at::Device device = at::kCPU) {
  return at::empty({count}, at::TensorOptions().dtype(at::kByte).device(device));
}

TEST(Memory, CountsByCauseAtThePeak) {
  count_tensor_memory();
  const auto before = cpu_memory().live;
  reset_cpu_peak();
  {
    const MemoryScope ring(MemoryCause::kRing);
    const auto a = bytes(1000);  // counts 1024
    {
      const MemoryScope inner(MemoryCause::kGradients);
      const auto b = bytes(int64_t{3} << 20);
      EXPECT_EQ(cpu_memory().live, before + 1024 + (3 << 20));
    }
    const auto c = bytes(1);
    EXPECT_EQ(cpu_memory().live, before + 1024 + 64);
  }
  const auto use = cpu_memory();
  EXPECT_EQ(use.live, before);
  EXPECT_EQ(use.peak, before + 1024 + (3 << 20));
  EXPECT_EQ(use.causes[static_cast<size_t>(MemoryCause::kRing)], 1024);
  EXPECT_EQ(use.causes[static_cast<size_t>(MemoryCause::kGradients)], 3 << 20);
  reset_cpu_peak();
  EXPECT_EQ(cpu_memory().peak, before);
}

TEST(Memory, MetaCountsAsTheCpuDoes) {
  count_tensor_memory();
  for (const int64_t size : {1, 63, 64, 65, 4000, 5 << 20}) {
    const auto cpu = cpu_memory().live, meta = meta_memory().live;
    const auto a = bytes(size), b = bytes(size, at::kMeta);
    EXPECT_EQ(cpu_memory().live - cpu, meta_memory().live - meta) << size;
  }
}

TEST(Memory, AFreedBlockServesASmallerOneAndIsCut) {
  count_tensor_memory();
  constexpr int64_t kSize = int64_t{64} << 20;
  bytes(2 * kSize).reset();  // the peak that kept blocks stay within
  release_cached_memory();
  const void* first = nullptr;
  {
    const auto a = bytes(kSize);
    first = a.data_ptr();
    a.fill_(7);
  }
  const auto before = static_cast<int64_t>(rss_bytes());
  const auto b = bytes(kSize * 5 / 8);
  EXPECT_EQ(b.data_ptr(), first);
  EXPECT_EQ(b[-1].item<uint8_t>(), 7);  // pages were not mapped anew
  EXPECT_LT(static_cast<int64_t>(rss_bytes()),
            before - kSize / 4);    // nor are those kept that are too much
  const auto c = bytes(kSize / 8);  // a fresh one: no block is kept
  EXPECT_NE(c.data_ptr(), first);
}

TEST(Memory, FreedBlocksAreUsedAgainAndNothingIsKeptBeyondThePeak) {
  count_tensor_memory();
  constexpr int64_t kSize = int64_t{8} << 20;
  const void* first = nullptr;
  {
    const auto a = bytes(kSize);
    first = a.data_ptr();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(first) % 64, 0u);
  }
  EXPECT_EQ(bytes(kSize).data_ptr(), first);
  release_cached_memory();
  const auto again = bytes(kSize);
  again.zero_();
  EXPECT_EQ(again.sum().item<int64_t>(), 0);
}

TEST(Memory, ValuesSurviveThreadsThatAllocateAtOnce) {
  count_tensor_memory();
  const auto before = cpu_memory().live;
  std::vector<std::thread> threads;
  std::vector<char> good(4, 0);
  for (size_t t = 0; t < good.size(); ++t) {
    threads.emplace_back([&, t] {
      good[t] = 1;
      for (int64_t round = 0; round < 50; ++round) {
        const auto a = bytes((int64_t{1} << 20) + 4096 * (round % 3));
        a.fill_(static_cast<int64_t>(t));
        if (!a.eq(static_cast<int64_t>(t)).all().item<bool>()) good[t] = 0;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(good, std::vector<char>(4, 1));
  EXPECT_EQ(cpu_memory().live, before);
}

TEST(Memory, OneDnnComputesOnIt) {
  count_tensor_memory();
  const auto x = at::ones({64, 256}, at::kBFloat16);
  EXPECT_EQ(at::mm(x, x.t()).to(at::kFloat).sum().item<float>(), 64.0f * 64 * 256);
}

TEST(Memory, ACauseCanBeGivenLater) {
  count_tensor_memory();
  for (const auto device : {at::kCPU, at::kMeta}) {
    const auto of = [&](MemoryCause cause) {
      device == at::kCPU ? reset_cpu_peak() : reset_meta_peak();
      return (device == at::kCPU ? cpu_memory() : meta_memory()).causes[static_cast<size_t>(cause)];
    };
    const auto inputs = of(MemoryCause::kBlockInputs), other = of(MemoryCause::kOther);
    {
      const auto a = bytes(4096, device);
      EXPECT_EQ(of(MemoryCause::kOther), other + 4096);
      count_as(a, MemoryCause::kBlockInputs);
      EXPECT_EQ(of(MemoryCause::kOther), other);
      EXPECT_EQ(of(MemoryCause::kBlockInputs), inputs + 4096);
    }
    EXPECT_EQ(of(MemoryCause::kBlockInputs), inputs);
  }
}

TEST(Memory, ArenasCountToo) {
  const auto before = cpu_memory().live;
  {
    CountedMemory arena(1 << 20, MemoryCause::kRing);
    const CountedMemory moved = std::move(arena);
    EXPECT_EQ(cpu_memory().live, before + (1 << 20));
  }
  EXPECT_EQ(cpu_memory().live, before);
}

}  // namespace
}  // namespace flux
