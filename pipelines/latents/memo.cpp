#include "pipelines/latents/memo.h"

#include <chrono>
#include <cstring>

#include "common/core/error.h"
#include "common/core/log.h"

namespace flux::latents {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kMagic = "flux-stages pictures 2\n";
constexpr uint64_t kMaxMemoBytes = uint64_t{1} << 30;
constexpr int64_t kSettleNanoseconds = 1'000'000'000;

/// One picture on disk; the file is the magic, records, and the XXH3-64 of all that.
struct Record {
  uint64_t device, inode, size_bytes;
  int64_t modified_ns, changed_ns, width, height, orientation, animated;
  Sha256Digest sha256;
};
static_assert(sizeof(Record) == 104);

}  // namespace

Memo::Memo(const fs::path& folder, bool forget) {
  const auto root = user_cache_folder();
  if (!root) return;
  const auto stamp = file_stamp(folder);
  const auto name =
      to_hex(Sha256().add_u64(stamp.device).add_u64(stamp.inode).digest()).substr(0, 16);
  path_ = *root / ("pictures-" + name);
  std::error_code ignored;
  if (forget || !fs::is_regular_file(path_, ignored)) return;
  try {
    const auto text = read_file(path_, kMaxMemoBytes);
    if (text.size() < kMagic.size() + 8 || !text.starts_with(kMagic)) return;
    const auto body = std::string_view(text).substr(0, text.size() - 8);
    uint64_t checksum;
    std::memcpy(&checksum, text.data() + body.size(), 8);
    if (checksum != xxh3_64(as_bytes(body)) || (body.size() - kMagic.size()) % sizeof(Record) != 0)
      return;
    for (size_t at = kMagic.size(); at < body.size(); at += sizeof(Record)) {
      Record r;
      std::memcpy(&r, body.data() + at, sizeof r);
      Entry entry;
      entry.stamp.device = r.device, entry.stamp.inode = r.inode,
      entry.stamp.size_bytes = r.size_bytes;
      entry.stamp.modified_ns = r.modified_ns, entry.stamp.changed_ns = r.changed_ns;
      entry.picture = {r.sha256,
                       {{r.width, r.height}, static_cast<int>(r.orientation), r.animated != 0}};
      entries_[{r.device, r.inode}] = entry;
    }
  } catch (const Error& error) {
    log::debug("hashes of pictures are not remembered: {}", error.what());
  }
}

std::optional<Picture> Memo::find(const FileStamp& stamp) const {
  const auto found = entries_.find({stamp.device, stamp.inode});
  if (found == entries_.end()) return std::nullopt;
  auto known = found->second.stamp;
  known.path = stamp.path;
  if (known != stamp) return std::nullopt;
  found->second.used = true;
  return found->second.picture;
}

void Memo::add(const FileStamp& stamp, const Picture& picture) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto now_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
  if (now_ns - stamp.changed_ns < kSettleNanoseconds ||
      now_ns - stamp.modified_ns < kSettleNanoseconds)
    return;
  entries_[{stamp.device, stamp.inode}] = {stamp, picture, true};
  changed_ = true;
}

void Memo::save() const {
  if (path_.empty() || !changed_) return;
  std::string text(kMagic);
  for (const auto& [key, e] : entries_) {
    if (!e.used) continue;
    const Record r{e.stamp.device,
                   e.stamp.inode,
                   e.stamp.size_bytes,
                   e.stamp.modified_ns,
                   e.stamp.changed_ns,
                   e.picture.header.size.width,
                   e.picture.header.size.height,
                   e.picture.header.orientation,
                   e.picture.header.animated,
                   e.picture.sha256};
    text.append(reinterpret_cast<const char*>(&r), sizeof r);
  }
  const uint64_t checksum = xxh3_64(as_bytes(text));
  text.append(reinterpret_cast<const char*>(&checksum), sizeof checksum);
  try {
    make_folder(path_.parent_path());
    write_file_atomic(path_, text);
  } catch (const Error& error) {
    log::debug("hashes of pictures are not remembered: {}", error.what());
  }
}

}  // namespace flux::latents
