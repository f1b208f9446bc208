// A linear layer of bfloat16 weights for many rows, on processors that have no instruction for products of bfloat16.
//
// A panel is 16 rows of the weight, turned to columns and widened to float32 while it lies in the first-level cache. Each
// of its vectors is multiplied by one number of each of kPanelRows rows of x, as many as registers can hold the sums of.
// So 12 of 20 instructions are FMAs, which alone would limit it, and a row's sums do not depend on the rows beside it.
#pragma once

#include <memory>
#include <vector>

#include "linear_bf16.h"

namespace gpt_faster {

constexpr int kPanelRows = 6;          // with 16 outputs: as many sums as registers can hold
constexpr int64_t kPanelInputs = 256;  // of a panel: 16 KB

struct PanelProduct {
  const Bf16Weight& layer;
  const BFloat16* x;  // [M, K]
  BFloat16* y;        // [M, N]
  int64_t M;

  int64_t blocks() const { return divide_up(M, kPanelRows); }
  int64_t inputs() const { return round_up(layer.K, 32); }

  void multiply_all(const Threads& threads) const {
    const std::unique_ptr<float[]> rows(new float[blocks() * inputs() * kPanelRows]);
    threads.for_shares(blocks(), 1, [&](Range share) {
      for (int64_t block = share.begin; block < share.end; block++) widen(block, rows.get());
    });
    threads.for_shares(divide_up(layer.N, 16), 1, [&](Range share) {
      std::vector<float> panel(kPanelInputs * 16), sums(blocks() * kPanelRows * 16);
      for (int64_t tile = share.begin; tile < share.end; tile++) {
        multiply(16 * tile, rows.get(), panel.data(), sums.data());
      }
    });
  }

  // Rows of x as float32, number k of all rows of a block beside each other; zeros beyond x.
  void widen(int64_t block, float* rows) const {
    float* to = rows + block * inputs() * kPanelRows;
    for (int64_t i = 0; i < kPanelRows; i++) {
      const int64_t m = block * kPanelRows + i, count = m < M ? layer.K : 0;
      for (int64_t k = 0; k < inputs(); k++) to[k * kPanelRows + i] = k < count ? to_float(x[m * layer.K + k]) : 0.0f;
    }
  }

  // 16 outputs of all rows, from output n on.
  void multiply(int64_t n, const float* rows, float* panel, float* sums) const {
    std::fill_n(sums, blocks() * kPanelRows * 16, 0.0f);
    for (int64_t k = 0; k < inputs(); k += kPanelInputs) {
      const int64_t count = std::min(kPanelInputs, inputs() - k);
      fill(n, k, count, panel);
      for (int64_t block = 0; block < blocks(); block++) {
        add(rows + (block * inputs() + k) * kPanelRows, panel, count, sums + block * kPanelRows * 16);
      }
    }
    const int64_t left = std::min<int64_t>(16, layer.N - n);
    const Floats bias = layer.bias ? load(layer.bias + n, left) : every(0.0f);
    for (int64_t m = 0; m < M; m++) {
      alignas(32) BFloat16 rounded[16];
      store(rounded, load(sums + 16 * m) + bias);
      std::memcpy(y + m * layer.N + n, rounded, left * sizeof(BFloat16));
    }
  }

  // Inputs k .. k + count - 1 of 16 rows of the weight, turned to columns; zeros beyond the weight.
  void fill(int64_t n, int64_t k, int64_t count, float* panel) const {
    for (int64_t c = 0; c < count; c += 32) {
      Pairs columns[16];
      UNROLL for (int i = 0; i < 16; i++) {
        const int64_t there = n + i < layer.N ? std::clamp<int64_t>(layer.K - k - c, 0, 32) : 0;
        columns[i] = load_pairs(layer.weight + (n + i) * layer.K + k + c, there);
        __builtin_prefetch(layer.weight + (n + i) * layer.K + k + c + 64);  // 16 streams are too many for the hardware
      }
      transpose(columns);
      UNROLL for (int i = 0; i < 16; i++) {
        store(panel + (c + 2 * i) * 16, firsts_of(columns[i]));
        store(panel + (c + 2 * i + 1) * 16, seconds_of(columns[i]));
      }
    }
  }

  // Adds the products of a block of rows and a panel.
  static void add(const float* rows, const float* panel, int64_t count, float* sums) {
    Floats sum[kPanelRows];
    UNROLL for (int i = 0; i < kPanelRows; i++) sum[i] = load(sums + 16 * i);
    for (int64_t k = 0; k < count; k++, rows += kPanelRows, panel += 16) {
      const Floats weights = load(panel);
      UNROLL for (int i = 0; i < kPanelRows; i++) sum[i] = multiply_add(every(rows[i]), weights, sum[i]);
    }
    UNROLL for (int i = 0; i < kPanelRows; i++) store(sums + 16 * i, sum[i]);
  }
};

}  // namespace gpt_faster
