// pipelines/stage/finish.h - how both encoding stages talk about a run and end it.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "common/tensor/fwd.h"
#include "formats/cache/writer.h"
#include "pipelines/stage/report.h"
#include "pipelines/stage/sink.h"
#include "pipelines/stage/times.h"

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

/// Moves the items that need a sample that could not be made to the quarantined ones, which are then
/// in the order of the data set.
void quarantine(const std::vector<Failure>& failures, cache::Publication& publication);

/// Takes the counts into `report` and logs them: what was recovered from a killed run, which
/// parameters have changed since the last one, how many samples are new, changed, kept and
/// unwanted.
void announce(const cache::Writer& writer, const cache::Comparison& comparison, Report& report);

/// If a signal has come: seals what is finished, logs that it is kept, and throws Interrupted (exit
/// 129, 130 or 143).
void stop_if_asked(cache::Writer& writer, std::string_view noun);

/// What is predicted to be written: `num_samples` samples of `bytes` in all; logged, with a warning if
/// the disk or --max-bytes has no room for it.
void predict(const cache::Writer& writer,
             const std::filesystem::path& folder,
             int64_t num_samples,
             int64_t bytes,
             int64_t max_bytes);
/// Share of a tensor's bytes that is left after compression, measured on latents and embeddings:
/// bf16 0.68, f16 0.86, f32 0.84.
double compressed_share(DType dtype);

/// Stage times and the stage that limited the run, for the manifest.
void add_times(const StageTimes& times, cache::Publication& publication);

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
