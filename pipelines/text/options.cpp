#include "pipelines/text/options.h"

#include "common/core/error.h"

namespace flux::text {

std::string_view pad_policy_word(PadPolicy policy) {
  return policy == PadPolicy::kFull ? "full" : "masked";
}

void add_flags(Options& options, Tool& tool) {
  options.command_line = tool.command_line();
  tool.about("Encodes captions with CLIP and T5, once, into a cache that flux-train reads.",
             "flux-cache-text --images photos --t5 t5xxl.safetensors --clip clip_l.safetensors "
             "--t5-tokenizer spiece.model "
             "--clip-tokenizer clip --out cache/text");
  tool.group("Input");
  stage::add_flags(options.data, tool);
  tool.flag("prompts",
            options.prompts,
            "FILE",
            "prompts, one a line, # starts a comment: instead of a data set, for sampling");
  tool.flag(
      "t5", options.t5, "FILE", "T5 v1.1 XXL encoder (.safetensors, sharded set or its folder)");
  tool.flag("clip", options.clip, "FILE", "CLIP-L text model (.safetensors, or its folder)");
  tool.flag(
      "t5-tokenizer",
      options.t5_tokenizer,
      "FILE",
      "spiece.model or tokenizer.json; without it, what a diffusers folder has beside the weights");
  tool.flag("clip-tokenizer",
            options.clip_tokenizer,
            "DIR",
            "folder with vocab.json and merges.txt, or tokenizer.json; without it, as for T5");
  tool.group("Captions");
  tool.flag(
      "missing-caption",
      options.missing_caption,
      Choices<MissingCaption>{{"error", MissingCaption::kError}, {"empty", MissingCaption::kEmpty}},
      "an image without caption and class tokens: end the run, or use the empty caption");
  tool.flag(
      "text-variants",
      options.text_variants,
      "N",
      "encoded forms of a caption with random parts (shuffled tags, wildcards); 8 if not given",
      1,
      1024);
  tool.flag("seed", options.seed, "S", "of the forms of captions that have more than N");
  tool.group("Encoding");
  tool.flag("t5-length",
            options.t5_length_tokens,
            Choices<int64_t>{{"512", 512}, {"256", 256}},
            "T5 tokens of a caption; schnell was trained with 256");
  tool.flag("pad-policy",
            options.pad_policy,
            Choices<PadPolicy>{{"full", PadPolicy::kFull}, {"masked", PadPolicy::kMasked}},
            "T5's padding: attended to, as FLUX was trained, or masked out and zero");
  tool.bytes_flag("device-memory",
                  options.device_memory,
                  "what the run may take of the GPU: T5 streams if it does not fit",
                  "90 % of what is free");
  tool.bytes_flag(
      "host-memory", options.host_memory, "the same of the machine", "80 % of what is free");
  stage::add_flags(options.encode, tool, true);
}

void check(const Options& options) {
  stage::check(options.data, "prompts", options.prompts);
  stage::check(options.encode);
  if (options.t5.empty()) throw UsageError("--t5 FILE is required");
  if (options.clip.empty()) throw UsageError("--clip FILE is required");
  if (options.prompts.empty()) return;
  const auto refuse = [](const char* flag) {
    throw UsageError(
        std::string(flag) + " has no effect with --prompts, whose lines are taken as they are",
        "leave it out");
  };
  if (options.missing_caption == MissingCaption::kEmpty) refuse("--missing-caption");
  if (options.text_variants) refuse("--text-variants");
  if (options.data.profile == Profile::kKohya) refuse("--profile");
}

}  // namespace flux::text
