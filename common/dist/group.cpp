#include "common/dist/group.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>
#include <unistd.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/dist/meeting.h"

namespace flux::dist {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr milliseconds kBeat{1000};  // between signs of life
// After an operation failed: how long a rank may be silent, and how long rank 0 looks for one that is.
constexpr seconds kSilenceInTrouble{4}, kSearch{10};
constexpr seconds kGrace{10};  // for the main thread to end by itself

std::vector<uint8_t> bytes(const std::string& text) { return {text.begin(), text.end()}; }

std::string this_process() {
  char host[256] = {};
  gethostname(host, sizeof host - 1);
  return fmt::format("process {} on {}", getpid(), printable(host));
}

std::string first_line(const std::exception& error) {
  return printable(split(error.what(), '\n')[0]);
}

}  // namespace

/// Shared with the watch's thread, which may outlive the group.
struct Group::State {
  Launch launch;
  GroupOptions options;
  Meeting meeting;
  c10::intrusive_ptr<c10d::Backend> backend;
  c10::intrusive_ptr<c10d::Work> started;

  std::atomic<bool> leaving = false, trouble = false, has_failed = false, told = false;
  std::atomic<Clock::rep> last_answer{
      Clock::now().time_since_epoch().count()};  // of the store, to the watch
  std::mutex mutex;
  std::string failure;  // under the mutex

  std::string describe(int64_t rank, c10d::Store& store) const;
  void note(const std::string& what);
  [[noreturn]] void throw_failure();
  void check();
  void wait(c10d::Work& work);
  void run(const c10::intrusive_ptr<c10d::Work>& work) { wait(*work); }
  std::string get(const std::string& key, seconds limit);
  void watch();
  void beat(c10d::Store& store,
            std::map<int64_t, std::pair<int64_t, Clock::time_point>>& seen,
            Clock::time_point& searching);
};

std::string Group::State::describe(int64_t rank, c10d::Store& store) const {
  const std::string key = fmt::format("who/{}", rank);
  std::string who;
  try {
    if (store.check({key})) {
      const auto value = store.get(key);
      who = fmt::format(" ({})", std::string(value.begin(), value.end()));
    }
  } catch (const std::exception&) {
    // without
  }
  return fmt::format("rank {} of {}{}", rank, launch.world, who);
}

void Group::State::note(const std::string& what) {
  const std::lock_guard lock(mutex);
  if (failure.empty()) failure = what;
  has_failed = true;
}

void Group::State::throw_failure() {
  told = true;
  const std::lock_guard lock(mutex);
  throw ResourceError(failure,
                      "start all ranks again with --resume: they go on from the last checkpoint");
}

void Group::State::check() {
  if (!has_failed) {
    const auto answered = Clock::time_point(Clock::duration(last_answer.load()));
    if (Clock::now() - answered < options.silence) return;
    note(
        fmt::format("rank {}: the store of the run has not answered for {} s: rank 0 of {} hangs "
                    "or cannot be reached",
                    launch.rank,
                    options.silence.count(),
                    launch.world));
  }
  throw_failure();
}

void Group::State::wait(c10d::Work& work) {
  const auto start = Clock::now();
  while (!work.isCompleted()) {
    check();
    const auto waited = Clock::now() - start;
    if (waited > milliseconds(1))
      std::this_thread::sleep_for(std::min<Clock::duration>(waited / 8, milliseconds(2)));
  }
  if (work.isSuccess()) return;
  std::string why = "an operation failed";
  try {
    std::rethrow_exception(work.exception());
  } catch (const std::exception& error) {
    why = first_line(error);
  }
  // The error names an address at best. Rank 0 looks who is silent.
  trouble = true;
  const auto end = Clock::now() + kSearch + 3 * kBeat;
  while (Clock::now() < end && !has_failed) std::this_thread::sleep_for(milliseconds(50));
  note(fmt::format(
      "rank {} of {}: the connection to another rank broke: {}", launch.rank, launch.world, why));
  throw_failure();
}

