// Operators for CPUs that PyTorch lacks: linear layers that read their weight at memory speed, bfloat16 for few rows, int8
// and int4 for any number; and the attention of few queries.
//
// One token through a linear layer is a matrix-vector product: every weight is read once and used once, so the only
// thing that counts is to keep the memory busy. Each thread reads its share of the weight, in its plain row-major
// layout, as four long streams far apart. Four neighbouring rows would do as much arithmetic at a time, but short rows
// lie in one memory page, where the hardware follows one stream only: half the speed (benchmarks/LOG.md).
//
// Only what is included here is needed: torch/extension.h would treble the time to build.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif

namespace {

using at::BFloat16;
using at::Tensor;

// More rows than this amortise a weight well enough for a blocked matrix product.
constexpr int64_t kFewRows = 16;
// Parts of a thread's share of a weight that are read side by side when there is one row.
constexpr int kStreams = 4;

#if defined(__x86_64__)

bool has_bf16() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// The unrolled loops below keep their sums in registers only if the compiler is told to unroll them early.
#define UNROLL _Pragma("GCC unroll 8")
#define INLINE __attribute__((always_inline)) inline

struct Linear {
  const BFloat16 *x, *w, *bias;  // [M, K], [N, K], [N] or null
  BFloat16* y;                   // [M, N]
  int64_t M, N, K;

  // Rows r .. r + R - 1 of x against W weight rows: n, n + stride, ...
  template <int R, int W>
  BF16_TARGET void tile(int64_t r, int64_t n, int64_t stride) const {
    __m512 sum[R][W];
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < W; j++) sum[i][j] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= K; k += 32) add<R, W>(sum, x + r * K + k, w + n * K + k, stride, ~__mmask32{0});
    if (k < K) add<R, W>(sum, x + r * K + k, w + n * K + k, stride, (__mmask32{1} << (K - k)) - 1);
    UNROLL for (int j = 0; j < W; j++) {
      const int64_t row = n + j * stride;
      const float b = bias ? static_cast<float>(bias[row]) : 0.0f;
      UNROLL for (int i = 0; i < R; i++) y[(r + i) * N + row] = _mm512_reduce_add_ps(sum[i][j]) + b;
    }
  }

  // Adds the products of the columns in `mask`, 32 at most.
  template <int R, int W>
  BF16_TARGET INLINE void add(__m512 (&sum)[R][W], const BFloat16* xk, const BFloat16* wk, int64_t stride,
                              __mmask32 mask) const {
    __m512bh weights[W];
    UNROLL for (int j = 0; j < W; j++) weights[j] = (__m512bh)_mm512_maskz_loadu_epi16(mask, wk + j * stride * K);
    UNROLL for (int i = 0; i < R; i++) {
      const __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(mask, xk + i * K);
      UNROLL for (int j = 0; j < W; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], weights[j], row);
    }
  }

  // All rows of x against W weight rows, which stay in the first-level cache meanwhile.
  template <int W>
  void columns(int64_t n, int64_t stride) const {
    int64_t r = 0;
    for (; r + 4 <= M; r += 4) tile<4, W>(r, n, stride);
    if (M - r == 3) tile<3, W>(r, n, stride);
    if (M - r == 2) tile<2, W>(r, n, stride);
    if (M - r == 1) tile<1, W>(r, n, stride);
  }

  void run() const {
    const int64_t grain = std::max<int64_t>(kStreams, 32768 / K);  // below 64 KiB a second thread does not pay
    at::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) {
      const int64_t stride = (end - begin) / kStreams;
      for (int64_t n = begin; n < begin + stride; n++) columns<kStreams>(n, stride);
      for (int64_t n = begin + kStreams * stride; n < end; n++) columns<1>(n, 0);
    });
  }
};

#else

bool has_bf16() { return false; }

struct Linear {
  const BFloat16 *x, *w, *bias;
  BFloat16* y;
  int64_t M, N, K;
  void run() const {}
};

#endif

