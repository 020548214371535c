// common/core/memory_limit.h - what the system and control groups leave of the memory.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string_view>

namespace flux {

/// The number behind `key` at the beginning of a line of a file of the system; nothing if there is none.
std::optional<int64_t> number_in(const std::filesystem::path& path, std::string_view key = "");

/// Bytes that this process may still take by the memory limits of its control group and of all those above it, whichever
/// is the least; the page cache of a group counts as free. Versions 1 and 2, a container's and a Slurm job's. Nothing:
/// there is no limit. `proc` and `root` are for tests.
///
/// Source: cgroups(7), Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux.
std::optional<int64_t> memory_left_by_limits(const std::filesystem::path& proc = "/proc/self",
                                             const std::filesystem::path& root = "/");

}  // namespace flux
