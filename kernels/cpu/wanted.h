// A linear layer for few rows of which some outputs are wanted: of the weight only their rows are read.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "sparse.h"

namespace gpt_faster {

// Some outputs of a weight that lies by output, [out, in] as in SparseWeight with whole kColumns of inputs, groups of whole
// kColumns, and scales [out, 1 or 2, groups]: of few rows of x [M, in], and where `wanted` [M, out] is 0 they are 0.
template <class Code, class Element>
struct WantedProduct {
  const SparseWeight& weight;
  const float* x;     // [M, in]
  const float* sums;  // [M, groups] of x
  const Element* wanted;
  Element* y;  // [M, out]
  int64_t M;
  static constexpr bool kIsInt4 = std::is_same_v<Code, Nibbles>;
  static constexpr int kAtOnce = 4, kParts = kIsInt4 ? 2 : 1;  // rows read side by side; scales and zeros
  static constexpr int kBits = kIsInt4 ? 4 : 8 * sizeof(Code);

  const Code* row(int64_t n) const {
    return static_cast<const Code*>(weight.weight) + n * weight.in / kParts;
  }

  void fetch_scales(int64_t n) const {
    const BFloat16* from = weight.scales + n * kParts * weight.groups;
    for (int64_t i = 0; weight.scales && i < kParts * weight.groups; i += 32) __builtin_prefetch(from + i);
  }

  // The scales of row n as floats; returns what its bias, its zeros, and the 8 that nibbles have too much, add to output m.
  float prepare(int64_t n, int64_t m, float* scales) const {
    Floats rest = every(0.0f);
    const BFloat16* from = weight.scales + n * kParts * weight.groups;
    for (int64_t g = 0; weight.scales && g < weight.groups; g += 16) {
      const int64_t count = std::min<int64_t>(16, weight.groups - g);
      const Floats scale = load(from + g, count);
      store(scales + g, scale);
      if constexpr (kIsInt4) {
        const Floats zero = load(from + weight.groups + g, count) - scale * every(8.0f);
        rest = multiply_add(zero, load(sums + m * weight.groups + g, count), rest);
      }
    }
    return reduce_add(rest) + (weight.bias ? weight.bias[n] : 0.0f);
  }

  // Output m of the rows *n, n[stride] ..., R of them. Meanwhile, if asked to, it fetches those after each, up to *last.
  template <int R, bool FETCH = true>
  void dots(const int32_t* n, int64_t stride, const int32_t* last, int64_t m) const {
    const int64_t groupsize = weight.in / weight.groups, padded = round_up(weight.groups, 16);
    thread_local std::vector<float> scales;  // [R, padded]
    scales.resize(kAtOnce * padded);
    const Code *codes[R], *next[R];
    float rest[R];
    Floats total[R];
    UNROLL for (int r = 0; r < R; r++) {
      const int32_t* own = n + r * stride;
      codes[r] = row(*own), next[r] = row(*std::min(own + 1, last)), total[r] = every(0.0f);
      if constexpr (FETCH) fetch_scales(*std::min(own + 1, last));
      rest[r] = prepare(*own, m, &scales[r * padded]);
    }
    for (int64_t g = 0; g < weight.groups; g++) {
      Floats sum[R];
      UNROLL for (int r = 0; r < R; r++) sum[r] = every(0.0f);
      for (int64_t i = g * groupsize; i < (g + 1) * groupsize; i += kColumns) {
        const Floats first = load(x + m * weight.in + i), second = load(x + m * weight.in + i + 16);
        UNROLL for (int r = 0; r < R; r++) {
          if constexpr (FETCH) fetch(next[r], i * kBits);
          Floats two[2];
          load_two(codes[r], i, two);
          sum[r] = multiply_add(two[0], first, multiply_add(two[1], second, sum[r]));
        }
      }
      UNROLL for (int r = 0; r < R; r++) {
        total[r] = weight.scales ? multiply_add(sum[r], every(scales[r * padded + g]), total[r]) : sum[r];
      }
    }
    UNROLL for (int r = 0; r < R; r++) {
      Element rounded[16];
      store(rounded, every(reduce_add(total[r]) + rest[r]));
      y[m * weight.out + n[r * stride]] = rounded[0];
    }
  }

  // The rows that any row of x wants, into `found`; returns how many they are.
  int64_t find(Range outputs, int32_t* found) const {
    int64_t n = 0;
    for (int64_t o = outputs.begin; o < outputs.end; o += 16) {
      const int64_t count = std::min<int64_t>(16, outputs.end - o);
      Floats any = every(0.0f);
      for (int64_t m = 0; m < M; m++) any = any + abs(load(wanted + m * weight.out + o, count));
      float values[16];
      store(values, any);
      for (int64_t i = 0; i < count; i++) found[n] = o + i, n += values[i] != 0;  // NaN is wanted
    }
    return n;
  }

  void multiply(Range outputs) const {
    thread_local std::vector<int32_t> found;
    found.resize(weight.out + 1);
    const int64_t n = find(outputs, found.data()), stream = n / kAtOnce;
    for (int64_t m = 0; m < M; m++) {
      std::memset(y + m * weight.out + outputs.begin, 0, (outputs.end - outputs.begin) * sizeof(Element));
    }
    const int32_t* last = found.data() + std::max<int64_t>(n, 1) - 1;
    if (M == 1) {
      const bool by_hand = !nearly_all(n, outputs.end - outputs.begin);
      for (int64_t i = 0; i < stream; i++) {
        by_hand ? dots<kAtOnce>(&found[i], stream, last, 0) : dots<kAtOnce, false>(&found[i], stream, last, 0);
      }
      for (int64_t i = stream * kAtOnce; i < n; i++) dots<1>(&found[i], 1, last, 0);
    } else {
      for (int64_t i = 0; i < n; i++) for (int64_t m = 0; m < M; m++) {  // a row of the weight serves all rows of x
        if (first_float(wanted + m * weight.out + found[i]) != 0) dots<1>(&found[i], 1, last, m);
      }
    }
  }

  static float first_float(const Element* from) {
    float values[16];
    store(values, load(from, 1));
    return values[0];
  }
};

template <class Element>
void multiply_wanted(const SparseWeight& weight, const Element* x, const Element* wanted, Element* y, int64_t M,
                     const Threads& threads) {
  std::vector<float> floats(M * weight.in), sums(M * weight.groups);
  const int64_t groupsize = weight.in / weight.groups;
  for (int64_t i = 0; i < M * weight.in; i += 16) {
    store(&floats[i], load(x + i));
    sums[i / groupsize] += reduce_add(load(&floats[i]));
  }
  threads.for_shares(weight.out, divide_up(65536, weight.in), [&](Range outputs) {
    const auto with_code = [&](auto code) {
      WantedProduct<decltype(code), Element>{weight, floats.data(), sums.data(), wanted, y, M}.multiply(outputs);
    };
    with_code_of(weight, with_code);
  });
}

}  // namespace gpt_faster
