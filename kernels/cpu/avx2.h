// The primitives of x86 processors with AVX2, FMA and F16C, some faster on those with AVX VNNI. A vector is two registers.
#pragma once

#include <immintrin.h>

namespace gpt_faster {

struct Floats {  // 16 values, or 16 sums
  __m256 low, high;
};

struct Whole {
  __m256i low, high;
};

struct Ints : Whole {};   // 16 values, or 16 sums
struct Bytes : Whole {};  // 16 x 4: four codes for each sum
struct Pairs : Whole {};  // 16 x 2: two bfloat16 for each sum, the first low

constexpr bool kFewRegisters = true;  // whether several rows of bfloat16 are multiplied in parts
constexpr bool kHasBf16Matrices = false;  // whether there are instructions for products of bfloat16 matrices

// How much of a product is kept in registers at a time: rows of activations, ...
constexpr int kCodesRows = 2, kBf16Rows = 2, kScoreRows = 2;
// ... tiles of codes, of several rows or of one, rows of a bfloat16 weight, and vectors of a sum of values.
constexpr int kCodesTiles = 1, kCodesStreams = 2, kBf16Outputs = 3, kValueVectors = 6;

// ---------------------------------------------------------------- 1. load and store

INLINE __m256i load_whole(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
INLINE __m128i load_half(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
INLINE void store_whole(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

INLINE Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }

INLINE Floats load(const Half* from) { return {_mm256_cvtph_ps(load_half(from)), _mm256_cvtph_ps(load_half(from + 8))}; }

INLINE __m256 widened(__m128i bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16)); }

INLINE Floats load(const BFloat16* from) { return {widened(load_half(from)), widened(load_half(from + 8))}; }

INLINE __m256 widened(const int8_t* from) {  // 8 of them
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
INLINE Floats load(const int8_t* from) { return {widened(from), widened(from + 8)}; }

// 32 codes of 4 bits from 16 bytes: those in the low nibbles, then those in the high ones.
INLINE void load_nibbles(const uint8_t* from, Floats& low, Floats& high) {
  const auto widened = [](const uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  };
  const __m256i first = widened(from), second = widened(from + 8), nibble = _mm256_set1_epi32(15);
  low = {_mm256_cvtepi32_ps(first & nibble), _mm256_cvtepi32_ps(second & nibble)};
  high = {_mm256_cvtepi32_ps(_mm256_srli_epi32(first, 4)), _mm256_cvtepi32_ps(_mm256_srli_epi32(second, 4))};
}

INLINE void store(float* to, Floats value) {
  _mm256_storeu_ps(to, value.low);
  _mm256_storeu_ps(to + 8, value.high);
}

INLINE void store(Half* to, Floats value) {
  const __m128i low = _mm256_cvtps_ph(value.low, _MM_FROUND_TO_NEAREST_INT);
  store_whole(to, _mm256_set_m128i(_mm256_cvtps_ph(value.high, _MM_FROUND_TO_NEAREST_INT), low));
}

// To the nearest, ties to even, in the low halves of the lanes.
INLINE __m256i rounded_to_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}

INLINE void store(BFloat16* to, Floats value) {
  const __m256i mixed = _mm256_packus_epi32(rounded_to_bf16(value.low), rounded_to_bf16(value.high));
  store_whole(to, _mm256_permute4x64_epi64(mixed, 0xd8));  // packed by quarters: 0 2 1 3
}

// Numbers beyond those of a byte become -128 or 127.
INLINE void store(int8_t* to, Ints value) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(value.low, value.high), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}

INLINE Bytes load_bytes(const uint8_t* from) { return {load_whole(from), load_whole(from + 32)}; }
INLINE void store(uint8_t* to, Bytes value) { store_whole(to, value.low), store_whole(to + 32, value.high); }

INLINE Pairs load_pairs(const uint32_t* from) { return {load_whole(from), load_whole(from + 8)}; }
INLINE void store(uint32_t* to, Pairs value) { store_whole(to, value.low), store_whole(to + 8, value.high); }

