// common/dist/run_state.h - what all groups of a run share in one rank: its store, and whether anybody has failed.
#pragma once
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "common/dist/group.h"
#include "common/dist/launch.h"
#include "common/dist/meeting.h"

namespace c10d {
class Work;
}

namespace flux::dist {

/// Any thread may call any of it. Shared with the watch's thread, which may outlive the groups.
struct RunState {
  Launch launch;
  GroupOptions options;
  Meeting meeting;

  std::atomic<bool> leaving = false, trouble = false, has_failed = false, told = false;

  /// Meets the others and starts the watch.
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
  /// Until it is done. Throws if it fails, or anybody does.
  void wait(c10d::Work& work);
  /// The value of a key of `store`, when it is there.
  std::string get(c10d::Store& store, const std::string& key, std::chrono::seconds limit);
  /// See Group.
  void fail(const std::string& reason) noexcept;
  /// After a barrier: says so, and in rank 0 waits until all have.
  void leave();

 private:
  using Clock = std::chrono::steady_clock;
  struct Seen {
    std::map<int64_t, std::pair<int64_t, Clock::time_point>>
        beats;  // by rank: how many, since when
    Clock::time_point searching{};
  };
  void watch();
  void beat(c10d::Store& store, Seen& seen);

  std::atomic<Clock::rep> last_answer_{0};  // of the store, to the watch
  std::mutex mutex_;
  std::string failure_;  // under the mutex
};

}  // namespace flux::dist