// F.linear for bfloat16: x [..., K], weight [N, K], bias [N] or none -> [..., N]; sums in float32.
Tensor linear_bf16(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t K = weight.size(1), N = weight.size(0);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16, "linear_bf16: wrong dtype");
  TORCH_CHECK(x.size(-1) == K, "linear_bf16: x has ", x.size(-1), " features, weight takes ", K);
  const int64_t M = x.numel() / K;
  if (M > kFewRows || !has_bf16()) return at::linear(x, weight, bias);
  auto shape = x.sizes().vec();
  shape.back() = N;
  Tensor y = at::empty(shape, x.options());
  const Tensor xc = x.contiguous(), wc = weight.contiguous();
  const Tensor bc = bias ? bias->contiguous() : Tensor();
  Linear{xc.const_data_ptr<BFloat16>(), wc.const_data_ptr<BFloat16>(), bias ? bc.const_data_ptr<BFloat16>() : nullptr,
         y.mutable_data_ptr<BFloat16>(), M, N, K}.run();
  return y;
}

// ---------------------------------------------------------------- quantised weights
//
// Weights come as bytes, in tiles of 16 output rows: for each four inputs the 16 x 4 codes that one instruction
// multiplies (VNNI: 64 products of an unsigned and a signed byte, summed by fours into 16 int32). int8 codes are stored
// plus 128; int4 codes plus 8, two a byte: inputs 8i .. 8i + 3 in the low nibbles, the next four in the high ones.
//
// Activations in half precision are rounded to int8 in groups of 32 inputs; sums of products are then exact integers.
// float32 ones are taken as they are (EXACT), three times slower where the arithmetic counts: whoever asks for float32
// wants every digit. All sums are in one order for any number of rows: no row's result depends on the rows beside it.

constexpr int64_t kLanes = 16, kGroup = 32;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

#if defined(__x86_64__)

#define VNNI_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

bool has_vnni() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// 16 values of any floating type as float32, those outside of the mask as 0.
VNNI_TARGET INLINE __m512 load(const void* data, int64_t i, at::ScalarType type, __mmask16 mask = 0xffff) {
  if (type == at::kFloat) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + i);
  if (type == at::kHalf) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

VNNI_TARGET INLINE void store(void* data, int64_t i, at::ScalarType type, __m512 value) {
  if (type == at::kFloat) return _mm512_storeu_ps(static_cast<float*>(data) + i, value);
  __m256i half;
  if (type == at::kHalf) {
    half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
  } else {  // to the nearest bfloat16, ties to even
    __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(data) + i), half);
}

struct QuantisedLinear {
  const void* x;  // [M, in]
  void* y;        // [M, tiles * 16]
  at::ScalarType type;  // of x and y
  const uint8_t* w;     // [tiles, K * 16] bytes, or half as many with nibbles
  const void* scales;   // [tiles, groups, 16], or with zeros [tiles, groups, 2, 16]
  at::ScalarType scale_type;
  const float* bias;  // [tiles * 16] or null
  int64_t M, in, K, tiles, groups;
  bool nibbles;  // int4, which has zeros
  // x made ready by prepare_row, K = in rounded up to a multiple of 32
  void* ready;      // [M, K] int8, or float32 if EXACT
  float* x_scales;  // [M, K / 32]
  float* x_sums;    // [M, K / 32], of x itself, for zeros
  int32_t* starts;  // [M, K / 32], minus what the offset of the weights' codes adds to a sum of products

  int32_t offset() const { return nibbles ? 8 : 128; }