// 32 bfloat16 that lie one after another.
INLINE Pairs load_pairs(const BFloat16* from) { return {load_whole(from), load_whole(from + 16)}; }

// Pairs of one value of `first` and one of `second`.
INLINE Pairs interleave(const BFloat16* first, const BFloat16* second) {
  const Floats high = load(second);
  const auto pair = [](const BFloat16* from, __m256 high) {
    return _mm256_or_si256(_mm256_cvtepu16_epi32(load_half(from)), _mm256_castps_si256(high));
  };
  return {pair(first, high.low), pair(first + 8, high.high)};
}

// ---------------------------------------------------------------- 2. one value in every lane

INLINE Floats every(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
INLINE Ints every(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
INLINE Pairs every(uint32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }

// The indices of 16 lanes.
INLINE Ints lane_numbers() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}

// ---------------------------------------------------------------- 3. lane by lane

INLINE Floats operator+(Floats a, Floats b) { return {a.low + b.low, a.high + b.high}; }
INLINE Floats operator-(Floats a, Floats b) { return {a.low - b.low, a.high - b.high}; }
INLINE Floats operator*(Floats a, Floats b) { return {a.low * b.low, a.high * b.high}; }
INLINE Floats operator/(Floats a, Floats b) { return {a.low / b.low, a.high / b.high}; }
INLINE Floats operator-(Floats a) { return {-a.low, -a.high}; }
INLINE Ints operator<(Floats a, Floats b) { return {(__m256i)(a.low < b.low), (__m256i)(a.high < b.high)}; }
INLINE Ints operator==(Floats a, Floats b) { return {(__m256i)(a.low == b.low), (__m256i)(a.high == b.high)}; }
INLINE Ints operator<(Ints a, Ints b) {
  return {_mm256_cmpgt_epi32(b.low, a.low), _mm256_cmpgt_epi32(b.high, a.high)};
}
INLINE Ints operator&(Ints a, Ints b) { return {a.low & b.low, a.high & b.high}; }
INLINE Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }

INLINE Floats multiply_add(Floats a, Floats b, Floats c) {  // a * b + c, rounded once
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE Floats select(Ints condition, Floats a, Floats b) {
  return {_mm256_blendv_ps(b.low, a.low, (__m256)condition.low), _mm256_blendv_ps(b.high, a.high, (__m256)condition.high)};
}
INLINE Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
INLINE Ints bits_of(Floats x) { return {(__m256i)x.low, (__m256i)x.high}; }
INLINE Floats abs(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
INLINE Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
INLINE Ints max(Ints a, Ints b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }
INLINE Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }

// ---------------------------------------------------------------- 4. codes, and sums of their products with bytes

// The codes of the first and of the second four inputs that share bytes, one code in each nibble.
INLINE Bytes low_nibbles(Bytes both) {
  const __m256i nibble = _mm256_set1_epi8(15);
  return {both.low & nibble, both.high & nibble};
}
INLINE Bytes high_nibbles(Bytes both) {
  return low_nibbles({_mm256_srli_epi16(both.low, 4), _mm256_srli_epi16(both.high, 4)});
}

// The entries of a table that nibbles stand for.
INLINE Bytes looked_up(Bytes nibbles, const uint8_t (&table)[16]) {
  const __m256i both = _mm256_broadcastsi128_si256(load_half(table));
  return {_mm256_shuffle_epi8(both, nibbles.low), _mm256_shuffle_epi8(both, nibbles.high)};
}

// Code number c of each four.
INLINE Ints code_of(Bytes codes, int c) {
  const __m256i byte = _mm256_set1_epi32(255);
  return {_mm256_srli_epi32(codes.low, 8 * c) & byte, _mm256_srli_epi32(codes.high, 8 * c) & byte};
}

// The entries of a table that number c of each four stands for, of numbers up to 15: the last three bits choose in each
// half, and the one before them is made a sign, which chooses the half.
INLINE Floats entries_of(Floats table, Bytes codes, int c) {
  const auto entries = [&](__m256i codes) {
    const __m256i number = _mm256_srli_epi32(codes, 8 * c);
    const __m256 low = _mm256_permutevar8x32_ps(table.low, number), high = _mm256_permutevar8x32_ps(table.high, number);
    return _mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32(codes, 28 - 8 * c));
  };
  return {entries(codes.low), entries(codes.high)};
}

