#include "pipelines/latents/encode.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <new>
#include <thread>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/ordered.h"
#include "common/core/progress.h"
#include "common/core/rng.h"
#include "common/core/text.h"
#include "common/image/image.h"
#include "common/tensor/tensor.h"
#include "pipelines/latents/read.h"
#include "pipelines/stage/finish.h"
#include "pipelines/stage/halving.h"

namespace flux::latents {
namespace {

/// [3, H, W] floats and the loss mask [H / 8, W / 8] if the sample has one, or why there are none.
struct Pixels {
  std::vector<float> values, mask;
  std::string reason;
};

/// The mask that another picture is: its red, as sd-scripts takes it; what is transparent counts nothing.
std::vector<float> mask_of_picture(const Sample& sample, image::DecodeOptions options) {
  options.alpha = false;
  options.background = {0, 0, 0};
  try {
    const auto bytes = read_picture(sample.mask_file);
    if (sha256(bytes) != sample.mask_sha256) throw InputError("changed while it was being read");
    const image::Rgb picture = image::decode(as_bytes(bytes), options);
    if (picture.size != sample.original) throw InputError("its head and its pixels differ in size");
    image::Rgb mask{picture.size, {}};
    mask.alpha.resize(picture.data.size() / 3);
    for (size_t i = 0; i < mask.alpha.size(); ++i) mask.alpha[i] = picture.data[3 * i];
    return image::alpha_mask(mask, sample.placement, sample.interpolation, sample.flip);
  } catch (const InputError& error) {
    throw InputError("its mask: " + stage::reason_of(error.what(), sample.mask_file.parent_path()));
  }
}

Pixels load_pixels(const std::filesystem::path& file,
                   const Sample& sample,
                   image::DecodeOptions options,
                   stage::StageTime& decode_time,
                   stage::StageTime& resize_time) {
  options.alpha = sample.mask && sample.mask_file.empty();
  try {
    const auto picture = [&] {
      const stage::StageTime::Scope busy(decode_time);
      const auto bytes = read_picture(file);
      if (sha256(bytes) != sample.source_sha256)
        throw InputError("changed while it was being read");
      return image::decode(as_bytes(bytes), options);
    }();
    if (picture.size != sample.original) throw InputError("its head and its pixels differ in size");
    const stage::StageTime::Scope busy(resize_time);
    const auto placed = image::place(picture, sample.placement, sample.interpolation, sample.flip);
    Pixels pixels;
    pixels.values.resize(placed.data.size());
    image::to_pixels(placed, pixels.values);
    if (!sample.mask_file.empty()) {
      pixels.mask = mask_of_picture(sample, options);
    } else if (sample.mask && !picture.alpha.empty()) {
      pixels.mask = image::alpha_mask(picture, sample.placement, sample.interpolation, sample.flip);
    } else if (sample.mask) {  // all of an opaque picture counts
      const auto& bucket = sample.placement.bucket;
      pixels.mask.assign(static_cast<size_t>(bucket.height / 8 * (bucket.width / 8)), 1.0f);
    }
    return pixels;
  } catch (const InputError& error) {
    return {{}, {}, stage::reason_of(error.what(), file.parent_path())};
  } catch (const std::bad_alloc&) {
    throw ResourceError("no memory to decode " + show(file));
  }
}

// Pictures that are decoded or wait for the net; one larger than this is alone.
constexpr int64_t kPictureBytes = int64_t{3} << 29;

int64_t bytes_decoded(const Sample& sample) {
  const auto& bucket = sample.placement.bucket;
  return bucket.width * bucket.height * 3 * static_cast<int64_t>(sizeof(float));
}

// 8-bit colours, once more while they are turned upright, the scaled picture, and the result.
int64_t bytes_decoding(const Sample& sample) {
  const auto &original = sample.original, &resized = sample.placement.resized;
  const int64_t per_pixel = sample.mask_file.empty() ? 6 : 10;  // a mask is decoded beside it
  return per_pixel * original.width * original.height + 3 * resized.width * resized.height +
         bytes_decoded(sample);
}

vae::Posterior encode_batch(const vae::Encoder& encoder,
                            const std::vector<at::Tensor>& pixels,
                            at::Device device) {
  auto posterior = encoder.encode(at::stack(pixels).to(device));
  return {posterior.mean.cpu(), posterior.logvar.cpu()};
}

}  // namespace

cache::SampleInfo info_of(const Sample& s, const std::string& path) {
  const auto u32 = [](int64_t value) { return static_cast<uint32_t>(value); };
  cache::SampleInfo info;
  info.key = s.key;
  info.source_sha256 = s.source_sha256;
  info.text = path;
  info.flags = s.flags();
  info.height = u32(s.placement.bucket.height / 8), info.width = u32(s.placement.bucket.width / 8);
  info.original_hw = {u32(s.original.height), u32(s.original.width)};
  info.resized_hw = {u32(s.placement.resized.height), u32(s.placement.resized.width)};
  info.crop_top_left = {u32(s.placement.crop_y), u32(s.placement.crop_x)};
  return info;
}

at::Tensor stored_latents(const vae::Posterior& posterior,
                          int64_t index,
                          Store store,
                          int64_t seed,
                          const Sha256Digest& key) {
  const auto mean = posterior.mean[index], logvar = posterior.logvar[index];
  if (store == Store::kMeanLogvar) return at::cat({mean, logvar});
  uint64_t name = 0;
  for (size_t i = 0; i < 8; ++i) name |= static_cast<uint64_t>(key[i]) << (8 * i);
  std::vector<float> normal(static_cast<size_t>(mean.numel()));
  RandomStream(static_cast<uint64_t>(seed), Purpose::kLatentSample, name).fill_normal(normal);
  return mean + at::exp(logvar * 0.5) * from_values<float>(normal, mean.sizes());
}

Encoded encode_samples(const dataset::Resolved& resolved,
                       std::vector<Sample> samples,
                       const vae::Encoder& encoder,
                       at::Device device,
                       const Options& options,
                       stage::StageTimes& times,
                       stage::Sink& sink) {
  // Buckets one after the other, so that batches are full; within one in the order of the data set.
  std::stable_sort(samples.begin(), samples.end(), [](const Sample& a, const Sample& b) {
    return a.placement.bucket < b.placement.bucket;
  });
  const image::DecodeOptions decoding{resolved.profile, options.background};
  const auto dtype = *scalar_type(options.encode.dtype);
  // On the CPU the net needs the cores itself; a GPU waits for pictures.
  const auto cores = std::max(1u, std::thread::hardware_concurrency());
  const int num_threads =
      static_cast<int>(device.is_cpu() ? std::max(1u, cores / 4) : std::clamp(cores, 2u, 16u));
  stage::StageTime &decode_time = times.add("decode", num_threads),
                   &resize_time = times.add("resize", num_threads),
                   &encode_time = times.add("encode");
  const auto count = static_cast<int64_t>(samples.size());
  int64_t batch_size = options.encode.batch_size, num_passes = 0;
  Encoded out;
  Progress progress("encoding", "images", count);
  Ordered<Pixels> pictures(
      count,
      num_threads,
      2 * num_threads + batch_size,
      [&](int64_t i) {
        const auto& sample = samples[static_cast<size_t>(i)];
        return load_pixels(
            resolved.images[sample.image].file, sample, decoding, decode_time, resize_time);
      },
      {kPictureBytes,
       [&](int64_t i) { return bytes_decoding(samples[static_cast<size_t>(i)]); },
       [&](int64_t i) { return bytes_decoded(samples[static_cast<size_t>(i)]); }});

  const auto fail = [&](const Sample& sample, const std::string& reason) {
    out.failures.push_back({info_of(sample, resolved.images[sample.image].name), reason});
  };
  for (int64_t next = 0; next < count;) {
    sink.stop_if_asked();
    std::vector<const Sample*> batch;
    std::vector<at::Tensor> pixels;
    std::vector<std::vector<float>> masks;
    const auto bucket = samples[static_cast<size_t>(next)].placement.bucket;
    while (next < count && static_cast<int64_t>(batch.size()) < batch_size &&
           samples[static_cast<size_t>(next)].placement.bucket == bucket) {
      const auto& sample = samples[static_cast<size_t>(next++)];
      auto picture = pictures.take();
      if (!picture.reason.empty()) {
        fail(sample, picture.reason);
        continue;
      }
      batch.push_back(&sample);
      pixels.push_back(from_values<float>(
          picture.values, std::initializer_list<int64_t>{3, bucket.height, bucket.width}));
      masks.push_back(std::move(picture.mask));
    }
    const auto compute = [&](int64_t begin, int64_t part) {
      const stage::StageTime::Scope busy(encode_time);
      ++num_passes;
      const auto first = pixels.begin() + begin;
      const vae::Posterior posterior = encode_batch(encoder, {first, first + part}, device);
      std::vector<at::Tensor> stored;
      for (int64_t i = 0; i < part; ++i) {
        const Sample& sample = *batch[static_cast<size_t>(begin + i)];
        const auto latents = stored_latents(posterior, i, options.store, options.seed, sample.key);
        stored.push_back(to_dtype(latents, dtype).contiguous());
      }
      return stored;
    };
    const auto take = [&](int64_t begin, int64_t part, std::vector<at::Tensor> stored) {
      for (int64_t i = 0; i < part; ++i) {
        const Sample& sample = *batch[static_cast<size_t>(begin + i)];
        const at::Tensor& latents = stored[static_cast<size_t>(i)];
        if (!at::isfinite(latents).all().item<bool>()) {
          fail(sample, "its latents are not finite");
          continue;
        }
        const auto bytes = host_bytes(latents);
        stage::EncodedSample encoded{info_of(sample, resolved.images[sample.image].name),
                                     {{bytes.begin(), bytes.end()}}};
        if (sample.mask) {
          const auto mask = std::as_bytes(std::span(masks[static_cast<size_t>(begin + i)]));
          encoded.tensors.emplace_back(mask.begin(), mask.end());
        }
        sink.add(std::move(encoded));
        ++out.num_samples;
      }
    };
    stage::encode_in_batches(std::ssize(batch), batch_size, compute, take);
    progress.update(next, times.progress());
  }
  sink.flush();
  if (num_passes > 0)  // fewer at once where memory ran out
    log::info("AE: {} passes={} batch_size={}",
              stage::count_of(out.num_samples, "images"),
              num_passes,
              batch_size);
  return out;
}

}  // namespace flux::latents
