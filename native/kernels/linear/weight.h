// A Weight from numbers that nobody has checked yet.
#pragma once
#include "kernels/linear/linear.h"

namespace haomiao {

// Fill *weight and return nullptr, or return one line that says what is wrong. The sections must have exactly the size
// that the numbers imply; `lo` and `mask` may be nullptr. Nothing is read from them and no alignment is assumed.
const char* make_weight(uint32_t encoding, int64_t rows, int64_t cols, int64_t group, int64_t lo_shift,
                        const uint8_t* hi, uint64_t hi_bytes, const uint8_t* lo, uint64_t lo_bytes,
                        const TileMask* mask, Weight* weight);

}  // namespace haomiao
