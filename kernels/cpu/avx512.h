// The primitives of x86 processors with AVX512 and VNNI, some faster on those with AVX512 BF16. A vector is one register.
// Another processor needs a file like this one: the types, the sizes and the eight groups of primitives.
#pragma once

#include <immintrin.h>

namespace gpt_faster {

typedef float Floats __attribute__((vector_size(64), may_alias));     // 16 values, or 16 sums
typedef int32_t Ints __attribute__((vector_size(64), may_alias));     // 16 values, or 16 sums
typedef uint8_t Bytes __attribute__((vector_size(64), may_alias));    // 16 x 4: four codes for each sum
typedef uint32_t Pairs __attribute__((vector_size(64), may_alias));   // 16 x 2: two bfloat16 for each sum, the first low

constexpr bool kFewRegisters = false;  // whether several rows of bfloat16 are multiplied in parts
constexpr bool kHasBf16Matrices = true;  // whether there are instructions for products of bfloat16 matrices

// How much of a product is kept in registers at a time: rows of activations, ...
constexpr int kCodesRows = 4, kBf16Rows = 4, kScoreRows = 12;
// ... tiles of codes, of several rows or of one, rows of a bfloat16 weight, and vectors of a sum of values.
constexpr int kCodesTiles = 2, kCodesStreams = 4, kBf16Outputs = 4, kValueVectors = 24;

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

INLINE Floats load(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

// 32 codes of 4 bits from 16 bytes: those in the low nibbles, then those in the high ones.
INLINE void load_nibbles(const uint8_t* from, Floats& low, Floats& high) {
  const Ints both = (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  low = __builtin_convertvector(both & 15, Floats), high = __builtin_convertvector(both >> 4, Floats);
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

// The indices of 16 lanes.
INLINE Ints lane_numbers() { return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// ---------------------------------------------------------------- 3. lane by lane, beside + - * / & < == of the types

INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c, rounded once
INLINE Floats select(Ints condition, Floats a, Floats b) { return condition ? a : b; }
INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
INLINE Ints bits_of(Floats x) { return (Ints)x; }
INLINE Floats abs(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }
INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
INLINE Ints max(Ints a, Ints b) { return a > b ? a : b; }
INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }

// ---------------------------------------------------------------- 4. codes, and sums of their products with bytes

// The codes of the first and of the second four inputs that share bytes, one code in each nibble.
INLINE Bytes low_nibbles(Bytes both) { return both & 15; }
INLINE Bytes high_nibbles(Bytes both) { return both >> 4; }

// The entries of a table that nibbles stand for.
INLINE Bytes looked_up(Bytes nibbles, const uint8_t (&table)[16]) {
  const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return (Bytes)_mm512_shuffle_epi8(all, (__m512i)nibbles);
}

// Code number c of each four.
INLINE Ints code_of(Bytes codes, int c) { return ((Ints)codes >> 8 * c) & 255; }

// The entries of a table that number c of each four stands for, of numbers up to 15.
INLINE Floats entries_of(Floats table, Bytes codes, int c) {
  return _mm512_permutexvar_ps((__m512i)((Ints)codes >> 8 * c), table);
}

// Number k of each 16 that share four bytes, 2 bits each, as `at_places` takes it.
INLINE Ints place_of(Bytes places, int k) { return (Ints)places >> 2 * k; }

// In each lane, that of four values which has its place.
INLINE Floats at_places(const float* four, Ints places) {
  return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(four)), (__m512i)places);
}

// Number c of each four, of numbers in e4m3: sign, exponent and mantissa in the places of float32, whose exponent has
// another bias.
INLINE Floats e4m3_of(Bytes codes, int c) {
  return (Floats)((((Ints)codes << (24 - 8 * c)) >> 4) & static_cast<int32_t>(0x87f00000)) * 0x1p120f;
}

// What int8 codes, which are stored with 128 added, still have more than they should in a product.
constexpr int kAddedToInt8 = 128;

// 16 sums over a group of 32 inputs, from `start` on, of codes up to MOST.
template <int MOST>
struct ByteSums {
  Ints sum;

  INLINE void begin(int32_t start) { sum = every(start); }

  // To each sum, its four products of an unsigned code and a signed byte of x are added.
  INLINE void add(Bytes codes, Ints x) { sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x); }

  INLINE Floats total() const { return to_floats(sum); }
};

// ---------------------------------------------------------------- 5. sums of products of bfloat16

INLINE Floats firsts_of(Pairs pairs) { return (Floats)(pairs << 16); }
INLINE Floats seconds_of(Pairs pairs) { return (Floats)(pairs & 0xffff0000); }

// To each sum, its two products are added.
INLINE Floats dot_pairs(Floats sum, Pairs a, Pairs b) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  return multiply_add(firsts_of(a), firsts_of(b), multiply_add(seconds_of(a), seconds_of(b), sum));
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
