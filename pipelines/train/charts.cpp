#include "pipelines/train/charts.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/core/text.h"

namespace flux::train {
namespace {

constexpr double kWidth = 760, kHeight = 220, kLeft = 70, kRight = 10, kTop = 10, kBottom = 30;

/// Round numbers, at most about five, between low and high.
std::vector<double> ticks(double low, double high) {
  const double rough = (high - low) / 4, power = std::pow(10, std::floor(std::log10(rough)));
  double step = 10 * power;
  for (const double factor : {5.0, 2.0, 1.0})
    if (factor * power >= rough) step = factor * power;
  std::vector<double> out;
  for (double k = std::ceil(low / step); k * step <= high; ++k) out.push_back(k * step);
  return out;
}

/// From values to places in the picture.
class Scale {
 public:
  Scale(double low, double high, double from, double to)
      : low_(low), high_(high), from_(from), to_(to) {
    // one value only, or values that no tick would part: in the middle
    if (high_ - low_ > 1e-9 * std::max(std::abs(low_), std::abs(high_))) return;
    const double room = low_ == 0 ? 1 : std::abs(low_) / 2;
    high_ = low_ + room;
    low_ -= room;
  }
  double operator()(double value) const {
    return from_ + (value - low_) / (high_ - low_) * (to_ - from_);
  }
  std::vector<double> ticks() const { return train::ticks(low_, high_); }

 private:
  double low_, high_, from_, to_;
};

std::string begin_chart(std::string_view title, std::string_view attributes) {
  return fmt::format(
      "<figure><figcaption>{}</figcaption>\n"
      "<svg class=\"chart\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\"{}>\n",
      html_text(title),
      kWidth,
      kHeight,
      html_text(title),
      attributes);
}

std::string y_axis(const Scale& y) {
  std::string out;
  for (const double value : y.ticks())
    out += fmt::format(
        "<line class=\"grid\" x1=\"{0}\" x2=\"{1}\" y1=\"{2:.1f}\" y2=\"{2:.1f}\"/>"
        "<text class=\"y\" x=\"{3}\" y=\"{4:.1f}\">{5:.4g}</text>\n",
        kLeft,
        kWidth - kRight,
        y(value),
        kLeft - 6,
        y(value) + 4,
        std::abs(value) < 1e-15 ? 0 : value);
  return out;
}

std::string x_label(double x, std::string_view text) {
  return fmt::format(
      "<text class=\"x\" x=\"{:.1f}\" y=\"{}\">{}</text>\n", x, kHeight - 10, html_text(text));
}

}  // namespace

std::string html_table(const std::vector<std::string>& head,
                       const std::vector<std::vector<std::string>>& cells) {
  const auto row = [](const char* tag, const std::vector<std::string>& texts) {
    std::string out = "<tr>";
    for (const std::string& text : texts) {
      const bool is_number =
          !text.empty() && text.find_first_of("0123456789") == text.find_first_not_of("-");
      out +=
          fmt::format("<{}{}>{}</{}>", tag, is_number ? " class=\"n\"" : "", html_text(text), tag);
    }
    return out + "</tr>\n";
  };
  std::string out = "<table>\n";
  if (!head.empty()) out += row("th", head);
  for (const auto& texts : cells) out += row("td", texts);
  return out + "</table>\n";
}

std::string curve_chart(std::string_view title,
                        std::span<const int64_t> steps,
                        std::span<const Curve> curves,
                        std::string_view steps_name) {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  std::string names;
  for (const Curve& curve : curves) {
    names += (names.empty() ? "" : " ") + curve.name;
    for (const double value : curve.values) {
      if (!std::isfinite(value)) continue;
      low = std::min(low, value);
      high = std::max(high, value);
    }
  }
  if (steps.empty() || low > high)
    return fmt::format(
        "<figure><figcaption>{}</figcaption><p>not computed in this run</p></figure>\n",
        html_text(title));
  const double room = (high - low) / 20;
  const Scale x(static_cast<double>(steps.front()),
                static_cast<double>(steps.back()),
                kLeft,
                kWidth - kRight);
  const Scale y(low - room, high + room, kHeight - kBottom, kTop);

  std::string out =
      begin_chart(title, fmt::format(" data-curves=\"{}\" data-steps=\"{}\"", names, steps_name)) +
      y_axis(y);
  for (const double step : x.ticks())
    if (step == std::floor(step)) out += x_label(x(step), fmt::format("{:.0f}", step));
  for (size_t k = 0; k < curves.size(); ++k) {
    const auto& values = curves[k].values;
    std::string points;
    size_t num_points = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      if (!std::isfinite(values[i])) continue;
      ++num_points;
      points += fmt::format("{}{:.1f},{:.1f}",
                            points.empty() ? "" : " ",
                            x(static_cast<double>(steps[i])),
                            y(values[i]));
    }
    out += fmt::format("<polyline class=\"curve c{}\" data-curve=\"{}\" points=\"{}\"/>\n",
                       k,
                       curves[k].name,
                       points);
    if (num_points == 1) {  // a line of one point is not drawn
      const size_t comma = points.find(',');
      out += fmt::format("<circle class=\"dot c{}\" cx=\"{}\" cy=\"{}\" r=\"3\"/>\n",
                         k,
                         points.substr(0, comma),
                         points.substr(comma + 1));
    }
  }
  out += fmt::format(
      "<line class=\"cursor\" x1=\"0\" x2=\"0\" y1=\"{}\" y2=\"{}\"/>\n</svg>\n<p "
      "class=\"legend\">",
      kTop,
      kHeight - kBottom);
  for (size_t k = 0; k < curves.size(); ++k)
    out += fmt::format("<span class=\"key c{}\"></span>{} ", k, html_text(curves[k].label));
  return out + "<output></output></p></figure>\n";
}

std::string bar_chart(std::string_view title, std::span<const Bar> bars) {
  double high = 0;
  for (const Bar& bar : bars) high = std::max(high, bar.value);
  const Scale y(0, high > 0 ? high * 1.05 : 1, kHeight - kBottom, kTop);
  std::string out = begin_chart(title, "") + y_axis(y);
  const double step = (kWidth - kLeft - kRight) / static_cast<double>(bars.size());
  for (size_t i = 0; i < bars.size(); ++i) {
    const double left = kLeft + step * static_cast<double>(i), top = y(bars[i].value);
    out += fmt::format(
        "<rect class=\"bar\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\">"
        "<title>{}</title></rect>\n",
        left + step * 0.1,
        top,
        step * 0.8,
        kHeight - kBottom - top,
        html_text(bars[i].note));
    out += x_label(left + step / 2, bars[i].label);
  }
  return out + "</svg></figure>\n";
}

}  // namespace flux::train
