// Linear layers of int8 and 4-bit codes, for any number of rows.
//
// The weight lies in tiles of 16 output rows. A tile has, for each four inputs, the 16 x 4 codes that ByteSums multiplies
// at once: 64 products of an unsigned and a signed byte, summed by fours into 16 int32. Codes are stored unsigned: int8
// ones plus 128; int4 ones plus 8, two a byte, the inputs 8i .. 8i + 3 in the low nibbles, the next four in the high ones.
// So are e2m1 numbers, which a table makes codes, and nibbles that stand for any 16 numbers, which follow those of a tile.
//
// Activations in half precision are quantised to int8 in groups of 32 inputs; sums of products, over 32 inputs or, where
// a weight has a scale for each 16, over so many, are then exact integers.
// float32 ones are multiplied as they are, three times slower where the arithmetic counts: whoever asks for float32 wants
// every digit. So are those of a weight of e4m3 numbers, a byte each, which lie as int8 codes do, or of 16 numbers. The
// order of sums is the same for any number of rows: no row's result depends on the rows beside it.
#pragma once

#include <vector>

#include "linear_bf16.h"

namespace gpt_faster {

constexpr int64_t kLanes = 16, kGroup = 32;  // outputs of a tile; inputs that are quantised together
constexpr int64_t kHalfGroup = 16;           // inputs that share a scale, at least
constexpr int64_t kNumbersBytes = 64;        // of 16 numbers in float32
constexpr int64_t kAhead = 1536;             // bytes, which a stream that is read alone is fetched ahead

struct CodesWeight {
  const uint8_t* codes;  // [tiles, K * 16], or half as many bytes of 4-bit codes; K is `in` rounded up to whole groups of 32
  const void* scales;    // [tiles, groups, 16], or scales and zeros, which int4 always has: [tiles, groups, 2, 16]
  Dtype scale_dtype;
  const float* bias;  // [tiles * 16] or null
  int64_t in, tiles, groups;
  bool is_int4, is_float4, is_numbers4, is_float8, has_zeros;

  // Whether activations are multiplied as they are.
  bool multiplies_floats(Dtype x) const { return is_float8 || is_numbers4 || x == Dtype::float32; }
  int64_t K() const { return round_up(in, kGroup); }
  bool has_halves() const { return groups * kGroup > K(); }  // whether half a group has a scale of its own
  bool has_nibbles() const { return is_int4 || is_float4 || is_numbers4; }
  int64_t bytes_a_tile() const { return K() * kLanes / (has_nibbles() ? 2 : 1) + (is_numbers4 ? kNumbersBytes : 0); }
  // What nibbles stand for, if they are numbers: the same in all tiles.
  Floats numbers() const {
    return is_numbers4 ? load(reinterpret_cast<const float*>(codes + bytes_a_tile() - kNumbersBytes)) : every(0.0f);
  }
  int offset() const;  // what codes have more in a product than they stand for
};

// ---------------------------------------------------------------- formats

struct Int8 {  // a scale for each output row
  static constexpr int64_t kInputs = kGroup;  // whose products are summed before they are scaled
  static constexpr int kOffset = 128, kMost = 255;
  static constexpr bool kIsFloat = false, kPacked = false, kHasGroups = false, kHasZeros = false;

  // Number c of each four, without what is added to it. The last argument: see CodesWeight::numbers.
  static INLINE Floats numbers(Bytes four, int c, Floats) { return to_floats(code_of(four, c)) - every(float{kOffset}); }
};

struct Int8Groups : Int8 {  // a scale for each group of inputs of each output row
  static constexpr bool kHasGroups = true;
};

struct Int8Zeros : Int8Groups {  // a zero too
  static constexpr bool kHasZeros = true;
};

struct Int4 {  // two codes a byte; a scale and a zero for each group
  static constexpr int64_t kInputs = kGroup;
  static constexpr int kOffset = 8, kMost = 15;
  static constexpr bool kIsFloat = false, kPacked = true, kHasGroups = true, kHasZeros = true;

