#include "common/dist/group.h"

#include <fmt/format.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <algorithm>
#include <functional>
#include <future>
#include <stdexcept>
#include <thread>
#include <utility>

#include "common/core/log.h"
#include "common/core/text.h"
#include "common/dist/run_state.h"

namespace flux::dist {
namespace {

using StorePointer = c10::intrusive_ptr<c10d::Store>;
using BackendPointer = c10::intrusive_ptr<c10d::Backend>;

constexpr std::chrono::seconds kAbortLimit{10};
constexpr int64_t kGatherPiece = int64_t{16} << 20;  // bytes of all ranks

/// What moves is bytes: backends do not know every type.
at::Tensor as_bytes(const at::Tensor& tensor) { return tensor.view({-1}).view(at::kByte); }

BackendPointer connect(RunState& run, const StorePointer& store, int64_t rank, int64_t world) {
  const auto gloo = c10d::ProcessGroupGloo::Options::create(run.options.operation);
  try {
    gloo->devices.push_back(
        run.meeting.address.empty()
            ? c10d::ProcessGroupGloo::createDefaultDevice()
            : c10d::ProcessGroupGloo::createDeviceForHostname(run.meeting.address));
    auto backend = c10::make_intrusive<c10d::ProcessGroupGloo>(
        c10::make_intrusive<c10d::PrefixStore>("gloo", store),
        static_cast<int>(rank),
        static_cast<int>(world),
        gloo);
    break_silent_connections(run.options.silence);
    return backend;
  } catch (const std::exception& error) {
    run.broken(fmt::format("the address {} and those of others do not connect: {}",
                           run.meeting.address,
                           first_line(error)));
  }
}

}  // namespace

struct Group::State {
  std::shared_ptr<RunState> run;
  int64_t rank = 0, world = 1;  // within this group
  bool whole = true;            // that of join()
  StorePointer store;           // its keys are this group's own
  BackendPointer cpu, gpu;      // none: one rank; of GPUs: not used yet
  c10::intrusive_ptr<c10d::Work> started;

