#include "formats/cache/journal.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <optional>
#include <system_error>
#include <utility>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "formats/cache/header.h"
#include "formats/cache/manifest.h"

namespace flux::cache {
namespace {

constexpr std::string_view kHeaderMagic = kJournalMagic, kRecordMagic = "FXCJSMPL";
constexpr size_t kMaxBlock = size_t{1} << 30;
constexpr auto kSyncEvery = std::chrono::seconds(1);

// A block: magic, length of the body as u64, body, XXH3-64 of all before it.
class BlockWriter {
 public:
  explicit BlockWriter(std::string_view magic) {
    bytes(as_bytes(magic));
    number(uint64_t{0});
  }
  template <class T>
  void number(T value) {
    bytes(std::as_bytes(std::span(&value, 1)));
  }
  void bytes(std::span<const std::byte> more) { out_.insert(out_.end(), more.begin(), more.end()); }
  void field(std::span<const std::byte> more) {
    number(static_cast<uint64_t>(more.size()));
    bytes(more);
  }
  std::vector<std::byte> finish() {
    const uint64_t body = out_.size() - 16;
    std::memcpy(out_.data() + 8, &body, sizeof body);
    number(xxh3_64(out_));
    return std::move(out_);
  }

 private:
  std::vector<std::byte> out_;
};

// Reads a body; once something does not fit, everything reads as zero and ok() is false.
class BlockReader {
 public:
  explicit BlockReader(std::span<const std::byte> body) : rest_(body) {}
  template <class T>
  T number() {
    T value{};
    const auto from = bytes(sizeof value);
    if (from.size() == sizeof value) std::memcpy(&value, from.data(), sizeof value);
    return value;
  }
  std::span<const std::byte> bytes(uint64_t count) {
    if (count > rest_.size()) {
      ok_ = false;
      rest_ = {};
      return {};
    }
    const auto out = rest_.first(count);
    rest_ = rest_.subspan(count);
    return out;
  }
  std::span<const std::byte> field() { return bytes(number<uint64_t>()); }
  bool finished() const { return ok_ && rest_.empty(); }

 private:
  std::span<const std::byte> rest_;
  bool ok_ = true;
};

// The body of the block that `bytes` start with, if it is whole.
std::optional<std::span<const std::byte>> block_body(std::span<const std::byte> bytes,
                                                     std::string_view magic) {
  if (bytes.size() < 24 || std::memcmp(bytes.data(), magic.data(), 8) != 0) return std::nullopt;
  uint64_t body = 0, hash = 0;
  std::memcpy(&body, bytes.data() + 8, sizeof body);
  if (body > kMaxBlock || body > bytes.size() - 24) return std::nullopt;
  std::memcpy(&hash, bytes.data() + 16 + body, sizeof hash);
  if (hash != xxh3_64(bytes.first(16 + body))) return std::nullopt;
  return bytes.subspan(16, body);
}

// Every number of a sample's row in one fixed order, for writing and reading alike.
template <class Info, class Visit>
void visit_numbers(Info& info, Visit visit) {
  visit(info.key);
  visit(info.source_sha256);
  visit(info.tensor_xxh3);
  visit(info.flags);
  visit(info.height);
  visit(info.width);
  visit(info.original_hw);
  visit(info.resized_hw);
  visit(info.crop_top_left);
  visit(info.t5_tokens);
  visit(info.t5_lost);
  visit(info.clip_tokens);
  visit(info.clip_lost);
}

std::vector<std::byte> encode(const Record& record) {
  BlockWriter out(kRecordMagic);
  visit_numbers(record.info, [&](const auto& value) { out.number(value); });
  out.field(as_bytes(record.info.text));
  out.number(static_cast<uint64_t>(record.frames.size()));
  for (const auto& frame : record.frames) out.field(frame);
  return out.finish();
}

std::optional<Record> decode_record(std::span<const std::byte> body, const Layout& layout) {
  BlockReader in(body);
  Record out;
  visit_numbers(out.info, [&](auto& value) { value = in.number<std::decay_t<decltype(value)>>(); });
  const auto text = in.field();
  out.info.text.assign(reinterpret_cast<const char*>(text.data()), text.size());
  const int num_frames = num_tensors(layout, out.info);
  if (in.number<uint64_t>() != static_cast<uint64_t>(num_frames)) return std::nullopt;
  for (int i = 0; i < num_frames; ++i) {
    const auto frame = in.field();
    out.frames.emplace_back(frame.begin(), frame.end());
  }
  // a record that passes its hash was written by this code; what a segment's reader would refuse is
  // refused here too
  const SampleInfo& info = out.info;
  const bool fits = layout.kind == Kind::kText
                        ? info.t5_tokens <= layout.t5_length && info.flags == 0
                        : (info.flags & ~kSampleFlags) == 0 && info.height >= 1 &&
                              info.height <= kMaxLatentSide && info.width >= 1 &&
                              info.width <= kMaxLatentSide;
  if (!in.finished() || !fits || text.size() > static_cast<size_t>(kMaxTextBytes))
    return std::nullopt;
  return out;
}

std::vector<std::byte> encode(const SegmentHeader& header) {
  const nlohmann::json object = {{"schema_version", kSchemaVersion},
                                 {"kind", kind_name(header.recipe.kind)},
                                 {"parameters", header.recipe.parameters},
                                 {"weights", header.recipe.weights},
                                 {"tokenizers", header.recipe.tokenizers},
                                 {"tool", printable(header.provenance.tool)},
                                 {"tool_version", printable(header.provenance.tool_version)},
                                 {"command_line", printable(header.provenance.command_line)},
                                 {"device", printable(header.provenance.device)},
                                 {"created", header.created}};
  BlockWriter out(kHeaderMagic);
  out.bytes(as_bytes(canonical_json(object)));
  return out.finish();
}

std::optional<SegmentHeader> decode_header(std::span<const std::byte> body,
                                           const std::filesystem::path& path) {
  const auto object =
      nlohmann::json::parse(reinterpret_cast<const char*>(body.data()),
                            reinterpret_cast<const char*>(body.data()) + body.size(),
                            nullptr,
                            false);
  if (!object.is_object()) return std::nullopt;
  const auto text = [&](const char* name) { return object.value(name, std::string()); };
  try {
    const std::string problem = schema_problem(
        object.at("schema_version").get<int64_t>(), text("tool"), text("tool_version"));
    if (!problem.empty()) throw SchemaError(fmt::format("{}: {}", show(path), problem));
    const std::string kind = object.at("kind");
    if (kind != "latents" && kind != "text") return std::nullopt;
    SegmentHeader out;
    out.recipe = {kind == "latents" ? Kind::kLatents : Kind::kText,
                  object.at("parameters"),
                  object.at("weights"),
                  object.at("tokenizers")};
    out.provenance = {text("tool"), text("tool_version"), text("command_line"), text("device")};
    out.created = text("created");
    return out;
  } catch (const nlohmann::json::exception&) {
    return std::nullopt;
  }
}

}  // namespace

Journal::Journal(const std::filesystem::path& folder, const SegmentHeader& header)
    : path_(folder / (".journal-" + random_name())) {
  fd_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666);
  if (fd_ < 0) fail("cannot be created", errno);
  const auto bytes = encode(header);
  if (!write_all(fd_, bytes)) {
    const int number = errno;
    remove();
    fail("writing failed", number);
  }
  size_ = bytes.size();
  sync_folder(folder);
  flusher_ = std::jthread([this](const std::stop_token& stop) { flush_later(stop); });
}

