#include "common/models/vae/vae.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/models/vae/norm_swish.h"
#include "common/models/vae/picture.h"
#include "common/tensor/tensor.h"

namespace flux::vae {
namespace {

using at::Tensor;

/// Elements of one slice of attention scores: 64 MiB in float32, so 1024 x 1024 pixels (16384
/// tokens) take 16 slices.
constexpr int64_t kScoreElements = int64_t{1} << 24;
/// Channels last is 2 to 3 times as fast as channels first in oneDNN's convolutions, in bfloat16
/// and in float32 (docs/benchmarks.md).
constexpr auto kFormat = at::MemoryFormat::ChannelsLast;
/// About as many elements a large image's convolutions take at a time on the CPU (16 MiB in float32). A constant, so
/// that bits stay a function of the image alone even where oneDNN computes another height in another way.
constexpr int64_t kStripElements = int64_t{1} << 22;

/// Takes a net's tensors out of a map, in the dtype, on the device and in the memory format it
/// computes in.
class Loader {
 public:
  Loader(const TensorMap& weights, at::ScalarType dtype, at::Device device)
      : weights_(weights), dtype_(dtype), device_(device) {}

  Tensor take(const std::string& name) const {
    const Tensor& from = weights_.at(name);
    Tensor x = to_dtype(from, dtype_).to(device_);
    x = x.dim() == 4 ? x.contiguous(kFormat) : x.contiguous();
    // a view of a mapped file would keep all of it in memory, beside the copies of the large tensors
    return x.is_alias_of(from) ? x.clone() : x;
  }
  Conv conv(const std::string& name) const {
    return {take(name + ".weight"), take(name + ".bias")};
  }
  Norm norm(const std::string& name) const {
    return {take(name + ".weight"), take(name + ".bias")};
  }
  ResBlock res_block(const std::string& name) const {
    const bool same = !weights_.contains(name + ".nin_shortcut.weight");
    return {norm(name + ".norm1"),
            norm(name + ".norm2"),
            conv(name + ".conv1"),
            conv(name + ".conv2"),
            same ? Conv{} : conv(name + ".nin_shortcut")};
  }
  Attention attention(const std::string& name) const {
    return {norm(name + ".norm"),
            conv(name + ".q"),
            conv(name + ".k"),
            conv(name + ".v"),
            conv(name + ".proj_out")};
  }
  Level level(const std::string& name, int64_t num_blocks, const std::string& resample) const {
    Level level;
    for (int64_t i = 0; i < num_blocks; ++i)
      level.blocks.push_back(res_block(name + ".block." + std::to_string(i)));
    if (weights_.contains(name + resample + ".conv.weight"))
      level.resample = conv(name + resample + ".conv");
    return level;
  }

 private:
  const TensorMap& weights_;
  at::ScalarType dtype_;
  at::Device device_;
};

void tap(TensorMap* taps, const std::string& name, const Tensor& x) {
  if (taps)
    taps->insert_or_assign(name,
                           x.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true)
                               .contiguous());  // x changes in place
}

Tensor convolve(const Tensor& x, const Conv& conv, int64_t stride, int64_t padding) {
  return at::conv2d(x, conv.weight, conv.bias, {stride, stride}, {padding, padding});
}
Tensor convolve_3x3(const Tensor& x, const Conv& conv) { return convolve(x, conv, 1, 1); }
Tensor convolve_1x1(const Tensor& x, const Conv& conv) { return convolve(x, conv, 1, 0); }

}  // namespace

Tensor normalise(const Tensor& x, const Norm& norm) {
  return at::group_norm(x, kNormGroups, norm.weight, norm.bias, kNormEpsilon);
}

