// pipelines/decode/pages.h - many pictures on one: a contact sheet, and the section of a run's report.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "common/image/encode.h"

namespace flux::decode {

/// A picture made small.
struct Thumb {
  image::Rgb image;
  uint64_t prompt_number = 0;
  std::string prompt;
  std::optional<int64_t> step;
  std::string name;
};

/// `image` scaled down so that its longer side has at most `cell` pixels.
image::Rgb thumbnail(const image::Rgb& image, int64_t cell);

/// All of them row by row, each in the middle of a cell of `cell` pixels, on white with a gap between.
///   columns  0: as many as a prompt has pictures if all have the same number above one, else about a square
/// Throws UsageError if the sheet has more pixels than a picture may have.
image::Rgb contact_sheet(const std::vector<Thumb>& thumbs, int64_t columns, int64_t cell);

/// Writes RUN/samples/pictures.html, the pictures of a run by step, and puts it into RUN/report.html if that is there.
/// flux-train takes it from there when it writes its report anew. Nothing without pictures of a step.
void write_run_pictures(const std::filesystem::path& run, const std::vector<Thumb>& thumbs);

}  // namespace flux::decode
