// Operators for CPUs that PyTorch lacks: a linear layer for few rows that reads its weight at memory speed.
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

#if defined(__x86_64__)
#include <immintrin.h>
#define BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif

namespace {

using at::BFloat16;
using at::Tensor;

// More rows than this amortise a weight well enough for a blocked matrix product.
constexpr int64_t kFewRows = 16;

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
    constexpr int kStreams = 4;
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

}  // namespace

TORCH_LIBRARY(gpt_faster, m) {
  m.def("linear_bf16(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("has_bf16() -> bool", &has_bf16);
}

TORCH_LIBRARY_IMPL(gpt_faster, CPU, m) { m.impl("linear_bf16", &linear_bf16); }