namespace {

/// Strips of rows that an image [1, c, height, w] is cut into. One on a GPU, which has no use for less work at a time.
int64_t strip_count(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  if (!like.is_cpu()) return 1;
  return std::clamp<int64_t>(channels * height * width / kStripElements, 1, height);
}

/// The first elements of `buffer`, made larger where it must be, as an image. Mapping fresh pages for each took a tenth
/// of the time of encoding.
Tensor in_buffer(Tensor& buffer,
                 int64_t channels,
                 int64_t height,
                 int64_t width,
                 const at::TensorOptions& options) {
  const int64_t size = channels * height * width;
  if (!buffer.defined() || buffer.numel() < size) {
    buffer.reset();  // before the larger one is made
    buffer = at::empty({size}, options);
  }
  return buffer.narrow(0, 0, size).view({1, height, width, channels}).permute({0, 3, 1, 2});
}

/// 3x3 convolution of an image [1, c, height, width] that never exists as a whole:
///   fill(first, last, out)  writes its rows [first, last) to out [1, c, last - first, width]
///   take(first, strip)      gets the rows of the result from `first` on
template <class Fill, class Take>
void convolve_strips(const Conv& conv,
                     int64_t height,
                     int64_t width,
                     Tensor& buffer,
                     const Fill& fill,
                     const Take& take) {
  const int64_t
      channels = conv.weight.size(1),
      count = strip_count(conv.weight, channels, height, width),
      halo = count > 1
                 ? 1
                 : 0;  // rows of the neighbours, or of zeros; a single strip is padded by conv2d
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = i * height / count, last = (i + 1) * height / count;
    const int64_t top = std::max<int64_t>(first - halo, 0), bottom = std::min(last + halo, height);
    const Tensor rows =
        in_buffer(buffer, channels, last - first + 2 * halo, width, conv.weight.options());
    if (halo && first == 0) rows.narrow(2, 0, 1).zero_();
    if (halo && last == height) rows.narrow(2, last - first + 1, 1).zero_();
    fill(top, bottom, rows.narrow(2, top - (first - halo), bottom - top));
    take(first, at::conv2d(rows, conv.weight, conv.bias, {1, 1}, {1 - halo, 1}));
  }
}

/// What the parts of one picture's way share.
struct Work {
  PictureMemory& memory;
  Tensor buffer{};  // of strips that are convolved
  Tensor read{};    // of rows that come from a scratch file
};

/// The same of swish(GroupNorm(x)). x is freed as early as may be.
template <class Take>
void norm_convolve(Picture x, const Norm& norm, const Conv& conv, Work& work, const Take& take) {
  if (x.whole().defined() && !NormSwish::takes(x.whole())) {
    Tensor n = normalise(x.whole(), norm);
    x.reset();
    take(0, convolve_3x3(at::silu_(n), conv));
    return;
  }
  const int64_t height = x.height(), width = x.width();
  const NormSwish normed(std::move(x), norm.weight, norm.bias);
  const auto fill = [&](int64_t first, int64_t last, const Tensor& out) {
    normed.rows(first, last, out);
  };
  convolve_strips(conv, height, width, work.buffer, fill, take);
}

/// Takes the rows of `picture` [1, c, height, w] from `first` on; the first strip makes it.
void place(Picture& picture, int64_t height, int64_t first, const Tensor& strip, Work& work) {
  if (strip.size(2) == height) {
    picture = Picture(strip, &work.memory);
    return;
  }
  if (first == 0)
    picture = Picture(work.memory, strip.size(1), height, strip.size(3), strip.options());
  picture.set_rows(first, strip);
}

Picture norm_convolve(const Picture& x, const Norm& norm, const Conv& conv, Work& work) {
  Picture out;
  norm_convolve(x, norm, conv, work, [&, height = x.height()](int64_t first, const Tensor& strip) {
    place(out, height, first, strip, work);
  });
  return out;
}

/// In one go where both are in memory, else some rows at a time.
Picture shortcut(const Picture& x, const Conv& conv, Work& work) {
  const int64_t height = x.height(), channels = conv.weight.size(0);
  const int64_t bytes = x.num_bytes() / x.channels() * channels;
  if (x.whole().defined() && work.memory.fits(bytes))
    return Picture(convolve_1x1(x.whole(), conv), &work.memory);
  Picture out;
  const int64_t count =
      strip_count(conv.weight, std::max(channels, x.channels()), height, x.width());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = i * height / count, last = (i + 1) * height / count;
    place(out, height, first, convolve_1x1(x.rows(first, last, work.read), conv), work);
  }
  return out;
}