std::string Group::State::get(const std::string& key, seconds limit) {
  const auto end = Clock::now() + limit;
  for (;;) {
    check();
    try {
      if (meeting.store->check({key})) {
        const auto value = meeting.store->get(key);
        return {value.begin(), value.end()};
      }
    } catch (const std::exception&) {
      // the watch says what became of the store
    }
    std::this_thread::sleep_for(milliseconds(20));
    if (Clock::now() < end) continue;
    note(fmt::format("rank {} of {}: '{}' has not come within {} s",
                     launch.rank,
                     launch.world,
                     key,
                     limit.count()));
    throw_failure();
  }
}

void Group::State::beat(c10d::Store& store,
                        std::map<int64_t, std::pair<int64_t, Clock::time_point>>& seen,
                        Clock::time_point& searching) {
  store.add(fmt::format("beat/{}", launch.rank), 1);
  const auto now = Clock::now();
  last_answer = now.time_since_epoch().count();
  if (store.check({"failed"})) {
    const auto value = store.get("failed");
    note(std::string(value.begin(), value.end()));
    return;
  }
  if (trouble) store.set("trouble", bytes("1"));
  const bool any_trouble = store.check({"trouble"});
  if (any_trouble && searching == Clock::time_point()) searching = now;
  const seconds limit =
      any_trouble ? std::min(kSilenceInTrouble, options.silence) : options.silence;
  // rank 0 watches all; the others watch it, where its store is another process's
  for (int64_t rank = 0; rank < launch.world; ++rank) {
    if (rank == launch.rank || (launch.rank != 0 && rank != 0)) continue;
    if (store.check({fmt::format("left/{}", rank)})) continue;
    const int64_t count = store.add(fmt::format("beat/{}", rank), 0);
    const auto [entry, is_new] = seen.try_emplace(rank, count, now);
    if (entry->second.first != count) entry->second = {count, now};
    if (now - entry->second.second < limit) continue;
    const auto silent = std::chrono::duration_cast<seconds>(now - entry->second.second);
    store.set(
        "failed",
        bytes(fmt::format(
            "{} has given no sign of life for {} s: it was killed, hangs, or cannot be reached",
            describe(rank, store),
            silent.count())));
    return;
  }
  if (launch.rank == 0 && any_trouble && now - searching > kSearch)
    store.set("failed", bytes("the connection between two ranks broke, all of which are alive"));
}

void Group::State::watch() {
  const auto store = meeting.store_of_watch;
  std::map<int64_t, std::pair<int64_t, Clock::time_point>> seen;
  Clock::time_point searching{}, noted{};
  while (!leaving) {
    if (!has_failed) {
      try {
        beat(*store, seen, searching);
      } catch (const std::exception& error) {
        if (!leaving)
          note(
              fmt::format("rank {}: the store of the run is gone ({}): rank 0 of {} was killed, "
                          "ended or cannot be reached",
                          launch.rank,
                          first_line(error),
                          launch.world));
      }
    }
    if (has_failed && noted == Clock::time_point()) noted = Clock::now();
    // the main thread computes, or waits for something that does not come: nothing more will be saved
    if (has_failed && !told && Clock::now() - noted > kGrace) {
      log::error("{}", failure);
      std::_Exit(static_cast<int>(ExitCode::kResource));
    }
    for (milliseconds slept{0}; slept < kBeat && !leaving; slept += milliseconds(50))
      std::this_thread::sleep_for(milliseconds(50));
  }
}

Group::Group(std::shared_ptr<State> state) : state_(std::move(state)) {}

std::unique_ptr<Group> Group::join(const Launch& launch,
                                   const std::filesystem::path& address_file,
                                   const GroupOptions& options) {
  auto state = std::make_shared<State>();
  state->launch = launch;
  state->options = options;
  state->meeting = meet(launch, address_file, options.start);
  state->meeting.store->set(fmt::format("who/{}", launch.rank), bytes(this_process()));
  state->last_answer = Clock::now().time_since_epoch().count();
  std::thread([state] { state->watch(); }).detach();
  auto group = std::unique_ptr<Group>(new Group(state));
  const auto gloo = c10d::ProcessGroupGloo::Options::create(options.operation);
  try {
    gloo->devices.push_back(
        state->meeting.address.empty()
            ? c10d::ProcessGroupGloo::createDefaultDevice()
            : c10d::ProcessGroupGloo::createDeviceForHostname(state->meeting.address));
    state->backend = c10::make_intrusive<c10d::ProcessGroupGloo>(
        c10::make_intrusive<c10d::PrefixStore>("gloo", state->meeting.store),
        static_cast<int>(launch.rank),
        static_cast<int>(launch.world),
        gloo);
  } catch (const std::exception& error) {
    state->note(fmt::format("rank {} of {} cannot connect to the others by its address {}: {}",
                            launch.rank,
                            launch.world,
                            state->meeting.address,
                            first_line(error)));
    state->throw_failure();
  }
  log::info("{}", launch.describe());
  return group;
}