// Number k of each 16 that share four bytes, 2 bits each, as `at_places` takes it.
INLINE Ints place_of(Bytes places, int k) {
  return {_mm256_srli_epi32(places.low, 2 * k), _mm256_srli_epi32(places.high, 2 * k)};
}

// In each lane, that of four values which has its place.
INLINE Floats at_places(const float* four, Ints places) {
  const __m256 all = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four));
  return {_mm256_permutevar_ps(all, places.low), _mm256_permutevar_ps(all, places.high)};
}

// Number c of each four, of numbers in e4m3: sign, exponent and mantissa in the places of float32, whose exponent has
// another bias.
INLINE Floats e4m3_of(Bytes codes, int c) {
  const auto number = [&](__m256i codes) {
    const __m256i placed = _mm256_srai_epi32(_mm256_slli_epi32(codes, 24 - 8 * c), 4);
    return (__m256)(placed & _mm256_set1_epi32(0x87f00000)) * _mm256_set1_ps(0x1p120f);
  };
  return {number(codes.low), number(codes.high)};
}

// Sums of two products of an unsigned and a signed byte, which must fit 16 bits, to four.
INLINE __m256i fours(__m256i twos) { return _mm256_madd_epi16(twos, _mm256_set1_epi16(1)); }

#ifdef __AVXVNNI__

// What int8 codes, which are stored with 128 added, still have more than they should in a product.
constexpr int kAddedToInt8 = 128;

// 16 sums over a group of 32 inputs, from `start` on, of codes up to MOST.
template <int MOST>
struct ByteSums {
  Ints sum;

  INLINE void begin(int32_t start) { sum = every(start); }

  // To each sum, its four products of an unsigned code and a signed byte of x are added.
  INLINE void add(Bytes codes, Ints x) {
    sum = {_mm256_dpbusd_avx_epi32(sum.low, codes.low, x.low), _mm256_dpbusd_avx_epi32(sum.high, codes.high, x.high)};
  }

  INLINE Floats total() const { return to_floats(sum); }
};

#else

constexpr int kAddedToInt8 = 0;

// Two products of 255 x 127 would not fit 16 bits. Those of 128 x 127 do: the sign of a code is taken into x.
template <int MOST>
struct ByteSums {
  Ints sum;

  INLINE void begin(int32_t start) { sum = every(start); }

  INLINE void add(Bytes codes, Ints x) {
    const auto products = [](__m256i codes, __m256i x) {
      const __m256i code = codes ^ _mm256_set1_epi8(-128);
      return fours(_mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(x, code)));
    };
    sum = sum + Ints{products(codes.low, x.low), products(codes.high, x.high)};
  }

  INLINE Floats total() const { return to_floats(sum); }
};

// Some sums of products of small codes and 127 fit 16 bits, those of int4 a whole group of them. Only then they are added to
// fours.
template <int MOST>
  requires(MOST < 128)
struct ByteSums<MOST> {
  static constexpr int kFit = 32767 / (2 * MOST * 127);
  __m256i low, high;  // sums of twos
  Ints sum;
  int added;

  INLINE void begin(int32_t start) { low = high = _mm256_setzero_si256(), sum = every(start), added = 0; }

  INLINE void add(Bytes codes, Ints x) {
    if (added++ == kFit) sum = fours_and_sum(), low = high = _mm256_setzero_si256(), added = 1;
    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(codes.low, x.low));
    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(codes.high, x.high));
  }

  INLINE Ints fours_and_sum() const { return sum + Ints{fours(low), fours(high)}; }
  INLINE Floats total() const { return to_floats(fours_and_sum()); }
};

