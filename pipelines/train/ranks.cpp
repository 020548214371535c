#include "pipelines/train/ranks.h"

#include <ATen/ops/full.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <span>
#include <vector>

#include "common/core/cancel.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/core/version.h"

namespace flux::train {
namespace {

/// Beside the run's folder, which only rank 0 makes.
std::filesystem::path address_file(const Options& options) {
  const auto out = std::filesystem::absolute(options.out).lexically_normal();
  const auto name = out.filename().empty() ? out.parent_path().filename() : out.filename();
  const auto parent = out.filename().empty() ? out.parent_path().parent_path() : out.parent_path();
  return parent / fmt::format(".{}.ranks", name.native());
}

/// Of pieces of every block, so that a file of 24 GB takes no time.
std::string model_digest(const engine::ModelFile& file) {
  constexpr int64_t kPieces = 16, kBytes = 4096;
  Xxh3 hash;
  std::vector<std::byte> piece(kBytes);
  for (int64_t block = 0; block < file.num_records(); ++block) {
    const int64_t size = file.record_bytes(block), bytes = std::min(size, kBytes);
    for (int64_t i = 0; i < kPieces; ++i) {
      const std::span<std::byte> to(piece.data(), static_cast<size_t>(bytes));
      file.read(block, (size - bytes) / kPieces * i, to);
      hash.add(to);
    }
  }
  return fmt::format("{:016x}", hash.digest());
}

/// What must be equal, by a name that says where to look.
nlohmann::json identity(const Session& session) {
  nlohmann::json out = deciding_options(session.options);
  out["program"] = fmt::format("{} {}", tool_version(), commit());
  out["precision"] = precision_word(session.compute);
  out["exact-reduction"] = session.options.exact_reduction;
  out["max-steps"] = session.options.max_steps;
  out["latents cache"] = session.data->latents_digest();
  out["text cache"] = session.data->text_digest();
  out["model"] = session.config.describe() + ", " + model_digest(*session.file);
  out["step to go on from"] = session.step;
  return out;
}

}  // namespace

std::unique_ptr<dist::Group> join_ranks(const Options& options) {
  if (!options.launch.several()) return nullptr;
  const auto address = address_file(options);
  if (options.launch.host.empty() && options.launch.rank == 0) make_folder(address.parent_path());
  auto group = dist::Group::join(options.launch,
                                 address,
                                 {.start = std::chrono::seconds(options.dist_start_timeout),
                                  .silence = std::chrono::seconds(options.dist_timeout),
                                  // rank 0 saves, validates and samples while the others wait
                                  .operation = std::chrono::hours(24)});
  if (options.launch.rank != 0)
    log::start(fmt::format("flux-train[{}]", options.launch.rank), log::Level::kWarn);
  return group;
}

void require_same_ranks(const Session& session) {
  dist::Group* const group = session.group;
  if (!group) return;
  const nlohmann::json mine = identity(session);
  std::string verdict;
  const auto all = group->gather("identity", mine.dump());
  for (size_t rank = 1; rank < all.size() && verdict.empty(); ++rank) {
    const auto its = nlohmann::json::parse(all[rank]);
    for (const auto& [name, value] : mine.items())
      if (its.value(name, nlohmann::json()) != value) {
        verdict = fmt::format("rank {} has another {}: {}, rank 0 has {}",
                              rank,
                              name,
                              its.value(name, nlohmann::json()).dump(),
                              value.dump());
        break;
      }
  }
  verdict = group->share("identity verdict", verdict);
  if (!verdict.empty())
    throw UsageError(verdict, "start every rank with the same program, options, caches and model");
}

std::optional<ExitCode> agreed_stop(const Session& session) {
  const auto mine = cancel::requested();
  if (!session.group) return mine;
  const at::Tensor codes = at::full({session.group->world()}, 0, at::kLong);
  const at::Tensor own = at::full({1}, mine ? static_cast<int64_t>(*mine) : 0, at::kLong);
  session.group->all_gather(codes, own);
  const auto code = codes.max().item<int64_t>();
  return code > 0 ? std::optional(static_cast<ExitCode>(code)) : std::nullopt;
}

}  // namespace flux::train
