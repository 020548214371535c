// pipelines/stage/finish.h - how both encoding stages talk about a run and end it.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "common/tensor/fwd.h"
#include "formats/cache/writer.h"
#include "pipelines/stage/report.h"

namespace flux::stage {

/// The first line of a run on stderr: version, command line and device; and the same as the cache's
/// provenance.
cache::Provenance begin(std::string_view tool,
                        std::string_view command_line,
                        const c10::Device& device);

/// Logs that an item is left out, and why; returns its record for Publication::quarantined.
cache::Quarantined leave_out(const Sha256Digest& item,
                             uint32_t subset,
                             const std::string& path,
                             std::string_view message);

/// Takes the counts into `report` and logs them: what was recovered from a killed run, which
/// parameters have changed since the last one, how many samples are new, changed, kept and
/// unwanted.
void announce(const cache::Writer& writer, const cache::Comparison& comparison, Report& report);

/// If a signal has come: seals what is finished, logs that it is kept, and throws Interrupted (exit
/// 129, 130 or 143).
void stop_if_asked(cache::Writer& writer, std::string_view noun);

/// The last step: publishes, or with more than `max_failed` quarantined items withdraws the
/// manifest and sets exit code 6; says which of them it was. Sets report.failed and, from
/// `start_seconds` of monotonic_seconds(), report.seconds.
void finish(cache::Writer& writer,
            const cache::Publication& publication,
            int64_t max_failed,
            double start_seconds,
            Report& report);

/// Seconds on a clock that never goes back.
double monotonic_seconds();

}  // namespace flux::stage
