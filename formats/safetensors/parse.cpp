// The header of one file: JSON by events, so that repeated keys, floats and deep nesting are seen
// before they are lost.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cctype>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <unordered_set>
#include <utility>

#include "common/core/error.h"
#include "common/core/text.h"
#include "formats/safetensors/reader.h"

namespace flux::safetensors {
namespace {

static_assert(std::endian::native == std::endian::little,
              "files are little-endian and read in place");

/// False on overflow of 64 bits.
bool multiply(uint64_t& product, uint64_t factor) {
  return !__builtin_mul_overflow(product, factor, &product);
}

/// product(shape) * bits; nothing on overflow.
std::optional<uint64_t> size_bits(DType dtype, std::span<const int64_t> shape) {
  uint64_t product = 1;
  for (const int64_t length : shape) {
    if (length < 0 || !multiply(product, static_cast<uint64_t>(length))) return std::nullopt;
  }
  if (!multiply(product, static_cast<uint64_t>(dtype_bits(dtype)))) return std::nullopt;
  return product;
}

std::string shown_name(std::string_view name) {
  constexpr size_t kLongest = 100;
  std::string text = printable(name.substr(0, kLongest));
  return fmt::format("'{}{}'", text, name.size() > kLongest ? "..." : "");
}

/// Receives the JSON events of a header. A method that returns false has put the reason into
/// `reason`.
class HeaderEvents : public nlohmann::json_sax<nlohmann::json> {
 public:
  Contents contents;
  std::string reason;

  bool key(std::string& name) override {
    switch (level_) {
      case Level::kTop:
        if (!names_.insert(name).second) return refuse("key {} appears twice", shown_name(name));
        key_ = std::move(name);
        return true;
      case Level::kMetadata:
        if (contents.metadata.contains(name))
          return refuse("metadata key {} appears twice", shown_name(name));
        key_ = std::move(name);
        return true;
      default:
        break;
    }
    const auto* const field = std::find(kFields.begin(), kFields.end(), name);
    if (field == kFields.end())
      return refuse("{} has an unknown field {}", entry(), shown_name(name));
    field_ = static_cast<size_t>(field - kFields.begin());
    if (std::exchange(seen_[field_], true))
      return refuse("{} has {} twice", entry(), kFields[field_]);
    return true;
  }

  bool start_object(size_t) override {
    switch (level_) {
      case Level::kFile:
        level_ = Level::kTop;
        return true;
      case Level::kTop:
        if (key_ == "__metadata__") {
          level_ = Level::kMetadata;
          return true;
        }
        if (contents.tensors.size() >= static_cast<size_t>(kMaxTensors)) {
          return refuse("more than {} tensors", kMaxTensors);
        }
        level_ = Level::kEntry;
        contents.tensors.emplace_back().name = key_;
        seen_ = {};
        num_offsets_ = 0;
        return true;
      default:
        return refuse_value("an object");
    }
  }

  bool end_object() override {
    if (level_ == Level::kEntry) {
      for (size_t i = 0; i < kFields.size(); ++i) {
        if (!seen_[i]) return refuse("{} has no {}", entry(), kFields[i]);
      }
    }
    level_ = level_ == Level::kTop ? Level::kFile : Level::kTop;
    return true;
  }

  bool start_array(size_t) override {
    if (level_ != Level::kEntry || field_ == kDtype) return refuse_value("an array");
    level_ = field_ == kShape ? Level::kShape : Level::kOffsets;
    return true;
  }

  bool end_array() override {
    if (level_ == Level::kOffsets && num_offsets_ != 2) {
      return refuse("data_offsets of {} has {} numbers, not 2", entry(), num_offsets_);
    }
    level_ = Level::kEntry;
    return true;
  }

  bool string(std::string& text) override {
    if (level_ == Level::kMetadata) {
      contents.metadata.emplace(std::move(key_), std::move(text));
      return true;
    }
    if (level_ != Level::kEntry || field_ != kDtype) return refuse_value("a string");
    const auto dtype = dtype_from_name(text);
    if (!dtype) return refuse("{} has the unknown dtype {}", entry(), shown_name(text));
    contents.tensors.back().dtype = *dtype;
    return true;
  }

