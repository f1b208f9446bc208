// The primitives of Arm processors with the dot product of bytes, some faster on those with I8MM and BF16. A vector is
// four registers.
#pragma once

#include <arm_neon.h>

namespace gpt_faster {

struct Floats {  // 16 values, or 16 sums
  float32x4_t part[4];
};

struct Ints {  // 16 values, or 16 sums
  int32x4_t part[4];
};

struct Bytes {  // 16 x 4: four codes for each sum
  uint8x16_t part[4];
};

struct Pairs {  // 16 x 2: two bfloat16 for each sum, the first low
  uint32x4_t part[4];
};

constexpr bool kFewRegisters = false;  // whether several rows of bfloat16 are multiplied in parts

// Whether PyTorch's product of bfloat16 matrices is as fast as one of float32. On Apple it has none but a plain loop.
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && !defined(__APPLE__)
constexpr bool kHasBf16Matrices = true;
#else
constexpr bool kHasBf16Matrices = false;
#endif

// How much of a product is kept in registers at a time: rows of activations, ...
constexpr int kCodesRows = 2, kBf16Rows = 1, kScoreRows = 2;
// ... tiles of codes, of several rows or of one, rows of a bfloat16 weight, and vectors of a sum of values.
constexpr int kCodesTiles = 1, kCodesStreams = 2, kBf16Outputs = 4, kValueVectors = 6;

// The vector that `work` makes, register by register.
template <class Vector, class Work, class... Vectors>
INLINE Vector each(const Work& work, Vectors... v) {
  return {work(v.part[0]...), work(v.part[1]...), work(v.part[2]...), work(v.part[3]...)};
}

// ---------------------------------------------------------------- 1. load and store

INLINE Floats load(const float* from) {
  return {vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)};
}

INLINE uint16x8_t load_half(const Half* from) { return vld1q_u16(&from->bits); }
INLINE uint16x8_t load_half(const BFloat16* from) { return vld1q_u16(&from->bits); }

INLINE Floats load(const Half* from) {
  const float16x8_t low = (float16x8_t)load_half(from), high = (float16x8_t)load_half(from + 8);
  return {vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low),
          vcvt_f32_f16(vget_low_f16(high)), vcvt_high_f32_f16(high)};
}

INLINE Pairs interleave(uint16x8_t first_low, uint16x8_t first_high, uint16x8_t second_low, uint16x8_t second_high) {
  return {(uint32x4_t)vzip1q_u16(first_low, second_low), (uint32x4_t)vzip2q_u16(first_low, second_low),
          (uint32x4_t)vzip1q_u16(first_high, second_high), (uint32x4_t)vzip2q_u16(first_high, second_high)};
}

INLINE Floats load(const BFloat16* from) {
  const uint16x8_t zero = vdupq_n_u16(0);
  const Pairs wide = interleave(zero, zero, load_half(from), load_half(from + 8));
  return each<Floats>([](uint32x4_t bits) { return (float32x4_t)bits; }, wide);
}

INLINE Floats load(const int8_t* from) {
  const int8x16_t bytes = vld1q_s8(from);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
          vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))};
}

// 32 codes of 4 bits from 16 bytes: those in the low nibbles, then those in the high ones.
INLINE void load_nibbles(const uint8_t* from, Floats& low, Floats& high) {
  const auto floats = [](uint8x16_t codes) {
    const uint16x8_t first = vmovl_u8(vget_low_u8(codes)), second = vmovl_high_u8(codes);
    return Floats{vcvtq_f32_u32(vmovl_u16(vget_low_u16(first))), vcvtq_f32_u32(vmovl_high_u16(first)),
                  vcvtq_f32_u32(vmovl_u16(vget_low_u16(second))), vcvtq_f32_u32(vmovl_high_u16(second))};
  };
  const uint8x16_t both = vld1q_u8(from);
  low = floats(vandq_u8(both, vdupq_n_u8(15))), high = floats(vshrq_n_u8(both, 4));
}

INLINE void store(float* to, Floats value) {
  UNROLL for (int i = 0; i < 4; i++) vst1q_f32(to + 4 * i, value.part[i]);
}

