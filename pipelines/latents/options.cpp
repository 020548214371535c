#include "pipelines/latents/options.h"

#include <charconv>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux::latents {

std::pair<int64_t, int64_t> parse_resolution(const std::string& text) {
  const auto parts = split(text, 'x');
  std::pair<int64_t, int64_t> size;
  const auto read = [&](const std::string& part, int64_t& side) {
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), side);
    return error == std::errc() && end == part.data() + part.size() && side >= 32 && side <= 8192;
  };
  if (parts.size() > 2 || !read(parts.front(), size.first) || !read(parts.back(), size.second)) {
    throw UsageError("'" + printable(text) +
                     "' is not a size such as 1024x1024 with sides from 32 to 8192");
  }
  return size;
}

std::array<uint8_t, 3> parse_background(const std::string& text) {
  if (text == "white") return {255, 255, 255};
  if (text == "black") return {0, 0, 0};
  std::array<uint8_t, 3> color{};
  bool good = text.size() == 7 && text[0] == '#';
  for (size_t i = 0; good && i < 3; ++i) {
    const char* begin = text.data() + 1 + 2 * i;
    const auto [end, error] = std::from_chars(begin, begin + 2, color[i], 16);
    good = error == std::errc() && end == begin + 2;
  }
  if (!good) throw UsageError("'" + printable(text) + "' is not white, black or #rrggbb");
  return color;
}

void add_flags(Options& options, Tool& tool) {
  options.command_line = tool.command_line();
  tool.about("Encodes images to VAE latents, once, into a cache that flux-train reads.",
             "flux-cache-latents --images photos --ae ae.safetensors --resolution 512x512 --out "
             "cache/latents");
  tool.group("Input");
  stage::add_flags(options.data, tool);
  tool.flag("ae", options.ae, "FILE", "FLUX autoencoder (.safetensors)");
  tool.group("Pixels");
  tool.flag("resolution",
            "WxH",
            "area of the buckets, where the dataset file does not say it",
            "1024x1024 with --images",
            [&options](const std::string& text) {
              std::tie(options.width, options.height) = parse_resolution(text);
            });
  tool.flag("background",
            "white|black|#rrggbb",
            "what is behind transparent pixels (profile default)",
            "white",
            [&options](const std::string& text) {
              options.background = parse_background(text);
              options.background_given = true;
            });
  tool.flag("animated",
            options.animated,
            Choices<Animated>{{"first", Animated::kFirst}, {"refuse", Animated::kRefuse}},
            "animations: their first frame, or left out as bad items");
  tool.group("Encoding");
  stage::add_flags(options.encode, tool, false);
  tool.flag("store",
            options.store,
            Choices<Store>{{"mean_logvar", Store::kMeanLogvar}, {"sample", Store::kSample}},
            "the posterior, drawn from anew at each visit in training; or one sample of it");
  tool.flag("seed", options.seed, "S", "of --store sample");
}

void check(const Options& options) {
  stage::check(options.data);
  stage::check(options.encode);
  if (options.ae.empty()) throw UsageError("--ae FILE is required");
  if (options.background_given && options.data.profile == Profile::kKohya) {
    throw UsageError("--background has no effect with --profile kohya, which drops transparency",
                     "leave one of them out");
  }
}

}  // namespace flux::latents
