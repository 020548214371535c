// pipelines/train/reproduce.h - makes a step again whose loss or gradients were not finite, from the file of dump.h.
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "pipelines/train/options.h"

namespace flux::train {

struct Reproduction {
  int64_t step = 0;
  std::string reason, loss;          // as dumped
  std::string reason_now, loss_now;  // of the step made again; "" and a number if all was finite
  std::string first;  // the first tensor with a number that is not finite, and which of them
  bool same() const { return reason == reason_now && loss == loss_now; }

  std::string line() const;
  nlohmann::json object() const;
};

/// --reproduce: makes the step of a dump again with the options of its run, and finds the first number that is not finite:
/// among the inputs, then in the order of Trainer::watch(). Reads no cache. Throws InputError for a file that is no such
/// dump; CacheError for other options, another model, or weights that are gone; and what loading a model throws.
Reproduction reproduce(const Options& options);

}  // namespace flux::train
