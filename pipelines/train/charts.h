// pipelines/train/charts.h - pieces of the report: text and tables as HTML, curves as SVG.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/core/html.h"

namespace flux::train {

/// A table; `cells` are texts. A column whose cells are numbers is set to the right by the style sheet's class "n".
std::string html_table(const std::vector<std::string>& head,
                       const std::vector<std::vector<std::string>>& cells);

struct Curve {
  std::string name;            // of a field of metrics.jsonl
  std::string label;           // for people
  std::vector<double> values;  // one a step; NaN: none
};

/// Curves over the same steps, a point a value. `steps` ascends; the page's data has them as `steps_name`.
std::string curve_chart(std::string_view title,
                        std::span<const int64_t> steps,
                        std::span<const Curve> curves,
                        std::string_view steps_name = "step");

struct Bar {
  std::string label, note;  // below it, and on hovering
  double value = 0;         // at least 0
};
std::string bar_chart(std::string_view title, std::span<const Bar> bars);

}  // namespace flux::train
