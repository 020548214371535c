#include "pipelines/stage/report.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "common/core/file.h"
#include "common/core/text.h"

namespace flux::stage {
namespace {

double rate(const Report& report) {
  return report.seconds > 0 ? static_cast<double>(report.encoded) / report.seconds : 0;
}

}  // namespace

std::string count_of(int64_t count, std::string_view plural) {
  return fmt::format("{} {}", count, plural.substr(0, plural.size() - (count == 1)));
}

std::string Report::line() const {
  if (drift) return drift->line();
  if (encoded == 0) {
    return fmt::format("nothing encoded: kept {}, unwanted {}, failed {} in {}",
                       count_of(kept, noun),
                       unwanted,
                       failed,
                       show_seconds(seconds));
  }
  return fmt::format(
      "encoded {} ({} of them changed), kept {}, unwanted {}, failed {} in {} ({:.3g} {}/s)",
      count_of(encoded, noun),
      changed,
      kept,
      unwanted,
      failed,
      show_seconds(seconds),
      rate(*this),
      noun);
}

nlohmann::json Report::json() const {
  if (drift) return drift->json();
  return {{"encoded", encoded},
          {"new", encoded - changed},
          {"changed", changed},
          {"changed_by", changed_by},
          {"changed_fields", changed_fields},
          {"kept", kept},
          {"unwanted", unwanted},
          {"failed", failed},
          {"seconds", seconds},
          {"samples_per_second", rate(*this)},
          {"peak_rss_bytes", peak_rss_bytes()}};
}

}  // namespace flux::stage