  static INLINE Bytes codes(Bytes nibbles) { return nibbles; }
  static INLINE Floats numbers(Bytes four, int c, Floats) { return to_floats(code_of(four, c)) - every(float{kOffset}); }
};

struct Float4 {  // e2m1 numbers, two a byte, whose codes are their doubles; a scale for each group
  static constexpr int64_t kInputs = kGroup;
  static constexpr int kOffset = 12, kMost = 24;
  static constexpr bool kIsFloat = false, kPacked = true, kHasGroups = true, kHasZeros = false;
  static constexpr uint8_t kCodes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

  static INLINE Bytes codes(Bytes nibbles) { return looked_up(nibbles, kCodes); }
  static INLINE Floats numbers(Bytes four, int c, Floats) { return to_floats(code_of(four, c)) - every(float{kOffset}); }
};

struct Float8 {  // e4m3 numbers; a scale for each group
  static constexpr int64_t kInputs = kGroup;
  static constexpr int kMost = 255;
  static constexpr bool kIsFloat = true, kPacked = false, kHasGroups = true, kHasZeros = false;

  static INLINE Floats numbers(Bytes four, int c, Floats) { return e4m3_of(four, c); }
};

struct Numbers4 {  // nibbles that stand for 16 numbers; a scale for each group
  static constexpr int64_t kInputs = kGroup;
  static constexpr int kMost = 255;
  static constexpr bool kIsFloat = true, kPacked = true, kHasGroups = true, kHasZeros = false;

  static INLINE Bytes codes(Bytes nibbles) { return nibbles; }
  static INLINE Floats numbers(Bytes four, int c, Floats table) { return entries_of(table, four, c); }
};

template <class Format>
struct Unpacked : Format {  // 4-bit codes, a code a byte
  static constexpr bool kPacked = false;
};

template <class Format>
struct Halved : Format {  // a scale for each half of a group
  static constexpr int64_t kInputs = kHalfGroup;
};

template <class Format>
void unpack(const uint8_t* from, uint8_t* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    const Bytes both = load_bytes(from + i);
    store(to + 2 * i, Format::codes(low_nibbles(both)));
    store(to + 2 * i + 64, Format::codes(high_nibbles(both)));
  }
}

inline int CodesWeight::offset() const {
  return is_int4 ? Int4::kOffset : is_float4 ? Float4::kOffset : kAddedToInt8;
}

// ---------------------------------------------------------------- activations

// M rows of activations as the products want them: quantised, or float32 copies padded with zeros.
struct Activations {
  int64_t M, K;
  void* values;      // int8 or float32 [M, K]
  float* scales;     // [M, K / 32]
  float* sums;       // [M, K / 32 or 16] of the activations themselves, which the zeros of weights multiply
  int32_t* offsets;  // [M, K / 32 or 16], where sums of products start: they undo the numbers added to the codes

  static int64_t bytes(int64_t M, int64_t in, bool floats) {
    const int64_t K = round_up(in, kGroup);
    return M * K * (floats ? 4 : 1) + 4 * M * K / kGroup + 8 * M * K / kHalfGroup;
  }

  // Lays the arrays out in `scratch`, which has as many bytes as that.
  Activations(void* scratch, int64_t M, int64_t in, bool floats) : M(M), K(round_up(in, kGroup)), values(scratch) {
    const int64_t groups = M * K / kGroup;
    scales = reinterpret_cast<float*>(static_cast<char*>(scratch) + M * K * (floats ? 4 : 1));
    sums = scales + groups;
    offsets = reinterpret_cast<int32_t*>(sums + 2 * groups);
  }
};

// Quantises some groups of row m of x [M, in] for a weight.
template <class Element>
void quantise(const Element* x, const CodesWeight& weight, const Activations& to, int64_t m, Range groups) {
  for (int64_t g = groups.begin; g < groups.end; g++) {
    const int64_t left = weight.in - g * kGroup, at = m * to.K + g * kGroup, group = m * to.K / kGroup + g;
    const auto put_sums = [&](auto* sums, auto low, auto high, auto factor) {
      if (weight.has_halves()) {
        sums[2 * group] = factor * reduce_add(low), sums[2 * group + 1] = factor * reduce_add(high);
      } else {
        sums[group] = factor * reduce_add(low + high);
      }
    };
    const Element* from = x + m * weight.in + g * kGroup;
    const Floats low = load(from, std::min<int64_t>(left, 16)), high = load(from + 16, std::max<int64_t>(left - 16, 0));
    if (weight.has_zeros) put_sums(to.sums, low, high, 1.0f);
    if (weight.multiplies_floats(dtype_of<Element>)) {
      store(static_cast<float*>(to.values) + at, low);
      store(static_cast<float*>(to.values) + at + 16, high);
    } else {
      const float largest = largest_of(max(bits_of(abs(low)), bits_of(abs(high))));
      const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;  // of smaller ones it would be infinite
      const Ints low_codes = round_to_int(low * every(inverse)), high_codes = round_to_int(high * every(inverse));
      store(static_cast<int8_t*>(to.values) + at, low_codes);
      store(static_cast<int8_t*>(to.values) + at + 16, high_codes);
      to.scales[group] = largest / 127.0f;  // NaN if any of them is
      put_sums(to.offsets, low_codes, high_codes, -weight.offset());
    }
  }
}

