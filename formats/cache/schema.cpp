#include "formats/cache/schema.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "common/core/error.h"
#include "common/core/text.h"
#include "formats/cache/codec.h"
#include "formats/cache/manifest.h"

namespace flux::cache {
namespace {

// A whole number in [low, high] from `parameters`.
int64_t number(const nlohmann::json& parameters, const char* name, int64_t low, int64_t high) {
  const auto found = parameters.find(name);
  if (found == parameters.end()) throw CacheError(fmt::format("parameters: '{}' is absent", name));
  if (!found->is_number_integer() || *found < low || *found > high) {
    throw CacheError(fmt::format("parameters: '{}' is {}, expected a whole number from {} to {}",
                                 name,
                                 printable(found->dump()),
                                 low,
                                 high));
  }
  return found->get<int64_t>();
}

}  // namespace

Layout check_recipe(const Recipe& recipe) {
  for (const auto& [name, value] : recipe.parameters.items()) {
    if (!value.is_string() && !value.is_number() && !value.is_boolean()) {
      throw CacheError(
          fmt::format("parameters: '{}' is a JSON {}, expected a text, number or boolean",
                      printable(name),
                      value.type_name()));
    }
  }
  const auto check_digests = [](const char* field, const nlohmann::json& digests) {
    if (!digests.is_object())
      throw CacheError(
          fmt::format("{}: is a JSON {}, expected an object", field, digests.type_name()));
    for (const auto& [part, digest] : digests.items()) {
      if (!digest.is_string() || !is_hex(digest.get_ref<const std::string&>(), 64)) {
        throw CacheError(fmt::format("{}: '{}' is not 64 hex digits", field, printable(part)));
      }
    }
  };
  check_digests("weights", recipe.weights);
  check_digests("tokenizers", recipe.tokenizers);
  return layout_of(recipe.kind, recipe.parameters);
}

bool is_hex(std::string_view text, size_t digits) {
  return text.size() == digits && std::all_of(text.begin(), text.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

std::string_view kind_name(Kind kind) { return kind == Kind::kLatents ? "latents" : "text"; }

std::string_view dtype_word(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return "bf16";
    case DType::kF16:
      return "f16";
    case DType::kF32:
      return "f32";
    default:
      throw std::invalid_argument(fmt::format("a cache cannot hold {}", dtype_name(dtype)));
  }
}

Layout layout_of(Kind kind, const nlohmann::json& parameters) {
  if (!parameters.is_object()) throw CacheError("parameters: not an object");
  Layout layout{.kind = kind};
  const auto dtype = parameters.find("dtype");
  if (dtype == parameters.end()) throw CacheError("parameters: 'dtype' is absent");
  if (*dtype == "bf16")
    layout.dtype = DType::kBF16;
  else if (*dtype == "f16")
    layout.dtype = DType::kF16;
  else if (*dtype == "f32")
    layout.dtype = DType::kF32;
  else
    throw CacheError(fmt::format("parameters: 'dtype' is {}, expected bf16, f16 or f32",
                                 printable(dtype->dump())));
  if (kind == Kind::kLatents) {
    layout.channels = number(parameters, "channels", 16, 32);
    if (layout.channels != 16 && layout.channels != 32) {
      throw CacheError(fmt::format(
          "parameters: 'channels' is {}, expected 16 (one sample) or 32 (mean, log-variance)",
          layout.channels));
    }
  } else {
    layout.t5_length = number(parameters, "t5_length", 1, 4096);
    layout.t5_width = number(parameters, "t5_width", 1, 65536);
    layout.clip_width = number(parameters, "clip_width", 1, 65536);
    if (layout.t5_length * layout.t5_width * 4 > kMaxTensorBytes) {
      throw CacheError(fmt::format("parameters: T5 tensors of {} x {} are larger than {} bytes",
                                   layout.t5_length,
                                   layout.t5_width,
                                   kMaxTensorBytes));
    }
  }
  return layout;
}

int64_t shard_of(const Sha256Digest& key, int64_t count) {
  uint64_t number = 0;
  for (size_t i = 0; i < 8; ++i) number = number << 8 | std::to_integer<uint64_t>(key[i]);
  return static_cast<int64_t>(number % static_cast<uint64_t>(count));
}

Sha256Digest sample_key(const nlohmann::json& fields) { return sha256(canonical_json(fields)); }

int num_tensors(const Layout& layout, const SampleInfo& info) {
  return layout.kind == Kind::kLatents && !(info.flags & kSampleMasked) ? 1 : 2;
}

DType tensor_dtype(const Layout& layout, int which) {
  return layout.kind == Kind::kLatents && which == 1 ? DType::kF32 : layout.dtype;
}

std::string mask_problem(std::span<const std::byte> mask) {
  for (size_t at = 0; at + sizeof(float) <= mask.size(); at += sizeof(float)) {
    float value;
    std::memcpy(&value, mask.data() + at, sizeof value);
    if (!(value >= 0 && value <= 1))
      return fmt::format("is a mask with the value {}, expected 0 to 1", value);
  }
  return {};
}

int64_t tensor_bytes(const Layout& layout, const SampleInfo& info, int which) {
  const int64_t element = dtype_bits(tensor_dtype(layout, which)) / 8;
  if (layout.kind == Kind::kLatents)
    return (which == 0 ? layout.channels : 1) * info.height * info.width * element;
  return which == 0 ? layout.t5_length * layout.t5_width * element : layout.clip_width * element;
}

Record prepare(const Layout& layout,
               const SampleInfo& info,
               std::span<const std::span<const std::byte>> tensors) {
  const auto require = [](bool holds, const std::string& text) {
    if (!holds) throw std::invalid_argument("cache sample: " + text);
  };
  require(tensors.size() == static_cast<size_t>(num_tensors(layout, info)),
          "wrong number of tensors");
  require(info.text.size() <= static_cast<size_t>(kMaxTextBytes), "text longer than 1 MiB");
  if (layout.kind == Kind::kLatents) {
    require(info.height >= 1 && info.height <= kMaxLatentSide && info.width >= 1 &&
                info.width <= kMaxLatentSide,
            fmt::format("latents of {} x {}", info.height, info.width));
  } else {
    require(info.flags == 0, "text with flags");
    require(info.t5_tokens <= layout.t5_length,
            fmt::format("{} live T5 tokens of {}", info.t5_tokens, layout.t5_length));
  }
  require((info.flags & ~kSampleFlags) == 0, fmt::format("flags {}", info.flags));
  Record record{info, {}};
  Xxh3 hash;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t expected = tensor_bytes(layout, info, static_cast<int>(i));
    require(expected <= kMaxTensorBytes, fmt::format("a tensor of {} bytes", expected));
    require(tensors[i].size() == static_cast<size_t>(expected),
            fmt::format("tensor {} has {} bytes, expected {}", i, tensors[i].size(), expected));
    if (layout.kind == Kind::kLatents && i == 1) {
      const std::string wrong = mask_problem(tensors[i]);
      require(wrong.empty(), "tensor 1 " + wrong);
    }
    hash.add(tensors[i]);
    record.frames.push_back(
        encode_frame(tensors[i], dtype_bits(tensor_dtype(layout, static_cast<int>(i))) / 8));
  }
  record.info.tensor_xxh3 = hash.digest();
  return record;
}

}  // namespace flux::cache
