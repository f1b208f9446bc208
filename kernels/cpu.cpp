// Operators for CPUs that PyTorch lacks: linear layers that read their weight at memory speed, bfloat16 for few rows, int8
// and int4 for any number; attention; and all blocks of a model as one operator.
//
// One token through a linear layer is a matrix-vector product: every weight is read once and used once, so the only
// thing that counts is to keep the memory busy. Each thread reads its share of the weight, in its plain row-major
// layout, as four long streams far apart. Four neighbouring rows would do as much arithmetic at a time, but short rows
// lie in one memory page, where the hardware follows one stream only: half the speed (benchmarks/LOG.md).
//
// Only what is included here is needed: torch/extension.h would treble the time to build.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include <omp.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define VNNI_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")))
#endif

namespace {

using at::BFloat16;
using at::Tensor;

// More rows than this amortise a weight well enough for a blocked matrix product.
constexpr int64_t kFewRows = 16;
// Parts of a thread's share of a weight that are read side by side when there is one row.
constexpr int kStreams = 4;

#if defined(__x86_64__)

bool has_vnni() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_bf16() { return has_vnni() && __builtin_cpu_supports("avx512bf16"); }

// The unrolled loops below keep their sums in registers only if the compiler is told to unroll them early.
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE __attribute__((always_inline)) inline

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

// The sum of one vector, in the order in which sum_each adds.
VNNI_TARGET INLINE float sum_of(__m512 v) {
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));       // lanes 0 + 2 and 1 + 3 of each quarter,
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));       // the two,
  v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));  // quarters 0 + 1 and 2 + 3,
  v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e));  // the two
  return _mm512_cvtss_f32(v);
}

struct Linear {
  const BFloat16 *x, *w, *bias;  // [M, K], [N, K], [N] or null
  BFloat16* y;                   // [M, N]
  int64_t M, N, K;

