// pipelines/model/random_streams.h - the random numbers of one tensor of a random model.
#pragma once
#include <cstring>
#include <string_view>

#include "common/core/hash.h"
#include "common/core/rng.h"

namespace flux::model {

/// Each tensor has a stream of its own, keyed by its name, so that it does not depend on what else
/// is in the file.
inline RandomStream stream_of(uint64_t seed, std::string_view net, std::string_view name) {
  const Sha256Digest digest = Sha256().add_field(net).add_field(name).digest();
  uint64_t words[2];
  std::memcpy(words, digest.data(), sizeof words);
  return RandomStream(seed, Purpose::kTinyModel, words[0], words[1]);
}

}  // namespace flux::model
