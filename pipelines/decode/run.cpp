#include "pipelines/decode/run.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "common/core/cancel.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/core/log.h"
#include "common/core/process.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/engine/record_file.h"
#include "common/models/vae/vae.h"
#include "common/tensor/device.h"
#include "common/tensor/memory_errors.h"
#include "common/tensor/weight_file.h"
#include "pipelines/decode/pages.h"
#include "pipelines/decode/sources.h"

namespace flux::decode {
namespace {

namespace fs = std::filesystem;

// Of a process beyond what it has before its first picture: code of kernels, threads, what the heap keeps. Measured
// (docs/benchmarks.md).
constexpr int64_t kProcessGrowth = int64_t{160} << 20;
// Of a GPU: context and modules; not measured, see docs/cuda.md.
constexpr int64_t kCudaContext = int64_t{500} << 20;

std::string size_text(int64_t bytes) { return show_bytes(static_cast<uint64_t>(bytes)); }

/// Where a picture goes, and whether it is there already.
struct Job {
  const Source* source = nullptr;
  fs::path file;
  bool there = false;
};

std::vector<Job> plan_jobs(const Options& o, const Sources& sources) {
  if (sources.of_cache && o.out.empty())
    throw UsageError("--out DIR is missing: no picture is written into a cache",
                     "give a folder for the pictures");
  std::vector<Job> jobs;
  std::map<fs::path, const Source*> names;
  for (const Source& source : sources.all) {
    Job job{
        &source,
        (o.out.empty() ? source.folder : o.out) / (source.name + "." + image::extension(o.format))};
    if (const auto [known, is_new] = names.try_emplace(job.file, &source); !is_new)
      throw UsageError(fmt::format("{} and {} would both be {}",
                                   show(known->second->file),
                                   show(source.file),
                                   show(job.file)),
                       "decode them into different folders");
    std::error_code error, other;
    const auto made = fs::last_write_time(job.file, error);
    const auto latents = fs::last_write_time(source.file, other);
    job.there = !o.overwrite && !error && !other && made > latents;
    jobs.push_back(std::move(job));
  }
  return jobs;
}

struct Budget {
  int64_t bytes = 0, fixed = 0;
  bool cuda = false;
};

Budget budget_of(const Options& o, at::Device device) {
  Budget b;
  b.cuda = device.is_cuda();
  b.fixed = b.cuda ? kCudaContext : static_cast<int64_t>(rss_bytes()) + kProcessGrowth;
  const int64_t free =
      b.cuda ? device_free_bytes(device) / 10 * 9
             : engine::available_memory_bytes() / 5 * 4 + static_cast<int64_t>(rss_bytes());
  b.bytes = o.memory > 0 ? o.memory : free;
  return b;
}

/// What of a picture may stay in memory. Throws ResourceError if the smallest setting does not fit.
int64_t picture_bytes(const Options& o,
                      const Budget& budget,
                      const vae::Decoder& decoder,
                      const Source& source) {
  const vae::DecodeNeeds needs = decoder.needs(source.height, source.width);
  const int64_t base = budget.fixed + needs.weights;
  // a GPU computes whole pictures
  const int64_t least = base + (budget.cuda ? std::max(needs.mid, needs.strips + needs.pictures)
                                            : std::max(needs.mid, needs.strips));
  if (least > budget.bytes)
    throw ResourceError(
        fmt::format("a picture of {}x{} takes {}, --memory may take {}",
                    source.width * 8,
                    source.height * 8,
                    size_text(least),
                    size_text(budget.bytes)),
        budget.cuda ? "use --device cpu, which needs less at a time, or --precision bf16"
        : o.precision == Precision::kF32 ? "give more --memory, or use --precision bf16"
                                         : "give more --memory");
  return budget.bytes - base - needs.strips;
}

image::Rgb to_rgb(const at::Tensor& pixels) {
  const c10::InferenceMode no_grad;
  image::Rgb out;
  out.size = {pixels.size(3), pixels.size(2)};
  out.data.resize(static_cast<size_t>(3 * out.size.width * out.size.height));
  // rows at a time: a large picture's floats are there once already
  constexpr int64_t kRows = 64;
  for (int64_t row = 0; row < out.size.height; row += kRows) {
    const int64_t count = std::min(kRows, out.size.height - row);
    const at::Tensor bytes = pixels[0]
                                 .narrow(1, row, count)
                                 .add(1)
                                 .mul_(127.5)
                                 .round_()
                                 .clamp_(0, 255)
                                 .to(at::kCPU, at::kByte)
                                 .permute({1, 2, 0})
                                 .contiguous();
    std::copy_n(bytes.const_data_ptr<uint8_t>(),
                bytes.numel(),
                out.data.begin() + row * out.size.width * 3);
  }
  return out;
}

vae::Decoder load_decoder(const Options& o, at::Device device) {
  const NetTensors net = take_net(read_weights(o.ae), NetKind::kAutoEncoder);
  const TensorMap canonical = vae::canonical(net);
  return vae::Decoder::load(vae::decoder_half(canonical, net.path),
                            vae::Config::from_weights(canonical, net.path),
                            o.precision == Precision::kF32 ? at::kFloat : at::kBFloat16,
                            device);
}

void write_sheet(const Options& o, const std::vector<Thumb>& thumbs) {
  std::string rows;
  for (const Thumb& thumb : thumbs) rows += thumb.name + ": " + thumb.prompt + "\n";
  const auto bytes = image::encode(contact_sheet(thumbs, o.columns, o.cell),
                                   {.format = format_of(o.sheet, "--sheet"),
                                    .quality = static_cast<int>(o.quality.value_or(95)),
                                    // a JPEG's EXIF holds 64 KiB
                                    .texts = {{"parameters", shortened(rows, 30'000)}}});
  if (o.sheet.has_parent_path()) make_folder(o.sheet.parent_path());
  write_file_atomic(o.sheet, {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
}

Report run_in_memory(const Options& o) {
  const at::Device device = resolve_device(o.device);
  log::info("version {} device={} command: {}", tool_version(), device.str(), o.command_line);
  const Sources sources = find_sources(o);
  const std::vector<Job> jobs = plan_jobs(o, sources);
  Report report;
  report.out = o.out;
  const bool any = std::ranges::any_of(jobs, [](const Job& job) { return !job.there; });
  std::optional<vae::Decoder> decoder;
  Budget budget = budget_of(o, device);
  if (any) {
    decoder = load_decoder(o, device);
    for (const Job& job : jobs)
      if (!job.there) picture_bytes(o, budget, *decoder, *job.source);
  }
  const bool wants_thumbs = !o.sheet.empty() || !sources.run_folders.empty();
  constexpr int64_t kReportCell = 256;
  std::vector<Thumb> thumbs;
  Progress progress("decoding", "pictures", std::ssize(jobs));
  for (const Job& job : jobs) {
    if (cancel::requested()) break;
    const Source& source = *job.source;
    image::Rgb picture;
    if (job.there) {
      ++report.kept;
      if (wants_thumbs) picture = image::decode(as_bytes(read_file(job.file)));
    } else {
      const fs::path folder =
          !o.scratch.empty() ? o.scratch : (o.out.empty() ? source.folder : o.out);
      make_folder(job.file.parent_path());
      vae::DecodeStats stats;
      const at::Tensor pixels =
          decoder->decode(source.raw(),
                          {.picture_bytes = picture_bytes(o, budget, *decoder, source),
                           .scratch = folder,
                           .stats = &stats});
      report.scratch_bytes = std::max(report.scratch_bytes, stats.scratch_bytes);
      picture = to_rgb(pixels);
      const auto bytes = image::encode(
          picture,
          {.format = o.format,
           .quality = static_cast<int>(o.quality.value_or(95)),
           .texts = {{"parameters", source.parameters}, {"flux-stages", source.json}}});
      write_file_atomic(job.file, {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
      ++report.decoded;
    }
    if (wants_thumbs)
      thumbs.push_back({thumbnail(picture, o.sheet.empty() ? kReportCell : o.cell),
                        source.prompt_number,
                        source.prompt,
                        source.step,
                        job.file.filename().native()});
    progress.update(report.decoded + report.kept);
  }
  if (!o.sheet.empty() && !thumbs.empty()) {
    write_sheet(o, thumbs);
    report.sheet = o.sheet;
  }
  for (const fs::path& run : sources.run_folders) write_run_pictures(run, thumbs);
  if (const auto signal = cancel::requested()) report.exit_code = *signal;
  report.seconds = process_seconds();
  report.peak_rss_bytes = peak_rss_bytes();
  if (report.scratch_bytes > 0)
    log::info("{} of activations went through scratch files", size_text(report.scratch_bytes));
  return report;
}

}  // namespace

std::string Report::line() const {
  return fmt::format("decoded={} kept={} seconds={:.1f} peak_rss={}{}{}",
                     decoded,
                     kept,
                     seconds,
                     show_bytes(peak_rss_bytes),
                     out.empty() ? "" : " out=" + show(out),
                     sheet.empty() ? "" : " sheet=" + show(sheet));
}

nlohmann::json Report::object() const {
  return {{"decoded", decoded},
          {"kept", kept},
          {"scratch_bytes", scratch_bytes},
          {"seconds", seconds},
          {"peak_rss_bytes", peak_rss_bytes},
          {"out", printable(out.native())},
          {"sheet", printable(sheet.native())}};
}

Report run(const Options& options) {
  use_huge_pages();
  return with_memory_errors("out of memory to decode a picture",
                            "give a smaller --memory, so that less stays there",
                            [&] { return run_in_memory(options); });
}

}  // namespace flux::decode
