// pipelines/check/quant.h - the fp8 vectors of kind optim.
#pragma once
#include "pipelines/check/case.h"

namespace flux::check {

/// fp8_e4m3.safetensors: `table`, `edge/*`, and NAME/x with scales, codes and values for one scale a
/// tensor, a row (`channel`) and 64 neighbours (`block64`). Nothing if the file is not there.
void check_fp8(const Case& c);

}  // namespace flux::check
