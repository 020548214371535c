// common/dist/group.h - the ranks of a run, what they compute together, and who is still there.
#pragma once
#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "common/dist/launch.h"

namespace flux::dist {

struct GroupOptions {
  std::chrono::seconds start{300};       // for all ranks to come
  std::chrono::seconds silence{30};      // of a rank, until it is taken for dead
  std::chrono::seconds operation{1800};  // of one collective operation, while all ranks are alive
};

/// Calls to one group come from one thread, in the same order in every rank. Each throws ResourceError that names the
/// rank and the reason when a rank has failed, ended, hung or cannot be reached, and Interrupted never: ranks stop
/// together, see train. Tensors are contiguous and on the CPU.
class Group {
 public:
  /// Meets the others (see meet()) and connects every pair by Gloo. `launch` has several ranks.
  static std::unique_ptr<Group> join(const Launch& launch,
                                     const std::filesystem::path& address_file,
                                     const GroupOptions& options);
  /// Of a group that has failed: returns at once, and leaves its threads and connections as they are.
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  int64_t rank() const;
  int64_t world() const;

  /// Sums over the ranks, in order of ranks, in place; float32, float64 or int64. Every rank has the same bits: those of
  /// one rank that adds what the ranks have one after the other.
  void all_reduce(const at::Tensor& tensor);
  /// Bytes. `all` [world * n]: every rank's `own` [n], in order of ranks.
  void all_gather(const at::Tensor& all, const at::Tensor& own);
  /// Bytes. Part r of `sent` [world * n] goes to rank r; part r of `received` came from it.
  void all_to_all(const at::Tensor& received, const at::Tensor& sent);
  /// The same, while the caller goes on; neither is to be touched before wait(). One is at work at a time.
  void start_all_to_all(const at::Tensor& received, const at::Tensor& sent);
  void wait();
  void broadcast(const at::Tensor& tensor, int64_t root);
  void barrier();

  /// At rank 0 what every rank says, in order of ranks; elsewhere nothing. `name` is used once.
  std::vector<std::string> gather(const std::string& name, const std::string& mine);
  /// What rank 0 says.
  std::string share(const std::string& name, const std::string& text);

  /// Tells the others why this rank ends, so that they do too. Throws nothing.
  void fail(const std::string& reason) noexcept;
  /// All ranks are done: waits for them.
  void leave();

 private:
  struct State;
  explicit Group(std::shared_ptr<State> state);
  std::shared_ptr<State> state_;
};

}  // namespace flux::dist