Group::~Group() {
  state_->leaving = true;
  if (!state_->has_failed) return;
  // their threads wait for ranks that do not answer
  state_->backend.release();
  state_->started.release();
  new std::shared_ptr<State>(state_);
}

int64_t Group::rank() const { return state_->launch.rank; }
int64_t Group::world() const { return state_->launch.world; }

void Group::all_reduce(const at::Tensor& tensor) {
  const at::NoGradGuard no_grad;
  const at::Tensor mine = tensor.reshape({1, -1});
  const at::Tensor all = at::empty({world(), mine.size(1)}, tensor.options());
  all_gather(all.view({-1}), mine.view({-1}));
  at::Tensor sum = all[0];
  for (int64_t rank = 1; rank < world(); ++rank) sum.add_(all[rank]);
  tensor.copy_(sum.view(tensor.sizes()));
}

void Group::all_gather(const at::Tensor& all, const at::Tensor& own) {
  state_->check();
  at::Tensor out = all, in = own;
  state_->run(state_->backend->all_gather_single(out, in));
}

void Group::start_all_to_all(const at::Tensor& received, const at::Tensor& sent) {
  state_->check();
  at::Tensor out = received, in = sent;
  std::vector<int64_t> equal_parts;
  state_->started = state_->backend->all_to_all_single(out, in, equal_parts, equal_parts);
}

void Group::wait() {
  if (state_->started) state_->wait(*state_->started);
  state_->started.reset();
}

void Group::all_to_all(const at::Tensor& received, const at::Tensor& sent) {
  start_all_to_all(received, sent);
  wait();
}

void Group::broadcast(const at::Tensor& tensor, int64_t root) {
  state_->check();
  std::vector<at::Tensor> tensors{tensor};
  c10d::BroadcastOptions options;
  options.rootRank = root;
  state_->run(state_->backend->broadcast(tensors, options));
}

void Group::barrier() {
  state_->check();
  state_->run(state_->backend->barrier());
}

std::vector<std::string> Group::gather(const std::string& name, const std::string& mine) {
  State& s = *state_;
  s.check();
  s.meeting.store->set(fmt::format("gather/{}/{}", name, s.launch.rank), bytes(mine));
  std::vector<std::string> all;
  if (s.launch.rank != 0) return all;
  for (int64_t rank = 0; rank < s.launch.world; ++rank)
    all.push_back(s.get(fmt::format("gather/{}/{}", name, rank), s.options.operation));
  return all;
}

std::string Group::share(const std::string& name, const std::string& text) {
  State& s = *state_;
  s.check();
  const std::string key = "share/" + name;
  if (s.launch.rank == 0) {
    s.meeting.store->set(key, bytes(text));
    return text;
  }
  return s.get(key, s.options.operation);
}

void Group::fail(const std::string& reason) noexcept {
  State& s = *state_;
  if (s.has_failed) return;
  try {
    s.meeting.store->set(
        "failed",
        bytes(fmt::format("{} ended: {}", s.describe(s.launch.rank, *s.meeting.store), reason)));
    std::this_thread::sleep_for(2 * kBeat);  // rank 0 keeps the store that the others read it from
  } catch (const std::exception&) {
    // they find out by themselves
  }
  s.told = true;
  s.note(reason);
}

void Group::leave() {
  State& s = *state_;
  barrier();
  s.leaving = true;
  s.meeting.store->set(fmt::format("left/{}", s.launch.rank), bytes("1"));
  s.meeting.store->add("left", 1);
  if (s.launch.rank != 0) return;
  const auto end = Clock::now() + seconds(10);
  while (Clock::now() < end && s.meeting.store->add("left", 0) < s.launch.world)
    std::this_thread::sleep_for(milliseconds(20));
}

}  // namespace flux::dist
