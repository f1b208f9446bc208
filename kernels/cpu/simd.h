// Vectors of 16 lanes and what the algorithms do with them. The primitives are each processor's own; everything else is
// written with them and with the operators that every vector has: + - * / & < and ==, lane by lane.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// The loops over small arrays of vectors keep them in registers only if the compiler is told to unroll them early.
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE __attribute__((always_inline)) inline

namespace gpt_faster {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

}  // namespace gpt_faster

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "avx2.h"
#include "padded.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "neon.h"
#include "padded.h"
#else
#error "The flags of the compiler choose none of the levels of instructions that have a file of primitives."
#endif

namespace gpt_faster {

enum class Dtype { float32, float16, bfloat16 };

// Calls work with a value of the C++ type of `dtype`. It stands outside of every loop.
template <class Work>
void with_type_of(Dtype dtype, const Work& work) {
  if (dtype == Dtype::float32) work(float{});
  else if (dtype == Dtype::float16) work(Half{});
  else work(BFloat16{});
}

template <class Element>
constexpr Dtype dtype_of = std::is_same_v<Element, float> ? Dtype::float32
                           : std::is_same_v<Element, Half> ? Dtype::float16 : Dtype::bfloat16;

INLINE float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The 4 bytes at `from` in every lane.
INLINE Ints every_int(const void* from) {
  int32_t value;
  std::memcpy(&value, from, 4);
  return every(value);
}

// The two bfloat16 at `from` in every lane.
INLINE Pairs every_pair(const void* from) {
  uint32_t pair;
  std::memcpy(&pair, from, 4);
  return every(pair);
}

// The lanes below `count`.
INLINE Ints first_lanes(int64_t count) { return lane_numbers() < every(static_cast<int32_t>(count)); }

// The largest of the numbers whose bits, without signs, these are: read as integers they are in the same order, and NaN is
// the largest of all.
INLINE float largest_of(Ints bits) {
  const int32_t largest = reduce_max(bits);
  float value;
  std::memcpy(&value, &largest, 4);
  return value;
}

// e^x for x <= 0, to one unit in the last place or two: 2^n times a polynomial in what is left of x / ln 2.
INLINE Floats exp_of(Floats x) {
  const Floats n = round(x * every(1.44269504f));
  Floats rest = multiply_add(n, every(-0.693145752f), x);  // ln 2 in two parts
  rest = multiply_add(n, every(-1.42860677e-6f), rest);
  Floats power = every(1.0f / 720);
  for (const float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    power = multiply_add(power, rest, every(term));
  }
  return times_power_of_two(power, n);
}

// x times its sigmoid.
INLINE Floats silu_of(Floats x) {
  const Floats one = every(1.0f);
  // e^-|x| does not overflow. It is 0 from 104 on, and far beyond that exp_of is no longer right
  const Floats power = exp_of(-min(abs(x), every(104.0f)));
  return x * (select(x < every(0.0f), power, one) / (one + power));
}

}  // namespace gpt_faster
