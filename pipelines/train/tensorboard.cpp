#include "pipelines/train/tensorboard.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <boost/crc.hpp>
#include <charconv>
#include <chrono>

#include "common/core/file.h"

namespace flux::train {
namespace {

constexpr char kPrefix[] = "events.out.tfevents.";

template <class T>
std::string raw(T value) {  // little-endian, as this project's machines are
  return {reinterpret_cast<const char*>(&value), sizeof(value)};
}

// Fields of protobuf messages: a key of number and wire type, and the value.
std::string varint(uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out += static_cast<char>((value & 0x7F) | 0x80);
  out += static_cast<char>(value);
  return out;
}
std::string key(uint64_t field, uint64_t wire_type) { return varint(field << 3 | wire_type); }
std::string number(uint64_t field, int64_t value) {
  return key(field, 0) + varint(static_cast<uint64_t>(value));
}
std::string number(uint64_t field, double value) { return key(field, 1) + raw(value); }
std::string number(uint64_t field, float value) { return key(field, 5) + raw(value); }
std::string bytes(uint64_t field, std::string_view value) {
  return key(field, 2) + varint(value.size()) + std::string(value);
}

std::string record(std::string_view message) {
  const std::string length = raw(uint64_t{message.size()});
  return length + raw(masked_crc32c(length)) + std::string(message) + raw(masked_crc32c(message));
}

/// Event: 1 wall_time, 2 step, then `what`.
std::string event(int64_t step, std::string_view what) {
  const double now =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  return record(number(1, now) + number(2, step) + std::string(what));
}

/// TensorBoard reads files in the order of their names, which begin with the seconds since 1970.
std::filesystem::path next_name(const std::filesystem::path& folder) {
  make_folder(folder);
  int64_t seconds = std::chrono::duration_cast<std::chrono::seconds>(
                        std::chrono::system_clock::now().time_since_epoch())
                        .count();
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().native();
    int64_t other = 0;
    if (!name.starts_with(kPrefix)) continue;
    std::from_chars(name.data() + sizeof(kPrefix) - 1, name.data() + name.size(), other);
    seconds = std::max(seconds, other + 1);
  }
  return folder / fmt::format("{}{:010}.flux-train", kPrefix, seconds);
}

}  // namespace

uint32_t masked_crc32c(std::string_view bytes) {
  boost::crc_optimal<32, 0x1EDC6F41, 0xFFFFFFFF, 0xFFFFFFFF, true, true> crc;
  crc.process_bytes(bytes.data(), bytes.size());
  return std::rotr(static_cast<uint32_t>(crc.checksum()), 15) + 0xA282EAD8u;
}

EventFile::EventFile(const std::filesystem::path& folder, int64_t first_step)
    : file_(next_name(folder)) {
  constexpr int64_t kStart = 1;
  // Event: 3 file_version, 7 session_log; SessionLog: 1 status
  file_.write(event(0, bytes(3, "brain.Event:2")));
  file_.write(event(first_step, bytes(7, number(1, kStart))));
}

void EventFile::add(int64_t step, const std::vector<std::pair<std::string, double>>& values) {
  std::string summary;  // 1 value; Value: 1 tag, 2 simple_value
  for (const auto& [name, value] : values)
    summary += bytes(1, bytes(1, name) + number(2, static_cast<float>(value)));
  file_.write(event(step, bytes(5, summary)));
}

}  // namespace flux::train