  // Rows r .. r + R - 1 of x against W weight rows: n, n + stride, ... The rows after those of AHEAD of them, from the
  // one called `first` on, are fetched meanwhile.
  template <int R, int W, int AHEAD = 0>
  BF16_TARGET void tile(int64_t r, int64_t n, int64_t stride, int64_t first = 0) const {
    __m512 sum[R][W];
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < W; j++) sum[i][j] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= K; k += 32) {
      UNROLL for (int j = 0; j < AHEAD; j++) _mm_prefetch(w + (n + 1 + (first + j) * stride) * K + k, _MM_HINT_T0);
      add<R, W>(sum, x + r * K + k, w + n * K + k, stride, ~__mmask32{0});
    }
    if (k < K) add<R, W>(sum, x + r * K + k, w + n * K + k, stride, (__mmask32{1} << (K - k)) - 1);
    __m512 all[16];
    UNROLL for (int i = 0; i < 16; i++) all[i] = i < R * W ? sum[i / W][i % W] : _mm512_setzero_ps();
    alignas(64) float total[16] = {};
    if constexpr (R * W > 4) _mm512_store_ps(total, sum_each(all));
    else UNROLL for (int i = 0; i < R * W; i++) total[i] = sum_of(all[i]);
    if (bias) for (int i = 0; i < R * W; i++) total[i] += static_cast<float>(bias[n + i % W * stride]);
    alignas(64) uint16_t rounded[16];
    _mm256_store_si256((__m256i*)rounded, (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(total)));
    for (int i = 0; i < R * W; i++) std::memcpy(y + (r + i / W) * N + n + i % W * stride, rounded + i, 2);
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

  // All rows of x against W weight rows, which stay in the first-level cache meanwhile. When the first four have read them,
  // the memory would have nothing to do until the last have.
  template <int W>
  void columns(int64_t n, int64_t stride) const {
    int64_t r = 0;
    for (; r + 4 <= M; r += 4) {
      if (r == 4) tile<4, W, W / 2>(r, n, stride);
      else if (r == 8) tile<4, W, W / 2>(r, n, stride, W / 2);
      else tile<4, W>(r, n, stride);
    }
    if (M - r == 3) tile<3, W>(r, n, stride);
    if (M - r == 2) tile<2, W>(r, n, stride);
    if (M - r == 1) tile<1, W>(r, n, stride);
  }

  // The outputs begin .. end - 1 of all rows.
  void share(int64_t begin, int64_t end) const {
    const int64_t stride = (end - begin) / kStreams;
    for (int64_t n = begin; n < begin + stride; n++) columns<kStreams>(n, stride);
    for (int64_t n = begin + kStreams * stride; n < end; n++) columns<1>(n, 0);
  }

  void run() const {
    const int64_t grain = std::max<int64_t>(kStreams, 32768 / K);  // below 64 KiB a second thread does not pay
    at::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) { share(begin, end); });
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
  // x made ready by prepare, K = in rounded up to a multiple of 32
  void* ready;      // [M, K] int8, or float32 if EXACT
  float* x_scales;  // [M, K / 32]
  float* x_sums;    // [M, K / 32], of x itself, for zeros
  int32_t* starts;  // [M, K / 32], minus what the offset of the weights' codes adds to a sum of products

  int32_t offset() const { return nibbles ? 8 : 128; }

  // Makes groups begin .. end - 1 of row m ready.
  VNNI_TARGET void prepare(int64_t m, int64_t begin, int64_t end) const {
    const int64_t blocks = K / kGroup;
    for (int64_t b = begin; b < end; b++) {
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

  // Few rows: the weight is read once, each thread's share, the tiles n .. end - 1, as streams far apart.
  template <bool EXACT, bool NIBBLES, bool GROUPED, bool ZEROS>
  void few(int64_t n, int64_t end) const {
    const int64_t bytes = K * kLanes / (NIBBLES ? 2 : 1);
    if (M == 1) {
      constexpr int streams = ZEROS ? kStreams / 2 : kStreams;  // scales and zeros of groups are streams too
      const int64_t stride = (end - n) / streams;
      for (int64_t i = 0; i < stride; i++, n++)
        tile<EXACT, NIBBLES, GROUPED, ZEROS, 1, streams>(0, n, stride, w + n * bytes, stride * bytes);
      n += (streams - 1) * stride;
    }
    const int64_t stride = (end - n) / 2;
    for (int64_t i = 0; i < stride; i++, n++) {
      all_rows<EXACT, NIBBLES, GROUPED, ZEROS, 2>(n, stride, w + n * bytes, stride * bytes);
    }
    n += stride;
    if (n < end) all_rows<EXACT, NIBBLES, GROUPED, ZEROS, 1>(n, 0, w + n * bytes, 0);
  }

  template <bool EXACT>
  void few_of_kind(int64_t begin, int64_t end) const {
    if (nibbles) few<EXACT, true, true, true>(begin, end);
    else if (groups > 1) few<EXACT, false, true, false>(begin, end);
    else few<EXACT, false, false, false>(begin, end);
  }

  // The outputs of the tiles begin .. end - 1 of all rows.
  void share(int64_t begin, int64_t end) const {
    if (type == at::kFloat) few_of_kind<true>(begin, end);
    else few_of_kind<false>(begin, end);
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
  void many_of_kind() const {
    if (nibbles) many<EXACT, true, true>();
    else if (groups > 1) many<EXACT, true, false>();
    else many<EXACT, false, false>();
  }

  void run() const {
    at::parallel_for(0, M, std::max<int64_t>(1, 65536 / K), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; m++) prepare(m, 0, K / kGroup);
    });
    multiply_ready();
  }

  // All outputs of rows made ready.
  void multiply_ready() const {
    if (M <= kFewRows) {
      const int64_t grain = std::max<int64_t>(1, 65536 / (K * kLanes / (nibbles ? 2 : 1)));
      at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) { share(begin, end); });
    } else if (type == at::kFloat) {
      many_of_kind<true>();
    } else {
      many_of_kind<false>();
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

// Attention of few queries a row to its cache. No query's result depends on the queries beside it.
struct FewQueries {
  const void *q, *k, *v, *mask;  // [B, S, H, D]; [B, Hkv, C, D]; [B, S, C] of zeros and -inf
  void* y;                       // [B, S, H, D]
  at::ScalarType type;           // of all of them
  int64_t B, S, H, D, kv_row, kv_head, group;  // strides of k and v, query heads a key head
  int64_t mask_row, mask_query, slots;         // strides of mask, C
  float scale;                                 // of q k

  template <int N>  // D / 16; slots begin .. end - 1, begin being a multiple of 16
  VNNI_TARGET void head(int64_t b, int64_t s, int64_t h, int64_t begin, int64_t end, float* scores) const {
    __m512 query[N], sum[N];
    const int64_t at_q = ((b * S + s) * H + h) * D, at = b * kv_row + h / group * kv_head;
    UNROLL for (int n = 0; n < N; n++) {
      query[n] = _mm512_mul_ps(load(q, at_q + 16 * n, type), _mm512_set1_ps(scale));
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

  // Query s of head h of row b. scores: room for slots + 16 values.
  VNNI_TARGET void one(int64_t b, int64_t s, int64_t h, float* scores) const {
    int64_t begin = 0, end = round_up(slots, 16);  // the masked ends are left out, 16 slots at a time
    while (end > 16 && !any_seen(b, s, end - 16)) end -= 16;
    while (begin < end - 16 && !any_seen(b, s, begin)) begin += 16;
    end = std::min(end, slots);
    if (D == 64) head<4>(b, s, h, begin, end, scores);
    else if (D == 96) head<6>(b, s, h, begin, end, scores);
    else if (D == 128) head<8>(b, s, h, begin, end, scores);
    else head<16>(b, s, h, begin, end, scores);
  }

  void run() const {
    const int64_t grain = std::max<int64_t>(1, 16384 / (slots * D));
    at::parallel_for(0, B * H * S, grain, [&](int64_t first, int64_t last) {
      std::vector<float> scores(slots + 16);
      // the queries that share a key head one after another
      for (int64_t i = first; i < last; i++) one(i / (H * S), i % S, i / S % H, scores.data());
    });
  }
};

// 16 vectors of 16 int32, rows to columns.
VNNI_TARGET INLINE void transpose(__m512i (&v)[16]) {
  __m512i u[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    u[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    u[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
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
    u[c] = _mm512_shuffle_i32x4(a, d, 0x88);
    u[c + 8] = _mm512_shuffle_i32x4(a, d, 0xdd);
    u[c + 4] = _mm512_shuffle_i32x4(b, e, 0x88);
    u[c + 12] = _mm512_shuffle_i32x4(b, e, 0xdd);
  }
  UNROLL for (int i = 0; i < 16; i++) v[i] = u[i];
}

// Attention of many queries a row to its cache, in bfloat16. The queries of some positions and of all heads that share a
// key head are the rows of three matrix products: scores = queries x keys, their softmax, and its product with the values.
// What no query of a tile sees is left out; a causal mask halves the work.
struct ManyQueries {
  const FewQueries all;
  static constexpr int64_t kPositions = 64, kKeys = 32, kValues = 128;  // at a time
  static constexpr int64_t kScores = 1 << 18;                           // floats, which stay in the second-level cache

  struct Span {
    int64_t begin, end;  // slots
  };

  // One thread's memory.
  struct Task {
    int64_t b, first, rows, width;  // queries first, first + 1, ... of `group` heads each; slots in a row of scores
    std::vector<float> scores, sums, out;
    std::vector<uint32_t> panel;
    std::vector<Span> seen;  // of each row
  };

  const BFloat16* query(const Task& task, int64_t head, int64_t r) const {
    const int64_t s = task.first + r / all.group, h = head * all.group + r % all.group;
    return static_cast<const BFloat16*>(all.q) + ((task.b * all.S + s) * all.H + h) * all.D;
  }

  static Span joined(const Task& task, int64_t r, int64_t end) {
    Span span = task.seen[r];
    for (; r < end; r++) span = {std::min(span.begin, task.seen[r].begin), std::max(span.end, task.seen[r].end)};
    return span;
  }

  // Keys c .. c + 31 into a panel, in which one load has the same two dimensions of 16 keys.
  VNNI_TARGET void rearrange_keys(const BFloat16* k, int64_t c, int64_t end, uint32_t* panel) const {
    for (int64_t half = 0; half < kKeys; half += 16) {
      for (int64_t d = 0; d < all.D; d += 32) {
        __m512i v[16];
        UNROLL for (int i = 0; i < 16; i++) {
          v[i] = _mm512_maskz_loadu_epi16(c + half + i < end ? ~__mmask32{0} : 0, k + (c + half + i) * all.D + d);
        }
        transpose(v);
        UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_si512(panel + (d / 2 + i) * kKeys + half, v[i]);
      }
    }
  }

  // Rows r .. r + R - 1 of scores against the 32 keys of a panel.
  template <int R>
  BF16_TARGET void score(Task& task, int64_t head, int64_t r, int64_t c) const {
    __m512 sum[R][2];
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < 2; j++) sum[i][j] = _mm512_setzero_ps();
    const BFloat16* rows[R];
    UNROLL for (int i = 0; i < R; i++) rows[i] = query(task, head, r + i);
    for (int64_t d = 0; d < all.D; d += 2) {
      const uint32_t* two = task.panel.data() + d / 2 * kKeys;
      const __m512bh low = (__m512bh)_mm512_loadu_si512(two), high = (__m512bh)_mm512_loadu_si512(two + 16);
      UNROLL for (int i = 0; i < R; i++) {
        int32_t pair;
        std::memcpy(&pair, rows[i] + d, 4);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], low, both);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], high, both);
      }
    }
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < 2; j++) {
      _mm512_storeu_ps(task.scores.data() + (r + i) * task.width + c + 16 * j, sum[i][j]);
    }
  }

  // Row r of scores to e^(score - most), in bfloat16, in the first half of its memory; 0 where nothing is seen.
  BF16_TARGET void soften(Task& task, int64_t r, Span tile) const {
    float* row = task.scores.data() + r * task.width;
    uint16_t* to = reinterpret_cast<uint16_t*>(row);
    const Span seen = task.seen[r];
    const int64_t at = task.b * all.mask_row + (task.first + r / all.group) * all.mask_query;
    const __m512 scale = _mm512_set1_ps(all.scale), none = _mm512_set1_ps(-INFINITY);
    __m512 most = none, total = _mm512_setzero_ps();
    for (int64_t c = seen.begin; c < seen.end; c += 16) {
      const __mmask16 there = FewQueries::lanes(all.slots - c);
      const __m512 add = load(all.mask, at + c, all.type, there);
      const __m512 score = _mm512_mask_fmadd_ps(_mm512_loadu_ps(row + c), there, scale, add);
      _mm512_storeu_ps(row + c, _mm512_mask_mov_ps(none, there, score));
      most = _mm512_max_ps(most, _mm512_mask_mov_ps(none, there, score));
    }
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t c = tile.begin; c < tile.end; c += 16) {
      const bool inside = seen.begin <= c && c < seen.end;
      const __m512 power = inside ? exp_of(_mm512_sub_ps(_mm512_loadu_ps(row + c), most)) : _mm512_setzero_ps();
      total = _mm512_add_ps(total, power);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c), (__m256i)_mm512_cvtneps_pbh(power));
    }
    task.sums[r] = _mm512_reduce_add_ps(total);
  }

  // Values c .. end - 1 into a panel, in which one load has the same 16 dimensions of two slots.
  VNNI_TARGET void rearrange_values(const BFloat16* v, int64_t c, int64_t end, uint32_t* panel) const {
    for (; c < end; c += 2) {
      const __mmask16 second = c + 1 < end ? 0xffff : 0;
      for (int64_t d = 0; d < all.D; d += 16, panel += 16) {
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + c * all.D + d)));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, v + (c + 1) * all.D + d));
        _mm512_storeu_si512(panel, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      }
    }
  }

  // Adds softmax x values c .. end - 1 to rows r .. r + R - 1. N = D / 16.
  template <int N, int R>
  BF16_TARGET void weigh(Task& task, int64_t r, int64_t c, int64_t end) const {
    __m512 sum[R][N];
    float* out = task.out.data() + r * 16 * N;
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < N; j++) sum[i][j] = _mm512_loadu_ps(out + (i * N + j) * 16);
    const uint32_t* panel = task.panel.data();
    for (; c < end; c += 2, panel += 16 * N) {
      __m512bh two[N];
      UNROLL for (int j = 0; j < N; j++) two[j] = (__m512bh)_mm512_loadu_si512(panel + 16 * j);
      UNROLL for (int i = 0; i < R; i++) {
        int32_t pair;
        std::memcpy(&pair, reinterpret_cast<const uint16_t*>(task.scores.data() + (r + i) * task.width) + c, 4);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        UNROLL for (int j = 0; j < N; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], two[j], both);
      }
    }
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < N; j++) _mm512_storeu_ps(out + (i * N + j) * 16, sum[i][j]);
  }

  template <int R>
  void score_all(Task& task, int64_t head, int64_t r, int64_t c) const {
    for (; r + R <= task.rows; r += R) {
      const Span tile = joined(task, r, r + R);
      if (tile.begin < c + kKeys && c < tile.end) score<R>(task, head, r, c);
    }
    if constexpr (R > 1) score_all<R / 2>(task, head, r, c);
  }

  template <int N, int R>
  void weigh_all(Task& task, int64_t r, int64_t c, int64_t end) const {
    for (; r + R <= task.rows; r += R) {
      const Span tile = joined(task, r, r + R);
      if (tile.begin < end && c < tile.end) weigh<N, R>(task, r, c, std::min(end, round_up(tile.end, 2)));
    }
    if constexpr (R > 1) weigh_all<N, R / 2>(task, r, c, end);
  }

  template <int N>
  BF16_TARGET void head(Task& task, int64_t head) const {
    const int64_t at = task.b * all.kv_row + head * all.kv_head;
    const BFloat16 *k = static_cast<const BFloat16*>(all.k) + at, *v = static_cast<const BFloat16*>(all.v) + at;
    Span any = joined(task, 0, task.rows);
    any.end = std::min(any.end, all.slots);
    const Span tile{any.begin / kValues * kValues, round_up(any.end, kValues)};  // all that a block of values may ask for
    for (int64_t c = any.begin / kKeys * kKeys; c < any.end; c += kKeys) {
      rearrange_keys(k, c, any.end, task.panel.data());
      score_all<12>(task, head, 0, c);
    }
    for (int64_t r = 0; r < task.rows; r++) soften(task, r, tile);
    std::fill(task.out.begin(), task.out.end(), 0.0f);
    for (int64_t c = tile.begin; c < any.end; c += kValues) {
      const int64_t end = std::min(any.end, c + kValues);
      rearrange_values(v, c, end, task.panel.data());
      weigh_all<N, 24 / N ? 24 / N : 1>(task, 0, c, end);
    }
    for (int64_t r = 0; r < task.rows; r++) {
      const __m512 share = _mm512_set1_ps(1.0f / task.sums[r]);
      BFloat16* y = static_cast<BFloat16*>(all.y) + (query(task, head, r) - static_cast<const BFloat16*>(all.q));
      for (int j = 0; j < N; j++) {
        store(y, 16 * j, all.type, _mm512_mul_ps(_mm512_loadu_ps(task.out.data() + (r * N + j) * 16), share));
      }
    }
  }

  // The slots that query s of row b sees, in whole sixteens.
  Span span_of(int64_t b, int64_t s) const {
    Span span{0, round_up(all.slots, 16)};
    while (span.end > 16 && !all.any_seen(b, s, span.end - 16)) span.end -= 16;
    while (span.begin < span.end - 16 && !all.any_seen(b, s, span.begin)) span.begin += 16;
    return span;
  }

  void run() const {
    const int64_t heads = all.H / all.group, width = round_up(all.slots, kValues);
    const int64_t positions = std::max<int64_t>(1, std::min(kPositions, kScores / (width * all.group)));
    const int64_t parts = (all.S + positions - 1) / positions, tasks = parts * all.B * heads;
#pragma omp parallel num_threads(at::get_num_threads()) if (!omp_in_parallel())
    {
      const int64_t rows = positions * all.group;
      Task task{0, 0, 0, width, std::vector<float>(rows * width), std::vector<float>(rows),
                std::vector<float>(rows * all.D), std::vector<uint32_t>(std::max(kKeys, kValues) * all.D / 2)};
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < tasks; i++) {  // the last positions, which see most, come first
        const int64_t part = parts - 1 - i / (all.B * heads);
        task.b = i / heads % all.B, task.first = part * positions;
        task.rows = std::min(positions, all.S - task.first) * all.group;
        task.seen.resize(task.rows);
        for (int64_t r = 0; r < task.rows; r++) {
          task.seen[r] = r % all.group ? task.seen[r - 1] : span_of(task.b, task.first + r / all.group);
        }
        if (all.D == 64) head<4>(task, i % heads);
        else if (all.D == 96) head<6>(task, i % heads);
        else if (all.D == 128) head<8>(task, i % heads);
        else head<16>(task, i % heads);
      }
    }
  }
};

