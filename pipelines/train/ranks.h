// pipelines/train/ranks.h - several processes that train one run together.
#pragma once
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "common/core/error.h"
#include "common/dist/group.h"
#include "pipelines/train/load.h"

namespace flux::train {

/// Meets the other ranks and says which this is; null where there is one only. The others' logs begin with warnings.
/// Throws what dist::Group::join() throws.
std::unique_ptr<dist::Group> join_ranks(const Options& options);

/// That all ranks are the same program, with the same options, caches, model and step. Throws UsageError naming the first
/// rank that is not, the field and both values, in every rank.
void require_same_ranks(const Session& session);

/// Whether each rank has a part of every block's weights and of their states only.
bool shares_weights(const Session& session);

// What follows is called by all ranks together, and works with one.

/// What every rank has, in order of ranks, in every rank.
std::vector<std::string> gather_bytes(const Session& session, std::string_view mine);
template <typename T>
std::vector<std::vector<T>> gather_values(const Session& session, std::span<const T> mine) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::vector<std::vector<T>> out;
  for (const std::string& bytes : gather_bytes(
           session, {reinterpret_cast<const char*>(mine.data()), mine.size() * sizeof(T)})) {
    out.emplace_back(bytes.size() / sizeof(T));
    if (!bytes.empty()) std::memcpy(out.back().data(), bytes.data(), bytes.size());
  }
  return out;
}

/// The same of as many numbers in every rank, with one message.
std::vector<std::vector<int64_t>> gather_numbers(const Session& session,
                                                 const std::vector<int64_t>& mine);

/// Each rank does its own work, at the end of which all know whether it was done. Throws in every rank if it was not in
/// any: in that rank what `work` threw, in the others ResourceError that names it.
void together(const Session& session, const std::function<void()>& work);

/// That all see the folder that rank 0 writes to, as they must where they share the weights: each writes its part of a
/// checkpoint. Throws UsageError.
void require_common_out(const Session& session);

/// A failure that every rank comes to at the same place, so that they still can do something together.
struct CommonFailure : InputError {
  using InputError::InputError;
};

/// What is decided between two steps.
struct Decision {
  std::optional<ExitCode> stop;           // a signal to any rank
  bool saves = false, validates = false;  // as rank 0 says, by its clock
};
/// Of what each rank would decide.
Decision agree(const Session& session, const Decision& mine);

/// The exit code that a signal to any rank asks for.
std::optional<ExitCode> agreed_stop(const Session& session);

}  // namespace flux::train
