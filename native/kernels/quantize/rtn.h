// Round-to-nearest quantization of groups of weights. The rule is stated in src/haomiao/kernels/rtn.py and written out
// in numpy in src/haomiao/kernels/rtn_reference.py; the results are the same to the bit.
#pragma once
#include <stdint.h>

namespace haomiao {

// `groups` groups x of `group` (a multiple of 16) finite weights -> a float16 scale each (as f32) and two planes of
// codes in [-8, 7], or with lo = nullptr the codes of a hi plane alone. False if a scale overflows.
bool quantize_planes(const float* x, int64_t groups, int group, int lo_shift, float* scales, int8_t* hi, int8_t* lo);

}  // namespace haomiao
