// Linear layers of which 2 of each 4 successive weights are kept, for any number of rows.
//
// The weight lies in tiles of 16 output rows. A tile has, for each 32 inputs, first the places of the kept weights, 2 bits
// each, in four bytes an output, then the kept weights: the first of all 16 outputs, the second ... Nothing is expanded: of
// the four inputs that kept weights may belong to, every output takes the one at its place, by one instruction for all.
//
// Activations are multiplied as float32, those of int8 weights too. The order of sums is the same for any number of rows:
// no row's result depends on the rows beside it.
#pragma once

#include "linear_codes.h"

namespace gpt_faster {

struct TwoFourWeight {
  const uint8_t* tiles;    // [n_tile, bytes]; null: there is no such weight
  const BFloat16* scales;  // [n_tile, groups, 16] of int8 weights, or null: weights have the dtype of the activations
  const float* bias;       // [n_tile * 16] or null
  int64_t in, n_tile, groups;

  int64_t K() const { return round_up(in, kGroup); }
};

// Some rows of x, into those of y [M, n_tile * 16].
template <class Value, class Element>
struct TwoFourProduct {
  const TwoFourWeight& weight;
  const float* x;  // [M, K]
  Element* y;
  int64_t M;
  static constexpr int64_t kKept = kGroup / 2, kPlaces = kLanes * kGroup / 8;  // of a block of 32 inputs: weights an
  static constexpr int64_t kBlock = kPlaces + kKept * kLanes * sizeof(Value);  // output; bytes of places, and of all
  static constexpr int kRows = 4;  // at a time

  int64_t bytes_a_tile() const { return weight.K() / kGroup * kBlock; }

  // To the sums of R rows and T tiles, the products of one block.
  template <int R, int T>
  INLINE void add_block(Floats (&sum)[R][T], const uint8_t* block, int64_t stride, const float* x) const {
    Bytes places[T];
    UNROLL for (int j = 0; j < T; j++) places[j] = load_bytes(block + j * stride);
    UNROLL for (int k = 0; k < kKept; k++) UNROLL for (int j = 0; j < T; j++) {
      const Ints place = place_of(places[j], k);
      const Floats values = load(reinterpret_cast<const Value*>(block + j * stride + kPlaces) + k * kLanes);
      UNROLL for (int i = 0; i < R; i++) {
        sum[i][j] = multiply_add(values, at_places(x + i * weight.K() + k / 2 * 4, place), sum[i][j]);
      }
    }
  }

  // Rows r .. r + R - 1 and T tiles: n, n + stride, ...
  template <int R, int T>
  void tile(int64_t r, int64_t n, int64_t stride) const {
    const int64_t blocks = weight.K() / kGroup / weight.groups;
    const uint8_t* block = weight.tiles + n * bytes_a_tile();
    const float* rows = x + r * weight.K();
    Floats total[R][T];
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < T; j++) total[i][j] = every(0.0f);
    for (int64_t g = 0; g < weight.groups; g++) {
      Floats sum[R][T];
      UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < T; j++) sum[i][j] = every(0.0f);
      for (int64_t b = 0; b < blocks; b++, block += kBlock, rows += kGroup) {
        add_block<R, T>(sum, block, stride * bytes_a_tile(), rows);
      }
      UNROLL for (int j = 0; j < T; j++) {
        const int64_t at = ((n + j * stride) * weight.groups + g) * kLanes;
        const Floats scale = weight.scales ? load(weight.scales + at) : every(1.0f);
        UNROLL for (int i = 0; i < R; i++) total[i][j] = multiply_add(sum[i][j], scale, total[i][j]);
      }
    }
    UNROLL for (int j = 0; j < T; j++) {
      const int64_t column = (n + j * stride) * kLanes;
      const Floats bias = weight.bias ? load(weight.bias + column) : every(0.0f);
      UNROLL for (int i = 0; i < R; i++) store(y + (r + i) * weight.n_tile * kLanes + column, total[i][j] + bias);
    }
  }

  // The R rows at most that are left.
  template <int R>
  INLINE void rest(int64_t r, int64_t n) const {
    if constexpr (R > 0) {
      if (M - r == R) tile<R, 1>(r, n, 0);
      else rest<R - 1>(r, n);
    }
  }

  // Some tiles, by one thread.
  void multiply(Range tiles) const {
    int64_t n = tiles.begin;
    if (M == 1) {  // streams far apart keep the memory busier
      const int64_t stride = (tiles.end - n) / kStreams, end = n + stride;
      for (; n < end; n++) tile<1, kStreams>(0, n, stride);
      n += (kStreams - 1) * stride;
    }
    for (; n < tiles.end; n++) {
      int64_t r = 0;
      for (; r + kRows <= M; r += kRows) tile<kRows, 1>(r, n, 0);
      rest<kRows - 1>(r, n);
    }
  }
};

constexpr int64_t kRowBytes = 1 << 18;  // of rows that all tiles of a thread pass: they stay in the second-level cache

// Some tiles of outputs of any number of rows x [M, in], by one thread.
template <class Element>
void multiply_two_four(const TwoFourWeight& weight, const Element* x, Element* y, int64_t M, Range tiles) {
  thread_local std::vector<float> floats;
  const int64_t in = weight.in, K = weight.K();
  const int64_t at_once = std::max(kFewRows, kRowBytes / (K * static_cast<int64_t>(sizeof(float))));
  for (int64_t m = 0; m < M; m += at_once) {
    const int64_t rows = std::min(at_once, M - m);
    floats.resize(rows * K);
    for (int64_t i = 0; i < rows; i++) for (int64_t k = 0; k < K; k += 16) {
      store(&floats[i * K + k], load(x + (m + i) * in + k, std::clamp<int64_t>(in - k, 0, 16)));
    }
    Element* to = y + m * weight.n_tile * kLanes;
    if (weight.scales) TwoFourProduct<int8_t, Element>{weight, floats.data(), to, rows}.multiply(tiles);
    else TwoFourProduct<Element, Element>{weight, floats.data(), to, rows}.multiply(tiles);
  }
}

// All outputs, by all threads.
template <class Element>
void multiply_two_four(const TwoFourWeight& weight, const Element* x, Element* y, int64_t M, const Threads& threads) {
  const int64_t grain = divide_up(65536, weight.in * kLanes);  // below so many weights a second thread does not pay
  threads.for_shares(weight.n_tile, grain, [&](Range tiles) { multiply_two_four(weight, x, y, M, tiles); });
}

}  // namespace gpt_faster
