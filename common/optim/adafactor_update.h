// common/optim/adafactor_update.h - Adafactor of one parameter on the CPU, on all threads.
#pragma once
#include "common/optim/op_arguments.h"

namespace flux {

/// All passes.
void adafactor_update(const Operands& operands,
                      const AdafactorArguments& arguments,
                      const AdafactorScalars& scalars);

}  // namespace flux
