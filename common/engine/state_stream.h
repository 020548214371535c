// common/engine/state_stream.h - optimizer states, and gradients that wait, of weights that stream.
//
// A block's weights are all needed at a time, its states one tensor after the other. So they pass through a ring of their
// own, which has room for the states of a few tensors instead of two blocks.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "common/engine/record_layout.h"
#include "common/engine/ring.h"

namespace flux::engine {

/// Of one trainable.
struct StateEntry {
  RecordLayout states;
  RecordLayout gradient;  // without slices if none waits
};

class StateStream {
 public:
  /// Entry i has the records first_record + 2 i (states) and first_record + 2 i + 1 (gradient) of the store, which are
  /// as long as its layouts say. The memory is that of `lookahead` entries more than the one at work.
  StateStream(std::shared_ptr<RecordStore> store,
              int64_t first_record,
              std::vector<StateEntry> entries,
              at::Device device,
              int64_t lookahead);
  /// Lengths of the records for the store.
  static std::vector<int64_t> record_bytes(const std::vector<StateEntry>& entries);

  enum class Use {
    kUpdate,             // the states are read and written
    kUpdateWithWaiting,  // the gradient that was put away is read too
    kPutAway,            // the gradient is written
  };
  /// Whether the entry comes next as planned.
  bool expects(size_t entry, Use use) const;
  /// What comes next, in this order, and again from its beginning. What is open is closed, unchanged.
  void expect(std::vector<size_t> entries, Use use);

  struct Opened {
    std::vector<at::Tensor> states;
    at::Tensor gradient;  // with kUpdateWithWaiting
  };
  /// The entry that comes next, which must be as expected: std::logic_error otherwise. Throws as Ring::acquire().
  Opened open();
  /// `changed`: the states are to be written back.
  void close(bool changed);
  /// Stores the gradient of the entry that comes next; an undefined one as zeros.
  void put_away(const at::Tensor& gradient);

  RingCounts counts() const { return ring_ ? ring_->counts() : RingCounts{}; }
  const RingOptions& ring_options() const { return options_; }

 private:
  struct Stop {
    size_t entry = 0;
    bool gradient = false;
  };
  int64_t record(const Stop& stop) const;
  Lease acquire(const Stop& expected);

  std::shared_ptr<RecordStore> store_;
  int64_t first_record_ = 0;
  std::vector<StateEntry> entries_;
  at::Device device_;
  RingOptions options_;
  std::unique_ptr<Ring> ring_;  // made when it is known what comes first
  std::vector<size_t> order_;
  Use use_ = Use::kUpdate;
  size_t next_ = 0;  // in order_
  std::vector<Lease> open_;
};

}  // namespace flux::engine
