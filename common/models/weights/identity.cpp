// weights_sha256, and its memo in the user's cache folder.
#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <optional>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/models/weights/weights.h"
#include "common/tensor/tensor.h"

namespace flux {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kDefinition{"flux-stages weights_sha256 1\0", 29};
constexpr uint64_t kMaxMemoBytes = 16 << 20;
constexpr size_t kMaxMemoEntries = 1000;  // the oldest go first
constexpr int64_t kSettleNanoseconds = 1'000'000'000;

std::optional<fs::path> memo_path() {
  const auto folder = user_cache_folder();
  return folder ? std::optional(*folder / "hashes.json") : std::nullopt;
}

/// Names the bytes that were hashed: stat tuples, not paths, so that a moved file is known again.
std::string memo_key(std::span<const FileStamp> stamps, std::string_view net) {
  std::string text = fmt::format("1 {}", net);
  for (const FileStamp& s : stamps) {
    text += fmt::format(
        " {}:{}:{}:{}:{}", s.device, s.inode, s.size_bytes, s.modified_ns, s.changed_ns);
  }
  return to_hex(sha256(text));
}

/// Of an entry, so that a damaged digit is not somebody's identity.
std::string memo_check(const std::string& key, const std::string& hex) {
  return fmt::format("{:016x}", xxh3_64(as_bytes(key + " " + hex)));
}

/// {"entries": {key: {"check": hex, "sha256": hex, "used": seconds}}}; empty if there is none or it
/// is damaged.
nlohmann::json read_memo(const fs::path& path) {
  nlohmann::json memo;
  std::error_code error;
  if (fs::is_regular_file(path, error)) {
    try {
      memo = nlohmann::json::parse(read_file(path, kMaxMemoBytes), nullptr, false);
    } catch (const InputError& e) {
      log::debug("hashes are not remembered: {}", e.what());
    }
  }
  if (!memo.is_object() || !memo.contains("entries") || !memo["entries"].is_object()) {
    memo = {{"entries", nlohmann::json::object()}};
  }
  auto& entries = memo["entries"];
  for (auto it = entries.begin(); it != entries.end();) {
    const bool sound = it->is_object() && it->contains("sha256") && (*it)["sha256"].is_string() &&
                       it->contains("used") && (*it)["used"].is_number_integer();
    it = sound ? std::next(it) : entries.erase(it);
  }
  return memo;
}

std::optional<Sha256Digest> remembered(const nlohmann::json& memo, const std::string& key) {
  const auto& entries = memo["entries"];
  const auto entry = entries.find(key);
  if (entry == entries.end()) return std::nullopt;
  try {
    const auto hex = (*entry)["sha256"].get<std::string>();
    if (entry->value("check", nlohmann::json()) != memo_check(key, hex)) return std::nullopt;
    return digest_from_hex(hex);
  } catch (const std::invalid_argument&) {
    return std::nullopt;
  }
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

void remember(const fs::path& path, const std::string& key, const Sha256Digest& digest) {
  nlohmann::json memo = read_memo(path);
  auto& entries = memo["entries"];
  entries[key] = {{"check", memo_check(key, to_hex(digest))},
                  {"sha256", to_hex(digest)},
                  {"used", now_ns() / 1'000'000'000}};
  while (entries.size() > kMaxMemoEntries) {
    auto oldest = entries.begin();
    for (auto it = entries.begin(); it != entries.end(); ++it) {
      if ((*it)["used"] < (*oldest)["used"]) oldest = it;
    }
    entries.erase(oldest);
  }
  make_folder(path.parent_path());
  write_file_atomic(path, memo.dump(1) + "\n");
}

/// Unchanged since they were opened, and for long enough that a change in the same clock tick
/// cannot hide.
bool settled(std::span<const FileStamp> stamps, int64_t opened_ns) {
  try {
    return std::all_of(stamps.begin(), stamps.end(), [&](const FileStamp& s) {
      return std::max(s.modified_ns, s.changed_ns) + kSettleNanoseconds < opened_ns &&
             file_stamp(s.path) == s;
    });
  } catch (const InputError&) {
    return false;  // renamed or removed meanwhile
  }
}

}  // namespace

Sha256Digest weights_sha256(const std::map<std::string, TensorStream>& canonical) {
  Sha256 hash;
  hash.add(kDefinition).add_u64(canonical.size());
  for (const auto& [name, tensor] : canonical) {
    cancel::check();  // 10 GB take seconds
    hash.add_field(name).add_field(dtype_name(tensor.dtype)).add_u64(tensor.shape.size());
    uint64_t elements = 1;
    for (const int64_t length : tensor.shape) {
      hash.add_u64(static_cast<uint64_t>(length));
      elements *= static_cast<uint64_t>(length);
    }
    hash.add_u64(elements * static_cast<uint64_t>(dtype_bits(tensor.dtype)) / 8);
    tensor.add_data(hash);
  }
  return hash.digest();
}

Sha256Digest weights_sha256(const TensorMap& canonical) {
  std::map<std::string, TensorStream> streams;
  for (const auto& [name, tensor] : canonical)
    streams[name] = {dtype_of(tensor), tensor.sizes().vec(), [&tensor = tensor](Sha256& hash) {
                       const at::Tensor contiguous = tensor.contiguous();
                       hash.add(host_bytes(contiguous));
                     }};
  return weights_sha256(streams);
}

Sha256Digest remembered_weights_sha256(std::span<const FileStamp> stamps,
                                       std::string_view net,
                                       const TensorMap& canonical,
                                       bool rehash) {
  return remembered_weights_sha256(
      stamps, net, [&] { return weights_sha256(canonical); }, rehash);
}

Sha256Digest remembered_weights_sha256(std::span<const FileStamp> stamps,
                                       std::string_view net,
                                       const std::function<Sha256Digest()>& compute,
                                       bool rehash) {
  const auto path = stamps.empty() ? std::nullopt : memo_path();
  const std::string key = memo_key(stamps, net);
  if (path && !rehash) {
    if (const auto known = remembered(read_memo(*path), key)) return *known;
  }
  constexpr uint64_t kLong = uint64_t{1} << 30;  // a second or more
  uint64_t bytes = 0;
  for (const FileStamp& stamp : stamps) bytes += stamp.size_bytes;
  if (bytes >= kLong) log::info("hashing {}: {}, once", show(stamps[0].path), show_bytes(bytes));
  const int64_t started_ns = now_ns();
  const Sha256Digest digest = compute();
  if (path && settled(stamps, started_ns)) {
    try {
      remember(*path, key, digest);
    } catch (const Error& e) {
      log::debug("the hash of {} is not remembered: {}", show(stamps[0].path), e.what());
    }
  }
  return digest;
}

}  // namespace flux
