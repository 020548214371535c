// common/optim/optimizer.h - what every optimizer offers a training loop: which tensors it keeps for
// a parameter, and the update of one parameter in place.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "common/optim/adafactor.h"
#include "common/optim/adamw.h"
#include "common/optim/adamw8bit.h"
#include "common/optim/ema.h"
#include "common/optim/lion.h"
#include "common/optim/prodigy.h"
#include "common/optim/schedule_free.h"
#include "common/optim/sgd.h"
#include "common/optim/weight_mode.h"
#include "common/tensor/fwd.h"

namespace flux {

struct OptimizerPrecision {
  WeightMode weights = WeightMode::kStochastic;
  /// float32 or bfloat16: of moments. 8-bit states and Adafactor's factors are as they are.
  c10::ScalarType states = c10::ScalarType::Float;
};

using OptimizerOptions = std::variant<AdamWOptions,
                                      AdamW8bitOptions,
                                      AdafactorOptions,
                                      LionOptions,
                                      ProdigyOptions,
                                      ScheduleFreeOptions,
                                      SgdOptions>;

/// One tensor kept for a parameter between steps.
struct StateTensor {
  std::string name;  // as in the library it comes from: "exp_avg", "state1", "absmax1"
  c10::ScalarType dtype;
  std::vector<int64_t> shape;
  bool on_host = false;  // kept in host memory where it stays, also of a parameter on a GPU
};

/// What all parameters of a step (or of a group with its own learning rate) share.
struct StepScalars {
  int64_t step = 1;  // from 1
  double learning_rate = 0;
  double gradient_scale = 1;  // gradients are multiplied by it, in float32: of clipping
  uint64_t seed = 0;          // of stochastic rounding
};

/// One parameter, or (but for Adafactor) a slice of the flattened parameter.
struct Slot {
  at::Tensor parameter;  // float32 or bfloat16, contiguous, without grad; updated in place
  at::Tensor
      gradient;  // shape and device of parameter, contiguous; float32 or bfloat16; not changed
  std::vector<at::Tensor> states;  // as state_layout() lists them, in its order; updated in place
  uint64_t id = 0;                 // of the parameter in the model: its stream of random numbers
  int64_t offset = 0;              // of a slice in the parameter, in elements; a multiple of 1024
};

/// Results do not depend on the number of threads, and on CPU not on the machine either. A step on
/// the Meta device changes nothing, but allocates what it allocates elsewhere. One optimizer makes one
/// step at a time: its scratch and numbers are its own.
class Optimizer {
 public:
  explicit Optimizer(OptimizerPrecision precision) : precision_(precision) {}
  virtual ~Optimizer() = default;

  /// From here on state_layout() has one more, last: "ema", an average of the parameter, float32 or bfloat16. Before any
  /// state is made.
  void keep_average(const EmaOptions& options, c10::ScalarType dtype);
  bool keeps_average() const { return average_.has_value(); }

  /// "adamw", as flags name it.
  virtual std::string_view name() const = 0;
  const OptimizerPrecision& precision() const { return precision_; }
  /// The states of a parameter. All bytes of all of them are zero before step 1.
  /// `offset` as Slot::offset: a slice of a parameter has slices of its states, of whatever size itself is.
  std::vector<StateTensor> state_layout(c10::IntArrayRef shape,
                                        c10::ScalarType dtype,
                                        int64_t offset = 0) const;

  /// Updates one parameter and its states in place; order among parameters is free. Throws
  /// std::invalid_argument, naming the argument and both values, if the slot is not as described
  /// above; c10::Error on a device without this op.
  void step(const Slot& slot, const StepScalars& scalars);

  /// After step(), and whatever else changes the parameter in that step: takes it into its average, if one is kept. Of an
  /// optimizer that averages itself that is evaluation_weights(), and with WeightMode::kMaster the float32 weights. The
  /// slot needs no gradient.
  void average(const Slot& slot, const StepScalars& scalars) const;

  /// Once a step, before its first parameter.
  virtual void begin_step(const StepScalars& /*scalars*/) {}
  /// True if all gradients of a step must have been seen before the first weight changes: then every
  /// slot goes to observe() and, after end_observe(), every slot to step(), with equal gradients.
  virtual bool two_phase() const { return false; }
  void observe(const Slot& slot, const StepScalars& scalars);
  virtual void end_observe() {}
  /// Numbers of the whole run, to be saved with the states and set again on resume; none for most.
  virtual std::map<std::string, double> numbers() const { return {}; }
  virtual void set_numbers(const std::map<std::string, double>& /*numbers*/) {}
  /// The weights to save or sample with; the parameter itself but for optimizers that average.
  at::Tensor evaluation_weights(const Slot& slot) const { return evaluated(without_average(slot)); }
  /// Whether those are others than the parameter.
  virtual bool averages() const { return false; }
  /// The average in the parameter's dtype, where it is kept; only if keeps_average().
  at::Tensor averaged_weights(const Slot& slot) const;

 protected:
  /// States but for what the weight mode adds.
  /// `elements`: that the parameter has, or at least has.
  virtual std::vector<StateTensor> moments(c10::IntArrayRef shape, int64_t elements) const = 0;
  /// The update of a slot that was checked. Here and below slots are without the average.
  virtual void update(const Slot& slot, const StepScalars& scalars) = 0;
  /// observe() of a slot that was checked.
  virtual void look(const Slot& /*slot*/, const StepScalars& /*scalars*/) {}
  virtual at::Tensor evaluated(const Slot& slot) const { return slot.parameter; }

 private:
  struct Average {
    EmaOptions options;
    c10::ScalarType dtype;
  };
  void check(const Slot& slot, const StepScalars& scalars) const;
  Slot without_average(const Slot& slot) const;

  OptimizerPrecision precision_;
  std::optional<Average> average_;
};

/// Throws std::invalid_argument for states that are neither float32 nor bfloat16.
std::unique_ptr<Optimizer> make_optimizer(const OptimizerOptions& options,
                                          OptimizerPrecision precision = {});

}  // namespace flux
