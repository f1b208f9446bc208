// A linear layer of bfloat16 weights for few rows, at the speed at which memory can be read.
//
// One token through a linear layer is a matrix-vector product: every weight is read once and used once, so the only
// thing that counts is to keep the memory busy. Each thread reads its share of the weight, in its plain row-major
// layout, as four streams far apart. Four neighbouring rows would do as much arithmetic at a time, but short rows lie in
// one memory page, where the hardware's prefetcher follows one stream only: half the speed (benchmarks/LOG.md).
#pragma once

#include "parallel.h"
#include "simd.h"

namespace gpt_faster {

// Up to so many rows the weight is read at memory speed; more pay for a blocked matrix product.
constexpr int64_t kFewRows = 16;
// Streams of a thread, when there is one row.
constexpr int kStreams = 4;

struct Bf16Weight {
  const BFloat16 *weight, *bias;  // [N, K], [N] or null
  int64_t N, K;
};

// y = x weight^T + bias, with sums in float32.
struct Bf16Product {
  const Bf16Weight& layer;
  const BFloat16* x;  // [M, K]
  BFloat16* y;        // [M, N]
  int64_t M;

  // Adds the products of `count` columns, 32 at most, of R rows of x and W rows of the weight.
  template <int R, int W>
  INLINE void add_products(Floats (&sum)[R][W], const BFloat16* x, const BFloat16* weight, int64_t stride,
                           int64_t count) const {
    if constexpr (kFewRegisters && R > 1) {
      if (count == 32) return add_in_parts(sum, x, layer.K, weight, stride * layer.K);
    }
    Pairs rows[R];
    UNROLL for (int i = 0; i < R; i++) rows[i] = load_pairs(x + i * layer.K, count);
    UNROLL for (int j = 0; j < W; j++) {
      const Pairs weights = load_pairs(weight + j * stride * layer.K, count);
      UNROLL for (int i = 0; i < R; i++) sum[i][j] = dot_pairs(sum[i][j], weights, rows[i]);
    }
  }

  // Rows r .. r + R - 1 of x and W rows of the weight: n, n + stride, ... Meanwhile it fetches AHEAD of the W rows after
  // those, n + 1, n + 1 + stride, ..., from number `first` on.
  template <int R, int W, int AHEAD = 0>
  void tile(int64_t r, int64_t n, int64_t stride, int64_t first = 0) const {
    const int64_t K = layer.K;
    const BFloat16 *rows = x + r * K, *weight = layer.weight + n * K;
    Floats sum[R][W];
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < W; j++) sum[i][j] = every(0.0f);
    int64_t k = 0;
    for (; k + 32 <= K; k += 32) {
      UNROLL for (int j = 0; j < AHEAD; j++) __builtin_prefetch(weight + (1 + (first + j) * stride) * K + k);
      add_products<R, W>(sum, rows + k, weight + k, stride, 32);
    }
    if (k < K) add_products<R, W>(sum, rows + k, weight + k, stride, K - k);
    finish<R, W>(sum, r, n, stride);
  }

  // Sums across lanes, adds the bias, rounds and stores.
  template <int R, int W>
  INLINE void finish(Floats (&sum)[R][W], int64_t r, int64_t n, int64_t stride) const {
    alignas(64) float total[16] = {};
    if constexpr (R * W > 4) {
      Floats all[16];
      UNROLL for (int i = 0; i < 16; i++) all[i] = i < R * W ? sum[i / W][i % W] : every(0.0f);
      store(total, sums_of(all));
    } else {
      UNROLL for (int i = 0; i < R * W; i++) total[i] = sum_of(sum[i / W][i % W]);
    }
    if (layer.bias) for (int i = 0; i < R * W; i++) total[i] += to_float(layer.bias[n + i % W * stride]);
    alignas(32) BFloat16 rounded[16];
    store(rounded, load(total));
    for (int i = 0; i < R * W; i++) y[(r + i / W) * layer.N + n + i % W * stride] = rounded[i];
  }

  // All rows of x and W rows of the weight, which stay in the first-level cache meanwhile: after the first rows of x
  // the memory would be idle, so the next ones fetch the first half of the next W rows, those after them the second.
  template <int W>
  void all_rows(int64_t n, int64_t stride) const {
    constexpr int R = kBf16Rows;
    int64_t r = 0;
    for (; r + R <= M; r += R) {
      constexpr int kHalf = (W + 1) / 2;
      if (r == R) tile<R, W, kHalf>(r, n, stride);
      else if (r == 2 * R) tile<R, W, W - kHalf>(r, n, stride, kHalf);
      else tile<R, W>(r, n, stride);
    }
    rest<R - 1, W>(r, n, stride);
  }

  // The R rows of x at most that are left.
  template <int R, int W>
  INLINE void rest(int64_t r, int64_t n, int64_t stride) const {
    if constexpr (R > 0) {
      if (M - r == R) tile<R, W>(r, n, stride);
      else rest<R - 1, W>(r, n, stride);
    }
  }

  // Some outputs of all rows, by one thread.
  void multiply(Range outputs) const {
    if (M == 1) in_streams<kStreams>(outputs);
    else in_streams<kBf16Outputs>(outputs);
  }

  template <int W>
  void in_streams(Range outputs) const {
    const int64_t stride = (outputs.end - outputs.begin) / W;
    for (int64_t n = outputs.begin; n < outputs.begin + stride; n++) all_rows<W>(n, stride);
    for (int64_t n = outputs.begin + W * stride; n < outputs.end; n++) all_rows<1>(n, 0);
  }

  void multiply_all(const Threads& threads) const {
    const int64_t grain = std::max<int64_t>(kStreams, 32768 / layer.K);  // below 64 KiB a second thread does not pay
    threads.for_shares(layer.N, grain, [&](Range outputs) { multiply(outputs); });
  }
};

}  // namespace gpt_faster
