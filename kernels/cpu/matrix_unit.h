// A processor's unit for products of bfloat16 matrices, such as Intel's AMX, handed to the algorithms like threads.
#pragma once

#include "simd.h"

namespace gpt_faster {

// Tokens of a request from which on the unit multiplies them. Guesses that are checked together are fewer, 33 at most: a
// token that is decoded takes one arithmetic, whatever stands beside it.
constexpr int64_t kMatrixTokens = 64;

struct MatrixUnit {
  // c [M, N] = a [M, K] b, or is added to c, with sums in float32. Rows 2i and 2i + 1 of b [K, N] lie in pairs, [K / 2, N].
  // Strides are those of rows. The first call with some sizes compiles code for them, which is kept: they must be few.
  void (*multiply)(int64_t M, int64_t N, int64_t K, const BFloat16* a, int64_t a_stride, const uint32_t* b,
                   int64_t b_stride, float* c, int64_t c_stride, bool add);
  void (*release)();  // for each thread, after its last product
};

}  // namespace gpt_faster
