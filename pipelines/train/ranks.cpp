#include "pipelines/train/ranks.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <exception>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <span>
#include <system_error>
#include <vector>

#include "common/core/cancel.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/core/version.h"
#include "common/models/flux/layout.h"
#include "pipelines/train/validate.h"

namespace flux::train {
namespace {

/// Beside the run's folder, which only rank 0 makes, if none is given.
std::filesystem::path address_file(const Options& options) {
  if (!options.launch.file.empty()) return std::filesystem::absolute(options.launch.file);
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
  out["device"] = session.device.is_cuda() ? "cuda" : "cpu";
  out["precision"] = precision_word(session.compute);
  out["exact-reduction"] = session.options.exact_reduction;
  out["dist-shard"] = session.options.shard_world();
  out["max-steps"] = session.options.max_steps;
  out["latents cache"] = session.data->latents_digest();
  out["text cache"] = session.data->text_digest();
  out["model"] = session.config.describe() + ", " + model_digest(*session.file);
  out["step to go on from"] = session.step;
  // what all do together, beside steps
  const Options& o = session.options;
  out["resume"] = o.resume;
  out["model-layout"] = o.model_layout == dit::ModelLayout::kBfl ? "bfl" : "diffusers";
  out["validation-samples"] = validates(session) ? session.data->num_held_out() : 0;
  out["validation-sigmas"] = o.effective_validation_sigmas();
  out["sample-every"] = o.sample_every;
  out["sample-count"] = o.sample_count;
  out["sample-steps"] = o.sample_steps.value_or(0);
  out["sample-seed"] = o.sample_seed;
  out["sample-size"] = {o.sample_width, o.sample_height};
  out["sample-guidance"] = o.sample_guidance.value_or(0);
  Xxh3 prompts;
  if (session.prompts)
    for (const Prompt& prompt : session.prompts->all()) prompts.add(as_bytes(prompt.text + '\n'));
  out["sampled prompts"] = fmt::format("{:016x}", prompts.digest());
  return out;
}

/// As many bytes of every rank, one behind the other.
std::string gather_equal(const Session& session, std::string mine) {
  // views of memory of ours: what the engine counts and plans are tensors
  const auto view = [](std::string& bytes) {
    return at::from_blob(bytes.data(), {static_cast<int64_t>(bytes.size())}, at::kByte);
  };
  std::string all(mine.size() * static_cast<size_t>(session.group->world()), '\0');
  session.group->all_gather(view(all), view(mine));
  return all;
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
                                  // rank 0 alone saves a LoRA, and reads what all have saved
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

bool shares_weights(const Session& session) { return session.trainer->options().ranks.sharded(); }

std::vector<std::string> gather_bytes(const Session& session, std::string_view mine) {
  if (!session.group) return {std::string(mine)};
  const auto sizes = gather_numbers(session, {static_cast<int64_t>(mine.size())});
  const auto largest = static_cast<size_t>((*std::ranges::max_element(sizes))[0]);
  if (largest == 0) return std::vector<std::string>(sizes.size());
  std::string own(mine);
  own.resize(largest);
  const std::string all = gather_equal(session, own);
  std::vector<std::string> out;
  for (size_t rank = 0; rank < sizes.size(); ++rank)
    out.push_back(all.substr(rank * largest, static_cast<size_t>(sizes[rank][0])));
  return out;
}

std::vector<std::vector<int64_t>> gather_numbers(const Session& session,
                                                 const std::vector<int64_t>& mine) {
  if (!session.group) return {mine};
  const size_t bytes = mine.size() * sizeof(int64_t);
  const std::string all =
      gather_equal(session, {reinterpret_cast<const char*>(mine.data()), bytes});
  std::vector<std::vector<int64_t>> out(all.size() / bytes, mine);
  for (size_t rank = 0; rank < out.size(); ++rank)
    std::memcpy(out[rank].data(), all.data() + rank * bytes, bytes);
  return out;
}

void together(const Session& session, const std::function<void()>& work) {
  std::exception_ptr failure;
  std::string why;
  try {
    work();
  } catch (const std::exception& error) {
    if (!session.group) throw;
    failure = std::current_exception();
    why = fmt::format(
        "rank {} of {}: {}", session.group->rank(), session.group->world(), error.what());
  }
  const auto all = gather_bytes(session, why);
  if (failure) std::rethrow_exception(failure);
  for (const std::string& its : all)
    if (!its.empty()) throw ResourceError(its);
}

void require_common_out(const Session& session) {
  const auto& out = session.options.out;
  std::string name;  // as a file is called that is left over when a run ends now
  together(session, [&] {
    if (!session.leads()) return;
    name = fmt::format(".ranks.tmp-{}", random_name());
    write_file_atomic(out / name, "");
  });
  name = gather_bytes(session, name)[0];
  together(session, [&] {
    std::error_code error;
    if (!std::filesystem::exists(out / name, error))
      throw UsageError(fmt::format("--out: {} is not the folder that rank 0 writes to", show(out)),
                       "each rank has a part of the weights, which it saves: give a folder on a "
                       "file system that all see");
  });
  std::error_code ignored;
  if (session.leads()) std::filesystem::remove(out / name, ignored);
}

Decision agree(const Session& session, const Decision& mine) {
  const auto all = gather_numbers(
      session, {mine.stop ? static_cast<int64_t>(*mine.stop) : 0, mine.saves, mine.validates});
  Decision out{{}, all[0][1] != 0, all[0][2] != 0};
  int64_t code = 0;
  for (const auto& its : all) code = std::max(code, its[0]);
  if (code > 0) out.stop = static_cast<ExitCode>(code);
  return out;
}

std::optional<ExitCode> agreed_stop(const Session& session) {
  return agree(session, {.stop = cancel::requested()}).stop;
}

}  // namespace flux::train
