// common/dataset/caption.h - caption files, and caption programs: captions with random parts.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "common/dataset/profile.h"

namespace flux::dataset {

/// What a subset says about its captions, with sd-scripts' defaults. Source:
/// kohya-ss/sd-scripts, library/config_util.py.
struct CaptionOptions {
  std::string prefix, suffix;         // joined by one space
  std::string separator = ",";        // between tags on reading; ", " joins them again
  std::string secondary_separator;    // replaced by `separator` at the end; empty = off
  std::string keep_tokens_separator;  // fixed tags, this, tags, this, fixed tags; empty = off
  int64_t keep_tokens = 0;            // this many first tags stay in place
  bool shuffle = false;
  bool wildcards = false;  // {a|b} and a random line of several
  double tag_dropout_rate = 0;
  double dropout_rate = 0;             // of the whole caption; applied in training
  int64_t dropout_every_n_epochs = 0;  // of the whole caption; 0 = off
  int64_t token_warmup_min = 1;
  double token_warmup_step = 0;  // below 1: a fraction of all steps; 0 = off
};

/// The text of one caption file: UTF-8, lines ended by \n, \r\n or \r, Unicode white space stripped
/// at both ends. Without wildcards the first line, with them all lines that are not blank, joined
/// by \n. A byte order mark is stripped in profile default and part of the text in profile kohya.
/// Throws InputError naming the file: unreadable, empty, above 16 MiB, not UTF-8 (with the offset).
std::string read_caption_file(const std::filesystem::path& file, bool wildcards, Profile profile);

/// Where a caption program gets its random decisions.
class Draws {
 public:
  virtual ~Draws() = default;
  /// Whether something with this probability in (0, 1] happens.
  virtual bool chance(double probability) = 0;
  /// One of 0 .. n-1, n > 0.
  virtual size_t choice(size_t n) = 0;
  /// An order: new[i] = old[result[i]].
  virtual std::vector<size_t> shuffle(size_t n) = 0;
};

/// Where training stands, for the options that depend on it.
struct CaptionTime {
  int64_t epoch = 1, step = 0, max_steps = 0;
};

/// One outcome of a caption, whole-caption dropout and token warm-up included. Draws are asked in
/// sd-scripts' order: dropout (if its rate is above 0), line, each {a|b} from the left, shuffle,
/// one chance a tag.
std::string process_caption(std::string_view caption,
                            const CaptionOptions& options,
                            const CaptionTime& time,
                            Draws& draws);

/// One text that a caption can become, and how often it does.
struct CaptionVariant {
  std::string text;
  double weight;  // of all variants of a caption: sum 1
};

/// The outcomes of a caption in bytewise order, without dropout and warm-up (training's matter). If
/// there are at most `max_variants` of them, found within 50,000 combinations of draws, their
/// probabilities are exact; else `max_variants` draws keyed by (seed, caption), equal ones joined.
std::vector<CaptionVariant> caption_variants(std::string_view caption,
                                             const CaptionOptions& options,
                                             int64_t max_variants,
                                             uint64_t seed);

/// Text without white space at both ends, as Python's str.strip sees white space; `text` is UTF-8.
std::string_view strip_unicode(std::string_view text);

}  // namespace flux::dataset