// Attention of any number of queries a row; of more than kFewRows in bfloat16 only.
void attend_any(const FewQueries& queries) {
  if (queries.S <= kFewRows) return queries.run();
  TORCH_CHECK(has_bf16() && queries.type == at::kBFloat16, "attend: many queries that are not bfloat16");
  ManyQueries{queries}.run();
}

// Bytes of memory that a layer of codes with `in` inputs needs to make M rows ready.
int64_t bytes_to_prepare(int64_t M, int64_t in, at::ScalarType type) {
  const int64_t K = round_up(in, kGroup);
  return M * K * (type == at::kFloat ? 4 : 1) + 12 * M * K / kGroup;
}

// Refuses what layer_of_codes would read wrongly.
void check_codes(at::ScalarType type, int64_t in, const Tensor& weight, const Tensor& scales,
                 const std::optional<Tensor>& bias) {
  const int64_t K = round_up(in, kGroup), tiles = weight.size(0);
  const bool nibbles = scales.size(2) == 2;
  TORCH_CHECK(weight.size(1) == K * kLanes / (nibbles ? 2 : 1), "linear_codes: weight takes other than ", in, " features");
  const auto known = [](at::ScalarType type) { return type == at::kFloat || type == at::kHalf || type == at::kBFloat16; };
  TORCH_CHECK(known(type) && known(scales.scalar_type()) && weight.scalar_type() == at::kByte &&
              (!bias || bias->scalar_type() == at::kFloat), "linear_codes: wrong dtype");
  TORCH_CHECK(scales.size(0) == tiles && scales.is_contiguous() && weight.is_contiguous(), "linear_codes: wrong layout");
}

