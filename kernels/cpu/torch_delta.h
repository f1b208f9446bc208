// The operator of gated DeltaNet as PyTorch sees it.
#pragma once

#include <ATen/ops/empty.h>

#include "delta.h"
#include "torch_checks.h"

namespace gpt_faster {

// All of gated DeltaNet but its linear layers: x [B, S, C + H V], what the one of q, k, v and the output's gate makes; gates
// float32 [B, S, 2 H], those of beta and the decay; pos [B, S], consecutive, and counts [B], int64; taps [n_tap, C], rates
// [2, H], the decay's -exp(A_log) and dt_bias, and norm [V], float32 -> y [B, S, H V] in x's dtype. states [N, R, H, K, V]
// and inputs [N, W, C], float32, and stands [N, R], int64, are a cache, see mixers/recurrent/delta_net.py, of which row b
// uses row cache_rows[b], or b if there are no cache_rows; rows must differ. They are written. K is a multiple of 16, V of
// 32.
inline Tensor delta_net(const Tensor& x, const Tensor& gates, const Tensor& pos, const Tensor& counts, const Tensor& taps,
                        const Tensor& rates, const Tensor& norm, const Tensor& states, const Tensor& inputs,
                        const Tensor& stands, const OptionalTensor& cache_rows, double eps) {
  TORCH_CHECK(x.dim() == 3 && states.dim() == 5 && inputs.dim() == 3 && stands.dim() == 2 && taps.dim() == 2,
              "delta_net: x, states, inputs, stands and taps have 3, 5, 3, 2 and 2 dimensions");
  const int64_t B = x.size(0), S = x.size(1), C = taps.size(1), n_tap = taps.size(0);
  const int64_t N = states.size(0), R = states.size(1), H = states.size(2), K = states.size(3), V = states.size(4);
  const int64_t W = inputs.size(1), key_heads = K > 0 ? (C - H * V) / (2 * K) : 0;
  TORCH_CHECK(K > 0 && K % 16 == 0 && V > 0 && V % 32 == 0, "delta_net: keys of ", K, " are no multiple of 16, or values of ",
              V, " none of 32");
  TORCH_CHECK(key_heads > 0 && H % key_heads == 0 && C == 2 * key_heads * K + H * V && x.size(2) == C + H * V &&
              gates.sizes() == at::IntArrayRef({B, S, 2 * H}) && pos.sizes() == at::IntArrayRef({B, S}) &&
              counts.numel() == B && rates.numel() == 2 * H && norm.numel() == V, "delta_net: sizes do not fit");
  TORCH_CHECK(R > 0 && n_tap > 1 && W + 1 >= n_tap && inputs.size(0) == N && inputs.size(2) == C && stands.size(0) == N &&
              stands.size(1) == R, "delta_net: sizes of the cache do not fit");
  for (const Tensor& each : {gates, taps, rates, norm, states, inputs}) {
    TORCH_CHECK(each.scalar_type() == at::kFloat, "delta_net: a tensor beside x is not float32");
  }
  for (const Tensor& each : {pos, counts, stands}) {
    TORCH_CHECK(each.scalar_type() == at::kLong, "delta_net: pos, counts or stands are not int64");
  }
  for (const Tensor& each : {states, inputs, stands, taps, rates, norm}) {
    TORCH_CHECK(each.is_contiguous() && each.is_cpu(), "delta_net: the cache or a weight is not contiguous");
  }
  const int64_t* rows = checked_rows(cache_rows, B, N, "delta_net");
  const Tensor xc = contiguous(x), gc = contiguous(gates), pc = contiguous(pos), cc = contiguous(counts);
  for (int64_t b = 0; b < B && S > 0; b++) {
    TORCH_CHECK(data<int64_t>(pc)[b * S] >= 0 && data<int64_t>(cc)[b] >= 0 && data<int64_t>(cc)[b] <= S,
                "delta_net: a position is below 0, or a row has more than ", S, " tokens");
  }
  Tensor y = at::empty({B, S, H * V}, x.options());
  if (B * S == 0) return y;
  with_type_of(dtype_from(x.scalar_type(), "delta_net"), [&](auto element) {
    using Element = decltype(element);
    DeltaNet<Element>{.x = data<Element>(xc), .gates = data<float>(gc), .pos = data<int64_t>(pc),
                      .counts = data<int64_t>(cc), .taps = data<float>(taps), .rates = data<float>(rates),
                      .norm = data<float>(norm), .states = static_cast<float*>(states.mutable_data_ptr()),
                      .inputs = static_cast<float*>(inputs.mutable_data_ptr()),
                      .stands = static_cast<int64_t*>(stands.mutable_data_ptr()), .rows = rows,
                      .y = static_cast<Element*>(y.mutable_data_ptr()), .B = B, .S = S, .C = C, .H = H,
                      .key_heads = key_heads, .K = K, .V = V, .n_tap = n_tap, .R = R, .W = W,
                      .eps = static_cast<float>(eps), .threads = all_threads()}
        .run();
  });
  return y;
}

}  // namespace gpt_faster
