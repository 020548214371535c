#include "formats/cache/reader.h"

#include <fmt/format.h>

#include <list>
#include <mutex>
#include <stdexcept>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "formats/cache/folder.h"
#include "formats/cache/header.h"
#include "formats/cache/journal.h"
#include "formats/cache/segment_reader.h"

namespace flux::cache {
namespace {

constexpr size_t kMaxOpenSegments =
    128;  // 0.6 MB and one descriptor each; 1024 descriptors are a usual limit

}  // namespace

struct Cache::State {
  std::filesystem::path folder;
  Manifest manifest;
  Index index;
  Layout layout;

  // the open segments, the last used first
  std::mutex mutex;
  std::list<std::pair<uint32_t, std::shared_ptr<const Segment>>> open;
  std::unordered_map<uint32_t, decltype(open)::iterator> position;

  [[noreturn]] void refuse(const std::string& name, const std::string& text) const {
    throw CacheError(fmt::format("{}: {}", show(folder / name), text), repair_hint(folder));
  }

  // What `read` throws about a segment, with what to do about it.
  template <class Read>
  auto hinted(const Read& read) const {
    return with_repair_hint(folder, read);
  }

  std::shared_ptr<const Segment> find_open(uint32_t number) {
    const auto found = position.find(number);
    if (found == position.end()) return nullptr;
    open.splice(open.begin(), open, found->second);
    return open.front().second;
  }

  std::shared_ptr<const Segment> segment(uint32_t number) {
    if (number >= manifest.segments.size())
      throw std::invalid_argument(
          fmt::format("segment {} of {}", number, manifest.segments.size()));
    {
      const std::lock_guard lock(mutex);
      if (auto found = find_open(number)) return found;
    }
    const SegmentEntry& entry = manifest.segments[number];
    auto opened = hinted([&] { return std::make_shared<const Segment>(folder / entry.name); });
    if (opened->layout() != layout)
      refuse(entry.name, "has tensors of another shape or type than the manifest says");
    if (opened->num_samples() != entry.num_samples) {
      refuse(entry.name,
             fmt::format(
                 "has {} samples, the manifest says {}", opened->num_samples(), entry.num_samples));
    }
    std::shared_ptr<const Segment> evicted;  // closed after the lock is gone
    const std::lock_guard lock(mutex);
    if (auto found = find_open(number)) return found;  // another thread was faster
    open.emplace_front(number, opened);
    position[number] = open.begin();
    if (open.size() > kMaxOpenSegments) {
      evicted = open.back().second;
      position.erase(open.back().first);
      open.pop_back();
    }
    return opened;
  }

  const SampleInfo& info(const Segment& segment, const IndexVariant& variant) const {
    if (variant.row >= segment.samples().size()) {
      refuse(kIndexName,
             fmt::format("names sample {} of {} in {}",
                         variant.row,
                         segment.samples().size(),
                         show(segment.path())));
    }
    const SampleInfo& sample = segment.samples()[variant.row];
    if (sample.key != variant.key || sample.height != variant.height ||
        sample.width != variant.width || sample.flags != variant.flags) {
      const auto shown = [](const auto& s) {
        return fmt::format("{} ({} x {}, flags {})", to_hex(s.key), s.height, s.width, s.flags);
      };
      refuse(segment.path().filename(),
             fmt::format(
                 "sample {} is {}, the index says {}", variant.row, shown(sample), shown(variant)));
    }
    return sample;
  }
};

Cache::Cache(const std::filesystem::path& folder, Kind kind) : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.folder = folder;
  s.manifest = read_manifest(folder);
  if (s.manifest.recipe.kind != kind) {
    throw CacheError(fmt::format("{}: is a {} cache, expected {}",
                                 show(folder),
                                 kind_name(s.manifest.recipe.kind),
                                 kind_name(kind)),
                     "check which folder was given to which flag");
  }
  s.layout = layout_of(kind, s.manifest.recipe.parameters);
  for (const auto& entry : s.manifest.segments) {  // before hours of training, not in them
    std::error_code error;
    const auto bytes = std::filesystem::file_size(folder / entry.name, error);
    if (error) s.refuse(entry.name, "cannot be read: " + error.message());
    if (bytes != static_cast<uintmax_t>(entry.bytes))
      s.refuse(entry.name, fmt::format("has {} bytes, the manifest says {}", bytes, entry.bytes));
  }
  s.index = read_index_of(folder, s.manifest);
}

Cache::~Cache() = default;

const std::filesystem::path& Cache::folder() const { return state_->folder; }
const Manifest& Cache::manifest() const { return state_->manifest; }
const Index& Cache::index() const { return state_->index; }
const Layout& Cache::layout() const { return state_->layout; }

SampleInfo Cache::read_into(const IndexVariant& variant,
                            std::span<const std::span<std::byte>> tensors) const {
  const auto segment = state_->segment(variant.segment);
  const SampleInfo& info = state_->info(*segment, variant);
  state_->hinted([&] { segment->read(variant.row, tensors, FrameChecksum::kSkip); });
  return info;
}

Sample Cache::read(const IndexVariant& variant) const {
  const auto segment = state_->segment(variant.segment);
  const SampleInfo& info = state_->info(*segment, variant);
  return {info, state_->hinted([&] { return segment->read(variant.row, FrameChecksum::kSkip); })};
}

SampleInfo Cache::info(const IndexVariant& variant) const {
  const auto segment = state_->segment(variant.segment);
  return state_->info(*segment, variant);
}

nlohmann::json newest_parameters(const std::filesystem::path& folder) {
  try {
    if (const auto manifest = read_manifest_if_there(folder)) return manifest->recipe.parameters;
  } catch (const CacheError&) {
    // what made the segments counts, then
  }
  std::string newest;
  nlohmann::json parameters = nlohmann::json::object();
  const auto take = [&](const SegmentHeader& header) {
    if (header.created < newest) return;
    newest = header.created;
    parameters = header.recipe.parameters;
  };
  std::error_code error;
  if (!std::filesystem::is_directory(folder, error)) return parameters;
  for (const auto& name : names_in(folder)) {
    const std::filesystem::path path = folder / name;
    try {
      if (is_segment_name(name)) take(Segment(path).header());
      if (!is_journal_name(name)) continue;
      const MappedFile file(path);
      const auto content = parse_journal(file.bytes(), path);
      if (content.valid_bytes > 0) take(content.header);
    } catch (const Error&) {
      // told by what opens it next
    }
  }
  return parameters;
}

}  // namespace flux::cache