// ---------------------------------------------------------------- products

// The codes of T tiles, `stride` bytes apart.
template <class Format, int T>
struct Codes {
  const uint8_t* from;
  int64_t stride;
  static constexpr int kFours = Format::kPacked ? 2 : 1;  // one load has 4 inputs, or 8 if packed

  INLINE void load_all(Bytes (&loaded)[T], int k) const {  // from input k on
    UNROLL for (int j = 0; j < T; j++) loaded[j] = load_bytes(from + j * stride + k / kFours * kLanes);
  }

  // The codes of the first four inputs of a load, or of the second four if f is 1.
  static INLINE Bytes four(Bytes loaded, int f) {
    if constexpr (!Format::kPacked) return loaded;
    else return Format::codes(f ? high_nibbles(loaded) : low_nibbles(loaded));
  }
};

// Sums of the products of the kInputs of block b, of rows r .. r + R - 1 and T tiles: quantised activations, ...
template <class Format, int R, int T>
INLINE void multiply_block(Floats (&product)[R][T], const Activations& x, int64_t r, int64_t b,
                           const Codes<Format, T>& codes) {
  const int8_t* values = static_cast<const int8_t*>(x.values) + r * x.K + b * Format::kInputs;
  constexpr int kFours = Codes<Format, T>::kFours;
  ByteSums<Format::kMost> sum[R][T];
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < T; j++) {
    sum[i][j].begin(x.offsets[(r + i) * (x.K / Format::kInputs) + b]);
  }
  UNROLL for (int k = 0; k < Format::kInputs; k += 4 * kFours) {
    Bytes loaded[T], four[T];
    codes.load_all(loaded, k);
    UNROLL for (int f = 0; f < kFours; f++) {
      UNROLL for (int j = 0; j < T; j++) four[j] = codes.four(loaded[j], f);
      UNROLL for (int i = 0; i < R; i++) {
        const Ints row = every_int(values + i * x.K + k + 4 * f);
        UNROLL for (int j = 0; j < T; j++) sum[i][j].add(four[j], row);
      }
    }
  }
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < T; j++) product[i][j] = sum[i][j].total();
}

// ... and those that are multiplied as they are.
template <class Format, int R, int T>
INLINE void multiply_block_exactly(Floats (&product)[R][T], const Activations& x, int64_t r, int64_t b,
                                   const Codes<Format, T>& codes, Floats numbers) {
  const float* values = static_cast<const float*>(x.values) + r * x.K + b * Format::kInputs;
  constexpr int kFours = Codes<Format, T>::kFours;
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < T; j++) product[i][j] = every(0.0f);
  for (int k = 0; k < Format::kInputs; k += 4 * kFours) {
    Bytes loaded[T];
    codes.load_all(loaded, k);
    UNROLL for (int f = 0; f < kFours; f++) UNROLL for (int c = 0; c < 4; c++) {  // code c of each four
      Floats weights[T];
      UNROLL for (int j = 0; j < T; j++) {
        weights[j] = Format::numbers(codes.four(loaded[j], f), c, numbers);
      }
      UNROLL for (int i = 0; i < R; i++) {
        const Floats row = every(values[i * x.K + k + 4 * f + c]);
        UNROLL for (int j = 0; j < T; j++) product[i][j] = multiply_add(weights[j], row, product[i][j]);
      }
    }
  }
}