QuantisedLinear layer_of_codes(const void* x, void* y, at::ScalarType type, int64_t M, int64_t in, const Tensor& weight,
                               const Tensor& scales, const std::optional<Tensor>& bias, void* room) {
  const int64_t K = round_up(in, kGroup), blocks = M * K / kGroup;
  QuantisedLinear layer{x, y, type, weight.const_data_ptr<uint8_t>()};
  layer.scales = scales.const_data_ptr();
  layer.scale_type = scales.scalar_type();
  layer.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  layer.M = M, layer.in = in, layer.K = K, layer.tiles = weight.size(0), layer.groups = scales.size(1);
  layer.nibbles = scales.size(2) == 2;
  float* floats = reinterpret_cast<float*>(static_cast<char*>(room) + M * K * (type == at::kFloat ? 4 : 1));
  layer.ready = room, layer.x_scales = floats, layer.x_sums = floats + blocks;
  layer.starts = reinterpret_cast<int32_t*>(floats + 2 * blocks);
  return layer;
}

#else

bool has_vnni() { return false; }

#endif

// A linear layer of int8 or int4 codes: x [..., in], weight uint8 [tiles, bytes], scales [tiles, groups, 1 or 2, 16],
// bias float32 [tiles * 16] or none -> [..., tiles * 16] in x's dtype.
Tensor linear_codes(const Tensor& x, const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& bias) {
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0) * kLanes;
  Tensor y = at::empty(shape, x.options());
#if defined(__x86_64__)
  const int64_t in = x.size(-1), M = x.numel() / in;
  const at::ScalarType type = x.scalar_type();
  check_codes(type, in, weight, scales, bias);
  Tensor room = at::empty({bytes_to_prepare(M, in, type)}, x.options().dtype(at::kByte));
  const Tensor xc = x.contiguous();
  layer_of_codes(xc.const_data_ptr(), y.mutable_data_ptr(), type, M, in, weight, scales, bias, room.mutable_data_ptr())
      .run();
#endif
  return y;
}