#endif

// ---------------------------------------------------------------- 5. sums of products of bfloat16

// The first or the second of each pair.
template <bool SECOND>
INLINE __m256 part_of(__m256i pairs) {
  return _mm256_castsi256_ps(SECOND ? pairs & _mm256_set1_epi32(0xffff0000) : _mm256_slli_epi32(pairs, 16));
}

INLINE Floats firsts_of(Pairs pairs) { return {part_of<false>(pairs.low), part_of<false>(pairs.high)}; }
INLINE Floats seconds_of(Pairs pairs) { return {part_of<true>(pairs.low), part_of<true>(pairs.high)}; }

// To each sum, its two products are added.
INLINE Floats dot_pairs(Floats sum, Pairs a, Pairs b) {
  const auto dot = [](__m256 sum, __m256i a, __m256i b) {
    const __m256 seconds = _mm256_fmadd_ps(part_of<true>(a), part_of<true>(b), sum);
    return _mm256_fmadd_ps(part_of<false>(a), part_of<false>(b), seconds);
  };
  return {dot(sum.low, a.low, b.low), dot(sum.high, a.high, b.high)};
}

template <bool SECOND, bool HIGH, int R, int W>
INLINE void add_parts(Floats (&sum)[R][W], const BFloat16* x, int64_t x_stride, const BFloat16* weight,
                      int64_t stride) {
  constexpr int64_t kAt = HIGH ? 16 : 0;
  __m256 rows[R];
  UNROLL for (int i = 0; i < R; i++) rows[i] = part_of<SECOND>(load_whole(x + i * x_stride + kAt));
  UNROLL for (int j = 0; j < W; j++) {
    const __m256 weights = part_of<SECOND>(load_whole(weight + j * stride + kAt));
    UNROLL for (int i = 0; i < R; i++) {
      __m256& each = HIGH ? sum[i][j].high : sum[i][j].low;
      asm volatile("vfmadd231ps %1, %2, %0" : "+x"(each) : "x"(rows[i]), "x"(weights));
    }
  }
}

// To the sums of R rows of x and W of a weight, as dot_pairs, the products of 32 columns. One half of each vector and
// one of each pair at a time, because the sums leave only four registers.
template <int R, int W>
INLINE void add_in_parts(Floats (&sum)[R][W], const BFloat16* x, int64_t x_stride, const BFloat16* weight,
                         int64_t stride) {
  add_parts<true, false>(sum, x, x_stride, weight, stride);
  add_parts<false, false>(sum, x, x_stride, weight, stride);
  add_parts<true, true>(sum, x, x_stride, weight, stride);
  add_parts<false, true>(sum, x, x_stride, weight, stride);
}

// ---------------------------------------------------------------- 6. rounding, ties to even

INLINE Floats round(Floats x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
}
INLINE Ints round_to_int(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }

// x * 2^n, where n is a whole number up to 127; 0 where n is minus infinity, even if x is NaN.
INLINE Floats times_power_of_two(Floats x, Floats n) {
  const auto scaled = [](__m256 x, __m256 n) {
    const __m256 least = _mm256_set1_ps(-252);  // by two factors, because one would have to be a denormal number
    const __m256i exponent = _mm256_cvtps_epi32(_mm256_max_ps(n, least)), half = _mm256_srai_epi32(exponent, 1);
    const auto power = [](__m256i n) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    };
    const __m256 value = x * power(half) * power(_mm256_sub_epi32(exponent, half));
    return _mm256_and_ps(value, _mm256_cmp_ps(n, least, _CMP_NLT_UQ));
  };
  return {scaled(x.low, n.low), scaled(x.high, n.high)};
}

// ---------------------------------------------------------------- 7. across lanes