INLINE void store(Half* to, Floats value) {
  UNROLL for (int i = 0; i < 4; i += 2) {
    const float16x8_t half = vcvt_high_f16_f32(vcvt_f16_f32(value.part[i]), value.part[i + 1]);
    vst1q_u16(&to[4 * i].bits, (uint16x8_t)half);
  }
}

// To the nearest, ties to even.
INLINE uint16x8_t rounded_to_bf16(float32x4_t low, float32x4_t high) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
#else
  const auto rounded = [](float32x4_t value) {
    const uint32x4_t bits = (uint32x4_t)value, odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vaddhn_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  };
  return vcombine_u16(rounded(low), rounded(high));
#endif
}

INLINE void store(BFloat16* to, Floats value) {
  vst1q_u16(&to->bits, rounded_to_bf16(value.part[0], value.part[1]));
  vst1q_u16(&to[8].bits, rounded_to_bf16(value.part[2], value.part[3]));
}

// Numbers beyond those of a byte become -128 or 127.
INLINE void store(int8_t* to, Ints value) {
  const int16x8_t low = vqmovn_high_s32(vqmovn_s32(value.part[0]), value.part[1]);
  const int16x8_t high = vqmovn_high_s32(vqmovn_s32(value.part[2]), value.part[3]);
  vst1q_s8(to, vqmovn_high_s16(vqmovn_s16(low), high));
}

INLINE Bytes load_bytes(const uint8_t* from) {
  return {vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)};
}
INLINE void store(uint8_t* to, Bytes value) {
  UNROLL for (int i = 0; i < 4; i++) vst1q_u8(to + 16 * i, value.part[i]);
}

INLINE Pairs load_pairs(const uint32_t* from) {
  return {vld1q_u32(from), vld1q_u32(from + 4), vld1q_u32(from + 8), vld1q_u32(from + 12)};
}
INLINE void store(uint32_t* to, Pairs value) {
  UNROLL for (int i = 0; i < 4; i++) vst1q_u32(to + 4 * i, value.part[i]);
}

// 32 bfloat16 that lie one after another.
INLINE Pairs load_pairs(const BFloat16* from) {
  return {(uint32x4_t)load_half(from), (uint32x4_t)load_half(from + 8),
          (uint32x4_t)load_half(from + 16), (uint32x4_t)load_half(from + 24)};
}

// Pairs of one value of `first` and one of `second`.
INLINE Pairs interleave(const BFloat16* first, const BFloat16* second) {
  return interleave(load_half(first), load_half(first + 8), load_half(second), load_half(second + 8));
}

// ---------------------------------------------------------------- 2. one value in every lane

INLINE Floats every(float value) {
  const float32x4_t four = vdupq_n_f32(value);
  return {four, four, four, four};
}
INLINE Ints every(int32_t value) {
  const int32x4_t four = vdupq_n_s32(value);
  return {four, four, four, four};
}
INLINE Pairs every(uint32_t value) {
  const uint32x4_t four = vdupq_n_u32(value);
  return {four, four, four, four};
}

// The indices of 16 lanes.
INLINE Ints lane_numbers() {
  return {int32x4_t{0, 1, 2, 3}, int32x4_t{4, 5, 6, 7}, int32x4_t{8, 9, 10, 11}, int32x4_t{12, 13, 14, 15}};
}

// ---------------------------------------------------------------- 3. lane by lane

