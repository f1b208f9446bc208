// Linear layers of int8 and int4 codes for long prompts, where the processor has a unit for matrices.
//
// The codes of a block of outputs become bfloat16 weights, with their scales and zeros, which stay in the second-level
// cache while all rows pass. Activations are not rounded. A tile has four inputs of 16 outputs beside each other, so two of
// its codes make the pairs that the unit reads: nothing is transposed.
#pragma once

#include "linear_codes.h"
#include "matrix_unit.h"

namespace gpt_faster {

template <class Format, class Scale>
struct UnpackedProduct {
  const CodesWeight& weight;
  const BFloat16* x;  // [M, in]
  BFloat16* y;        // [M, tiles * 16]
  int64_t M;
  const MatrixUnit& unit;
  static constexpr int64_t kRows = 64, kTiles = 2, kColumns = kTiles * kLanes;  // at a time

  // The weights of tile n as pairs of two inputs [in / 2, 16], kColumns apart.
  void unpack(int64_t n, uint32_t* to) const {
    using Loads = Codes<Format, 1>;
    constexpr int64_t kParts = Format::kHasZeros ? 2 : 1, kLoad = 4 * Loads::kFours;  // inputs of a load
    const int64_t groupsize = weight.in / weight.groups;
    const uint8_t* codes = weight.codes + n * weight.bytes_a_tile();
    const Floats numbers = weight.numbers();
    const Scale* scales = static_cast<const Scale*>(weight.scales) + n * weight.groups * kParts * kLanes;
    for (int64_t g = 0; g < weight.groups; g++, scales += kParts * kLanes) {
      const Floats scale = load(scales);
      Floats zero = every(0.0f);
      if constexpr (Format::kHasZeros) zero = load(scales + kLanes);
      for (int64_t k = 0; k < groupsize; k += kLoad, codes += kLanes * 4) {
        const Bytes loaded = load_bytes(codes);
        UNROLL for (int f = 0; f < Loads::kFours; f++) UNROLL for (int c = 0; c < 4; c += 2, to += kColumns) {
          BFloat16 pair[2][kLanes];
          UNROLL for (int i = 0; i < 2; i++) {
            store(pair[i], multiply_add(Format::numbers(Loads::four(loaded, f), c + i, numbers), scale, zero));
          }
          store(to, interleave(pair[0], pair[1], kLanes));
        }
      }
    }
  }

  // Adds the bias of tile n, rounds and stores.
  void finish(const float* sums, int64_t first, int64_t rows, int64_t n) const {
    const Floats bias = weight.bias ? load(weight.bias + n * kLanes) : every(0.0f);
    for (int64_t i = 0; i < rows; i++) {
      store(y + ((first + i) * weight.tiles + n) * kLanes, load(sums + i * kColumns) + bias);
    }
  }

  // Some blocks of kTiles tiles, by one thread.
  void multiply(Range blocks) const {
    std::vector<uint32_t> weights(weight.in / 2 * kColumns);
    std::vector<float> sums(kRows * kColumns);
    for (int64_t n = kTiles * blocks.begin; n < std::min(kTiles * blocks.end, weight.tiles); n += kTiles) {
      const int64_t tiles = std::min(kTiles, weight.tiles - n);  // of an odd number the last block has old weights too
      for (int64_t j = 0; j < tiles; j++) unpack(n + j, weights.data() + j * kLanes);
      for (int64_t m = 0; m < M; m += kRows) {
        // the last rows are joined by some before them, which come out the same again, so that there are two sizes
        const int64_t rows = std::min(kRows, round_up(M - m, kRows / 2)), first = std::min(m, M - rows);
        unit.multiply(rows, kColumns, weight.in, x + first * weight.in, weight.in, weights.data(), kColumns, sums.data(),
                      kColumns, false);
        for (int64_t j = 0; j < tiles; j++) finish(sums.data() + j * kLanes, first, rows, n + j);
      }
    }
    unit.release();
  }
};

// All outputs of kMatrixTokens rows or more. The inputs are whole groups of 32.
inline void multiply_unpacked(const CodesWeight& weight, const BFloat16* x, BFloat16* y, int64_t M,
                              const MatrixUnit& unit, const Threads& threads) {
  const auto with_format = [&](auto format) {
    with_type_of(weight.scale_dtype, [&](auto scale) {
      const UnpackedProduct<decltype(format), decltype(scale)> product{weight, x, y, M, unit};
      static_assert(product.kRows <= kMatrixTokens);
      threads.for_shares(divide_up(weight.tiles, product.kTiles), 1, [&](Range blocks) { product.multiply(blocks); });
    });
  };
  if (weight.is_float8) with_format(Float8{});
  else if (weight.is_int4) with_format(Int4{});
  else if (weight.is_float4) with_format(Float4{});
  else if (weight.is_numbers4) with_format(Numbers4{});
  else if (weight.has_zeros) with_format(Int8Zeros{});
  else with_format(Int8{});
}

}  // namespace gpt_faster
