#include "pipelines/text/encode.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <new>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/tensor/memory_errors.h"
#include "common/tensor/tensor.h"
#include "pipelines/stage/halving.h"
#include "pipelines/stage/report.h"

namespace flux::text {
namespace {

/// Runs `work`, with a shortage of memory as our error.
template <class Work>
auto with_memory(const char* net, const Work& work) {
  return with_memory_errors(fmt::format("not enough memory to encode with {}", net),
                            "use --precision bf16, a smaller --batch-size, or --device cpu",
                            work);
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
                                stage::StageTimes& times,
                                stage::StageTime& tokenize_time,
                                stage::Sink& sink) {
  stage::StageTime& clip_time = times.add("clip");
  const auto model = [&] {
    const stage::StageTime::Scope busy(clip_time);
    return clip::TextModel::load(files.weights, files.config, torch_type(precision), device);
  }();
  std::vector<Pooled> out;
  Progress progress("encoding with CLIP", "captions", std::ssize(jobs));
  int64_t batch_size = options.encode.batch_size;
  const auto compute = [&](int64_t begin, int64_t count) {
    sink.stop_if_asked();
    const auto batch = jobs.subspan(static_cast<size_t>(begin), static_cast<size_t>(count));
    const Tokens tokens = [&] {
      const stage::StageTime::Scope busy(tokenize_time);
      return tokenize(files.tokenizer, batch, files.config.num_positions);
    }();
    const stage::StageTime::Scope busy(clip_time);
    const at::Tensor pooled = model.encode(tokens.ids).pooled;  // [B, V]
    std::vector<Pooled> part;
    for (size_t i = 0; i < batch.size(); ++i) {
      part.push_back({stored(pooled[static_cast<int64_t>(i)], options.encode.dtype),
                      static_cast<uint32_t>(tokens.rows[i].num_live_tokens),
                      static_cast<uint32_t>(tokens.rows[i].num_lost_tokens)});
    }
    return part;
  };
  const auto take = [&](int64_t, int64_t, std::vector<Pooled> part) {
    std::ranges::move(part, std::back_inserter(out));
    progress.update(std::ssize(out), times.progress());
  };
  stage::encode_in_batches(std::ssize(jobs), batch_size, compute, take);
  return out;
}

/// Captions that go through a layer together.
struct Group {
  Tokens tokens;
  t5::Batch batch;
};

void encode_t5(std::span<const Job> jobs,
               std::vector<Pooled> pooled,
               T5Files files,
               const T5Plan& plan,
               stage::Precision precision,
               c10::Device device,
               const Options& options,
               stage::StageTimes& times,
               stage::StageTime& tokenize_time,
               stage::Sink& sink,
               Encoded& out) {
  stage::StageTime& t5_time = times.add("t5");
  const at::ScalarType type = torch_type(precision);
  const auto model = [&] {
    const stage::StageTime::Scope busy(t5_time);
    return plan.streams ? files.weights.load_outer(type, device) : files.weights.load(type, device);
  }();
  std::optional<t5::LayerStream> stream;
  if (plan.streams) stream.emplace(files.weights, type, device);
  const auto each_layer = [&](const auto& work) {
    if (stream) return stream->each(work);
    for (size_t i = 0; i < model.layers.size(); ++i) work(static_cast<int64_t>(i), model.layers[i]);
  };
  Progress progress("encoding with T5", "captions", std::ssize(jobs));
  const bool masked = options.pad_policy == PadPolicy::kMasked;
  const int64_t together = masked ? kMaskedCaptions : 1;
  t5::Scratch scratch;
  const auto compute = [&](int64_t begin, int64_t count) {
    std::vector<Group> groups;
    for (int64_t first = begin; first < begin + count; first += together) {
      sink.stop_if_asked();
      const auto captions =
          jobs.subspan(static_cast<size_t>(first),
                       static_cast<size_t>(std::min(together, begin + count - first)));
      Group group;
      {
        const stage::StageTime::Scope busy(tokenize_time);
        group.tokens = tokenize(files.tokenizer, captions, options.t5_length_tokens);
      }
      const stage::StageTime::Scope busy(t5_time);
      group.batch = model.begin(group.tokens.ids, masked ? group.tokens.live : at::Tensor());
      groups.push_back(std::move(group));
    }
    const stage::StageTime::Scope busy(t5_time);
    each_layer([&](int64_t layer, const t5::Layer& weights) {
      for (size_t i = 0; i < groups.size(); ++i) {
        sink.stop_if_asked();
        model.run_layer(weights, groups[i].batch, scratch);
        // how far the pass is, as captions
        const double part = (static_cast<double>(layer) +
                             static_cast<double>(i + 1) / static_cast<double>(groups.size())) /
                            static_cast<double>(model.config.num_layers);
        progress.update(begin + static_cast<int64_t>(part * static_cast<double>(count)),
                        times.progress());
      }
    });
    return groups;
  };
  const auto take = [&](int64_t begin, int64_t, std::vector<Group> groups) {
    auto place = static_cast<size_t>(begin);
    for (Group& group : groups) {
      const at::Tensor rows = [&] {
        const stage::StageTime::Scope busy(t5_time);
        return model.finish(std::exchange(group.batch, {}));
      }();
      for (size_t i = 0; i < group.tokens.rows.size(); ++i, ++place) {
        const Job& job = jobs[place];
        Pooled& clip = pooled[place];
        auto prompt = stored(rows[static_cast<int64_t>(i)], options.encode.dtype);  // [L, X]
        if (!prompt || !clip.bytes) {
          out.failures.push_back(
              {info_of(job),
               fmt::format("its {} embedding is not finite", prompt ? "CLIP" : "T5")});
          continue;
        }
        cache::SampleInfo info = info_of(job);
        info.t5_tokens = static_cast<uint32_t>(group.tokens.rows[i].num_live_tokens);
        info.t5_lost = static_cast<uint32_t>(group.tokens.rows[i].num_lost_tokens);
        info.clip_tokens = clip.num_tokens;
        info.clip_lost = clip.num_lost;
        sink.add({std::move(info), {std::move(*prompt), std::move(*clip.bytes)}});
        ++out.num_samples;
      }
    }
    progress.update(static_cast<int64_t>(place), times.progress());
  };
  int64_t captions = plan.captions;
  stage::encode_in_batches(std::ssize(jobs), captions, compute, take);
  sink.flush();
}

}  // namespace

at::ScalarType torch_type(stage::Precision precision) {
  return precision == stage::Precision::kF32 ? at::kFloat : at::kBFloat16;
}

cache::SampleInfo info_of(const Job& job) {
  cache::SampleInfo info;
  info.key = job.key;
  info.source_sha256 = sha256(job.caption);
  info.text = job.caption;
  return info;
}

Encoded encode_captions(std::span<const Job> jobs,
                        ClipFiles clip,
                        T5Files t5,
                        const T5Plan& plan,
                        stage::Precision precision,
                        c10::Device device,
                        const Options& options,
                        stage::StageTimes& times,
                        stage::Sink& sink) {
  Encoded out;
  stage::StageTime& tokenize_time = times.add("tokenize");
  auto pooled = with_memory("CLIP", [&] {
    return encode_clip(
        jobs, std::move(clip), precision, device, options, times, tokenize_time, sink);
  });
  with_memory("T5", [&] {
    encode_t5(jobs,
              std::move(pooled),
              std::move(t5),
              plan,
              precision,
              device,
              options,
              times,
              tokenize_time,
              sink,
              out);
  });
  return out;
}

std::vector<CaptionTokens> count_tokens(std::span<const std::string> captions,
                                        const ClipFiles& clip,
                                        const T5Files& t5) {
  std::vector<CaptionTokens> out;
  for (const std::string& caption : captions) {
    out.push_back(
        {std::ssize(t5.tokenizer.encode(caption)), std::ssize(clip.tokenizer.encode(caption))});
  }
  return out;
}

nlohmann::json truncation_json(std::span<const std::string> captions,
                               std::span<const CaptionTokens> tokens) {
  constexpr size_t kNumWorst = 10, kShownBytes = 200;
  const auto lost = [](int64_t count, int64_t limit) {
    return std::max<int64_t>(count - limit, 0);
  };
  nlohmann::json out = nlohmann::json::object();
  for (const auto& [name, count, limit] : {std::tuple{"clip_77", &CaptionTokens::clip, int64_t{77}},
                                           {"t5_256", &CaptionTokens::t5, int64_t{256}},
                                           {"t5_512", &CaptionTokens::t5, int64_t{512}}}) {
    int64_t too_long = 0, used_tokens = 0, lost_tokens = 0;
    for (const CaptionTokens& caption : tokens) {
      too_long += caption.*count > limit;
      used_tokens += std::min(caption.*count, limit);
      lost_tokens += lost(caption.*count, limit);
    }
    out[name] = {
        {"captions", too_long}, {"tokens_used", used_tokens}, {"tokens_lost", lost_tokens}};
  }
  std::vector<size_t> worst;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i].clip > 77 || tokens[i].t5 > 256) worst.push_back(i);
  }
  std::ranges::stable_sort(worst, [&](size_t a, size_t b) {
    return std::pair(tokens[a].t5, tokens[a].clip) > std::pair(tokens[b].t5, tokens[b].clip);
  });
  worst.resize(std::min(worst.size(), kNumWorst));
  out["worst"] = nlohmann::json::array();
  for (const size_t i : worst) {
    out["worst"].push_back({{"caption", printable(shortened(captions[i], kShownBytes))},
                            {"t5_tokens", tokens[i].t5},
                            {"t5_lost_256", lost(tokens[i].t5, 256)},
                            {"t5_lost_512", lost(tokens[i].t5, 512)},
                            {"clip_tokens", tokens[i].clip},
                            {"clip_lost_77", lost(tokens[i].clip, 77)}});
  }
  return out;
}

void log_truncation(const nlohmann::json& truncation, int64_t t5_length) {
  const auto& t5 = truncation[t5_length == 256 ? "t5_256" : "t5_512"];
  const auto& clip = truncation["clip_77"];
  if (t5["captions"] > 0) {
    log::warn("{} cut off: {} at T5's {} tokens",
              stage::count_of(t5["tokens_lost"], "tokens"),
              stage::count_of(t5["captions"], "captions"),
              t5_length);
  }
  if (clip["captions"] > 0) {
    log::info("{} cut off: {} at CLIP's 77 tokens; T5 reads on",
              stage::count_of(clip["tokens_lost"], "tokens"),
              stage::count_of(clip["captions"], "captions"));
  }
  for (const auto& caption : truncation["worst"]) {
    const std::string lost = t5_length == 256 ? "t5_lost_256" : "t5_lost_512";
    log::info("cut off: T5 {} of {}, CLIP {} of {} tokens: {}",
              caption[lost].dump(),
              caption["t5_tokens"].dump(),
              caption["clip_lost_77"].dump(),
              caption["clip_tokens"].dump(),
              shortened(caption["caption"].get<std::string>(), 60));
  }
}

}  // namespace flux::text
