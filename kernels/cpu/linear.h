// A linear layer of any kind, and scratch memory.
#pragma once

#include <memory>

#include "linear_panels.h"
#include "linear_unpacked.h"
#include "sparse.h"
#include "two_four.h"

namespace gpt_faster {

// Buffers for one call. If `keep`, the next call of this thread gets the same buffers in the same order: those for few
// tokens then stay in the processor's cache.
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

  template <class Element>
  Element* take(int64_t n) {
    return reinterpret_cast<Element*>(take_bytes(n * sizeof(Element)));
  }

 private:
  char* take_bytes(int64_t bytes) {
    thread_local std::vector<Buffer> kept;
    std::vector<Buffer>& all = keep ? kept : own;
    if (taken == all.size()) all.emplace_back();
    Buffer& buffer = all[taken++];
    const int64_t lines = bytes / sizeof(Line) + 1;
    if (buffer.lines < lines) buffer = {std::unique_ptr<Line[]>(new Line[lines]), lines};
    return buffer.memory[0].bytes;
  }
};

// A product of a bfloat16 weight and many rows of x, into y. It is handed in: where processors have instructions for it,
// oneDNN's is the fastest.
using ManyRowsProduct = void (*)(const Bf16Weight& layer, const BFloat16* x, BFloat16* y, int64_t M);

struct Linear {
  bool has_codes;
  CodesWeight codes;  // if it has
  Bf16Weight bf16;    // if not
  int64_t in, out;
  ManyRowsProduct many_rows_product;  // for bfloat16 weights
  const MatrixUnit* matrix_unit;      // for bfloat16 activations of codes; null: there is none
  SparseWeight sparse = {};           // which has a weight if the layer has none of the others; for `multiply_sparse` only
  TwoFourWeight two_four = {};         // which has tiles if the layer has none of the others
  float threshold = -1;               // of codes: inputs of few tokens, up to it in magnitude, count as 0

  // Whether activations are multiplied as they are if each request has S tokens. Else they are quantised.
  bool takes_floats(int64_t S) const {
    return !has_codes || (matrix_unit && S >= kMatrixTokens && in % kGroup == 0);
  }

  // Those of M rows in `scratch`, as the weight takes them.
  template <class Element>
  Activations activations(void* scratch, int64_t M) const {
    return Activations(scratch, M, in, codes.multiplies_floats(dtype_of<Element>));
  }

  // Quantises, if need be, some inputs of row m of x [M, in] into `scratch`, whole groups of them.
  template <class Element>
  void quantise_inputs(const Element* x, int64_t M, int64_t S, void* scratch, int64_t m, Range inputs) const {
    if (takes_floats(S)) return;
    const Range groups{inputs.begin / kGroup, divide_up(inputs.end, kGroup)};
    quantise(x, codes, activations<Element>(scratch, M), m, groups);
  }

  // As quantise_inputs for few rows, where `threshold` holds: small inputs become 0 in x, too.
  template <class Element>
  void take_inputs(Element* x, int64_t M, int64_t S, void* scratch, int64_t m, Range inputs) const {
    if (threshold >= 0) skip_small(x + m * in + inputs.begin, inputs.end - inputs.begin, threshold);
    quantise_inputs(x, M, S, scratch, m, inputs);
  }

  // All inputs of all rows, by all threads.
  template <class Element>
  void quantise_rows(const Element* x, int64_t M, int64_t S, void* scratch, const Threads& threads) const {
    if (takes_floats(S)) return;
    threads.for_shares(M, std::max<int64_t>(1, 65536 / in), [&](Range rows) {
      for (int64_t m = rows.begin; m < rows.end; m++) quantise_inputs(x, M, S, scratch, m, {0, in});
    });
  }

  // Some outputs of few rows, whole tiles of them, by one thread. `scratch` has the quantised inputs.
  template <class Element>
  void multiply_few_rows(const Element* x, Element* y, int64_t M, void* scratch, Range outputs) const {
    if (two_four.tiles) return multiply_two_four(two_four, x, y, M, {outputs.begin / kLanes, outputs.end / kLanes});
    if (has_codes) {
      const Range tiles{outputs.begin / kLanes, outputs.end / kLanes};
      return multiply_few(codes, activations<Element>(scratch, M), y, dtype_of<Element>, tiles);
    }
    if constexpr (std::is_same_v<Element, BFloat16>) Bf16Product{.layer = bf16, .x = x, .y = y, .M = M}.multiply(outputs);
  }

  // All outputs of more than kFewRows rows, by all threads.
  template <class Element>
  void multiply_many_rows(const Element* x, Element* y, int64_t M, int64_t S, void* scratch,
                          const Threads& threads) const {
    if (two_four.tiles) return multiply_two_four(two_four, x, y, M, threads);
    if (!takes_floats(S)) {
      return multiply_many(codes, activations<Element>(scratch, M), y, dtype_of<Element>, threads);
    }
    if constexpr (std::is_same_v<Element, BFloat16>) {
      if (has_codes) multiply_unpacked(codes, x, y, M, *matrix_unit, threads);
      else if (kHasBf16Matrices) many_rows_product(bf16, x, y, M);
      else PanelProduct{.layer = bf16, .x = x, .y = y, .M = M}.multiply_all(threads);
    }
  }

  // All outputs of any number of rows, S of each request, by all threads.
  template <class Element>
  void multiply(const Element* x, Element* y, int64_t M, int64_t S, const Threads& threads) const {
    if (two_four.tiles) return multiply_two_four(two_four, x, y, M, threads);
    Scratch scratch(false);
    const int64_t bytes = takes_floats(S) ? 0 : Activations::bytes(M, in, codes.multiplies_floats(dtype_of<Element>));
    char* quantised = scratch.take<char>(bytes);
    quantise_rows(x, M, S, quantised, threads);
    if (M > kFewRows) return multiply_many_rows(x, y, M, S, quantised, threads);
    if (has_codes) {
      const Activations whole = activations<Element>(quantised, M);
      const int64_t grain = std::max<int64_t>(1, 65536 / codes.bytes_a_tile());
      threads.for_shares(codes.tiles, grain, [&](Range tiles) {
        multiply_few(codes, whole, y, dtype_of<Element>, tiles);
      });
    } else if constexpr (std::is_same_v<Element, BFloat16>) {
      Bf16Product{.layer = bf16, .x = x, .y = y, .M = M}.multiply_all(threads);
    }
  }
};

}  // namespace gpt_faster
