// pipelines/train/charts.h - pieces of the report: text and tables as HTML, curves as SVG.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace flux::train {

/// `text` as HTML shows it: &, <, >, " and ' escaped, control characters and broken UTF-8 written out.
std::string html_text(std::string_view text);

/// A table; `cells` are texts. A column whose cells are numbers is set to the right by the style sheet's class "n".
std::string html_table(const std::vector<std::string>& head,
                       const std::vector<std::vector<std::string>>& cells);

struct Curve {
  std::string name;            // of a field of metrics.jsonl
  std::string label;           // for people
  std::vector<double> values;  // one a step; NaN: none
};

/// Curves over the same steps, a point a value. `steps` ascends.
std::string curve_chart(std::string_view title,
                        std::span<const int64_t> steps,
                        std::span<const Curve> curves);

struct Bar {
  std::string label, note;  // below it, and on hovering
  double value = 0;         // at least 0
};
std::string bar_chart(std::string_view title, std::span<const Bar> bars);

/// Standard base 64 with padding.
std::string base64(std::string_view bytes);

}  // namespace flux::train