void check_head(int64_t D) {
  TORCH_CHECK(D == 64 || D == 96 || D == 128 || D == 256, "attention: a head of ", D, " is not supported");
}

// Queries against the filled part of the cache: q [B, S, H, D], k and v [B', Hkv, C', D], mask [B, S, C] of zeros and -inf
// over the first C slots, scale of q k -> [B, S, H, D]. D is 64, 96, 128 or 256. More than 16 queries a row are bfloat16.
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, double scale) {
  const int64_t B = q.size(0), S = q.size(1), H = q.size(2), D = q.size(3);
  check_head(D);
  Tensor y = at::empty(q.sizes(), q.options());
#if defined(__x86_64__)
  const Tensor qc = q.contiguous();
  const FewQueries queries{qc.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), mask.const_data_ptr(),
                           y.mutable_data_ptr(), q.scalar_type(), B, S, H, D, k.stride(0), k.stride(1), H / k.size(1),
                           mask.stride(0), mask.stride(1), mask.size(2), static_cast<float>(scale)};
  attend_any(queries);
#endif
  return y;
}

#if defined(__x86_64__)

// ---------------------------------------------------------------- all blocks of a model
//
// By way of its parts a block is nine operators, each with its call from Python, its buffer and its parallel regions; and
// all tensors of all layers, hundreds, are arguments of the compiled graph. Both take about a millisecond, a quarter of
// the step of a small model. Here a model's blocks are one operator and one argument, a tensor whose bytes are the object
// `Blocks`. For few tokens one parallel region runs through them, in which threads wait for each other where one needs
// what another made. For many, parts and products are regions of their own: a product of many bfloat16 rows is oneDNN's.

// Waits until every thread of the region is here.
void wait_for_all() {
#pragma omp barrier
}

struct Range {
  int64_t begin, end;
};

// The thread's part of n things, dealt out by the unit.
Range part(int64_t n, int64_t unit, int thread, int threads) {
  const int64_t each = round_up((n + threads - 1) / threads, unit);
  return {std::min(n, thread * each), std::min(n, (thread + 1) * each)};
}

// Buffers that stay from call to call, if they are for few tokens, and so in the cache: the nth of a call is the nth of
// the last one.
class Scratch {
  struct alignas(64) Line {
    char bytes[64];
  };
  struct Buffer {
    std::unique_ptr<Line[]> memory;
    int64_t lines = 0;
  };
  std::vector<Buffer> own;
  const bool keep;
  size_t taken = 0;

 public:
  explicit Scratch(bool keep) : keep(keep) {}

  char* take(int64_t bytes) {
    thread_local std::vector<Buffer> kept;
    std::vector<Buffer>& all = keep ? kept : own;
    if (taken == all.size()) all.emplace_back();
    Buffer& buffer = all[taken++];
    const int64_t lines = bytes / sizeof(Line) + 1;
    if (buffer.lines < lines) buffer = {std::unique_ptr<Line[]>(new Line[lines]), lines};
    return buffer.memory[0].bytes;
  }
};

// A linear layer of codes if it has scales, of bfloat16 if not.
struct SharedLinear {
  Tensor weight;
  std::optional<Tensor> scales, bias;
  int64_t in, out;

  SharedLinear(const std::optional<Tensor>* tensors, int64_t in, at::ScalarType type)
      : weight(tensors[0].value().contiguous()), scales(tensors[1]), bias(tensors[2]), in(in) {
    if (bias) bias = bias->contiguous();
    out = weight.size(0) * (scales ? kLanes : 1);
    if (scales) check_codes(type, in, weight, *scales, bias);
    else TORCH_CHECK(type == at::kBFloat16 && weight.scalar_type() == type && weight.size(1) == in && has_bf16(),
                     "a layer's weight is no bfloat16 matrix with ", in, " inputs");
  }

  QuantisedLinear codes(const void* x, void* y, at::ScalarType type, int64_t M, void* room) const {
    return layer_of_codes(x, y, type, M, in, weight, *scales, bias, room);
  }

  // Makes the inputs begin .. end - 1 of row m ready in `room`; begin is the first of a group.
  void prepare(const void* x, at::ScalarType type, int64_t M, void* room, int64_t m, Range inputs) const {
    if (scales) codes(x, nullptr, type, M, room).prepare(m, inputs.begin / kGroup, round_up(inputs.end, kGroup) / kGroup);
  }

  // The outputs begin .. end - 1, in whole tiles if there are scales, of all rows.
  void share(const void* x, void* y, at::ScalarType type, int64_t M, void* room, Range outputs) const {
    if (scales) return codes(x, y, type, M, room).share(outputs.begin / kLanes, outputs.end / kLanes);
    Linear{static_cast<const BFloat16*>(x), weight.const_data_ptr<BFloat16>(),
           bias ? bias->const_data_ptr<BFloat16>() : nullptr, static_cast<BFloat16*>(y), M, out, in}
        .share(outputs.begin, outputs.end);
  }

  // All outputs of more than kFewRows rows, not to be called by the threads of a region.
  void all(const void* x, void* y, at::ScalarType type, int64_t M, void* room) const {
    if (scales) return codes(x, y, type, M, room).multiply_ready();
    Tensor made = at::from_blob(y, {M, out}, weight.options());
    at::linear_out(made, at::from_blob(const_cast<void*>(x), {M, in}, weight.options()), weight, bias);
  }
};

