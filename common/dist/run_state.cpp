#include "common/dist/run_state.h"

#include <fmt/format.h>
#include <unistd.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <algorithm>
#include <cstdlib>
#include <thread>
#include <utility>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/text.h"

namespace flux::dist {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr milliseconds kBeat{1000};  // between signs of life
constexpr milliseconds kTick{50};    // of the clock
// After an operation failed: how long a rank may be silent, and how long rank 0 looks for one that is.
constexpr seconds kSilenceInTrouble{4}, kSearch{10};
constexpr seconds kGrace{10};  // for the main thread to end by itself
constexpr const char* kHint =
    "start all ranks again with --resume: they go on from the last checkpoint";

std::string this_process() {
  char host[256] = {};
  gethostname(host, sizeof host - 1);
  return fmt::format("process {} on {}", getpid(), printable(host));
}

}  // namespace

std::string first_line(const std::exception& error) {
  const std::string line = split(error.what(), '\n')[0];
  return printable(line.substr(0, line.find(". This is typically caused by")));  // Gloo's guesses
}

std::shared_ptr<RunState> RunState::meet_and_watch(const Launch& launch,
                                                   const std::filesystem::path& address_file,
                                                   const GroupOptions& options) {
  auto run = std::make_shared<RunState>();
  run->launch = launch;
  run->options = options;
  std::thread([run] { run->guard(); }).detach();
  try {
    run->meeting = meet(
        launch, address_file, options.start, [&] { run->answered(); }, options.silence);
    run->with_store(
        [&] { run->meeting.store->set(fmt::format("who/{}", launch.rank), this_process()); });
  } catch (...) {
    run->end();
    throw;
  }
  run->answered();
  std::thread([run] { run->watch(); }).detach();
  return run;
}

std::string RunState::keeper_of_store() const {
  return launch.hosted
             ? fmt::format("torchrun's agent at {}:{}", printable(launch.host), launch.port)
             : fmt::format("rank 0 of {}", launch.world);
}

std::string RunState::describe(int64_t rank, c10d::Store& store) const {
  const std::string key = fmt::format("who/{}", rank);
  std::string who;
  try {
    if (store.check({key})) who = fmt::format(" ({})", store.get_to_str(key));
  } catch (const std::exception&) {
    // without
  }
  return fmt::format("rank {} of {}{}", rank, launch.world, who);
}

void RunState::note(const std::string& what) {
  const std::lock_guard lock(mutex_);
  if (failure_.empty()) failure_ = what;
  has_failed = true;
}

void RunState::throw_failure() {
  told_ = true;
  const std::lock_guard lock(mutex_);
  throw ResourceError(failure_, kHint);
}

void RunState::check() {
  if (has_failed) throw_failure();
}

void RunState::wait(c10d::Work& work) {
  const auto start = Clock::now();
  while (!work.isCompleted()) {
    check();
    const auto waited = Clock::now() - start;
    if (waited > milliseconds(1))
      std::this_thread::sleep_for(std::min<Clock::duration>(waited / 8, milliseconds(2)));
  }
  // not isSuccess(): NCCL's throws
  try {
    if (const auto failed = work.exception()) std::rethrow_exception(failed);
    work.synchronize();
  } catch (const std::exception& error) {
    broken(first_line(error));
  }
}

void RunState::broken(const std::string& why) {
  // The error names an address at best. Rank 0 looks who is silent.
  std::string text = fmt::format(
      "rank {} of {}: the connection to another rank broke: {}", launch.rank, launch.world, why);
  {
    const std::lock_guard lock(mutex_);
    trouble_text_ = text;
    trouble_ = true;
  }
  const auto end = Clock::now() + kSearch + 3 * kBeat;
  while (Clock::now() < end && !has_failed) std::this_thread::sleep_for(kTick);
  note(text);
  throw_failure();
}