  VNNI_TARGET void prepare_row(int64_t m) const {
    const int64_t blocks = K / kGroup;
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t left = std::min(kGroup, in - b * kGroup), i = m * in + b * kGroup;
      const uint32_t mask = left == kGroup ? ~0u : (1u << left) - 1;
      const __m512 low = load(x, i, type, mask), high = load(x, i + 16, type, mask >> 16);
      if (nibbles) x_sums[m * blocks + b] = _mm512_reduce_add_ps(_mm512_add_ps(low, high));
      if (type == at::kFloat) {
        float* out = static_cast<float*>(ready) + m * K + b * kGroup;
        _mm512_storeu_ps(out, low);
        _mm512_storeu_ps(out + 16, high);
        continue;
      }
      // as integers the bits of absolute values are in the same order, and NaN is the largest of all
      const __m512i low_bits = _mm512_castps_si512(_mm512_abs_ps(low));
      const __m512i high_bits = _mm512_castps_si512(_mm512_abs_ps(high));
      const uint32_t most_bits = _mm512_reduce_max_epu32(_mm512_max_epu32(low_bits, high_bits));
      float most;
      std::memcpy(&most, &most_bits, 4);
      const __m512 inverse = _mm512_set1_ps(most > 1e-30f ? 127.0f / most : 0.0f);  // below, 127 / most is infinite
      const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
      const __m512i c = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
      __m128i* out = reinterpret_cast<__m128i*>(static_cast<int8_t*>(ready) + m * K + b * kGroup);
      _mm_storeu_si128(out, _mm512_cvtsepi32_epi8(a));
      _mm_storeu_si128(out + 1, _mm512_cvtsepi32_epi8(c));
      x_scales[m * blocks + b] = most / 127.0f;  // NaN if any of them is
      starts[m * blocks + b] = -offset() * _mm512_reduce_add_epi32(_mm512_add_epi32(a, c));
    }
  }

  // The 64 unsigned codes of 4 inputs and 16 rows. One load has those of two such parts if they are nibbles.
  template <bool NIBBLES>
  VNNI_TARGET INLINE __m512i codes_of(__m512i loaded, int part) const {
    if (!NIBBLES) return loaded;
    return _mm512_and_si512(part ? _mm512_srli_epi16(loaded, 4) : loaded, _mm512_set1_epi8(15));
  }

  // Sums of the products of 32 inputs of R rows and T tiles: x as int8 ...
  template <bool NIBBLES, int R, int T>
  VNNI_TARGET INLINE void multiply(__m512 (&product)[R][T], int64_t r, int64_t b, const uint8_t* wb,
                                   int64_t w_stride) const {
    constexpr int kStep = NIBBLES ? 8 : 4;
    const int64_t blocks = K / kGroup;
    const int8_t* xb = static_cast<const int8_t*>(ready) + r * K + b * kGroup;
    __m512i dot[R][T];
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < T; j++) {
      dot[i][j] = _mm512_set1_epi32(starts[(r + i) * blocks + b]);
    }
    UNROLL for (int k = 0; k < kGroup; k += kStep) {
      __m512i loaded[T], codes[T];
      UNROLL for (int j = 0; j < T; j++) loaded[j] = _mm512_loadu_si512(wb + j * w_stride + k / kStep * 64);
      UNROLL for (int part = 0; part < kStep / 4; part++) {
        UNROLL for (int j = 0; j < T; j++) codes[j] = codes_of<NIBBLES>(loaded[j], part);
        UNROLL for (int i = 0; i < R; i++) {
          int32_t four;
          std::memcpy(&four, xb + i * K + k + 4 * part, 4);
          const __m512i row = _mm512_set1_epi32(four);
          UNROLL for (int j = 0; j < T; j++) dot[i][j] = _mm512_dpbusd_epi32(dot[i][j], codes[j], row);
        }
      }
    }
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < T; j++) product[i][j] = _mm512_cvtepi32_ps(dot[i][j]);
  }

  // ... and x as float32.
  template <bool NIBBLES, int R, int T>
  VNNI_TARGET INLINE void multiply_exact(__m512 (&product)[R][T], int64_t r, int64_t b, const uint8_t* wb,
                                         int64_t w_stride) const {
    constexpr int kStep = NIBBLES ? 8 : 4;
    const float* xb = static_cast<const float*>(ready) + r * K + b * kGroup;
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < T; j++) product[i][j] = _mm512_setzero_ps();
    for (int k = 0; k < kGroup; k += 4) {
      __m512i codes[T];
      UNROLL for (int j = 0; j < T; j++) {
        const __m512i loaded = _mm512_loadu_si512(wb + j * w_stride + k / kStep * 64);
        codes[j] = codes_of<NIBBLES>(loaded, k % kStep);
      }
      UNROLL for (int c = 0; c < 4; c++) {
        __m512 weights[T];
        UNROLL for (int j = 0; j < T; j++) {
          const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes[j], 8 * c), _mm512_set1_epi32(255));
          weights[j] = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(offset())));
        }
        UNROLL for (int i = 0; i < R; i++) {
          const __m512 row = _mm512_set1_ps(xb[i * K + k + c]);
          UNROLL for (int j = 0; j < T; j++) product[i][j] = _mm512_fmadd_ps(weights[j], row, product[i][j]);
        }
      }
    }
  }

  // Rows r .. r + R - 1 of x against the tiles n, n + stride, ..., whose bytes begin at wn, wn + w_stride, ...
  template <bool EXACT, bool NIBBLES, bool GROUPED, bool ZEROS, int R, int T>
  VNNI_TARGET void tile(int64_t r, int64_t n, int64_t stride, const uint8_t* wn, int64_t w_stride) const {
    constexpr int kParts = ZEROS ? 2 : 1;
    const int64_t blocks = K / kGroup, blocks_a_group = blocks / groups;
    __m512 sum[R][T];
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < T; j++) sum[i][j] = _mm512_setzero_ps();
    for (int64_t g = 0, b = 0; g < groups; g++) {
      __m512 scale[T], zero[T];
      if (GROUPED) UNROLL for (int j = 0; j < T; j++) {
        const int64_t at = ((n + j * stride) * groups + g) * kParts * kLanes;
        scale[j] = load(scales, at, scale_type);
        if (ZEROS) zero[j] = load(scales, at + kLanes, scale_type);
      }
      for (; b < (g + 1) * blocks_a_group; b++) {
        __m512 product[R][T];
        const uint8_t* wb = wn + b * kGroup * (NIBBLES ? 8 : 16);
        if constexpr (EXACT) multiply_exact<NIBBLES, R, T>(product, r, b, wb, w_stride);
        else multiply<NIBBLES, R, T>(product, r, b, wb, w_stride);
        UNROLL for (int i = 0; i < R; i++) {
          const __m512 x_scale = _mm512_set1_ps(EXACT ? 1.0f : x_scales[(r + i) * blocks + b]);
          const __m512 x_sum = _mm512_set1_ps(ZEROS ? x_sums[(r + i) * blocks + b] : 0.0f);
          UNROLL for (int j = 0; j < T; j++) {
            const __m512 factor = !GROUPED ? x_scale : EXACT ? scale[j] : _mm512_mul_ps(scale[j], x_scale);
            sum[i][j] = _mm512_fmadd_ps(product[i][j], factor, sum[i][j]);
            if (ZEROS) sum[i][j] = _mm512_fmadd_ps(zero[j], x_sum, sum[i][j]);
          }
        }
      }
    }
    UNROLL for (int j = 0; j < T; j++) {
      const int64_t column = (n + j * stride) * kLanes;
      UNROLL for (int i = 0; i < R; i++) {
        __m512 value = sum[i][j];
        if (!GROUPED) value = _mm512_mul_ps(value, load(scales, column, scale_type));
        if (bias) value = _mm512_add_ps(value, _mm512_loadu_ps(bias + column));
        store(y, (r + i) * tiles * kLanes + column, type, value);
      }
    }
  }

  template <bool EXACT, bool NIBBLES, bool GROUPED, bool ZEROS, int T>
  void all_rows(int64_t n, int64_t stride, const uint8_t* wn, int64_t w_stride) const {
    constexpr int kRows = 4;
    int64_t r = 0;
    for (; r + kRows <= M; r += kRows) tile<EXACT, NIBBLES, GROUPED, ZEROS, kRows, T>(r, n, stride, wn, w_stride);
    if (M - r == 3) tile<EXACT, NIBBLES, GROUPED, ZEROS, 3, T>(r, n, stride, wn, w_stride);
    if (M - r == 2) tile<EXACT, NIBBLES, GROUPED, ZEROS, 2, T>(r, n, stride, wn, w_stride);
    if (M - r == 1) tile<EXACT, NIBBLES, GROUPED, ZEROS, 1, T>(r, n, stride, wn, w_stride);
  }

  // Few rows: the weight is read once, each thread's share as streams far apart.
  template <bool EXACT, bool NIBBLES, bool GROUPED, bool ZEROS>
  void few() const {
    const int64_t bytes = K * kLanes / (NIBBLES ? 2 : 1);
    const int64_t grain = std::max<int64_t>(1, 65536 / bytes);
    at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
      int64_t n = begin;
      if (M == 1) {
        const int64_t stride = (end - n) / kStreams;
        for (int64_t i = 0; i < stride; i++, n++)
          tile<EXACT, NIBBLES, GROUPED, ZEROS, 1, kStreams>(0, n, stride, w + n * bytes, stride * bytes);
        n += (kStreams - 1) * stride;
      }
      const int64_t stride = (end - n) / 2;
      for (int64_t i = 0; i < stride; i++, n++) {
        all_rows<EXACT, NIBBLES, GROUPED, ZEROS, 2>(n, stride, w + n * bytes, stride * bytes);
      }
      n += stride;
      if (n < end) all_rows<EXACT, NIBBLES, GROUPED, ZEROS, 1>(n, 0, w + n * bytes, 0);
    });
  }

  // Many rows: two tiles at a time stay in the cache, as bytes, while all rows pass.
  template <bool EXACT, bool GROUPED, bool ZEROS>
  void many() const {
    at::parallel_for(0, (tiles + 1) / 2, 1, [&](int64_t begin, int64_t end) {
      std::vector<uint8_t> buffer(nibbles ? 2 * K * kLanes : 0);
      for (int64_t n = 2 * begin; n < std::min(2 * end, tiles); n += 2) {
        const int64_t count = std::min<int64_t>(2, tiles - n), bytes = K * kLanes;
        const uint8_t* wn = w + n * bytes / (nibbles ? 2 : 1);
        if (nibbles) {
          unpack(wn, buffer.data(), count * bytes);
          wn = buffer.data();
        }
        if (count == 2) all_rows<EXACT, false, GROUPED, ZEROS, 2>(n, 1, wn, bytes);
        else all_rows<EXACT, false, GROUPED, ZEROS, 1>(n, 0, wn, 0);
      }
    });
  }

  VNNI_TARGET void unpack(const uint8_t* from, uint8_t* to, int64_t bytes) const {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int64_t i = 0; i < bytes; i += 128) {
      const __m512i two = _mm512_loadu_si512(from + i / 2);
      _mm512_storeu_si512(to + i, _mm512_and_si512(two, mask));
      _mm512_storeu_si512(to + i + 64, _mm512_and_si512(_mm512_srli_epi16(two, 4), mask));
    }
  }

  template <bool EXACT>
  void run() const {
    at::parallel_for(0, M, std::max<int64_t>(1, 65536 / K), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; m++) prepare_row(m);
    });
    if (M <= kFewRows) {
      if (nibbles) few<EXACT, true, true, true>();
      else if (groups > 1) few<EXACT, false, true, false>();
      else few<EXACT, false, false, false>();
    } else {
      if (nibbles) many<EXACT, true, true>();
      else if (groups > 1) many<EXACT, true, false>();
      else many<EXACT, false, false>();
    }
  }
};