// Products of activations and a weight, into y [M, tiles * 16]. EXACT: the activations are multiplied as they are.
template <class Format, bool EXACT, class Scale>
struct CodesProduct {
  const CodesWeight& weight;
  const Activations& x;
  void* y;
  Dtype y_dtype;

  // Scales of T tiles in group g, and their zeros.
  template <int T>
  INLINE void load_scales(Floats (&scale)[T], Floats (&zero)[T], int64_t n, int64_t stride, int64_t g) const {
    UNROLL for (int j = 0; j < T; j++) {
      const int64_t at = ((n + j * stride) * weight.groups + g) * (Format::kHasZeros ? 2 : 1) * kLanes;
      scale[j] = load(static_cast<const Scale*>(weight.scales) + at);
      if constexpr (Format::kHasZeros) zero[j] = load(static_cast<const Scale*>(weight.scales) + at + kLanes);
    }
  }

  // Rows r .. r + R - 1 of x and T tiles, n, n + stride, ...
  template <int R, int T>
  void tile(int64_t r, int64_t n, int64_t stride, Codes<Format, T> codes) const {
    const int64_t blocks = x.K / Format::kInputs, blocks_a_group = blocks / weight.groups;
    constexpr int64_t kBytes = Format::kInputs * kLanes / Codes<Format, T>::kFours;
    const Floats numbers = weight.numbers();
    Floats sum[R][T], scale[T], zero[T];
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < T; j++) sum[i][j] = every(0.0f);
    for (int64_t g = 0, b = 0; g < weight.groups; g++) {
      if constexpr (Format::kHasGroups) load_scales<T>(scale, zero, n, stride, g);
      for (; b < (g + 1) * blocks_a_group; b++, codes.from += kBytes) {
        if constexpr (R == 1 && T == 1) {  // the hardware follows a stream only to the end of its page
          UNROLL for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(codes.from + kAhead + i);
        }
        Floats product[R][T];
        if constexpr (EXACT) multiply_block_exactly<Format, R, T>(product, x, r, b, codes, numbers);
        else multiply_block<Format, R, T>(product, x, r, b, codes);
        UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < T; j++) {
          const int64_t at = (r + i) * blocks + b;
          Floats factor = EXACT ? every(1.0f) : every(x.scales[at * Format::kInputs / kGroup]);
          if constexpr (Format::kHasGroups) factor = EXACT ? scale[j] : scale[j] * factor;
          sum[i][j] = multiply_add(product[i][j], factor, sum[i][j]);
          if constexpr (Format::kHasZeros) sum[i][j] = multiply_add(zero[j], every(x.sums[at]), sum[i][j]);
        }
      }
    }
    if (EXACT && (!Format::kIsFloat || y_dtype == Dtype::float32)) finish<float, R, T>(sum, r, n, stride);
    else if (y_dtype == Dtype::float16) finish<Half, R, T>(sum, r, n, stride);
    else finish<BFloat16, R, T>(sum, r, n, stride);
  }

  template <class Element, int R, int T>
  INLINE void finish(Floats (&sum)[R][T], int64_t r, int64_t n, int64_t stride) const {
    UNROLL for (int j = 0; j < T; j++) {
      const int64_t column = (n + j * stride) * kLanes;
      UNROLL for (int i = 0; i < R; i++) {
        Floats value = sum[i][j];
        if constexpr (!Format::kHasGroups) value = value * load(static_cast<const Scale*>(weight.scales) + column);
        if (weight.bias) value = value + load(weight.bias + column);
        store(static_cast<Element*>(y) + (r + i) * weight.tiles * kLanes + column, value);
      }
    }
  }

  template <int T>
  void all_rows(int64_t n, int64_t stride, Codes<Format, T> codes) const {
    int64_t r = 0;
    for (; r + kCodesRows <= x.M; r += kCodesRows) tile<kCodesRows, T>(r, n, stride, codes);
    // for the one odd tile of a thread more forms would only lengthen the build
    if constexpr (T == kCodesTiles) rest<kCodesRows - 1, T>(r, n, stride, codes);
    else for (; r < x.M; r++) tile<1, T>(r, n, stride, codes);
  }

  // The R rows at most that are left.
  template <int R, int T>
  INLINE void rest(int64_t r, int64_t n, int64_t stride, Codes<Format, T> codes) const {
    if constexpr (R > 0) {
      if (x.M - r == R) tile<R, T>(r, n, stride, codes);
      else rest<R - 1, T>(r, n, stride, codes);
    }
  }

  // Few rows: a thread reads its tiles once, as streams far apart.
  void few_rows(Range tiles) const {
    const int64_t bytes = weight.bytes_a_tile();
    int64_t n = tiles.begin;
    if (x.M == 1) {
      constexpr int kTiles = Format::kHasZeros ? kCodesStreams / 2 : kCodesStreams;  // scales and zeros are streams too
      const int64_t stride = (tiles.end - n) / kTiles, end = n + stride;
      for (; n < end; n++) tile<1, kTiles>(0, n, stride, {weight.codes + n * bytes, stride * bytes});
      n += (kTiles - 1) * stride;
    }
    const int64_t stride = (tiles.end - n) / kCodesTiles, end = n + stride;
    for (; n < end; n++) all_rows<kCodesTiles>(n, stride, {weight.codes + n * bytes, stride * bytes});
    n += (kCodesTiles - 1) * stride;
    if (n < tiles.end) all_rows<1>(n, 0, {weight.codes + n * bytes, 0});
  }

  // Many rows: a few tiles at a time stay in the cache, a code a byte, while all rows pass.
  void many_rows(Range sets) const {
    constexpr bool kUnpacks = Format::kMost < 128;
    std::vector<uint8_t> unpacked(kUnpacks ? kCodesTiles * x.K * kLanes : 0);
    for (int64_t n = kCodesTiles * sets.begin; n < std::min(kCodesTiles * sets.end, weight.tiles); n += kCodesTiles) {
      const int64_t tiles = std::min<int64_t>(kCodesTiles, weight.tiles - n), bytes = weight.bytes_a_tile();
      const uint8_t* codes = weight.codes + n * bytes;
      if constexpr (kUnpacks) {
        unpack<Format>(codes, unpacked.data(), tiles * bytes);
        codes = unpacked.data();
      }
      if (tiles == kCodesTiles) all_rows<kCodesTiles>(n, 1, {codes, kUnpacks ? x.K * kLanes : bytes});
      else all_rows<1>(n, 0, {codes, 0});
    }
  }
};

