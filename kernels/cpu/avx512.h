// The primitives of x86 processors with AVX512 and VNNI, some also of those with AVX512 BF16. A vector is one register.
// Another processor needs a file like this one: the types and the seven groups of primitives.
#pragma once

#include <immintrin.h>

namespace gpt_faster {

typedef float Floats __attribute__((vector_size(64), may_alias));     // 16 values, or 16 sums
typedef int32_t Ints __attribute__((vector_size(64), may_alias));     // 16 values, or 16 sums
typedef uint8_t Bytes __attribute__((vector_size(64), may_alias));    // 16 x 4: four codes for each sum
typedef uint32_t Pairs __attribute__((vector_size(64), may_alias));   // 16 x 2: two bfloat16 for each sum, the first low

#ifdef __AVX512BF16__
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif

// ---------------------------------------------------------------- 1. load and store: values from `count` on are 0

INLINE __mmask16 lanes(int64_t count) { return count < 16 ? (1 << count) - 1 : 0xffff; }

INLINE Floats load(const float* from, int64_t count = 16) { return _mm512_maskz_loadu_ps(lanes(count), from); }

INLINE Floats load(const Half* from, int64_t count = 16) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(count), from));
}

INLINE Floats load(const BFloat16* from, int64_t count = 16) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(count), from));
  return (Floats)_mm512_slli_epi32(wide, 16);
}

INLINE void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }

INLINE void store(Half* to, Floats value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

INLINE void store(BFloat16* to, Floats value) {
#ifdef __AVX512BF16__
  const __m256i half = (__m256i)_mm512_cvtneps_pbh(value);
#else  // to the nearest, ties to even
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32((__m512i)value, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32((__m512i)value, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
}

// Numbers beyond those of a byte become -128 or 127.
INLINE void store(int8_t* to, Ints value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8((__m512i)value));
}

INLINE Bytes load_bytes(const uint8_t* from) { return (Bytes)_mm512_loadu_si512(from); }
INLINE void store(uint8_t* to, Bytes value) { _mm512_storeu_si512(to, (__m512i)value); }

INLINE Pairs load_pairs(const uint32_t* from) { return (Pairs)_mm512_loadu_si512(from); }
INLINE void store(uint32_t* to, Pairs value) { _mm512_storeu_si512(to, (__m512i)value); }

// 32 bfloat16 that lie one after another.
INLINE Pairs load_pairs(const BFloat16* from, int64_t count = 32) {
  const __mmask32 mask = count < 32 ? (__mmask32{1} << count) - 1 : ~__mmask32{0};
  return (Pairs)_mm512_maskz_loadu_epi16(mask, from);
}

// Pairs of one value of `first` and one of `second`, 0 from `count` on.
INLINE Pairs interleave(const BFloat16* first, const BFloat16* second, int64_t count) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(count), second));
  return (Pairs)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// ---------------------------------------------------------------- 2. one value in every lane

INLINE Floats every(float value) { return _mm512_set1_ps(value); }
INLINE Ints every(int32_t value) { return (Ints)_mm512_set1_epi32(value); }
INLINE Pairs every(uint32_t value) { return (Pairs)_mm512_set1_epi32(value); }

// ---------------------------------------------------------------- 3. a * b + c, rounded once

INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

// ---------------------------------------------------------------- 4. sums of products of bytes

// To each sum, its four products of an unsigned code and a signed byte of x are added.
INLINE Ints dot_bytes(Ints sum, Bytes codes, Ints x) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
}

// ---------------------------------------------------------------- 5. sums of products of bfloat16

// To each sum, its two products are added.
INLINE Floats dot_pairs(Floats sum, Pairs a, Pairs b) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  __builtin_trap();  // no operator gets here: they ask kHasBf16 first
#endif
}

// ---------------------------------------------------------------- 6. rounding, ties to even

INLINE Floats round(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Ints round_to_int(Floats x) { return (Ints)_mm512_cvtps_epi32(x); }

// x * 2^n, where n is a whole number; 0 where n is minus infinity, even if x is NaN.
INLINE Floats times_power_of_two(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

// ---------------------------------------------------------------- 7. across lanes

INLINE float reduce_add(Floats x) { return _mm512_reduce_add_ps(x); }
INLINE int32_t reduce_add(Ints x) { return _mm512_reduce_add_epi32((__m512i)x); }
INLINE float reduce_max(Floats x) { return _mm512_reduce_max_ps(x); }
INLINE int32_t reduce_max(Ints x) { return _mm512_reduce_max_epi32((__m512i)x); }
INLINE bool any(Ints condition) { return _mm512_movepi32_mask((__m512i)condition); }  // of lanes that are 0 or -1

// Lane i is the sum of v[i], which is cheaper than 16 reductions.
INLINE Floats sums_of(Floats (&v)[16]) {
  UNROLL for (int i = 0; i < 8; i++) {
    v[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  UNROLL for (int i = 0; i < 4; i++) {
    const __m512d a = (__m512d)v[2 * i], b = (__m512d)v[2 * i + 1];
    v[i] = (Floats)_mm512_unpacklo_pd(a, b) + (Floats)_mm512_unpackhi_pd(a, b);
  }
  for (int half = 2; half >= 1; half--) UNROLL for (int i = 0; i < half; i++) {  // four quarters to two, two to one
    v[i] = _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd);
  }
  return v[0];
}

// The sum of one vector, in the order in which sums_of adds: a result must not depend on how many are summed together.
INLINE float sum_of(Floats v) {
  v = v + _mm512_permute_ps(v, 0x4e);        // lanes 0 + 2 and 1 + 3 of each quarter,
  v = v + _mm512_permute_ps(v, 0xb1);        // these two,
  v = v + _mm512_shuffle_f32x4(v, v, 0xb1);  // quarters 0 + 1 and 2 + 3,
  v = v + _mm512_shuffle_f32x4(v, v, 0x4e);  // these two
  return _mm512_cvtss_f32(v);
}

// Rows to columns.
INLINE void transpose(Pairs (&rows)[16]) {
  __m512i u[16], v[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    u[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    u[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {  // v[i + c] has column 4q + c of four rows in its quarter q
    v[i] = _mm512_unpacklo_epi64(u[i], u[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(u[i], u[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(u[i + 1], u[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(u[i + 1], u[i + 3]);
  }
  UNROLL for (int c = 0; c < 4; c++) {
    const __m512i a = _mm512_shuffle_i32x4(v[c], v[c + 4], 0x88), b = _mm512_shuffle_i32x4(v[c], v[c + 4], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0x88), e = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0xdd);
    rows[c] = (Pairs)_mm512_shuffle_i32x4(a, d, 0x88);
    rows[c + 8] = (Pairs)_mm512_shuffle_i32x4(a, d, 0xdd);
    rows[c + 4] = (Pairs)_mm512_shuffle_i32x4(b, e, 0x88);
    rows[c + 12] = (Pairs)_mm512_shuffle_i32x4(b, e, 0xdd);
  }
}

}  // namespace gpt_faster