// ---------------------------------------------------------------- attention

// e^x for x <= 0, to one unit in the last place or two: 2^n times a polynomial in what is left of x / ln 2.
VNNI_TARGET INLINE __m512 exp_of(__m512 x) {
  const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);  // ln 2 in two parts
  rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), rest);
  __m512 power = _mm512_set1_ps(1.0f / 720);
  for (const float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(term));
  }
  return _mm512_scalef_ps(power, n);
}

// The sums of 16 vectors, in one.
VNNI_TARGET INLINE __m512 sum_each(__m512 (&v)[16]) {
  UNROLL for (int i = 0; i < 8; i++) {
    v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  }
  UNROLL for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
    v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int half = 2; half >= 1; half--) UNROLL for (int i = 0; i < half; i++) {  // four quarters to two, two to one
    const __m512 a = v[2 * i], b = v[2 * i + 1];
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  return v[0];
}

// Attention of few queries a row to its cache. No query's result depends on the queries beside it.
struct FewQueries {
  const void *q, *k, *v, *mask;  // [B, S, H, D]; [B, Hkv, C, D]; [B, S, C] of zeros and -inf
  void* y;                       // [B, S, H, D]
  at::ScalarType type;           // of all of them
  int64_t B, S, H, D, kv_row, kv_head, group;  // strides of k and v, query heads a key head
  int64_t mask_row, mask_query, slots;         // strides of mask, C