std::string RunState::get(c10d::Store& store, const std::string& key, seconds limit) {
  const auto end = Clock::now() + limit;
  for (;;) {
    check();
    try {
      if (store.check({key})) return store.get_to_str(key);
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

void RunState::fail(const std::string& reason) noexcept {
  const bool is_first = !has_failed;
  try {
    c10d::Store& store = *meeting.store;
    if (is_first)
      store.set("failed", fmt::format("{} ended: {}", describe(launch.rank, store), reason));
    // rank 0 keeps the store that the others read it from
    if (is_first || launch.rank == 0) std::this_thread::sleep_for(2 * kBeat);
  } catch (const std::exception&) {
    // they find out by themselves
  }
  told_ = true;
  note(reason);
}

void RunState::leave() {
  leaving_ = true;
  try {
    c10d::Store& store = *meeting.store;
    store.set(fmt::format("left/{}", launch.rank), "1");
    store.add("left", 1);
    const auto end = Clock::now() + seconds(10);
    while (launch.rank == 0 && Clock::now() < end && store.add("left", 0) < launch.world) {
      answered();
      std::this_thread::sleep_for(milliseconds(20));
    }
  } catch (const std::exception&) {
    // the store is gone, and all is done
  }
}

void RunState::end() { leaving_ = ended_ = true; }

void RunState::beat(c10d::Store& store, Seen& seen) {
  store.add(fmt::format("beat/{}", launch.rank), 1);
  answered();
  const milliseconds now = awake();
  if (store.check({"failed"})) {
    note(store.get_to_str("failed"));
    return;
  }
  bool any_trouble = store.check({"trouble"});
  if (trouble_ && !any_trouble) {
    const std::lock_guard lock(mutex_);
    store.set("trouble", trouble_text_);
    any_trouble = true;
  }
  if (any_trouble && !seen.searching) seen.searching = now;
  const milliseconds limit =
      any_trouble ? std::min(kSilenceInTrouble, options.silence) : options.silence;
  // rank 0 watches all; the others watch it, where its store is another process's
  for (int64_t rank = 0; rank < launch.world; ++rank) {
    if (rank == launch.rank || (launch.rank != 0 && rank != 0)) continue;
    if (store.check({fmt::format("left/{}", rank)})) continue;
    const int64_t count = store.add(fmt::format("beat/{}", rank), 0);
    const auto [entry, is_new] = seen.beats.try_emplace(rank, count, now);
    if (entry->second.first != count) entry->second = {count, now};
    const milliseconds silent = now - entry->second.second;
    if (silent < limit) continue;
    store.set(
        "failed",
        fmt::format(
            "{} has given no sign of life for {} s: it was killed, hangs, or cannot be reached",
            describe(rank, store),
            std::chrono::duration_cast<seconds>(silent).count()));
    return;
  }
  if (launch.rank == 0 && any_trouble && now - *seen.searching > kSearch)
    store.set("failed", store.get_to_str("trouble") + "; all ranks are alive");
}

void RunState::note_store_is_gone(const std::exception& error) {
  note(fmt::format(
      "rank {}: the store of the run is gone ({}): {} was killed, ended or cannot be reached",
      launch.rank,
      first_line(error),
      keeper_of_store()));
}

void RunState::watch() {
  const auto store = meeting.store_of_watch;
  Seen seen;
  while (!leaving_ && !has_failed) {
    try {
      beat(*store, seen);
    } catch (const std::exception& error) {
      if (!leaving_) note_store_is_gone(error);
    }
    for (milliseconds slept{0}; slept < kBeat && !leaving_ && !has_failed; slept += kTick)
      std::this_thread::sleep_for(kTick);
  }
}

void RunState::guard() {
  std::optional<milliseconds> noted;
  for (auto last = Clock::now(); !ended_;) {
    std::this_thread::sleep_for(kTick);
    const auto now = Clock::now();
    const auto passed = std::chrono::duration_cast<milliseconds>(now - last);
    // where this thread hardly runs, neither do those that wait: an overloaded machine is no silent rank
    awake_ms_ += std::min(passed, 4 * kTick).count();
    last += passed;
    const milliseconds silent = awake() - milliseconds(last_answer_ms_.load());
    if (!has_failed && silent >= options.silence)
      note(
          fmt::format("rank {}: the store of the run has not answered for {} s: {} hangs or cannot "
                      "be reached",
                      launch.rank,
                      std::chrono::duration_cast<seconds>(silent).count(),
                      keeper_of_store()));
    if (has_failed && (!noted || finishing > 0)) noted = awake();
    // the main thread computes, or waits for something that does not come: nothing more will be saved
    if (noted && !told_ && awake() - *noted > kGrace) {
      const std::lock_guard lock(mutex_);
      log::error("{}\n  hint: {}", failure_, kHint);
      std::_Exit(static_cast<int>(ExitCode::kResource));
    }
  }
}

}  // namespace flux::dist