Journal::~Journal() {
  stop_flusher();
  // what failed shows nowhere any more, but the samples are in the file
  if (fd_ >= 0 && dirty_) flush_data();
  close_file();
}

void Journal::stop_flusher() {
  if (!flusher_.joinable()) return;
  flusher_.request_stop();
  flusher_.join();
}

int Journal::flush_data() const {
  int result;
  do result = fdatasync(fd_);
  while (result != 0 && errno == EINTR);
  return result;
}

void Journal::close_file() {
  stop_flusher();
  if (fd_ >= 0) close(std::exchange(fd_, -1));
}

// A second after the first record that is not on the disk, and again for those that come later.
void Journal::flush_later(const std::stop_token& stop) {
  std::unique_lock lock(mutex_);
  while (changed_.wait(lock, stop, [this] { return dirty_; })) {
    changed_.wait_for(lock, stop, kSyncEvery, [] { return false; });
    if (stop.stop_requested()) return;
    dirty_ = false;
    lock.unlock();
    const int result = flush_data();
    const int number = errno;
    lock.lock();
    if (result != 0) flush_error_ = number;
  }
}

void Journal::check() {
  const std::lock_guard lock(mutex_);
  if (flush_error_ != 0) fail("flushing to the disk failed", flush_error_);
}

void Journal::fail(const char* what, int number) const {
  throw ResourceError(
      fmt::format("{}: {}: {}", show(path_), what, std::generic_category().message(number)),
      write_failure_hint(number) + "; nothing finished is lost");
}

void Journal::append(const Record& record) {
  check();
  const auto bytes = encode(record);
  if (!write_all(fd_, bytes)) {
    const int number = errno;
    // a torn record would hide those after it; if it cannot be cut off, nothing may follow
    if (ftruncate(fd_, static_cast<off_t>(size_)) != 0) close_file();
    fail("writing failed", number);
  }
  size_ += bytes.size();
  {
    const std::lock_guard lock(mutex_);
    dirty_ = true;
  }
  changed_.notify_one();
}

void Journal::remove() {
  close_file();
  unlink(path_.c_str());
}

bool is_journal_name(std::string_view name) {
  constexpr std::string_view kStart = ".journal-";
  return name.starts_with(kStart) && is_hex(name.substr(kStart.size()), 16);
}

JournalContent parse_journal(std::span<const std::byte> bytes, const std::filesystem::path& path) {
  JournalContent out;
  const auto header_body = block_body(bytes, kHeaderMagic);
  if (!header_body) return out;
  const auto header = decode_header(*header_body, path);
  Layout layout;
  try {
    if (!header) return out;
    layout = check_recipe(header->recipe);
  } catch (const CacheError&) {
    return out;
  }
  out.header = *header;
  out.valid_bytes = 24 + header_body->size();
  while (const auto body = block_body(bytes.subspan(out.valid_bytes), kRecordMagic)) {
    auto record = decode_record(*body, layout);
    if (!record) break;
    out.records.push_back(std::move(*record));
    out.valid_bytes += 24 + body->size();
  }
  return out;
}

}  // namespace flux::cache