/// Two large pictures exist at a time, x and what conv1 puts out, for a moment three where the shortcut has other channels:
/// norms and what conv2 puts out exist in strips. May change x in place.
Picture res_block(Picture x, const ResBlock& block, Work& work) {
  Picture h = norm_convolve(x, block.norm1, block.conv1, work);
  if (block.shortcut.weight.defined()) x = shortcut(x, block.shortcut, work);
  norm_convolve(
      std::move(h), block.norm2, block.conv2, work, [&](int64_t first, const Tensor& strip) {
        x.add_rows(first, strip, work.read);
      });
  return x;
}

/// One head over all pixels of one image. Scores exist for a slice of the queries at a time: all
/// would be tokens^2.
Tensor attend(const Tensor& x, const Attention& attention) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3),
                tokens = height * width;
  const Tensor n = normalise(x, attention.norm);
  const auto as_tokens = [&](const Tensor& y) {
    return y.permute({0, 2, 3, 1}).reshape({tokens, channels});
  };
  const Tensor q =
      as_tokens(convolve_1x1(n, attention.q)).mul(1.0 / std::sqrt(static_cast<double>(channels)));
  const Tensor k = as_tokens(convolve_1x1(n, attention.k)).t();
  const Tensor v = as_tokens(convolve_1x1(n, attention.v));
  Tensor out = at::empty({tokens, channels}, q.options());
  const int64_t rows = std::clamp<int64_t>(kScoreElements / tokens, 1, tokens);
  for (int64_t row = 0; row < tokens; row += rows) {
    const int64_t count = std::min(rows, tokens - row);
    Tensor slice = out.narrow(0, row, count);
    const Tensor scores = at::softmax(at::mm(q.narrow(0, row, count), k), -1);  // [count, tokens]
    at::mm_out(slice, scores, v);
  }
  const Tensor image =
      out.view({1, height, width, channels}).permute({0, 3, 1, 2});  // channels last
  return convolve_1x1(image, attention.out).add_(x);
}

/// Zero padding on the right and at the bottom only, as the net was trained: padding all sides
/// would shift by half a pixel.
Picture downsample(const Tensor& x, const Conv& conv, Work& work) {
  const int64_t height = x.size(2), half = height / 2,
                count = strip_count(x, x.size(1), height, x.size(3));
  Picture out;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = i * half / count, last = (i + 1) * half / count;
    const int64_t rows = std::min(2 * last + 1, height) - 2 * first;
    const Tensor padded =
        at::constant_pad_nd(x.narrow(2, 2 * first, rows), {0, 1, 0, 2 * (last - first) + 1 - rows});
    place(out, half, first, convolve(padded.contiguous(kFormat), conv, 2, 0), work);
  }
  return out;
}
Picture upsample(const Picture& x, const Conv& conv, Work& work) {
  const int64_t height = 2 * x.height(), width = 2 * x.width();
  const auto fill = [&](int64_t first, int64_t last, const Tensor& out) {
    const int64_t above = first / 2, count = (last + 1) / 2 - above;
    const Tensor rows =
        at::upsample_nearest2d(x.rows(above, above + count, work.read), {2 * count, width});
    Tensor(out).copy_(rows.narrow(2, first - 2 * above, last - first));
  };
  Picture out;
  convolve_strips(conv, height, width, work.buffer, fill, [&](int64_t first, const Tensor& strip) {
    place(out, height, first, strip, work);
  });
  return out;
}

/// What the small levels of the sample before left in the heap, up to 130 MB, would be there beside
/// the large level of the next.
void give_back_freed() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

/// Sample `i` of a batch as the net takes it.
Tensor sample(const Tensor& batch, int64_t i, const Tensor& weight) {
  return batch.narrow(0, i, 1).to(weight.options()).contiguous(kFormat);
}