INLINE Floats operator+(Floats a, Floats b) { return each<Floats>([](auto a, auto b) { return a + b; }, a, b); }
INLINE Floats operator-(Floats a, Floats b) { return each<Floats>([](auto a, auto b) { return a - b; }, a, b); }
INLINE Floats operator*(Floats a, Floats b) { return each<Floats>([](auto a, auto b) { return a * b; }, a, b); }
INLINE Floats operator/(Floats a, Floats b) { return each<Floats>([](auto a, auto b) { return a / b; }, a, b); }
INLINE Floats operator-(Floats a) { return each<Floats>([](auto a) { return -a; }, a); }
INLINE Ints operator+(Ints a, Ints b) { return each<Ints>([](auto a, auto b) { return a + b; }, a, b); }
INLINE Ints operator&(Ints a, Ints b) { return each<Ints>([](auto a, auto b) { return a & b; }, a, b); }
INLINE Ints operator<(Ints a, Ints b) {
  return each<Ints>([](auto a, auto b) { return (int32x4_t)vcltq_s32(a, b); }, a, b);
}
INLINE Ints operator<(Floats a, Floats b) {
  return each<Ints>([](auto a, auto b) { return (int32x4_t)vcltq_f32(a, b); }, a, b);
}
INLINE Ints operator==(Floats a, Floats b) {
  return each<Ints>([](auto a, auto b) { return (int32x4_t)vceqq_f32(a, b); }, a, b);
}

INLINE Floats multiply_add(Floats a, Floats b, Floats c) {  // a * b + c, rounded once
  return each<Floats>([](auto a, auto b, auto c) { return vfmaq_f32(c, a, b); }, a, b, c);
}
INLINE Floats select(Ints condition, Floats a, Floats b) {
  return each<Floats>([](auto condition, auto a, auto b) { return vbslq_f32((uint32x4_t)condition, a, b); }, condition,
                      a, b);
}
INLINE Floats to_floats(Ints x) { return each<Floats>([](auto x) { return vcvtq_f32_s32(x); }, x); }
INLINE Ints bits_of(Floats x) { return each<Ints>([](auto x) { return (int32x4_t)x; }, x); }
INLINE Floats abs(Floats x) { return each<Floats>([](auto x) { return vabsq_f32(x); }, x); }
INLINE Floats max(Floats a, Floats b) { return each<Floats>([](auto a, auto b) { return vmaxq_f32(a, b); }, a, b); }
INLINE Ints max(Ints a, Ints b) { return each<Ints>([](auto a, auto b) { return vmaxq_s32(a, b); }, a, b); }
INLINE Floats min(Floats a, Floats b) { return each<Floats>([](auto a, auto b) { return vminq_f32(a, b); }, a, b); }

// ---------------------------------------------------------------- 4. codes, and sums of their products with bytes

// The codes of the first and of the second four inputs that share bytes, one code in each nibble.
INLINE Bytes low_nibbles(Bytes both) {
  return each<Bytes>([](auto both) { return vandq_u8(both, vdupq_n_u8(15)); }, both);
}
INLINE Bytes high_nibbles(Bytes both) {
  return each<Bytes>([](auto both) { return vshrq_n_u8(both, 4); }, both);
}

// The entries of a table that nibbles stand for.
INLINE Bytes looked_up(Bytes nibbles, const uint8_t (&table)[16]) {
  return each<Bytes>([&](auto nibbles) { return vqtbl1q_u8(vld1q_u8(table), nibbles); }, nibbles);
}

// Code number c of each four.
INLINE Ints code_of(Bytes codes, int c) {
  const int32x4_t right = vdupq_n_s32(-8 * c);
  return each<Ints>([&](auto codes) {
    return (int32x4_t)vandq_u32(vshlq_u32((uint32x4_t)codes, right), vdupq_n_u32(255));
  }, codes);
}

// The entries of a table that number c of each four stands for, of numbers up to 15: each is four bytes.
INLINE Floats entries_of(Floats table, Bytes codes, int c) {
  uint8x16x4_t bytes;
  for (int i = 0; i < 4; i++) bytes.val[i] = (uint8x16_t)table.part[i];
  return each<Floats>([&](auto number) {
    const uint32x4_t places = vmlaq_n_u32(vdupq_n_u32(0x03020100), (uint32x4_t)number, 0x04040404);
    return (float32x4_t)vqtbl4q_u8(bytes, (uint8x16_t)places);
  }, code_of(codes, c));
}

// Number k of each 16 that share four bytes, 2 bits each, as `at_places` takes it: the places of its four bytes.
INLINE Ints place_of(Bytes places, int k) {
  const int32x4_t right = vdupq_n_s32(-2 * k);
  return each<Ints>([&](auto places) {
    const uint32x4_t place = vandq_u32(vshlq_u32((uint32x4_t)places, right), vdupq_n_u32(3));
    return (int32x4_t)vmlaq_n_u32(vdupq_n_u32(0x03020100), place, 0x04040404);
  }, places);
}