  bool number_unsigned(uint64_t value) override {
    if (level_ != Level::kShape && level_ != Level::kOffsets) return refuse_value("a number");
    if (value > INT64_MAX)
      return refuse("{} of {} has {}, which is above 2^63-1", kFields[field_], entry(), value);
    Tensor& tensor = contents.tensors.back();
    if (level_ == Level::kShape) {
      if (tensor.shape.size() >= static_cast<size_t>(kMaxRank))
        return refuse("{} has more than {} dimensions", entry(), kMaxRank);
      tensor.shape.push_back(static_cast<int64_t>(value));
    } else {
      (num_offsets_ == 0 ? tensor.begin : tensor.end) = value;
      ++num_offsets_;
    }
    return true;
  }
  bool number_integer(int64_t value) override { return refuse_number(std::to_string(value)); }
  bool number_float(double, const std::string& text) override { return refuse_number(text); }

  bool null() override { return refuse_value("null"); }
  bool boolean(bool) override { return refuse_value("true or false"); }
  bool binary(nlohmann::json::binary_t&) override { return refuse_value("binary data"); }

  bool parse_error(size_t position, const std::string&, const nlohmann::json::exception&) override {
    return refuse("not valid JSON at byte {}", position);
  }

 private:
  enum class Level { kFile, kTop, kMetadata, kEntry, kShape, kOffsets };
  enum Field : size_t { kDtype, kShape, kOffsets };
  static constexpr std::array<std::string_view, 3> kFields{"dtype", "shape", "data_offsets"};

  template <class... Args>
  bool refuse(fmt::format_string<Args...> format, Args&&... args) {
    if (reason.empty()) reason = fmt::format(format, std::forward<Args>(args)...);
    return false;
  }
  std::string entry() const { return "tensor " + shown_name(key_); }

  bool refuse_value(std::string_view what) {
    switch (level_) {
      case Level::kFile:
        return refuse("the header is {}, not an object", what);
      case Level::kTop:
        if (key_ == "__metadata__") return refuse("__metadata__ is {}, not an object", what);
        return refuse("the entry of {} is {}, not an object", entry(), what);
      case Level::kMetadata:
        return refuse("metadata {} is {}, not a string", shown_name(key_), what);
      default:
        return refuse("{} of {} holds {}", kFields[field_], entry(), what);
    }
  }
  bool refuse_number(std::string_view text) {
    if (level_ != Level::kShape && level_ != Level::kOffsets) return refuse_value("a number");
    return refuse("{} of {} has {}, not a whole number from 0 to 2^63-1",
                  kFields[field_],
                  entry(),
                  printable(text));
  }

  Level level_ = Level::kFile;
  std::string key_;  // of the tensor or the metadata value being read
  size_t field_ = 0;
  std::array<bool, 3> seen_{};
  int num_offsets_ = 0;
  std::unordered_set<std::string> names_;
};

/// What a file that does not start like safetensors is, if we can tell.
std::string_view other_kind(std::string_view head) {
  using namespace std::string_view_literals;
  constexpr std::pair<std::string_view, std::string_view> kMagics[] = {
      {"GGUF"sv, "a GGUF file"},
      {"PK\x03\x04"sv, "a zip archive, as PyTorch's pickle checkpoints (.pt .pth .bin .ckpt) are"},
      {"\x80\x02"sv, "a pickle"},
      {"\x80\x03"sv, "a pickle"},
      {"\x80\x04"sv, "a pickle"},
      {"\x80\x05"sv, "a pickle"},
      {"version https://git-lfs"sv,
       "a Git LFS pointer: the weights themselves were never downloaded"},
      {"\x89HDF"sv, "an HDF5 file"},
      {"\x89PNG"sv, "a PNG image"},
      {"\xff\xd8\xff"sv, "a JPEG image"},
  };
  for (const auto& [magic, kind] : kMagics) {
    if (head.starts_with(magic)) return kind;
  }
  const std::string start = lower_ascii(trim(head.substr(0, 256)));
  if (start.starts_with("<!doctype") || start.starts_with("<html") || start.starts_with("<?xml")) {
    return "a web page, perhaps an error page saved by a download";
  }
  const std::string_view sample = head.substr(0, 512);
  const bool text =
      !sample.empty() && std::all_of(sample.begin(), sample.end(), [](unsigned char c) {
        return c >= 0x20 || c == '\n' || c == '\r' || c == '\t';
      });
  return text ? "a text file" : "";
}

}  // namespace

uint64_t tensor_bytes(DType dtype, std::span<const int64_t> shape) {
  const auto bits = size_bits(dtype, shape);
  if (!bits || *bits % 8 != 0) {
    throw std::invalid_argument(fmt::format(
        "{} {} has no size in whole bytes below 2^61", dtype_name(dtype), shape_text(shape)));
  }
  return *bits / 8;
}

Contents parse(std::span<const std::byte> file, std::string_view where) {
  const auto refuse = [&](std::string_view reason) {
    throw InputError(
        fmt::format("{}: broken safetensors file: {}", where, reason),
        "the file is damaged or was written by a faulty program: download or convert it again");
  };
  const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());

