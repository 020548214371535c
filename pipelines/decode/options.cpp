#include "pipelines/decode/options.h"

#include <fmt/format.h>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/core/tool.h"

namespace flux::decode {

void add_flags(Options& o, Tool& tool) {
  o.command_line = tool.command_line();
  tool.about(
      "Turns latents of flux-sample, of flux-train --sample-every or of a cache into pictures.",
      "flux-decode samples.h5 --ae ae.safetensors --out pictures --sheet sheet.png");
  tool.arguments(
      o.inputs,
      "FILE|DIR",
      "files of samples, folders that hold some (RUN/samples), or a latents cache to look at");
  tool.group("input and output");
  tool.flag("ae", o.ae, "FILE", "autoencoder weights (.safetensors, or its folder)");
  tool.flag("out",
            o.out,
            "DIR",
            "folder of the pictures; without it they lie beside their file of samples");
  tool.flag("limit", o.limit, "N", "the first N pictures only; 0 = all", 0, 1'000'000'000);
  tool.flag("overwrite",
            o.overwrite,
            "decode again what has a picture already that is newer than its latents");
  tool.group("pictures");
  tool.flag("format",
            o.format,
            Choices<image::FileFormat>{{"png", image::FileFormat::kPng},
                                       {"jpeg", image::FileFormat::kJpeg},
                                       {"webp", image::FileFormat::kWebp}},
            "of the pictures; prompt and settings are in their metadata");
  tool.flag("quality",
            o.quality,
            "Q",
            "of jpeg and webp; 95 if not given; webp's 100 loses nothing",
            1,
            100);
  tool.flag("sheet",
            o.sheet,
            "FILE",
            "contact sheet of all pictures, .png, .jpg or .webp; with --sheet alone and no --out "
            "pictures are written too");
  tool.flag("columns",
            o.columns,
            "N",
            "of the sheet; 0 = as many as a prompt has pictures, or about a square",
            0,
            10'000);
  tool.flag("cell", o.cell, "N", "pixels of the longer side of a picture on the sheet", 16, 16384);
  tool.group("machine");
  tool.flag("device", o.device, device_choices(), "where to decode");
  tool.flag("precision",
            o.precision,
            Choices<Precision>{{"f32", Precision::kF32}, {"bf16", Precision::kBF16}},
            "of the decoder");
  tool.bytes_flag(
      "memory",
      o.memory,
      "what the run may take: of the machine, or of a GPU; larger pictures are decoded in "
      "strips, with what is between the layers in scratch files",
      "80 % of what is free");
  tool.flag(
      "scratch",
      o.scratch,
      "DIR",
      "for scratch files, which leave nothing behind; the folder of the pictures if not given");
}

void check(const Options& o, const Tool& tool) {
  if (o.inputs.empty())
    throw UsageError("nothing to decode", "give a file of samples, samples.h5 for one");
  if (o.ae.empty()) throw UsageError("--ae FILE is required", "the autoencoder of FLUX.1");
  if (o.format == image::FileFormat::kPng && o.quality)
    throw UsageError("--quality has no effect with --format png", "leave it out");
  if (o.sheet.empty()) {
    for (const char* name : {"columns", "cell"})
      if (tool.given(name))
        throw UsageError(fmt::format("--{} has no effect without --sheet", name), "leave it out");
  } else {
    format_of(o.sheet, "--sheet");
  }
}

image::FileFormat format_of(const std::filesystem::path& file, const char* flag) {
  const std::string extension = lower_ascii(file.extension().native());
  if (extension == ".png") return image::FileFormat::kPng;
  if (extension == ".jpg" || extension == ".jpeg") return image::FileFormat::kJpeg;
  if (extension == ".webp") return image::FileFormat::kWebp;
  throw UsageError(fmt::format("{}: {} ends in none of .png, .jpg, .webp", flag, show(file)),
                   "give it one of these endings");
}

}  // namespace flux::decode