// Linear layers of experts: x [T, 1 or K, in] through the experts chosen [T, K], whose weight [E, ...] and scales [E, ...]
// are as linear_codes takes them, or as linear_bf16 if there are no scales -> [T, K, out]. The rows of an expert are
// gathered, so that its weight is read once, where it lies, and those of others not at all. Experts with few rows are
// dealt out to the threads together.
Tensor linear_experts(const Tensor& x, const Tensor& chosen, const Tensor& weight, const std::optional<Tensor>& scales) {
  const int64_t T = chosen.size(0), K = chosen.size(1), n_expert = weight.size(0);
  TORCH_CHECK(x.dim() == 3 && x.size(0) == T && (x.size(1) == 1 || x.size(1) == K), "linear_experts: wrong shape");
  const int64_t in = x.size(2), out = weight.size(1) * (scales ? kLanes : 1), bytes = x.element_size();
  const at::ScalarType type = x.scalar_type();
  const Tensor xc = x.contiguous(), cc = chosen.contiguous();
  std::vector<std::vector<int64_t>> places(n_expert);  // of an expert, in [T, K]
  for (int64_t i = 0; i < T * K; i++) {
    const int64_t e = cc.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(0 <= e && e < n_expert, "linear_experts: there is no expert ", e);
    places[e].push_back(i);
  }
  Tensor y = at::empty({T, K, out}, x.options());
  const char* from = static_cast<const char*>(xc.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  const auto row = [&](int64_t place) { return from + (x.size(1) == 1 ? place / K : place) * in * bytes; };

  struct Job {
    SharedLinear layer;
    int64_t expert, n;
    const char* x;
    char *y, *room;
  };
  std::vector<Job> jobs;
  Scratch scratch(false);
  for (int64_t e = 0; e < n_expert; e++) {
    const int64_t n = places[e].size();
    if (n == 0) continue;
    const std::optional<Tensor> tensors[] = {weight[e], scales ? std::optional((*scales)[e]) : std::nullopt, std::nullopt};
    Job job{SharedLinear(tensors, in, type), e, n, row(places[e][0]), to + places[e][0] * out * bytes,
            scratch.take(bytes_to_prepare(n, in, type))};
    if (n > 1) {
      char* rows = scratch.take(n * in * bytes);
      for (int64_t j = 0; j < n; j++) std::memcpy(rows + j * in * bytes, row(places[e][j]), in * bytes);
      job.x = rows, job.y = scratch.take(n * out * bytes);
    }
    at::parallel_for(0, n, std::max<int64_t>(1, 65536 / in), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; m++) job.layer.prepare(job.x, type, n, job.room, m, {0, in});
    });
    jobs.push_back(std::move(job));
  }
  for (const Job& job : jobs) {
    if (job.n > kFewRows) job.layer.all(job.x, job.y, type, job.n, job.room);
  }
  const int64_t tiles = (out + kLanes - 1) / kLanes, n_job = jobs.size(), bytes_a_tile = weight.nbytes() / n_expert / tiles;
  at::parallel_for(0, n_job * tiles, std::max<int64_t>(1, 65536 / bytes_a_tile), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const Job& job = jobs[begin / tiles];
      const int64_t first = begin % tiles, last = std::min(tiles, first + end - begin);
      const Range outputs{first * kLanes, std::min(out, last * kLanes)};
      if (job.n <= kFewRows) job.layer.share(job.x, job.y, type, job.n, job.room, outputs);
      begin += last - first;
    }
  });
  for (const Job& job : jobs) {
    for (int64_t j = 0; job.n > 1 && j < job.n; j++) {
      std::memcpy(to + places[job.expert][j] * out * bytes, job.y + j * out * bytes, out * bytes);
    }
  }
  return y;
}

// Root mean square normalisation of n values, a multiple of 16, rounded as model.RMSNorm rounds them.
VNNI_TARGET void rms_norm(const void* x, const void* weight, void* y, at::ScalarType type, int64_t n, float eps) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 value = load(x, i, type);
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / n + eps));
  for (int64_t i = 0; i < n; i += 16) {
    store(y, i, type, _mm512_mul_ps(load(x, i, type), scale));
    store(y, i, type, _mm512_mul_ps(load(y, i, type), load(weight, i, type)));
  }
}

// Rotary embedding of one head, n values in two halves, in place: cos and sin [n / 2]. n is a multiple of 32.
VNNI_TARGET void rotate(void* x, at::ScalarType type, const float* cos, const float* sin, int64_t n) {
  for (int64_t i = 0, half = n / 2; i < half; i += 16) {
    const __m512 a = load(x, i, type), b = load(x, half + i, type);
    const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
    store(x, i, type, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
    store(x, half + i, type, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
  }
}

// silu(gate) * up of n values, a multiple of 16.
VNNI_TARGET void silu_times(const void* gate, const void* up, void* y, at::ScalarType type, int64_t n) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 g = load(gate, i, type);
    // e^-|g| does not overflow; below the bound it is 0, where minus infinity would become NaN
    const __m512 most = _mm512_min_ps(_mm512_abs_ps(g), _mm512_set1_ps(104.0f));
    const __m512 power = exp_of(_mm512_sub_ps(_mm512_setzero_ps(), most));
    const __mmask16 negative = _mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 sigmoid = _mm512_div_ps(_mm512_mask_mov_ps(one, negative, power), _mm512_add_ps(one, power));
    store(y, i, type, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid), load(up, i, type)));
  }
}

// y += x, n values, a multiple of 16.
VNNI_TARGET void add(const void* x, void* y, at::ScalarType type, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store(y, i, type, _mm512_add_ps(load(y, i, type), load(x, i, type)));
}

struct Block {
  Tensor attention_norm, ffn_norm;
  std::optional<Tensor> q_norm, k_norm;
  SharedLinear wqkv, wo, w13, w2;
  Tensor k, v;  // [B', Hkv, C', D]
};

// One call of `run_blocks`: sizes, arguments and buffers. Rows m = 0 .. M - 1 are the S tokens of row 0, then of row 1 ...
struct Call {
  int64_t B, S, M, dim, n_head, n_kv_head, D, width, slots, size;
  at::ScalarType type;
  float eps, scale;
  const int64_t* pos;      // [M]
  const float *cos, *sin;  // [M, D / 2]
  const Tensor& mask;      // [B, S, slots]
  char *x;                 // [M, dim], from block to block
  char *normed, *qkv, *q, *attended, *gate_up, *hidden, *made;
  char *room, *other_room;  // for activations made ready, in turn: one is written while the other may still be read
  float* scores;            // [threads, slots + 16]

  void normalise(const Tensor& norm, const SharedLinear& next, Range rows) const {
    for (int64_t m = rows.begin; m < rows.end; m++) {
      rms_norm(x + m * dim * size, norm.const_data_ptr(), normed + m * dim * size, type, dim, eps);
      next.prepare(normed, type, M, room, m, {0, dim});
    }
  }

