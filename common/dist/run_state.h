// common/dist/run_state.h - what all groups of a run share in one rank: its store, and whether anybody has failed.
#pragma once
#include <c10/util/Exception.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "common/dist/group.h"
#include "common/dist/launch.h"
#include "common/dist/meeting.h"

namespace c10d {
class Work;
}

namespace flux::dist {

/// Of an outside library's error, which goes on with a stack trace.
std::string first_line(const std::exception& error);

/// Any thread may call any of it. Shared with its own two threads, which may outlive the groups: the watch gives signs of
/// life and looks for those of others, and waits as long as the store is silent; the guard counts the time and ends the
/// process when nothing else does.
struct RunState {
  Launch launch;
  GroupOptions options;
  Meeting meeting;

  std::atomic<bool> has_failed = false;
  std::atomic<int> finishing = 0;  // see Group

  /// Meets the others and starts the threads.
  static std::shared_ptr<RunState> meet_and_watch(const Launch& launch,
                                                  const std::filesystem::path& address_file,
                                                  const GroupOptions& options);

  /// "rank 2 of 4 (process 17 on node-1)"
  std::string describe(int64_t rank, c10d::Store& store) const;
  /// What has failed; the first counts.
  void note(const std::string& what);
  [[noreturn]] void throw_failure();
  /// Throws if anybody has failed, or the store is silent.
  void check();
  /// Until it is done; the current stream of a GPU waits too. Throws if it fails, or anybody does.
  void wait(c10d::Work& work);
  /// An operation failed: finds out whose fault it is, and throws that.
  [[noreturn]] void broken(const std::string& why);
  /// What `use` of the store returns. Throws if the store is gone.
  template <typename Use>
  auto with_store(const Use& use) {
    try {
      return use();
    } catch (const c10::Error& error) {
      note_store_is_gone(error);
      throw_failure();
    }
  }
  /// The value of a key of `store`, when it is there.
  std::string get(c10d::Store& store, const std::string& key, std::chrono::seconds limit);
  /// See Group.
  void fail(const std::string& reason) noexcept;
  /// After a barrier: says so, and in rank 0 waits until all have.
  void leave();
  /// The last group of this rank goes: its threads end.
  void end();

 private:
  using Clock = std::chrono::steady_clock;
  using milliseconds = std::chrono::milliseconds;
  struct Seen {
    std::map<int64_t, std::pair<int64_t, milliseconds>> beats;  // by rank: how many, since when
    std::optional<milliseconds> searching{};
  };
  /// The time that this process has run for: while it is stopped, with all others or alone, it waits for nobody.
  milliseconds awake() const { return milliseconds(awake_ms_.load()); }
  void answered() { last_answer_ms_ = awake_ms_.load(); }
  std::string keeper_of_store() const;
  void note_store_is_gone(const std::exception& error);
  void watch();
  void beat(c10d::Store& store, Seen& seen);
  void guard();

  std::atomic<bool> leaving_ = false, ended_ = false, trouble_ = false, told_ = false;
  std::atomic<int64_t> awake_ms_ = 0, last_answer_ms_ = 0;  // of the store
  std::mutex mutex_;
  std::string failure_, trouble_text_;  // under the mutex
};

}  // namespace flux::dist
