// pipelines/check/lines.h - what the kinds without tensors share: JSON files of a case, read and
// tallied.
#pragma once
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "pipelines/check/case.h"
#include "pipelines/check/report.h"

namespace flux::check {

/// Counts results that should agree in one thing, and keeps the first that do not.
class Tally {
 public:
  /// `name` is shown if it is not the same, then `why`.
  void add(bool same, const std::string& name, const std::string& why = {});
  /// Named by the line's id.
  void add(bool same, const nlohmann::json& line) {
    add(same, "id " + line.value("id", nlohmann::json()).dump());
  }
  /// One verdict; that there is nothing to check is a failure. `what` counts them: "lines".
  void report(Report& report, const std::string& name, const std::string& what = "lines") const;

 private:
  int64_t num_ = 0, num_wrong_ = 0;
  std::vector<std::string> examples_;
};

/// An object of a JSON file. Throws InputError.
nlohmann::json read_object(const std::filesystem::path& file);

/// The objects of a JSON Lines file of the case. Throws InputError naming the line that is none.
void for_each_line(const Case& c,
                   const std::string& file,
                   const std::function<void(const nlohmann::json& line)>& take);

}  // namespace flux::check