  // Normalised and rotated queries into q, keys and values into the cache. `heads` are those of the queries and keys of
  // row 0, then of row 1 ...
  void place(const Block& block, Range heads) const {
    const int64_t turned = n_head + n_kv_head, bytes = D * size;
    for (int64_t i = heads.begin; i < heads.end; i++) {
      const int64_t m = i / turned, h = i % turned;
      const bool is_key = h >= n_head;
      const int64_t slot = m / S * block.k.stride(0) + (h - n_head) * block.k.stride(1) + pos[m] * D;
      const char* from = qkv + (m * (turned + n_kv_head) + h) * bytes;
      char* to = is_key ? static_cast<char*>(block.k.data_ptr()) + slot * size : q + (m * n_head + h) * bytes;
      const auto& norm = is_key ? block.k_norm : block.q_norm;
      if (norm) rms_norm(from, norm->const_data_ptr(), to, type, D, eps);
      else std::memcpy(to, from, bytes);
      rotate(to, type, cos + m * D / 2, sin + m * D / 2, D);
      if (is_key) std::memcpy(static_cast<char*>(block.v.data_ptr()) + slot * size, from + n_kv_head * bytes, bytes);
    }
  }

  FewQueries queries(const Block& block) const {
    return {q, block.k.const_data_ptr(), block.v.const_data_ptr(), mask.const_data_ptr(), attended, type, B, S, n_head, D,
            block.k.stride(0), block.k.stride(1), n_head / n_kv_head, mask.stride(0), mask.stride(1), slots, scale};
  }

  // silu(gate) * up of some outputs of some rows, in whole groups.
  void gate(const Block& block, Range rows, Range outputs) const {
    for (int64_t m = rows.begin; m < rows.end; m++) {
      const char *gate = gate_up + (2 * m * width + outputs.begin) * size, *up = gate + width * size;
      silu_times(gate, up, hidden + (m * width + outputs.begin) * size, type, outputs.end - outputs.begin);
      block.w2.prepare(hidden, type, M, other_room, m, outputs);
    }
  }

  void add_made(Range rows, Range outputs) const {
    for (int64_t m = rows.begin; m < rows.end; m++) {
      const int64_t at = (m * dim + outputs.begin) * size;
      add(made + at, x + at, type, outputs.end - outputs.begin);
    }
  }

  // A thread's part of the work of few tokens.
  void run_few(const Block& block, int thread, int threads) const {
    const Range all_rows{0, M}, rows = part(M, 1, thread, threads), attending = part(M * n_head, 1, thread, threads);
    const Range outputs = part(dim, kLanes, thread, threads), inner = part(width, kGroup, thread, threads);
    normalise(block.attention_norm, block.wqkv, rows);
    wait_for_all();
    block.wqkv.share(normed, qkv, type, M, room, part(block.wqkv.out, kLanes, thread, threads));
    wait_for_all();
    place(block, part(M * (n_head + n_kv_head), 1, thread, threads));
    wait_for_all();
    for (int64_t i = attending.begin; i < attending.end; i++) {  // queries that share a key head one after another
      const int64_t b = i / (n_head * S), h = i / S % n_head, s = i % S;
      queries(block).one(b, s, h, scores + thread * (slots + 16));
      block.wo.prepare(attended, type, M, other_room, b * S + s, {h * D, (h + 1) * D});
    }
    wait_for_all();
    block.wo.share(attended, made, type, M, other_room, outputs);
    add_made(all_rows, outputs);
    wait_for_all();
    normalise(block.ffn_norm, block.w13, rows);
    wait_for_all();
    block.w13.share(normed, gate_up, type, M, room, inner);
    block.w13.share(normed, gate_up, type, M, room, {width + inner.begin, width + inner.end});
    gate(block, all_rows, inner);
    wait_for_all();
    block.w2.share(hidden, made, type, M, other_room, outputs);
    add_made(all_rows, outputs);
    wait_for_all();
  }

  // The whole work of many tokens, each part of it a region of its own.
  void run_many(const Block& block) const {
    const auto for_rows = [this](auto work) {
      at::parallel_for(0, M, 1, [&](int64_t begin, int64_t end) { work(Range{begin, end}); });
    };
    for_rows([&](Range rows) { normalise(block.attention_norm, block.wqkv, rows); });
    block.wqkv.all(normed, qkv, type, M, room);
    const int64_t turned = n_head + n_kv_head;
    for_rows([&](Range rows) { place(block, {rows.begin * turned, rows.end * turned}); });
    attend_any(queries(block));
    for_rows([&](Range rows) {
      for (int64_t m = rows.begin; m < rows.end; m++) block.wo.prepare(attended, type, M, other_room, m, {0, n_head * D});
    });
    block.wo.all(attended, made, type, M, other_room);
    for_rows([&](Range rows) {
      add_made(rows, {0, dim});
      normalise(block.ffn_norm, block.w13, rows);
    });
    block.w13.all(normed, gate_up, type, M, room);
    for_rows([&](Range rows) { gate(block, rows, {0, width}); });
    block.w2.all(hidden, made, type, M, other_room);
    for_rows([&](Range rows) { add_made(rows, {0, dim}); });
  }
};

struct Blocks {
  const Blocks* self = this;  // which a copy of the bytes does not have
  double eps, scale;
  std::vector<Block> all;
};

constexpr int64_t kTensors = 18;  // of a block

