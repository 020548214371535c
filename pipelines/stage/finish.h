// pipelines/stage/finish.h - how both encoding stages talk about a run and end it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/tensor/fwd.h"
#include "formats/cache/writer.h"
#include "pipelines/stage/options.h"
#include "pipelines/stage/report.h"
#include "pipelines/stage/sink.h"
#include "pipelines/stage/times.h"
#include "pipelines/stage/write_queue.h"

namespace flux::stage {

/// Seconds on a clock that never goes back.
double monotonic_seconds();

/// The first line of a run on stderr: version, command line and device; and the same as the cache's
/// provenance.
cache::Provenance begin(std::string_view tool,
                        std::string_view command_line,
                        const c10::Device& device);

/// Why an item is left out: an error's message without its hint, and without the folder of the file
/// that it is about. Where a data set lies is no part of its cache: moving it changes nothing there.
std::string reason_of(std::string_view message, const std::filesystem::path& folder);

/// Logs that an item is left out, and why; returns its record for Publication::quarantined.
cache::Quarantined leave_out(const Sha256Digest& item,
                             uint32_t subset,
                             const std::string& path,
                             const std::string& reason);

/// Takes the samples that could not be made out of the report's changed ones. Before quarantine().
void discount(const std::vector<Failure>& failures,
              const cache::Writer& writer,
              const cache::Publication& publication,
              Report& report);

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

/// What is predicted to be written: `num_samples` samples of `raw_bytes` in all, of which `share` is
/// left after compression, and the segments' tables; logged, with a warning if the disk or
/// --max-bytes has no room for it. Returns the bytes.
int64_t predict(const cache::Writer& writer,
                const EncodeOptions& options,
                int64_t num_samples,
                double raw_bytes,
                double share);
/// Share of a tensor's bytes that is left after compression, measured on FLUX's own latents and
/// embeddings: bf16 0.68, f16 0.86, f32 0.84.
double compressed_share(DType dtype);
/// Places of the few of `count` samples whose compression is measured: spread evenly.
std::vector<size_t> measured_places(size_t count);

/// Takes samples only to see how small they become, for nets of which no share is known.
class Measurement : public Sink {
 public:
  explicit Measurement(const cache::Layout& layout) : layout_(layout) {}
  void add(EncodedSample sample) override;
  void flush() override {}
  void stop_if_asked() override;
  int64_t compressed_bytes() const { return bytes_; }

 private:
  const cache::Layout layout_;
  int64_t bytes_ = 0;
};

/// Throws CacheError if the folder's manifest is of another use than this run's: prompts and not a
/// data set, or the reverse; a whole cache that would become a part, or another part.
void require_same_use(const std::filesystem::path& folder,
                      const std::optional<cache::Manifest>& previous,
                      const nlohmann::json& plan,
                      const cache::Shard& shard);

/// A run's clock and stages.
struct Timing {
  StageTimes stages;
  /// Of what came before the stages, by name ("scan").
  nlohmann::json before = nlohmann::json::object();
  double start_seconds = monotonic_seconds();
};

/// What a manifest's provenance says about the last run that encoded something: `stage_seconds`,
/// `limit`, `<noun>_per_second`. A run that encoded and publishes nothing (exit 6, a signal, a full
/// disk) leaves it in the folder's file last-run.json, for the run that publishes.
nlohmann::json last_run(const Timing& timing, const Report& report);
/// Writes that file. Throws ResourceError.
void keep_last_run(const std::filesystem::path& folder, const nlohmann::json& last_run);

/// Lets `encode` (Sink& -> an object with num_samples and failures) fill the folder through a
/// WriteQueue. Sets report.encoded; moves items that could not be encoded to the quarantined ones.
/// What it throws passes, after the run's times were kept.
template <class Encode>
void fill(const EncodeOptions& options,
          cache::Writer& writer,
          const cache::Layout& layout,
          Timing& timing,
          const Encode& encode,
          cache::Publication& publication,
          Report& report) {
  WriteQueue queue(writer, layout, timing.stages, report.noun, options.max_bytes);
  try {
    const auto encoded = encode(static_cast<Sink&>(queue));
    report.encoded = encoded.num_samples;
    discount(encoded.failures, writer, publication, report);
    quarantine(encoded.failures, publication);
  } catch (...) {
    report.encoded = queue.num_written();
    if (report.encoded > 0) {
      try {
        keep_last_run(options.out, last_run(timing, report));
      } catch (const Error&) {  // what ended the run matters more
      }
    }
    throw;
  }
}

/// The last step: publishes, or withdraws the manifest and sets exit code 6 where more than
/// --max-failed items are quarantined or none is left; says which of them it was. Sets
/// report.failed and report.seconds.
void finish(const EncodeOptions& options,
            cache::Writer& writer,
            cache::Publication& publication,
            const Timing& timing,
            Report& report);

}  // namespace flux::stage
