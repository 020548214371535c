// common/dist/meeting.h - where the ranks of a run find each other: one TCP store that all are connected to.
#pragma once
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <filesystem>
#include <functional>
#include <string>

#include "common/dist/launch.h"

namespace flux::dist {

struct Meeting {
  /// Keys are this run's own, and this attempt's.
  c10::intrusive_ptr<c10d::Store> store;
  /// A connection of its own to the same keys, for another thread.
  c10::intrusive_ptr<c10d::Store> store_of_watch;
  /// This machine's address as it reaches the store, or the others if it keeps the store: they reach it there.
  std::string address;
};

/// Connects to the store that `launch` names, or keeps it in rank 0. Where none is named, rank 0 takes a free port and
/// writes it with its machine's addresses to `address_file`, which every rank must see (a shared file system); the others
/// try them until one answers with the number in the file, so that a file left by a killed run is no harm. Rank 0
/// removes the file when all have come.
/// Waits `patience` for the others, and not for those of a rank that came and gives no sign of life for `silence`. Throws ResourceError naming the ranks that did not come, or the address that does
/// not answer; Interrupted after a signal. A store that answers no more, and leaves its connection open, keeps it waiting:
/// `answered` is called whenever it is not, twice a second or more often.
Meeting meet(
    const Launch& launch,
    const std::filesystem::path& address_file,
    std::chrono::seconds patience,
    const std::function<void()>& answered = [] {},
    std::chrono::seconds silence = std::chrono::seconds(30));

/// Of all TCP connections of this process: what is sent and does not arrive for so long breaks them. The kernel's own limit
/// is a quarter of an hour, and Gloo and stores know no other.
void break_silent_connections(std::chrono::seconds limit);

}  // namespace flux::dist
