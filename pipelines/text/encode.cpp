#include "pipelines/text/encode.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <new>
#include <nlohmann/json.hpp>
#include <optional>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/progress.h"
#include "common/tensor/memory_errors.h"
#include "common/tensor/tensor.h"
#include "pipelines/stage/finish.h"
#include "pipelines/text/write.h"

namespace flux::text {
namespace {

/// Runs `work`, with a shortage of memory as our error.
template <class Work>
auto with_memory(const char* net, const Work& work) {
  return with_memory_errors(fmt::format("not enough memory to encode with {}", net),
                            "use --precision bf16, a smaller --batch-size, or --device cpu",
                            work);
}

at::ScalarType torch_type(stage::Precision precision) {
  return precision == stage::Precision::kF32 ? at::kFloat : at::kBFloat16;
}

/// Token ids of a batch as a net reads them.
struct Tokens {
  at::Tensor ids;   // [B, L] int64
  at::Tensor live;  // [B, L] bool: not padding
  std::vector<tokenizers::Padded> rows;
};

template <class Tokenizer>
Tokens tokenize(const Tokenizer& tokenizer, std::span<const Job> batch, int64_t length) {
  Tokens out;
  std::vector<int64_t> ids;
  for (const Job& job : batch) {
    out.rows.push_back(tokenizer.padded(tokenizer.encode(job.caption), length));
    ids.insert(ids.end(), out.rows.back().ids.begin(), out.rows.back().ids.end());
  }
  const int64_t shape[] = {std::ssize(batch), length};
  out.ids = from_values<int64_t>(ids, shape);
  out.live = at::zeros(shape, at::kBool);
  for (int64_t i = 0; i < shape[0]; ++i)
    out.live[i].narrow(0, 0, out.rows[static_cast<size_t>(i)].num_live_tokens).fill_(true);
  return out;
}

/// The bytes of one row in the cache's dtype; nothing if it is not finite there.
std::optional<std::vector<std::byte>> stored(const at::Tensor& row, DType dtype) {
  const at::Tensor host = to_dtype(row.cpu(), *scalar_type(dtype)).contiguous();
  if (!at::isfinite(host).all().item<bool>()) return std::nullopt;
  const auto bytes = host_bytes(host);
  return std::vector<std::byte>(bytes.begin(), bytes.end());
}

std::span<const Job> batch_at(std::span<const Job> jobs, size_t begin, int64_t batch_size) {
  return jobs.subspan(begin, std::min(jobs.size() - begin, static_cast<size_t>(batch_size)));
}

/// CLIP's half of a caption; without bytes if it is not finite.
struct Pooled {
  std::optional<std::vector<std::byte>> bytes;
  uint32_t num_tokens, num_lost;
};

std::vector<Pooled> encode_clip(std::span<const Job> jobs,
                                ClipFiles files,
                                stage::Precision precision,
                                c10::Device device,
                                const Options& options,
                                cache::Writer& writer) {
  const auto model =
      clip::TextModel::load(files.weights, files.config, torch_type(precision), device);
  std::vector<Pooled> out;
  Progress progress("encoding with CLIP", "captions", std::ssize(jobs));
  while (out.size() < jobs.size()) {
    stage::stop_if_asked(writer, "captions");
    const auto batch = batch_at(jobs, out.size(), options.encode.batch_size);
    const Tokens tokens = tokenize(files.tokenizer, batch, files.config.num_positions);
    const at::Tensor pooled = model.encode(tokens.ids).pooled;  // [B, V]
    for (size_t i = 0; i < batch.size(); ++i) {
      out.push_back({stored(pooled[static_cast<int64_t>(i)], options.encode.dtype),
                     static_cast<uint32_t>(tokens.rows[i].num_live_tokens),
                     static_cast<uint32_t>(tokens.rows[i].num_lost_tokens)});
    }
    progress.update(std::ssize(out));
  }
  return out;
}

void encode_t5(std::span<const Job> jobs,
               std::vector<Pooled> pooled,
               T5Files files,
               stage::Precision precision,
               c10::Device device,
               const Options& options,
               cache::Writer& writer,
               const cache::Layout& layout,
               Encoded& out) {
  const auto model =
      t5::Encoder::load(std::move(files.weights), files.config, torch_type(precision), device);
  CacheQueue queue(writer, layout);
  Progress progress("encoding with T5", "captions", std::ssize(jobs));
  for (size_t begin = 0; begin < jobs.size();) {
    const auto batch = batch_at(jobs, begin, options.encode.batch_size);
    const Tokens tokens = tokenize(files.tokenizer, batch, options.t5_length_tokens);
    const at::Tensor rows = model.encode(
        tokens.ids, options.pad_policy == PadPolicy::kMasked ? tokens.live : at::Tensor());
    std::vector<EncodedCaption> captions;
    for (size_t i = 0; i < batch.size(); ++i) {
      Pooled& clip = pooled[begin + i];
      auto prompt = stored(rows[static_cast<int64_t>(i)], options.encode.dtype);  // [L, X]
      if (!prompt || !clip.bytes) {
        out.failures.push_back(
            {batch[i].key, fmt::format("its {} embedding is not finite", prompt ? "CLIP" : "T5")});
        continue;
      }
      cache::SampleInfo info;
      info.key = batch[i].key;
      info.source_sha256 = sha256(batch[i].caption);
      info.text = batch[i].caption;
      info.t5_tokens = static_cast<uint32_t>(tokens.rows[i].num_live_tokens);
      info.t5_lost = static_cast<uint32_t>(tokens.rows[i].num_lost_tokens);
      info.clip_tokens = clip.num_tokens;
      info.clip_lost = clip.num_lost;
      captions.push_back({std::move(info), std::move(*prompt), std::move(*clip.bytes)});
    }
    queue.add(std::move(captions));
    begin += batch.size();
    progress.update(static_cast<int64_t>(begin));
    if (cancel::requested()) queue.flush();
    stage::stop_if_asked(writer, "captions");
  }
  queue.flush();
}

}  // namespace

Encoded encode_captions(std::span<const Job> jobs,
                        ClipFiles clip,
                        T5Files t5,
                        stage::Precision precision,
                        c10::Device device,
                        const Options& options,
                        cache::Writer& writer,
                        const cache::Layout& layout) {
  Encoded out;
  double start = stage::monotonic_seconds();
  auto pooled = with_memory("CLIP", [&] {
    return encode_clip(jobs, std::move(clip), precision, device, options, writer);
  });
  out.clip_seconds = stage::monotonic_seconds() - start;
  start = stage::monotonic_seconds();
  with_memory("T5", [&] {
    encode_t5(
        jobs, std::move(pooled), std::move(t5), precision, device, options, writer, layout, out);
  });
  out.t5_seconds = stage::monotonic_seconds() - start;
  return out;
}

Truncation count_truncation(std::span<const std::string> captions,
                            const ClipFiles& clip,
                            const T5Files& t5,
                            int64_t t5_length_tokens) {
  Truncation out;
  const auto count =
      [](int64_t tokens, int64_t limit, int64_t& num_captions, int64_t& lost, int64_t& longest) {
        longest = std::max(longest, tokens);
        if (tokens <= limit) return;
        ++num_captions;
        lost += tokens - limit;
      };
  for (const std::string& caption : captions) {
    count(std::ssize(t5.tokenizer.encode(caption)),
          t5_length_tokens,
          out.t5_captions,
          out.t5_tokens_lost,
          out.t5_longest);
    count(std::ssize(clip.tokenizer.encode(caption)),
          clip.config.num_positions,
          out.clip_captions,
          out.clip_tokens_lost,
          out.clip_longest);
  }
  return out;
}

nlohmann::json Truncation::json() const {
  return {{"t5_captions", t5_captions},
          {"t5_tokens_lost", t5_tokens_lost},
          {"t5_longest", t5_longest},
          {"clip_captions", clip_captions},
          {"clip_tokens_lost", clip_tokens_lost},
          {"clip_longest", clip_longest}};
}

}  // namespace flux::text