// Calls work with the product whose types are those of the weight and of the activations, chosen once for all tiles.
template <template <class> class Nibbles, class Work>
void with_product(const CodesWeight& weight, const Activations& x, void* y, Dtype dtype, const Work& work) {
  const auto with_format = [&](auto format) {
    with_type_of(weight.scale_dtype, [&](auto scale) {
      using Format = decltype(format);
      using Scale = decltype(scale);
      if constexpr (Format::kIsFloat) work(CodesProduct<Format, true, Scale>{weight, x, y, dtype});
      else if (dtype == Dtype::float32) work(CodesProduct<Format, true, Scale>{weight, x, y, dtype});
      else work(CodesProduct<Format, false, Scale>{weight, x, y, dtype});
    });
  };
  const auto with_groups = [&](auto format) {
    if (weight.has_halves()) with_format(Halved<decltype(format)>{});
    else with_format(format);
  };
  if (weight.is_float8) with_groups(Float8{});
  else if (weight.is_int4) with_groups(Nibbles<Int4>{});
  else if (weight.is_float4) with_groups(Nibbles<Float4>{});
  else if (weight.is_numbers4) with_groups(Numbers4{});
  else if (weight.has_zeros) with_groups(Int8Zeros{});
  else if (weight.groups > 1) with_groups(Int8Groups{});
  else with_format(Int8{});
}

// Some tiles of outputs of few rows, by one thread.
inline void multiply_few(const CodesWeight& weight, const Activations& x, void* y, Dtype dtype, Range tiles) {
  with_product<std::type_identity_t>(weight, x, y, dtype, [&](const auto& product) { product.few_rows(tiles); });
}

inline void multiply_many(const CodesWeight& weight, const Activations& x, void* y, Dtype dtype, const Threads& threads) {
  with_product<Unpacked>(weight, x, y, dtype, [&](const auto& product) {
    threads.for_shares(divide_up(weight.tiles, kCodesTiles), 1, [&](Range sets) { product.many_rows(sets); });
  });
}

}  // namespace gpt_faster