// In each lane, that of four values which has its place.
INLINE Floats at_places(const float* four, Ints places) {
  const uint8x16_t bytes = (uint8x16_t)vld1q_f32(four);
  return each<Floats>([&](auto places) { return (float32x4_t)vqtbl1q_u8(bytes, (uint8x16_t)places); }, places);
}

// Number c of each four, of numbers in e4m3: sign, exponent and mantissa in the places of float32, whose exponent has
// another bias.
INLINE Floats e4m3_of(Bytes codes, int c) {
  const int32x4_t left = vdupq_n_s32(24 - 8 * c), places = vdupq_n_s32(static_cast<int32_t>(0x87f00000));
  return each<Floats>([&](auto codes) {
    const int32x4_t placed = vandq_s32(vshrq_n_s32(vshlq_s32((int32x4_t)codes, left), 4), places);
    return vmulq_n_f32((float32x4_t)placed, 0x1p120f);
  }, codes);
}

#ifdef __ARM_FEATURE_MATMUL_INT8

// What int8 codes, which are stored with 128 added, still have more than they should in a product.
constexpr int kAddedToInt8 = 128;

// To each sum, its four products of an unsigned code and a signed byte of x are added.
template <int MOST>
INLINE int32x4_t add_products(int32x4_t sum, uint8x16_t codes, int32x4_t x) {
  return vusdotq_s32(sum, codes, (int8x16_t)x);
}

#else

constexpr int kAddedToInt8 = 0;

// The only instruction is for signed bytes. Codes of 4 bits are the same either way.
template <int MOST>
INLINE int32x4_t add_products(int32x4_t sum, uint8x16_t codes, int32x4_t x) {
  const uint8x16_t code = MOST < 128 ? codes : veorq_u8(codes, vdupq_n_u8(128));
  return vdotq_s32(sum, (int8x16_t)code, (int8x16_t)x);
}

#endif

// 16 sums over a group of 32 inputs, from `start` on, of codes up to MOST.
template <int MOST>
struct ByteSums {
  Ints sum;

  INLINE void begin(int32_t start) { sum = every(start); }

  INLINE void add(Bytes codes, Ints x) {
    sum = each<Ints>([](auto sum, auto codes, auto x) { return add_products<MOST>(sum, codes, x); }, sum, codes, x);
  }

  INLINE Floats total() const { return to_floats(sum); }
};

// ---------------------------------------------------------------- 5. sums of products of bfloat16

INLINE float32x4_t firsts_of(uint32x4_t pairs) { return (float32x4_t)vshlq_n_u32(pairs, 16); }
INLINE float32x4_t seconds_of(uint32x4_t pairs) { return (float32x4_t)vandq_u32(pairs, vdupq_n_u32(0xffff0000)); }

INLINE Floats firsts_of(Pairs pairs) {
  return each<Floats>([](uint32x4_t part) { return firsts_of(part); }, pairs);
}
INLINE Floats seconds_of(Pairs pairs) {
  return each<Floats>([](uint32x4_t part) { return seconds_of(part); }, pairs);
}

// To each sum, its two products are added.
INLINE float32x4_t dot_pairs(float32x4_t sum, uint32x4_t a, uint32x4_t b) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  return vbfdotq_f32(sum, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b));
#else
  return vfmaq_f32(vfmaq_f32(sum, seconds_of(a), seconds_of(b)), firsts_of(a), firsts_of(b));
#endif
}

INLINE Floats dot_pairs(Floats sum, Pairs a, Pairs b) {
  return each<Floats>([](auto sum, auto a, auto b) { return dot_pairs(sum, a, b); }, sum, a, b);
}

// ---------------------------------------------------------------- 6. rounding, ties to even

INLINE Floats round(Floats x) { return each<Floats>([](auto x) { return vrndnq_f32(x); }, x); }
INLINE Ints round_to_int(Floats x) { return each<Ints>([](auto x) { return vcvtnq_s32_f32(x); }, x); }

