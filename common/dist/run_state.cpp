#include "common/dist/run_state.h"

#include <fmt/format.h>
#include <unistd.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <algorithm>
#include <cstdlib>
#include <thread>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/text.h"

namespace flux::dist {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr milliseconds kBeat{1000};  // between signs of life
// After an operation failed: how long a rank may be silent, and how long rank 0 looks for one that is.
constexpr seconds kSilenceInTrouble{4}, kSearch{10};
constexpr seconds kGrace{10};  // for the main thread to end by itself

std::string this_process() {
  char host[256] = {};
  gethostname(host, sizeof host - 1);
  return fmt::format("process {} on {}", getpid(), printable(host));
}

std::string first_line(const std::exception& error) {
  return printable(split(error.what(), '\n')[0]);
}

}  // namespace

std::shared_ptr<RunState> RunState::meet_and_watch(const Launch& launch,
                                                   const std::filesystem::path& address_file,
                                                   const GroupOptions& options) {
  auto run = std::make_shared<RunState>();
  run->launch = launch;
  run->options = options;
  run->meeting = meet(launch, address_file, options.start);
  run->meeting.store->set(fmt::format("who/{}", launch.rank), this_process());
  run->last_answer_ = Clock::now().time_since_epoch().count();
  std::thread([run] { run->watch(); }).detach();
  return run;
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
  told = true;
  const std::lock_guard lock(mutex_);
  throw ResourceError(failure_,
                      "start all ranks again with --resume: they go on from the last checkpoint");
}

void RunState::check() {
  if (!has_failed) {
    const auto answered = Clock::time_point(Clock::duration(last_answer_.load()));
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

void RunState::wait(c10d::Work& work) {
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
  if (has_failed) return;
  try {
    c10d::Store& store = *meeting.store;
    store.set("failed", fmt::format("{} ended: {}", describe(launch.rank, store), reason));
    std::this_thread::sleep_for(2 * kBeat);  // rank 0 keeps the store that the others read it from
  } catch (const std::exception&) {
    // they find out by themselves
  }
  told = true;
  note(reason);
}

void RunState::leave() {
  c10d::Store& store = *meeting.store;
  leaving = true;
  store.set(fmt::format("left/{}", launch.rank), "1");
  store.add("left", 1);
  if (launch.rank != 0) return;
  const auto end = Clock::now() + seconds(10);
  while (Clock::now() < end && store.add("left", 0) < launch.world)
    std::this_thread::sleep_for(milliseconds(20));
}

void RunState::beat(c10d::Store& store, Seen& seen) {
  store.add(fmt::format("beat/{}", launch.rank), 1);
  const auto now = Clock::now();
  last_answer_ = now.time_since_epoch().count();
  if (store.check({"failed"})) {
    note(store.get_to_str("failed"));
    return;
  }
  if (trouble) store.set("trouble", "1");
  const bool any_trouble = store.check({"trouble"});
  if (any_trouble && seen.searching == Clock::time_point()) seen.searching = now;
  const seconds limit =
      any_trouble ? std::min(kSilenceInTrouble, options.silence) : options.silence;
  // rank 0 watches all; the others watch it, where its store is another process's
  for (int64_t rank = 0; rank < launch.world; ++rank) {
    if (rank == launch.rank || (launch.rank != 0 && rank != 0)) continue;
    if (store.check({fmt::format("left/{}", rank)})) continue;
    const int64_t count = store.add(fmt::format("beat/{}", rank), 0);
    const auto [entry, is_new] = seen.beats.try_emplace(rank, count, now);
    if (entry->second.first != count) entry->second = {count, now};
    if (now - entry->second.second < limit) continue;
    const auto silent = std::chrono::duration_cast<seconds>(now - entry->second.second);
    store.set(
        "failed",
        fmt::format(
            "{} has given no sign of life for {} s: it was killed, hangs, or cannot be reached",
            describe(rank, store),
            silent.count()));
    return;
  }
  if (launch.rank == 0 && any_trouble && now - seen.searching > kSearch)
    store.set("failed", "the connection between two ranks broke, all of which are alive");
}

void RunState::watch() {
  const auto store = meeting.store_of_watch;
  Seen seen;
  Clock::time_point noted{};
  while (!leaving) {
    if (!has_failed) {
      try {
        beat(*store, seen);
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
      log::error("{}", failure_);
      std::_Exit(static_cast<int>(ExitCode::kResource));
    }
    for (milliseconds slept{0}; slept < kBeat && !leaving; slept += milliseconds(50))
      std::this_thread::sleep_for(milliseconds(50));
  }
}

}  // namespace flux::dist
