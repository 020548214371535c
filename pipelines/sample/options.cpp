#include "pipelines/sample/options.h"

#include <fmt/format.h>

#include <tuple>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/engine/size.h"
#include "common/models/lora/weighted_file.h"

namespace flux::sample {

void add_flags(Options& o, Tool& tool) {
  o.command_line = tool.command_line();
  tool.about(
      "Samples pictures' latents from cached prompts; flux-decode turns them into pictures.",
      "flux-sample --text cache/prompts --model flux1-dev.safetensors --lora run/step-001000/"
      "lora.safetensors --out samples.h5");
  tool.group("input and output");
  tool.flag("text", o.text, "DIR", "text cache of flux-cache-text --prompts");
  tool.flag("model", o.model, "FILE", "transformer (.safetensors, sharded set or its folder)");
  tool.flag("lora",
            o.lora,
            "FILE[:WEIGHT]",
            "adapter in any layout that FLUX LoRAs have, and how much of it (1); may be repeated");
  tool.flag("out", o.out, "FILE", "latents with prompts and settings (samples.h5)");
  tool.group("pictures");
  tool.flag("size", "WxH", "pixels, multiples of 16", "1024x1024", [&o](const std::string& text) {
    std::tie(o.width, o.height) = engine::picture_size(text);
  });
  tool.flag("count", o.count, "N", "pictures of each prompt", 1, 1'000'000);
  tool.flag("seed", o.seed, "S", "of the noise; each prompt and picture has its own");
  tool.flag("schedule",
            o.schedule,
            Choices<Schedule>{{"dev", Schedule::kDev}, {"schnell", Schedule::kSchnell}},
            "noise levels: shifted with the size, or evenly spaced",
            "the model's: dev if it has a guidance input");
  tool.flag("steps", o.steps, "N", "Euler steps; 28, with schnell 4, if not given", 1, 10'000);
  tool.flag("guidance",
            o.guidance,
            "X",
            "what the model is told, if it has a guidance input; 3.5 if not given",
            0,
            100);
  tool.flag("cfg-scale",
            o.cfg_scale,
            "X",
            "classifier-free guidance away from --negative-prompt, at twice the work; 1 = none",
            0,
            100);
  tool.flag(
      "negative-prompt",
      "TEXT|N",
      "what --cfg-scale leads away from: a prompt of the text cache, or its number from 0; it "
      "is not sampled itself",
      "none",
      [&o](const std::string& text) { o.negative_prompt = text; });
  tool.group("machine");
  tool.flag("device", o.device, device_choices(), "where to sample");
  tool.flag("precision",
            o.precision,
            Choices<Precision>{
                {"auto", Precision::kAuto}, {"f32", Precision::kF32}, {"bf16", Precision::kBF16}},
            "of the transformer; auto = bf16 on CUDA, f32 on the CPU");
  tool.flag("base-precision",
            o.base,
            Choices<BasePrecision>{{"bf16", BasePrecision::kAsComputed},
                                   {"fp8", BasePrecision::kFp8},
                                   {"nf4", BasePrecision::kNf4}},
            "of the blocks' weights; bf16 = as --precision says");
  tool.flag("batch-size",
            o.batch_size,
            "N",
            "pictures that go through each block while it is in memory; changes no picture",
            1,
            4096);
  tool.group("memory");
  tool.bytes_flag(
      "device-memory", o.device_memory, "what the run may take of the GPU", "90 % of what is free");
  tool.bytes_flag(
      "host-memory", o.host_memory, "what the run may take of the machine", "80 % of what is free");
  tool.flag_or("plan",
               "table|json",
               "table",
               "print what the run would take and whether it fits (exit 0, or 5), and end; needs "
               "--model",
               [&o](const std::string& text) {
                 if (text != "table" && text != "json")
                   throw UsageError("'" + printable(text) + "' is not one of table|json");
                 o.plan = text == "json" ? PlanOutput::kJson : PlanOutput::kTable;
               });
  tool.flag("resident-blocks",
            o.resident_blocks,
            "N",
            "blocks whose weights stay in memory; else the plan's",
            0,
            1000);
  tool.flag(
      "ring-slots", o.ring_slots, "N", "blocks in memory at a time of those that stream", 2, 4);
  tool.flag("stream-from",
            o.stream_from,
            Choices<engine::StreamFrom>{{"file", engine::StreamFrom::kFile},
                                        {"host", engine::StreamFrom::kHost}},
            "where streamed weights are",
            "file; host on a GPU");
  tool.flag("rehash", o.rehash, "hash the model anew instead of remembering its hash");
}

void check(const Options& o) {
  const auto require = [](const char* name, bool given, const char* hint) {
    if (!given) throw UsageError(fmt::format("--{} is missing", name), hint);
  };
  require("model", !o.model.empty(), "--help has an example");
  for (const std::string& lora : o.lora) lora::weighted_file(lora);
  if (o.cfg_scale != 1 && !o.negative_prompt)
    throw UsageError(fmt::format("--cfg-scale {} needs --negative-prompt", o.cfg_scale),
                     "give a prompt of the text cache to lead away from");
  if (o.negative_prompt && o.cfg_scale == 1)
    throw UsageError("--negative-prompt has no effect with --cfg-scale 1",
                     "give a --cfg-scale, 2 for one");
  if (o.plan != PlanOutput::kNone) return;
  require("text", !o.text.empty(), "flux-cache-text --prompts FILE makes a text cache");
  require("out", !o.out.empty(), "give the file to write, samples.h5 for one");
}

}  // namespace flux::sample
