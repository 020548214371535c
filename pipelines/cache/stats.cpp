#include "pipelines/cache/stats.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <exception>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>
#include <tuple>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/ordered.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "pipelines/cache/decode.h"

namespace flux::cache {
namespace {

using Json = nlohmann::json;
using Samples = std::vector<const ListedSample*>;

constexpr size_t kSamplesAtOnce = 8;
constexpr double kMinSeconds = 0.3, kMaxSeconds = 5;  // of a measurement of throughput

// Sums around the first value, which keeps digits where the mean is far from 0.
struct Sums {
  double first = 0, sum = 0, squares = 0;
  float min = INFINITY, max = -INFINITY;
  int64_t count = 0, num_nan = 0, num_inf = 0;

  void add(float value) {
    if (!std::isfinite(value)) {
      ++(std::isnan(value) ? num_nan : num_inf);
      return;
    }
    const auto number = static_cast<double>(value);
    if (count++ == 0) first = number;
    const double distance = number - first;
    sum += distance, squares += distance * distance;
    min = std::min(min, value), max = std::max(max, value);
  }

  Moments moments() const {
    Moments out{.count = count, .num_nan = num_nan, .num_inf = num_inf};
    if (count == 0) return out;
    const auto n = static_cast<double>(count);
    out.mean = first + sum / n;
    out.squares = std::max(0.0, squares - sum * sum / n);
    out.min = static_cast<double>(min), out.max = static_cast<double>(max);
    return out;
  }
};

// What one thread adds up for a tensor.
struct Part {
  std::string name;
  std::vector<Sums> channels;
};
using Parts = std::vector<Part>;

std::vector<Sums>& part_of(Parts& parts, const std::string& name, size_t num_channels) {
  for (auto& part : parts) {
    if (part.name == name && part.channels.size() == num_channels) return part.channels;
  }
  return parts.emplace_back(name, std::vector<Sums>(num_channels)).channels;
}

void add_planes(Parts& parts, const NamedTensor& tensor) {
  const auto values = as_floats(tensor);
  const size_t num_channels =
      tensor.shape.size() == 3 ? static_cast<size_t>(tensor.shape[0]) : size_t{1};
  auto& channels = part_of(parts, tensor.name, num_channels);
  const size_t plane = values.size() / num_channels;
  for (size_t i = 0; i < values.size(); ++i) channels[i / plane].add(values[i]);
}

void add_rows(Parts& parts,
              const std::string& name,
              std::span<const float> values,
              size_t num_channels) {
  auto& channels = part_of(parts, name, num_channels);
  for (size_t row = 0; row < values.size(); row += num_channels) {
    for (size_t c = 0; c < num_channels; ++c) channels[c].add(values[row + c]);
  }
}

Parts add_up(Segments& segments, std::span<const ListedSample* const> samples) {
  Parts parts;
  for (const ListedSample* sample : samples) {
    cancel::check();
    for (const auto& tensor : decode(segments, *sample)) {
      const auto width = static_cast<size_t>(tensor.shape.back());
      if (tensor.name == "t5") {
        const auto values = as_floats(tensor);
        const auto rows = std::span(values);
        const size_t live = std::min<size_t>(sample->info.t5_tokens * width, rows.size());
        add_rows(parts, "t5_live", rows.first(live), width);
        add_rows(parts, "t5_rest", rows.subspan(live), width);
      } else if (tensor.name == "clip") {
        add_rows(parts, "clip", as_floats(tensor), width);
      } else {
        add_planes(parts, tensor);
      }
    }
  }
  return parts;
}

// In the order of files, so that each is read once.
Samples in_file_order(const Contents& contents) {
  Samples out;
  for (const auto& sample : contents.samples) out.push_back(&sample);
  std::ranges::sort(out, {}, [](const ListedSample* s) { return std::tie(s->file, s->row); });
  return out;
}

void merge(std::vector<TensorStats>& all, const Parts& parts, const Contents& contents) {
  for (const auto& part : parts) {
    auto found = std::ranges::find(all, part.name, &TensorStats::name);
    if (found == all.end()) {
      all.push_back({part.name, std::vector<Moments>(part.channels.size())});
      found = std::prev(all.end());
    }
    if (found->channels.size() != part.channels.size()) {
      throw CacheError(fmt::format("{}: some samples have {} channels of {}, others {}",
                                   show(contents.folder),
                                   found->channels.size(),
                                   part.name,
                                   part.channels.size()),
                       "run the caching tool again: the cache is not complete");
    }
    for (size_t c = 0; c < part.channels.size(); ++c)
      found->channels[c].merge(part.channels[c].moments());
  }
}

Throughput measure(const Contents& contents, const Samples& samples, int num_threads) {
  using Clock = std::chrono::steady_clock;
  Segments segments(contents.folder);
  std::atomic<int64_t> next = 0, read = 0, bytes = 0;
  std::exception_ptr failure;
  std::mutex lock;
  const auto start = Clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  const auto work = [&] {
    try {
      for (;;) {
        const auto i = static_cast<size_t>(next++);
        const double passed = seconds();
        if (passed > kMaxSeconds || (i >= samples.size() && passed > kMinSeconds)) return;
        cancel::check();
        const ListedSample& sample = *samples[i % samples.size()];
        for (const auto& tensor : segments.of(sample)->read(sample.row))
          bytes += static_cast<int64_t>(tensor.size());
        ++read;
      }
    } catch (...) {
      const std::lock_guard guard(lock);
      failure = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < num_threads; ++t) threads.emplace_back(work);
  }
  const double passed = seconds();
  if (failure) std::rethrow_exception(failure);
  return {num_threads,
          static_cast<double>(read.load()) / passed,
          static_cast<double>(bytes.load()) / 1e6 / passed};
}

Json moments_json(const Moments& m) {
  const auto known = [&](double value) { return m.count ? Json(value) : Json(); };
  return {{"count", m.count},
          {"mean", known(m.mean)},
          {"std", known(m.deviation())},
          {"min", known(m.min)},
          {"max", known(m.max)},
          {"num_nan", m.num_nan},
          {"num_inf", m.num_inf}};
}

void append(std::string& out, const std::string& name, const Moments& m) {
  out += fmt::format("{:<12} {:>12.6g} {:>12.6g} {:>12.6g} {:>12.6g} {:>8} {:>8}\n",
                     name,
                     m.mean,
                     m.deviation(),
                     m.min,
                     m.max,
                     m.num_nan,
                     m.num_inf);
}

}  // namespace

void add_flags(StatsOptions& options, Tool& tool) {
  tool.about(
      "Says what the values of a cache look like, a channel a line, and how fast they are read. "
      "Changes nothing.",
      "flux-cache stats cache/latents");
  tool.arguments(options.folders, "DIR", "cache folder; one that is not complete, too");
}

void check(const StatsOptions& options) {
  require_one_folder(options.folders, "flux-cache stats cache/latents");
}

double Moments::deviation() const {
  return count ? std::sqrt(squares / static_cast<double>(count)) : 0;
}

void Moments::merge(const Moments& other) {
  num_nan += other.num_nan, num_inf += other.num_inf;
  if (other.count == 0) return;
  if (count == 0) {
    min = other.min, max = other.max;
  } else {
    min = std::min(min, other.min), max = std::max(max, other.max);
  }
  const auto a = static_cast<double>(count), b = static_cast<double>(other.count);
  const double distance = other.mean - mean;
  squares += other.squares + distance * distance * (a * b / (a + b));
  mean += distance * (b / (a + b));
  count += other.count;
}

Moments TensorStats::all() const {
  Moments out;
  for (const auto& channel : channels) out.merge(channel);
  return out;
}

Stats stats(const Contents& contents) {
  require_readable(contents);
  Stats out;
  out.folder = contents.folder;
  out.kind = *contents.kind;
  out.num_samples = static_cast<int64_t>(contents.samples.size());
  const Samples samples = in_file_order(contents);
  if (samples.empty()) return out;
  const int num_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  {
    const auto num_parts =
        static_cast<int64_t>((samples.size() + kSamplesAtOnce - 1) / kSamplesAtOnce);
    Segments segments(contents.folder);
    Progress progress("stats", "samples", out.num_samples);
    Ordered<Parts> parts(num_parts, num_threads, 2 * num_threads, [&](int64_t i) {
      const auto begin = static_cast<size_t>(i) * kSamplesAtOnce;
      return add_up(
          segments,
          std::span(samples).subspan(begin, std::min(kSamplesAtOnce, samples.size() - begin)));
    });
    for (int64_t i = 0; i < num_parts; ++i) {
      merge(out.tensors, parts.take(), contents);
      progress.update(std::min(out.num_samples, (i + 1) * static_cast<int64_t>(kSamplesAtOnce)));
    }
  }
  const auto rest = std::ranges::find(out.tensors, "t5_rest", &TensorStats::name);
  if (rest != out.tensors.end()) {  // all rows are those of tokens and the rest
    const auto live = std::ranges::find(out.tensors, "t5_live", &TensorStats::name);
    rest->name = "t5_all";
    for (size_t c = 0; c < rest->channels.size(); ++c) {
      Moments both = live->channels[c];
      both.merge(rest->channels[c]);
      rest->channels[c] = both;
    }
  }
  out.throughput.push_back(measure(contents, samples, 1));
  out.throughput.push_back(measure(contents, samples, num_threads));
  return out;
}

Json stats_json(const Stats& s) {
  Json out{{"folder", printable(s.folder.native())},
           {"kind", kind_name(s.kind)},
           {"num_samples", s.num_samples},
           {"tensors", Json::object()},
           {"throughput", Json::array()}};
  for (const auto& tensor : s.tensors) {
    Json channels = Json::array();
    for (const auto& channel : tensor.channels) channels.push_back(moments_json(channel));
    out["tensors"][tensor.name] = {{"all", moments_json(tensor.all())}, {"channels", channels}};
  }
  for (const auto& t : s.throughput) {
    out["throughput"].push_back(
        {{"threads", t.threads}, {"samples_per_s", t.samples_per_s}, {"mb_per_s", t.mb_per_s}});
  }
  return out;
}

std::string stats_text(const Stats& s) {
  std::string out = fmt::format(
      "{}: {}, {}\n", show(s.folder), counted(s.num_samples, "sample"), kind_name(s.kind));
  if (!s.tensors.empty()) {
    out += fmt::format("{:<12} {:>12} {:>12} {:>12} {:>12} {:>8} {:>8}\n",
                       "channel",
                       "mean",
                       "std",
                       "min",
                       "max",
                       "NaN",
                       "infinite");
  }
  for (const auto& tensor : s.tensors) {
    for (size_t c = 0;
         s.kind == Kind::kLatents && tensor.channels.size() > 1 && c < tensor.channels.size();
         ++c) {
      append(out, fmt::format("{} {}", tensor.name, c), tensor.channels[c]);
    }
    append(out, tensor.name, tensor.all());
  }
  for (const auto& t : s.throughput) {
    out += fmt::format("read with {} thread{}: {:.1f} samples/s, {:.1f} MB/s decoded\n",
                       t.threads,
                       t.threads == 1 ? "" : "s",
                       t.samples_per_s,
                       t.mb_per_s);
  }
  out.pop_back();
  return out;
}

}  // namespace flux::cache