  template <int N>  // D / 16; slots begin .. end - 1, begin being a multiple of 16
  VNNI_TARGET void head(int64_t b, int64_t s, int64_t h, int64_t begin, int64_t end, float* scores) const {
    __m512 query[N], sum[N];
    const int64_t at_q = ((b * S + s) * H + h) * D, at = b * kv_row + h / group * kv_head;
    UNROLL for (int n = 0; n < N; n++) {
      query[n] = _mm512_mul_ps(load(q, at_q + 16 * n, type), _mm512_set1_ps(1.0f / std::sqrt(float(D))));
      sum[n] = _mm512_setzero_ps();
    }
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t c = begin; c < end; c += 16) {
      __m512 dot[16];
      UNROLL for (int i = 0; i < 16; i++) {
        const int64_t row = at + std::min(c + i, end - 1) * D;
        dot[i] = _mm512_mul_ps(query[0], load(k, row, type));
        UNROLL for (int n = 1; n < N; n++) dot[i] = _mm512_fmadd_ps(query[n], load(k, row + 16 * n, type), dot[i]);
      }
      const __mmask16 there = lanes(end - c);
      const __m512 seen = load(mask, b * mask_row + s * mask_query + c, type, there);
      const __m512 score = _mm512_mask_add_ps(_mm512_set1_ps(-INFINITY), there, sum_each(dot), seen);
      _mm512_storeu_ps(scores + c, score);
      most = _mm512_max_ps(most, score);
    }
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t c = begin; c < end; c += 16) {
      const __m512 power = exp_of(_mm512_sub_ps(_mm512_loadu_ps(scores + c), most));
      _mm512_storeu_ps(scores + c, power);
      total = _mm512_add_ps(total, power);
    }
    for (int64_t c = begin; c < end; c++) {
      const __m512 weight = _mm512_set1_ps(scores[c]);
      UNROLL for (int n = 0; n < N; n++) sum[n] = _mm512_fmadd_ps(weight, load(v, at + c * D + 16 * n, type), sum[n]);
    }
    const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    UNROLL for (int n = 0; n < N; n++) store(y, at_q + 16 * n, type, _mm512_mul_ps(sum[n], share));
  }

  static __mmask16 lanes(int64_t left) { return left < 16 ? (1 << left) - 1 : 0xffff; }

  // Whether any of up to 16 slots from c on is seen.
  VNNI_TARGET bool any_seen(int64_t b, int64_t s, int64_t c) const {
    const __mmask16 there = lanes(slots - c);
    const __m512 values = load(mask, b * mask_row + s * mask_query + c, type, there);
    return _mm512_mask_cmp_ps_mask(there, values, _mm512_setzero_ps(), _CMP_EQ_OQ);
  }

  VNNI_TARGET void run() const {
    const int64_t grain = std::max<int64_t>(1, 16384 / (slots * D));
    at::parallel_for(0, B * H * S, grain, [&](int64_t first, int64_t last) {
      std::vector<float> scores(slots + 16);
      for (int64_t i = first; i < last; i++) {  // the queries that share a key head one after another
        const int64_t b = i / (H * S), h = i / S % H, s = i % S;
        int64_t begin = 0, end = round_up(slots, 16);  // the masked ends are left out, 16 slots at a time
        while (end > 16 && !any_seen(b, s, end - 16)) end -= 16;
        while (begin < end - 16 && !any_seen(b, s, begin)) begin += 16;
        end = std::min(end, slots);
        if (D == 64) head<4>(b, s, h, begin, end, scores.data());
        else if (D == 96) head<6>(b, s, h, begin, end, scores.data());
        else if (D == 128) head<8>(b, s, h, begin, end, scores.data());
        else head<16>(b, s, h, begin, end, scores.data());
      }
    });
  }
};