void check_batch(const Tensor& x, const char* name, int64_t channels, int64_t stride) {
  if (x.dim() != 4 || x.size(0) < 1 || x.size(1) != channels || x.size(2) < stride ||
      x.size(3) < stride || x.size(2) % stride || x.size(3) % stride)
    throw std::invalid_argument(std::string(name) + " has shape " + shape_text(x) +
                                ", expected [B, " + std::to_string(channels) +
                                ", H, W] with H and W multiples of " + std::to_string(stride));
}

}  // namespace

Tensor scale_latents(const Tensor& raw) { return (raw - kShift) * kScale; }
Tensor unscale_latents(const Tensor& latents) { return latents / kScale + kShift; }

Encoder Encoder::load(const TensorMap& weights,
                      const Config& config,
                      at::ScalarType dtype,
                      at::Device device) {
  const c10::InferenceMode no_grad;
  const Loader loader(weights, dtype, device);
  Encoder e;
  e.config = config;
  e.conv_in = loader.conv("encoder.conv_in");
  for (size_t i = 0; i < config.channel_mult.size(); ++i)
    e.levels.push_back(
        loader.level("encoder.down." + std::to_string(i), config.num_res_blocks, ".downsample"));
  e.mid1 = loader.res_block("encoder.mid.block_1");
  e.attention = loader.attention("encoder.mid.attn_1");
  e.mid2 = loader.res_block("encoder.mid.block_2");
  e.norm_out = loader.norm("encoder.norm_out");
  e.conv_out = loader.conv("encoder.conv_out");
  return e;
}

Posterior Encoder::encode(const Tensor& pixels, TensorMap* taps) const {
  check_batch(pixels, "pixels", config.image_channels, config.stride());
  give_back_freed();
  const c10::InferenceMode no_grad;
  std::vector<Tensor> moments;
  PictureMemory memory;
  Work work{memory};
  for (int64_t i = 0; i < pixels.size(0); ++i, taps = nullptr) {
    Picture x(convolve_3x3(sample(pixels, i, conv_in.weight), conv_in));
    tap(taps, "conv_in", x.whole());
    for (size_t l = 0; l < levels.size(); ++l) {
      const std::string name = "down." + std::to_string(l);
      for (size_t b = 0; b < levels[l].blocks.size(); ++b) {
        x = res_block(std::move(x), levels[l].blocks[b], work);
        tap(taps, name + ".block." + std::to_string(b), x.whole());
      }
      if (levels[l].resample.weight.defined()) {
        x = downsample(x.whole(), levels[l].resample, work);
        tap(taps, name + ".downsample", x.whole());
      }
    }
    x = res_block(std::move(x), mid1, work);
    tap(taps, "mid.block_1", x.whole());
    x = Picture(attend(x.whole(), attention));
    tap(taps, "mid.attn_1", x.whole());
    x = res_block(std::move(x), mid2, work);
    tap(taps, "mid.block_2", x.whole());
    if (taps) tap(taps, "norm_out", normalise(x.whole(), norm_out));
    x = norm_convolve(x, norm_out, conv_out, work);
    tap(taps, "conv_out", x.whole());
    moments.push_back(x.whole().to(at::kFloat).contiguous());
  }
  const Tensor all = moments.size() == 1 ? moments[0] : at::cat(moments);
  return {all.narrow(1, 0, config.latent_channels).contiguous(),
          all.narrow(1, config.latent_channels, config.latent_channels).contiguous()};
}

Decoder Decoder::load(const TensorMap& weights,
                      const Config& config,
                      at::ScalarType dtype,
                      at::Device device) {
  const c10::InferenceMode no_grad;
  const Loader loader(weights, dtype, device);
  Decoder d;
  d.config = config;
  d.conv_in = loader.conv("decoder.conv_in");
  d.mid1 = loader.res_block("decoder.mid.block_1");
  d.attention = loader.attention("decoder.mid.attn_1");
  d.mid2 = loader.res_block("decoder.mid.block_2");
  for (size_t i = 0; i < config.channel_mult.size(); ++i)
    d.levels.push_back(
        loader.level("decoder.up." + std::to_string(i), config.num_res_blocks + 1, ".upsample"));
  d.norm_out = loader.norm("decoder.norm_out");
  d.conv_out = loader.conv("decoder.conv_out");
  return d;
}

