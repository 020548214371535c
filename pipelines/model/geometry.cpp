#include "pipelines/model/geometry.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <nlohmann/json.hpp>
#include <span>
#include <stdexcept>
#include <thread>

#include "common/core/cancel.h"
#include "common/core/disk.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/ordered.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/models/flux/names.h"
#include "common/models/t5/t5.h"
#include "common/models/weights/weights.h"
#include "formats/safetensors/writer.h"
#include "formats/safetensors/set_writer.h"
#include "pipelines/model/random_streams.h"
#include "pipelines/model/random_values.h"

namespace flux::model {
namespace fs = std::filesystem;
namespace {

constexpr const char* kMadeHere = "flux_stages.random";
constexpr const char* kWords[] = {"dev", "schnell", "t5-xxl"};
// 2 MiB: small beside what a process needs anyway, large beside a system call
constexpr int64_t kPieceValues = 1 << 20;

/// A part of one tensor.
struct Piece {
  size_t tensor = 0;
  int64_t first = 0, n = 0;
};

int64_t num_values(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t length : shape) n *= length;
  return n;
}

}  // namespace

Geometry parse_geometry(const std::string& word) {
  for (const Geometry geometry : {Geometry::kDev, Geometry::kSchnell, Geometry::kT5Xxl})
    if (word == kWords[static_cast<size_t>(geometry)]) return geometry;
  throw UsageError("'" + printable(word) + "' is not one of dev|schnell|t5-xxl");
}

Depth parse_depth(const std::string& text, Geometry geometry) {
  const bool t5 = geometry == Geometry::kT5Xxl;
  const auto parts = split(text, ',');
  std::vector<int64_t> numbers;
  for (const std::string& part : parts) {
    if (part.empty() || part.size() > 3 ||
        part.find_first_not_of("0123456789") != std::string::npos || std::stoll(part) == 0)
      break;
    numbers.push_back(std::stoll(part));
  }
  if (numbers.size() != parts.size() || numbers.size() != (t5 ? 1u : 2u)) {
    throw UsageError(
        fmt::format("--depth: '{}' is not {}",
                    printable(text),
                    t5 ? "a number of layers from 1 to 999"
                       : "two numbers of blocks from 1 to 999, double and single: 19,38"));
  }
  return {numbers[0], t5 ? 0 : numbers[1]};
}

int64_t write_random_net(
    const fs::path& path,
    std::string_view net,
    uint64_t seed,
    const std::map<std::string, std::vector<int64_t>>& shapes,
    const std::function<Scale(std::string_view, const std::vector<int64_t>&)>& scale_of,
    const std::map<std::string, std::string>& metadata) {
  std::vector<safetensors::TensorSpec> specs;
  for (const auto& [name, shape] : shapes) specs.push_back({name, DType::kBF16, shape});
  uint64_t bytes = safetensors::header_bytes(specs, metadata).size();
  for (const auto& spec : specs) bytes += safetensors::tensor_bytes(spec.dtype, spec.shape);
  require_free_space(path.parent_path(), bytes);
  make_folder(path.parent_path());

  safetensors::Writer writer(path, std::move(specs), metadata);
  const auto& order = writer.order();
  std::vector<Piece> pieces;
  std::vector<uint64_t> keys;
  for (size_t t = 0; t < order.size(); ++t) {
    const int64_t n = num_values(order[t].shape);
    if (n > int64_t{1} << 32) throw std::invalid_argument(order[t].name + " is too large");
    const RandomStream stream = stream_of(seed, net, order[t].name);
    keys.push_back(uint64_t{stream.bits(0)} << 32 | stream.bits(1));
    for (int64_t first = 0; first < n; first += kPieceValues)
      pieces.push_back({t, first, std::min(kPieceValues, n - first)});
  }
  const int threads = std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, 8);
  Ordered<std::vector<uint16_t>> made(
      static_cast<int64_t>(pieces.size()), threads, 2 * threads, [&](int64_t index) {
        const Piece& piece = pieces[static_cast<size_t>(index)];
        const auto& spec = order[piece.tensor];
        const Scale scale = scale_of(spec.name, spec.shape);
        std::vector<uint16_t> values(static_cast<size_t>(piece.n));
        fill_random(keys[piece.tensor],
                    static_cast<uint64_t>(piece.first),
                    static_cast<float>(scale.mean),
                    static_cast<float>(scale.deviation),
                    piece.n,
                    values.data());
        return values;
      });
  constexpr uint64_t kUnit = 1000000;
  Progress progress(path.filename().native(), "MB", static_cast<int64_t>(bytes / kUnit));
  uint64_t done = 0;
  for (const Piece& piece : pieces) {
    cancel::check();
    const std::vector<uint16_t> values = made.take();
    writer.write(order[piece.tensor].name, std::as_bytes(std::span(values)));
    done += values.size() * sizeof values[0];
    progress.update(static_cast<int64_t>(done / kUnit));
  }
  writer.commit();
  return static_cast<int64_t>(bytes);
}

GeometryReport write_geometry(const GeometryOptions& options) {
  const bool t5 = options.geometry == Geometry::kT5Xxl;
  std::map<std::string, std::vector<int64_t>> shapes;
  std::string depth;
  if (t5) {
    t5::Config config;
    if (options.depth) config.num_layers = options.depth->first;
    shapes = t5::tensor_shapes(config);
    depth = fmt::format("{}", config.num_layers);
  } else {
    dit::Config config;
    config.guidance = options.geometry == Geometry::kDev;
    if (options.depth) {
      config.num_double_blocks = options.depth->first;
      config.num_single_blocks = options.depth->second;
    }
    for (const auto& [name, shape] : dit::tensor_shapes(config)) shapes.emplace(name, shape);
    depth = fmt::format("{},{}", config.num_double_blocks, config.num_single_blocks);
  }
  GeometryReport report;
  report.file = options.out / (t5 ? "t5.safetensors" : "flux.safetensors");
  safetensors::require_replaceable(report.file, kMadeHere, "--geometry");
  auto metadata = safetensors::pt_metadata();
  metadata[kMadeHere] = fmt::format("--geometry {} --depth {} --seed {}",
                                    kWords[static_cast<size_t>(options.geometry)],
                                    depth,
                                    options.seed);
  const auto start = std::chrono::steady_clock::now();
  report.bytes = write_random_net(
      report.file, t5 ? "t5" : "flux", options.seed, shapes, t5 ? t5_scale : flux_scale, metadata);
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  for (const auto& [name, shape] : shapes) report.parameters += num_values(shape);
  return report;
}

std::string GeometryReport::line() const {
  return fmt::format(
      "wrote {} parameters={} bytes={} seconds={:.1f} rate={}/s",
      show(file),
      parameters,
      bytes,
      seconds,
      show_bytes(static_cast<uint64_t>(static_cast<double>(bytes) / std::max(seconds, 1e-3))));
}

nlohmann::json GeometryReport::json() const {
  return {{"file", printable(file.native())},
          {"parameters", parameters},
          {"bytes", bytes},
          {"seconds", seconds}};
}

}  // namespace flux::model