// x * 2^n, where n is a whole number up to 127; 0 where n is minus infinity, even if x is NaN.
INLINE float32x4_t times_power_of_two(float32x4_t x, float32x4_t n) {
  const float32x4_t least = vdupq_n_f32(-252);  // by two factors, because one would have to be a denormal number
  const int32x4_t exponent = vcvtnq_s32_f32(vmaxq_f32(n, least)), half = vshrq_n_s32(exponent, 1);
  const auto power = [](int32x4_t n) { return (float32x4_t)vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23); };
  const float32x4_t value = x * power(half) * power(exponent - half);
  return (float32x4_t)vbicq_u32((uint32x4_t)value, vcltq_f32(n, least));
}

INLINE Floats times_power_of_two(Floats x, Floats n) {
  return each<Floats>([](auto x, auto n) { return times_power_of_two(x, n); }, x, n);
}

// ---------------------------------------------------------------- 7. across lanes

// Four sums of four lanes.
INLINE float32x4_t fours(Floats v) { return (v.part[0] + v.part[1]) + (v.part[2] + v.part[3]); }

// Lane i is the sum of v[i], which is cheaper than 16 reductions.
INLINE Floats sums_of(Floats (&v)[16]) {
  float32x4_t sums[4];
  UNROLL for (int i = 0; i < 4; i++) {
    const float32x4_t low = vpaddq_f32(fours(v[4 * i]), fours(v[4 * i + 1]));
    sums[i] = vpaddq_f32(low, vpaddq_f32(fours(v[4 * i + 2]), fours(v[4 * i + 3])));
  }
  return {sums[0], sums[1], sums[2], sums[3]};
}

// The sum of one vector, in the order in which sums_of adds: a result must not depend on how many are summed together.
INLINE float sum_of(Floats v) {
  const float32x4_t sum = fours(v), two = vpaddq_f32(sum, sum);
  return vgetq_lane_f32(vpaddq_f32(two, two), 0);
}

INLINE float reduce_add(Floats x) { return sum_of(x); }
INLINE float reduce_max(Floats x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.part[0], x.part[1]), vmaxq_f32(x.part[2], x.part[3])));
}
INLINE int32_t reduce_add(Ints x) { return vaddvq_s32((x.part[0] + x.part[1]) + (x.part[2] + x.part[3])); }
INLINE int32_t reduce_max(Ints x) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.part[0], x.part[1]), vmaxq_s32(x.part[2], x.part[3])));
}

INLINE bool any(Ints condition) { return reduce_add(condition) != 0; }  // of lanes that are 0 or -1

// Rows to columns, of 4 x 4 numbers.
INLINE void transpose(uint32x4_t (&rows)[4]) {
  const uint64x2_t a = (uint64x2_t)vtrn1q_u32(rows[0], rows[1]), b = (uint64x2_t)vtrn2q_u32(rows[0], rows[1]);
  const uint64x2_t c = (uint64x2_t)vtrn1q_u32(rows[2], rows[3]), d = (uint64x2_t)vtrn2q_u32(rows[2], rows[3]);
  rows[0] = (uint32x4_t)vtrn1q_u64(a, c), rows[1] = (uint32x4_t)vtrn1q_u64(b, d);
  rows[2] = (uint32x4_t)vtrn2q_u64(a, c), rows[3] = (uint32x4_t)vtrn2q_u64(b, d);
}

// Rows to columns.
INLINE void transpose(Pairs (&rows)[16]) {
  uint32x4_t block[4][4][4];  // [rows 4 i ...][columns 4 j ...]
  UNROLL for (int i = 0; i < 16; i++) UNROLL for (int j = 0; j < 4; j++) block[i / 4][j][i % 4] = rows[i].part[j];
  UNROLL for (int i = 0; i < 16; i++) transpose(block[i / 4][i % 4]);
  UNROLL for (int i = 0; i < 16; i++) UNROLL for (int j = 0; j < 4; j++) rows[i].part[j] = block[j][i / 4][i % 4];
}

}  // namespace gpt_faster