Tensor Decoder::decode(const Tensor& raw, const DecodeMemory& allowed) const {
  check_batch(raw, "raw latents", config.latent_channels, 1);
  const c10::InferenceMode no_grad;
  std::vector<Tensor> images;
  for (int64_t i = 0; i < raw.size(0); ++i) {
    give_back_freed();
    PictureMemory memory(allowed.picture_bytes, allowed.scratch);
    Work work{memory};
    Picture x;
    {
      PictureMemory all_in_memory;
      Work mid{all_in_memory};
      x = Picture(convolve_3x3(sample(raw, i, conv_in.weight), conv_in));
      x = res_block(std::move(x), mid1, mid);
      x = Picture(attend(x.whole(), attention), &memory);
    }
    x = res_block(std::move(x), mid2, work);
    for (auto level = levels.rbegin(); level != levels.rend(); ++level) {
      for (const ResBlock& block : level->blocks) x = res_block(std::move(x), block, work);
      if (level->resample.weight.defined()) x = upsample(x, level->resample, work);
    }
    // the image itself is small
    Tensor image =
        at::empty({1, config.image_channels, x.height(), x.width()}, x.options().dtype(at::kFloat));
    norm_convolve(std::move(x), norm_out, conv_out, work, [&](int64_t first, const Tensor& strip) {
      image.narrow(2, first, strip.size(2)).copy_(strip);
    });
    images.push_back(std::move(image));
    if (allowed.stats) allowed.stats->scratch_bytes += memory.scratch_bytes();
  }
  return images.size() == 1 ? images[0] : at::cat(images);
}

namespace {

int64_t bytes_of(const Conv& conv) {
  return conv.weight.defined() ? static_cast<int64_t>(conv.weight.nbytes() + conv.bias.nbytes())
                               : 0;
}
int64_t bytes_of(const ResBlock& block) {
  return bytes_of(block.conv1) + bytes_of(block.conv2) + bytes_of(block.shortcut);
}

}  // namespace

DecodeNeeds Decoder::needs(int64_t h, int64_t w) const {
  const auto element = static_cast<int64_t>(conv_in.weight.element_size());
  DecodeNeeds needs;
  needs.weights = bytes_of(conv_in) + bytes_of(mid1) + bytes_of(mid2) + bytes_of(attention.q) +
                  bytes_of(attention.k) + bytes_of(attention.v) + bytes_of(attention.out) +
                  bytes_of(conv_out);
  int64_t x = conv_in.weight.size(0) * h * w * element, widest_row = 0;
  // x, its norm, q (and it once more while it is scaled), k, v, what is attended to; slices of scores and of their softmax
  needs.mid = 7 * x + 2 * std::min(kScoreElements, h * w * h * w) * element;
  for (auto level = levels.rbegin(); level != levels.rend(); ++level) {
    for (const ResBlock& block : level->blocks) {
      needs.weights += bytes_of(block);
      const int64_t out = block.conv1.weight.size(0) * h * w * element;
      needs.pictures =
          std::max(needs.pictures, x + (block.shortcut.weight.defined() ? 2 * out : out));
      widest_row = std::max(widest_row, x / h);
      x = out;
    }
    if (!level->resample.weight.defined()) continue;
    needs.weights += bytes_of(level->resample);
    h *= 2;
    w *= 2;
    needs.pictures = std::max(needs.pictures, x + 4 * x);
    x *= 4;
  }
  // a strip and its neighbours' rows, what it becomes, and what is read, added, and laid out anew on the way
  constexpr int64_t kTensorsOfStrips = 6;
  needs.strips = kTensorsOfStrips * (kStripElements * element + 3 * widest_row) +
                 config.image_channels * h * w * int64_t{sizeof(float)};
  return needs;
}

}  // namespace flux::vae