// The blocks of a model as one tensor for `run_blocks`, which keeps the tensors it is made of. Of each block, in this
// order: attention_norm, wqkv, q_norm and k_norm or none, wo, ffn_norm, w13, w2, and the caches k and v [B', Hkv, C', D].
// A linear layer is its weight, scales and bias, as linear_codes takes them, or linear_bf16 if there are no scales.
// eps: of the norms; scale: of q k.
Tensor join_blocks(const c10::List<std::optional<Tensor>>& tensors, double eps, double scale) {
  auto blocks = std::make_unique<Blocks>();
  blocks->eps = eps, blocks->scale = scale;
  const std::vector<std::optional<Tensor>> all = tensors.vec();
  TORCH_CHECK(!all.empty() && all.size() % kTensors == 0, "join_blocks: ", all.size(), " tensors");
  for (auto t = all.begin(); t != all.end(); t += kTensors) {
    const auto type = t[0]->scalar_type();
    const int64_t dim = t[0]->numel();
    const SharedLinear wqkv(&t[1], dim, type), w13(&t[10], dim, type);
    const Tensor &k = t[16].value(), &v = t[17].value();
    const int64_t D = k.size(3), n_head = wqkv.out / D - 2 * k.size(1);
    Block block{*t[0], *t[9], t[4], t[5], wqkv, SharedLinear(&t[6], n_head * D, type), w13,
                SharedLinear(&t[13], w13.out / 2, type), k, v};
    TORCH_CHECK(block.wo.out == dim && block.w2.out == dim && dim % kLanes == 0 && wqkv.out % kLanes == 0 &&
                w13.out % (2 * kGroup) == 0, "join_blocks: wrong size");
    TORCH_CHECK(k.is_contiguous() && v.is_contiguous() && k.sizes() == v.sizes(), "join_blocks: wrong layout of a cache");
    check_head(D);
    for (const Tensor& like : {block.ffn_norm, k, v, block.q_norm.value_or(k), block.k_norm.value_or(k)}) {
      TORCH_CHECK(like.scalar_type() == type, "join_blocks: several dtypes");
    }
    const Block& first = blocks->all.empty() ? block : blocks->all[0];
    TORCH_CHECK(first.attention_norm.numel() == dim && first.wqkv.out == wqkv.out && first.w13.out == w13.out &&
                first.k.sizes() == k.sizes() && first.k.scalar_type() == type, "join_blocks: unlike blocks");
    blocks->all.push_back(std::move(block));
  }
  Blocks* bytes = blocks.release();
  return at::from_blob(bytes, {sizeof(Blocks)}, [bytes](void*) { delete bytes; }, at::kByte);
}

// x [B, S, dim] through blocks from `join_blocks`, whose caches are written at pos [B, S] first. cos and sin
// [B, S, 1, D / 2] float32; mask [B, S, C] of zeros and -inf over the first C slots, in x's dtype, which is bfloat16 if
// there are more than 16 tokens a row.
Tensor run_blocks(const Tensor& x, const Tensor& joined, const Tensor& pos, const Tensor& cos, const Tensor& sin,
                  const Tensor& mask) {
  const Blocks& blocks = *static_cast<const Blocks*>(joined.const_data_ptr());
  TORCH_CHECK(joined.numel() == sizeof(Blocks) && blocks.self == &blocks, "run_blocks: not made by join_blocks");
  const Block& first = blocks.all[0];
  Tensor y = x.clone(at::MemoryFormat::Contiguous);
  const Tensor pc = pos.contiguous(), cc = cos.contiguous(), sc = sin.contiguous(), mc = mask.contiguous();
  Call call{x.size(0), x.size(1), x.size(0) * x.size(1), x.size(2), 0, first.k.size(1), first.k.size(3),
            first.w13.out / 2, mc.size(2), x.element_size(), x.scalar_type(), static_cast<float>(blocks.eps),
            static_cast<float>(blocks.scale), pc.const_data_ptr<int64_t>(), cc.const_data_ptr<float>(),
            sc.const_data_ptr<float>(), mc};
  const int64_t M = call.M, D = call.D, rows = first.wqkv.out, threads = at::get_num_threads();
  call.n_head = rows / D - 2 * call.n_kv_head;
  const bool few = M <= kFewRows;
  TORCH_CHECK(few || call.S <= kFewRows || (call.type == at::kBFloat16 && has_bf16()),
              "run_blocks: many queries a row that are not bfloat16");
  TORCH_CHECK(call.dim == first.attention_norm.numel() && call.B <= first.k.size(0) && call.slots <= first.k.size(2) &&
              cc.numel() == M * D / 2 && sc.numel() == M * D / 2 && pc.numel() == M && mc.numel() == M * call.slots,
              "run_blocks: wrong size");
  TORCH_CHECK(call.type == first.k.scalar_type() && mc.scalar_type() == call.type, "run_blocks: wrong dtype");
  for (int64_t m = 0; m < M; m++) {
    TORCH_CHECK(0 <= call.pos[m] && call.pos[m] < first.k.size(2), "run_blocks: position ", call.pos[m],
                " is not in a cache of ", first.k.size(2));
  }
  const int64_t row = M * call.size, widest = std::max({call.dim, call.width, call.n_head * D});
  Scratch scratch(few);
  call.x = static_cast<char*>(y.mutable_data_ptr());
  call.normed = scratch.take(row * call.dim), call.made = scratch.take(row * call.dim);
  call.qkv = scratch.take(row * rows), call.gate_up = scratch.take(row * 2 * call.width);
  call.q = scratch.take(row * call.n_head * D), call.attended = scratch.take(row * call.n_head * D);
  call.hidden = scratch.take(row * call.width);
  call.room = scratch.take(bytes_to_prepare(M, widest, call.type));
  call.other_room = scratch.take(bytes_to_prepare(M, widest, call.type));
  if (!few) {
    for (const Block& block : blocks.all) call.run_many(block);
    return y;
  }
  call.scores = reinterpret_cast<float*>(scratch.take(threads * (call.slots + 16) * 4));
#pragma omp parallel num_threads(threads) if (!omp_in_parallel())
  for (const Block& block : blocks.all) call.run_few(block, omp_get_thread_num(), omp_get_num_threads());
  return y;
}

#endif

}  // namespace

TORCH_LIBRARY(gpt_faster, m) {
  m.def("linear_bf16(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("has_bf16() -> bool", &has_bf16);
  m.def("linear_codes(Tensor x, Tensor weight, Tensor scales, Tensor? bias) -> Tensor");
  m.def("linear_experts(Tensor x, Tensor chosen, Tensor weight, Tensor? scales) -> Tensor");
  m.def("attend(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor");
  m.def("join_blocks(Tensor?[] tensors, float eps, float scale) -> Tensor");
  m.def("run_blocks(Tensor x, Tensor blocks, Tensor pos, Tensor cos, Tensor sin, Tensor mask) -> Tensor");
  m.def("has_vnni() -> bool", &has_vnni);
}

TORCH_LIBRARY_IMPL(gpt_faster, CPU, m) {
  m.impl("linear_bf16", &linear_bf16);
  m.impl("linear_codes", &linear_codes);
  m.impl("attend", &attend);
#if defined(__x86_64__)
  m.impl("linear_experts", &linear_experts);
  m.impl("join_blocks", &join_blocks);
  m.impl("run_blocks", &run_blocks);
#endif
}