// Lane i is the sum of lanes of v[i], all in one order: 0 + 2 and 1 + 3 of each half, these two, both halves.
INLINE __m256 sums_of_eight(__m256 (&v)[8]) {
  UNROLL for (int i = 0; i < 4; i++) {
    v[i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  UNROLL for (int i = 0; i < 2; i++) {
    const __m256d a = (__m256d)v[2 * i], b = (__m256d)v[2 * i + 1];
    v[i] = (__m256)_mm256_unpacklo_pd(a, b) + (__m256)_mm256_unpackhi_pd(a, b);
  }
  return _mm256_permute2f128_ps(v[0], v[1], 0x20) + _mm256_permute2f128_ps(v[0], v[1], 0x31);
}

// Lane i is the sum of v[i], which is cheaper than 16 reductions.
INLINE Floats sums_of(Floats (&v)[16]) {
  __m256 low[8], high[8];
  UNROLL for (int i = 0; i < 8; i++) low[i] = v[i].low + v[i].high, high[i] = v[8 + i].low + v[8 + i].high;
  return {sums_of_eight(low), sums_of_eight(high)};
}

// The sum of one vector, in the order in which sums_of adds: a result must not depend on how many are summed together.
INLINE float sum_of(Floats v) {
  __m256 sum = v.low + v.high;
  sum = sum + _mm256_permute_ps(sum, 0x4e);
  sum = sum + _mm256_permute_ps(sum, 0xb1);
  return _mm256_cvtss_f32(sum + _mm256_permute2f128_ps(sum, sum, 1));
}

INLINE float reduce_add(Floats x) { return sum_of(x); }
INLINE float reduce_max(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_permute_ps(four, 0x4e));
  return _mm_cvtss_f32(_mm_max_ps(two, _mm_permute_ps(two, 0xb1)));
}

template <class Both>
INLINE int32_t reduce(Ints x, const Both& both) {
  const __m256i eight = both(x.low, x.high), four = both(eight, _mm256_permute4x64_epi64(eight, 0x4e));
  const __m256i two = both(four, _mm256_shuffle_epi32(four, 0x4e));
  return _mm256_cvtsi256_si32(both(two, _mm256_shuffle_epi32(two, 0xb1)));
}
INLINE int32_t reduce_add(Ints x) { return reduce(x, [](__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }); }
INLINE int32_t reduce_max(Ints x) { return reduce(x, [](__m256i a, __m256i b) { return _mm256_max_epi32(a, b); }); }

INLINE bool any(Ints condition) {  // of lanes that are 0 or -1
  return _mm256_movemask_ps((__m256)(condition.low | condition.high));
}

// Rows to columns, of 8 x 8 numbers.
INLINE void transpose(__m256i (&rows)[8]) {
  __m256i u[8], v[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    u[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    u[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {  // v[i + c] has columns c and 4 + c of four rows
    v[i] = _mm256_unpacklo_epi64(u[i], u[i + 2]);
    v[i + 1] = _mm256_unpackhi_epi64(u[i], u[i + 2]);
    v[i + 2] = _mm256_unpacklo_epi64(u[i + 1], u[i + 3]);
    v[i + 3] = _mm256_unpackhi_epi64(u[i + 1], u[i + 3]);
  }
  UNROLL for (int c = 0; c < 4; c++) {
    rows[c] = _mm256_permute2x128_si256(v[c], v[c + 4], 0x20);
    rows[c + 4] = _mm256_permute2x128_si256(v[c], v[c + 4], 0x31);
  }
}

// Rows to columns.
INLINE void transpose(Pairs (&rows)[16]) {
  __m256i quarter[2][2][8];  // [rows 0 .. 7 or 8 .. 15][columns ...]
  UNROLL for (int i = 0; i < 16; i++) {
    quarter[i / 8][0][i % 8] = rows[i].low;
    quarter[i / 8][1][i % 8] = rows[i].high;
  }
  UNROLL for (int i = 0; i < 4; i++) transpose(quarter[i / 2][i % 2]);
  UNROLL for (int i = 0; i < 16; i++) rows[i] = {quarter[0][i / 8][i % 8], quarter[1][i / 8][i % 8]};
}

}  // namespace gpt_faster