  uint64_t header_size = 0;
  std::string start;  // why it does not even start like one
  if (file.empty()) {
    start = "it is empty";
  } else if (file.size() < sizeof header_size) {
    start = fmt::format("{} bytes are too few", file.size());
  } else {
    std::memcpy(&header_size, file.data(), sizeof header_size);
    if (header_size > kMaxHeaderBytes) {
      start =
          fmt::format("header of {} bytes, at most {} are allowed", header_size, kMaxHeaderBytes);
    } else if (header_size > file.size() - sizeof header_size) {
      start = fmt::format("header of {} bytes in a file of {}", header_size, file.size());
    } else if (header_size < 2) {
      start = fmt::format("header of {} bytes", header_size);
    } else if (text[sizeof header_size] != '{') {
      start = "the header does not start with '{'";
    }
  }
  if (!start.empty()) {
    const std::string_view kind = other_kind(text);
    throw InputError(
        fmt::format("{}: not a safetensors file: {}",
                    where,
                    kind.empty() ? start : fmt::format("it looks like {} ({})", kind, start)),
        "give weights in safetensors format");
  }

  std::string_view header = text.substr(sizeof header_size, header_size);
  if (const auto at = first_invalid_utf8(header))
    refuse(fmt::format("the header is not UTF-8 at byte {}", *at));
  // the JSON parser takes a NUL byte for the end of its input
  if (header.find('\0') != std::string_view::npos) refuse("NUL bytes in the header");
  header = header.substr(
      0, header.find_last_not_of(' ') + 1);  // padding; it starts with '{', so something is left
  HeaderEvents events;
  if (!nlohmann::json::sax_parse(header.begin(), header.end(), &events))
    refuse("header: " + events.reason);
  if (header.back() != '}') refuse("the header is padded with something other than spaces");

  Contents contents = std::move(events.contents);
  const std::span<const std::byte> data = file.subspan(sizeof header_size + header_size);
  std::sort(contents.tensors.begin(), contents.tensors.end(), [](const Tensor& a, const Tensor& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  uint64_t covered = 0;
  for (Tensor& tensor : contents.tensors) {
    const auto entry = [&] {
      return fmt::format(
          "tensor {} at {} to {}", shown_name(tensor.name), tensor.begin, tensor.end);
    };
    if (tensor.end < tensor.begin) refuse(entry() + " ends before it begins");
    if (tensor.end > data.size())
      refuse(fmt::format("{} ends after the file's {} bytes of data", entry(), data.size()));
    if (tensor.begin != covered) {
      refuse(fmt::format(
          "{} {}; it should begin at {}",
          entry(),
          tensor.begin < covered ? "overlaps the one before it" : "leaves a hole before it",
          covered));
    }
    const auto bits = size_bits(tensor.dtype, tensor.shape);
    const auto what = [&] {
      return fmt::format("{} {}", dtype_name(tensor.dtype), shape_text(tensor.shape));
    };
    if (!bits) refuse(fmt::format("{}: the size of {} overflows 64 bits", entry(), what()));
    if (*bits % 8 != 0)
      refuse(fmt::format("{}: {} is not a whole number of bytes", entry(), what()));
    if (*bits / 8 != tensor.end - tensor.begin) {
      refuse(fmt::format("{}: {} needs {} bytes, the offsets give {}",
                         entry(),
                         what(),
                         *bits / 8,
                         tensor.end - tensor.begin));
    }
    covered = tensor.end;
    tensor.bytes = data.subspan(tensor.begin, tensor.end - tensor.begin);
  }
  if (covered != data.size()) {
    refuse(fmt::format("tensors cover {} bytes of data, the file has {}", covered, data.size()));
  }
  return contents;
}

}  // namespace flux::safetensors