#else

bool has_vnni() { return false; }

#endif

// A linear layer of int8 or int4 codes: x [..., in], weight uint8 [tiles, bytes], scales [tiles, groups, 1 or 2, 16],
// bias float32 [tiles * 16] or none -> [..., tiles * 16] in x's dtype.
Tensor linear_codes(const Tensor& x, const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& bias) {
  const int64_t in = x.size(-1), K = round_up(in, kGroup), M = x.numel() / in, tiles = weight.size(0);
  const bool nibbles = scales.size(2) == 2;
  TORCH_CHECK(weight.size(1) == K * kLanes / (nibbles ? 2 : 1), "linear_codes: weight takes other than ", in, " features");
  const auto known = [](at::ScalarType type) { return type == at::kFloat || type == at::kHalf || type == at::kBFloat16; };
  TORCH_CHECK(known(x.scalar_type()) && known(scales.scalar_type()), "linear_codes: wrong dtype");
  TORCH_CHECK(scales.size(0) == tiles && scales.is_contiguous() && weight.is_contiguous(), "linear_codes: wrong layout");
  auto shape = x.sizes().vec();
  shape.back() = tiles * kLanes;
  Tensor y = at::empty(shape, x.options());
#if defined(__x86_64__)
  const bool exact = x.scalar_type() == at::kFloat;
  const int64_t blocks = M * K / kGroup, bytes = M * K * (exact ? 4 : 1);
  Tensor buffer = at::empty({bytes + 12 * blocks}, x.options().dtype(at::kByte));
  uint8_t* room = buffer.mutable_data_ptr<uint8_t>();
  float* floats = reinterpret_cast<float*>(room + bytes);
  const Tensor xc = x.contiguous();
  QuantisedLinear work{xc.const_data_ptr(), y.mutable_data_ptr(), x.scalar_type(), weight.const_data_ptr<uint8_t>()};
  work.scales = scales.const_data_ptr();
  work.scale_type = scales.scalar_type();
  work.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  work.M = M, work.in = in, work.K = K, work.tiles = tiles, work.groups = scales.size(1), work.nibbles = nibbles;
  work.ready = room, work.x_scales = floats, work.x_sums = floats + blocks;
  work.starts = reinterpret_cast<int32_t*>(floats + 2 * blocks);
  if (exact) work.run<true>();
  else work.run<false>();
#endif
  return y;
}

