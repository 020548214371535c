// common/dist/group.h - the ranks of a run, what they compute together, and who is still there.
#pragma once
#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "common/dist/launch.h"
#include "common/dist/nccl.h"

namespace flux::dist {

struct GroupOptions {
  std::chrono::seconds start{300};       // for all ranks to come
  std::chrono::seconds silence{30};      // of a rank, until it is taken for dead
  std::chrono::seconds operation{1800};  // of one collective operation, while all ranks are alive
  /// Makes what moves tensors that are not on the CPU.
  c10::intrusive_ptr<c10d::Backend> (*gpu_backend)(const BackendPlace& place) = &nccl_backend;
};

/// Calls to one group come from one thread at a time, in the same order in each of its ranks. Each throws ResourceError
/// that names the rank and the reason when any rank of the run has failed, ended, hung or cannot be reached, and
/// Interrupted never: ranks stop together, see train. Tensors are contiguous; Gloo moves those on the CPU, NCCL those on
/// a GPU.
class Group {
 public:
  /// Meets the others (see meet()) and connects every pair by Gloo; by NCCL when the first tensor on a GPU comes.
  /// `launch` has several ranks.
  static std::unique_ptr<Group> join(const Launch& launch,
                                     const std::filesystem::path& address_file,
                                     const GroupOptions& options);
  /// A group of some of this one's ranks, in ascending order, this one among them; all may be. It has connections of its
  /// own, so that another thread may use it meanwhile, and shares whatever becomes of the run. Its members call this
  /// together. `name` is used once a run; parts that have no rank in common may share one. A part of one rank only
  /// copies. Throws std::invalid_argument: ranks that are not as said.
  std::unique_ptr<Group> part(const std::string& name, std::span<const int64_t> ranks);
  /// Of a run that has failed: returns at once, and leaves its threads and connections as they are.
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  /// Within this group.
  int64_t rank() const;
  int64_t world() const;

  /// Bytes. `all` [world * n]: every rank's `own` [n], in order of ranks. `own` may be its place in `all`.
  void all_gather(const at::Tensor& all, const at::Tensor& own);
  /// Bytes. Part r of `sent` [world * n] goes to rank r; part r of `received` came from it. The caller goes on; neither
  /// is to be touched before wait(). One is at work at a time.
  void start_all_to_all(const at::Tensor& received, const at::Tensor& sent);
  void wait();
  void barrier();

  /// At rank 0 what every rank says, in order of ranks; elsewhere nothing. `name` is used once.
  std::vector<std::string> gather(const std::string& name, const std::string& mine);
  /// What rank 0 says.
  std::string share(const std::string& name, const std::string& text);

  /// A failure of another rank ends this process some seconds later if its calls do not see it before; not while one of
  /// these lives: what writes a checkpoint is to finish it.
  std::shared_ptr<void> finishing();
  /// Tells all ranks of the run why this one ends, so that they do too. Throws nothing.
  void fail(const std::string& reason) noexcept;
  /// All ranks of the run are done: waits for them. For the group of join() alone.
  void leave();

 private:
  struct State;
  explicit Group(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace flux::dist