  c10d::Backend& of(const at::Tensor& tensor);
  /// What `operation` starts on the backend of `tensor`.
  template <typename Operation>
  c10::intrusive_ptr<c10d::Work> start(const at::Tensor& tensor, const Operation& operation);
  void wait(c10d::Work& work);
  void abort_gpu();
};

c10d::Backend& Group::State::of(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return *cpu;
  if (!gpu)
    gpu = run->options.gpu_backend({.store = c10::make_intrusive<c10d::PrefixStore>("gpu", store),
                                    .rank = rank,
                                    .world = world,
                                    .device = tensor.device(),
                                    .operation = run->options.operation});
  return *gpu;
}

template <typename Operation>
c10::intrusive_ptr<c10d::Work> Group::State::start(const at::Tensor& tensor,
                                                   const Operation& operation) {
  run->check();
  try {
    return operation(of(tensor));
  } catch (const c10::DistError& error) {
    // NCCL says in the last of several lines what was wrong
    std::string text = error.what_without_backtrace();
    std::replace(text.begin(), text.end(), '\n', ' ');
    run->broken(printable(text));
  }
}

void Group::State::wait(c10d::Work& work) {
  try {
    run->wait(work);
  } catch (const std::exception&) {
    abort_gpu();
    throw;
  }
}

void Group::State::abort_gpu() {
  if (!gpu) return;
  // what a GPU waits for keeps it for ever; the abort itself may hang
  std::promise<void> done;
  const auto is_done = done.get_future();
  std::thread([backend = std::exchange(gpu, nullptr), done = std::move(done)]() mutable {
    try {
      backend->abort();
    } catch (const std::exception& error) {
      log::warn("what GPUs exchange is not aborted: {}", first_line(error));
    }
    backend.release();  // its threads wait for ranks that do not answer
    done.set_value();
  }).detach();
  is_done.wait_for(kAbortLimit);
}

Group::Group(std::unique_ptr<State> state) : state_(std::move(state)) {}

std::unique_ptr<Group> Group::join(const Launch& launch,
                                   const std::filesystem::path& address_file,
                                   const GroupOptions& options) {
  prepare_nccl();
  auto state = std::make_unique<State>();
  state->run = RunState::meet_and_watch(launch, address_file, options);
  state->rank = launch.rank;
  state->world = launch.world;
  state->store = state->run->meeting.store;
  State& s = *state;
  auto group = std::unique_ptr<Group>(new Group(std::move(state)));  // ends the watch if it fails
  s.cpu = connect(*s.run, s.store, s.rank, s.world);
  log::info("{}", launch.describe());
  return group;
}

std::unique_ptr<Group> Group::part(const std::string& name, std::span<const int64_t> ranks) {
  RunState& run = *state_->run;
  run.check();
  const auto me = std::find(ranks.begin(), ranks.end(), state_->rank);
  if (me == ranks.end() || ranks.front() < 0 || ranks.back() >= state_->world ||
      std::adjacent_find(ranks.begin(), ranks.end(), std::greater_equal<>()) != ranks.end())
    throw std::invalid_argument(
        fmt::format("part {}: ranks {} are not some of {} in ascending order with {} among them",
                    name,
                    fmt::join(ranks, ","),
                    state_->world,
                    state_->rank));
  auto state = std::make_unique<State>();
  state->run = state_->run;
  state->rank = me - ranks.begin();
  state->world = static_cast<int64_t>(ranks.size());
  state->whole = false;
  // a connection of its own: one that waits for a key keeps others waiting
  state->store = c10::make_intrusive<c10d::PrefixStore>(
      fmt::format("part/{}/{}", name, ranks.front()),
      run.with_store([&] { return state_->store->clone(); }));
  State& s = *state;
  auto group = std::unique_ptr<Group>(new Group(std::move(state)));
  if (s.world > 1) s.cpu = connect(run, s.store, s.rank, s.world);
  return group;
}

Group::~Group() {
  RunState& run = *state_->run;
  if (!run.has_failed && state_->gpu) {
    try {
      state_->gpu->shutdown();
    } catch (const std::exception& error) {
      log::warn("connections between GPUs: {}", first_line(error));
    }
  }
  if (state_->whole) run.end();
  if (!run.has_failed) return;
  state_->abort_gpu();
  // their threads wait for ranks that do not answer
  state_.release();
}

int64_t Group::rank() const { return state_->rank; }
int64_t Group::world() const { return state_->world; }

void Group::all_gather(const at::Tensor& all, const at::Tensor& own) {
  State& s = *state_;
  s.run->check();
  at::Tensor out = as_bytes(all), in = as_bytes(own);
  if (!s.cpu) {
    if (out.data_ptr() != in.data_ptr()) out.copy_(in);
    return;
  }
  // Gloo puts all together in memory of its own first
  const int64_t most = out.is_cpu() ? std::max<int64_t>(1, kGatherPiece / world()) : in.numel();
  if (in.numel() <= most) {
    s.wait(*s.start(out, [&](c10d::Backend& b) { return b.all_gather_single(out, in); }));
    return;
  }
  const at::Tensor rows = out.view({world(), -1});
  for (int64_t begin = 0; begin < in.numel(); begin += most) {
    const int64_t count = std::min(most, in.numel() - begin);
    std::vector<at::Tensor> pieces, mine{in.narrow(0, begin, count)};
    for (int64_t rank = 0; rank < world(); ++rank)
      pieces.push_back(rows[rank].narrow(0, begin, count));
    std::vector<std::vector<at::Tensor>> received{pieces};
    s.wait(*s.start(out, [&](c10d::Backend& b) { return b.allgather(received, mine); }));
  }
}

void Group::start_all_to_all(const at::Tensor& received, const at::Tensor& sent) {
  State& s = *state_;
  s.run->check();
  at::Tensor out = as_bytes(received), in = as_bytes(sent);
  std::vector<int64_t> equal_parts;
  if (s.cpu)
    s.started = s.start(out, [&](c10d::Backend& b) {
      return b.all_to_all_single(out, in, equal_parts, equal_parts);
    });
  else
    out.copy_(in);
}

void Group::wait() {
  if (state_->started) state_->wait(*state_->started);
  state_->started.reset();
}

void Group::barrier() {
  state_->run->check();
  if (state_->cpu) state_->wait(*state_->cpu->barrier());
}

std::vector<std::string> Group::gather(const std::string& name, const std::string& mine) {
  State& s = *state_;
  s.run->check();
  s.run->with_store([&] { s.store->set(fmt::format("gather/{}/{}", name, s.rank), mine); });
  std::vector<std::string> all;
  if (s.rank != 0) return all;
  for (int64_t rank = 0; rank < s.world; ++rank)
    all.push_back(
        s.run->get(*s.store, fmt::format("gather/{}/{}", name, rank), s.run->options.operation));
  return all;
}

std::string Group::share(const std::string& name, const std::string& text) {
  State& s = *state_;
  s.run->check();
  const std::string key = "share/" + name;
  if (s.rank == 0) {
    s.run->with_store([&] { s.store->set(key, text); });
    return text;
  }
  return s.run->get(*s.store, key, s.run->options.operation);
}

std::shared_ptr<void> Group::finishing() {
  ++state_->run->finishing;
  return {nullptr, [run = state_->run](void*) { --run->finishing; }};
}

void Group::fail(const std::string& reason) noexcept { state_->run->fail(reason); }

void Group::leave() {
  State& s = *state_;
  if (!s.whole) throw std::invalid_argument("a part of the ranks cannot leave the run");
  barrier();
  s.run->leave();
}

}  // namespace flux::dist
