#include "pipelines/decode/pages.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/html.h"
#include "common/core/text.h"

namespace flux::decode {
namespace {

constexpr int64_t kGap = 4;           // pixels between the cells of a sheet
constexpr int64_t kReportCell = 192;  // of a picture in a report
constexpr int kReportQuality = 80;

int64_t columns_of(const std::vector<Thumb>& thumbs) {
  std::map<std::pair<std::optional<int64_t>, uint64_t>, int64_t> of_prompt;
  for (const Thumb& thumb : thumbs) ++of_prompt[{thumb.step, thumb.prompt_number}];
  const int64_t count = of_prompt.begin()->second;
  const bool same =
      std::ranges::all_of(of_prompt, [&](const auto& entry) { return entry.second == count; });
  if (same && count > 1) return count;
  return static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(thumbs.size()))));
}

void paste(const image::Rgb& from, image::Rgb& to, int64_t x, int64_t y) {
  for (int64_t row = 0; row < from.size.height; ++row)
    std::copy_n(from.data.begin() + row * from.size.width * 3,
                from.size.width * 3,
                to.data.begin() + ((y + row) * to.size.width + x) * 3);
}

std::string picture_html(const Thumb& thumb) {
  const auto bytes = image::encode(thumbnail(thumb.image, kReportCell),
                                   {.format = image::FileFormat::kJpeg, .quality = kReportQuality});
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  return fmt::format("<img alt=\"{}\" title=\"{}\" src=\"data:image/jpeg;base64,{}\">",
                     html_text(thumb.prompt),
                     html_text(thumb.name),
                     base64(text));
}

/// A row a step, the newest first; a column a picture of a prompt.
std::string table_html(const std::vector<Thumb>& thumbs) {
  std::map<int64_t, std::map<uint64_t, std::vector<const Thumb*>>, std::greater<>> steps;
  std::map<uint64_t, std::string> prompts;
  for (const Thumb& thumb : thumbs) {
    if (!thumb.step) continue;
    steps[*thumb.step][thumb.prompt_number].push_back(&thumb);
    prompts[thumb.prompt_number] = thumb.prompt;
  }
  if (steps.empty()) return {};
  std::string out = "<table class=\"samples\">\n<tr><th>step</th>";
  for (const auto& [number, prompt] : prompts)
    out += fmt::format("<th>{}</th>", html_text(shortened(prompt, 200)));
  out += "</tr>\n";
  for (const auto& [step, by_prompt] : steps) {
    out += fmt::format("<tr><td class=\"n\">{}</td>", step);
    for (const auto& [number, prompt] : prompts) {
      out += "<td>";
      if (const auto found = by_prompt.find(number); found != by_prompt.end())
        for (const Thumb* thumb : found->second) out += picture_html(*thumb);
      out += "</td>";
    }
    out += "</tr>\n";
  }
  return out + "</table>\n";
}

}  // namespace

image::Rgb thumbnail(const image::Rgb& image, int64_t cell) {
  const auto [width, height] = image.size;
  const int64_t longer = std::max(width, height);
  if (longer <= cell) return image;
  const image::Size size{std::max<int64_t>(1, width * cell / longer),
                         std::max<int64_t>(1, height * cell / longer)};
  return image::resize(image, size, image::Interpolation::kArea);
}

image::Rgb contact_sheet(const std::vector<Thumb>& thumbs, int64_t columns, int64_t cell) {
  const int64_t count = std::ssize(thumbs),
                across = std::min(columns > 0 ? columns : columns_of(thumbs), count),
                down = (count + across - 1) / across;
  image::Rgb sheet;
  sheet.size = {across * (cell + kGap) + kGap, down * (cell + kGap) + kGap};
  if (sheet.size.width > image::kMaxPixels / sheet.size.height)
    throw UsageError(fmt::format("--sheet: {} pictures of {} pixels make a sheet of {}x{}",
                                 count,
                                 cell,
                                 sheet.size.width,
                                 sheet.size.height),
                     "give a smaller --cell, or --limit");
  constexpr uint8_t kWhite = 255;
  sheet.data.assign(static_cast<size_t>(sheet.size.width * sheet.size.height * 3), kWhite);
  for (int64_t i = 0; i < count; ++i) {
    const image::Rgb& picture = thumbs[static_cast<size_t>(i)].image;
    const int64_t x = kGap + i % across * (cell + kGap), y = kGap + i / across * (cell + kGap);
    paste(
        picture, sheet, x + (cell - picture.size.width) / 2, y + (cell - picture.size.height) / 2);
  }
  return sheet;
}

void write_run_pictures(const std::filesystem::path& run, const std::vector<Thumb>& thumbs) {
  const std::string table = table_html(thumbs);
  if (table.empty()) return;
  write_file_atomic(run / "samples" / "pictures.html", table);
  const auto report = run / "report.html";
  std::error_code error;
  if (!std::filesystem::is_regular_file(report, error)) return;
  std::string text = read_file(report);
  const std::string section = "<section id=\"samples\"><h2>Samples</h2>\n" + table + "</section>\n";
  constexpr std::string_view kBegin = "<section id=\"samples\">", kEnd = "</section>\n";
  if (const size_t begin = text.find(kBegin); begin != std::string::npos) {
    const size_t end = text.find(kEnd, begin);
    if (end == std::string::npos) return;  // not as flux-train writes it
    text.replace(begin, end + kEnd.size() - begin, section);
  } else {
    const size_t next = text.find("<section id=\"sigma\">");
    const size_t script = text.find("<script>\n\"use strict\"");
    const size_t at = next != std::string::npos ? next : script;
    if (at == std::string::npos) return;
    text.insert(at, section);
  }
  write_file_atomic(report, text);
}

}  // namespace flux::decode