// Few queries a row against the filled part of the cache: q [B, S, H, D], k and v [B', Hkv, C', D], mask [B, S, C] of
// zeros and -inf over the first C slots -> [B, S, H, D]. D is 64, 96, 128 or 256.
Tensor attend_few(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask) {
  const int64_t B = q.size(0), S = q.size(1), H = q.size(2), D = q.size(3);
  TORCH_CHECK(D == 64 || D == 96 || D == 128 || D == 256, "attend_few: a head of ", D, " is not supported");
  Tensor y = at::empty(q.sizes(), q.options());
#if defined(__x86_64__)
  const Tensor qc = q.contiguous();
  FewQueries{qc.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), mask.const_data_ptr(), y.mutable_data_ptr(),
             q.scalar_type(), B, S, H, D, k.stride(0), k.stride(1), H / k.size(1), mask.stride(0), mask.stride(1),
             mask.size(2)}.run();
#endif
  return y;
}

}  // namespace

TORCH_LIBRARY(gpt_faster, m) {
  m.def("linear_bf16(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("has_bf16() -> bool", &has_bf16);
  m.def("linear_codes(Tensor x, Tensor weight, Tensor scales, Tensor? bias) -> Tensor");
  m.def("attend_few(Tensor q, Tensor k, Tensor v, Tensor mask) -> Tensor");
  m.def("has_vnni() -> bool", &has_vnni);
}

TORCH_LIBRARY_IMPL(gpt_faster, CPU, m) {
  m.impl("linear_bf16", &linear_bf16);
  m.impl("linear_codes", &linear_codes);
  m.impl("attend_few", &attend_few);
}
