// Products of matrices by PyTorch, which are handed to the algorithms: those know nothing of it.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>

#include "linear_bf16.h"
#include "matrix_unit.h"

namespace gpt_faster {

// A linear layer: a product of bfloat16 matrices.
inline void product_of_many_rows(const Bf16Weight& layer, const BFloat16* x, BFloat16* y, int64_t M) {
  const auto tensor = [](const BFloat16* from, at::IntArrayRef sizes) {
    return at::from_blob(const_cast<BFloat16*>(from), sizes, at::kBFloat16);
  };
  at::Tensor out = tensor(y, {M, layer.N});
  const auto bias = layer.bias ? std::optional(tensor(layer.bias, {layer.N})) : std::nullopt;
  at::linear_out(out, tensor(x, {M, layer.K}), tensor(layer.weight, {layer.N, layer.K}), bias);
}

// The unit of this processor, through oneDNN. Null: the level does not use it, or oneDNN is told not to.
inline const MatrixUnit* matrix_unit() {
#ifdef GPT_FASTER_AMX
  static constexpr MatrixUnit amx{
      .multiply = [](int64_t M, int64_t N, int64_t K, const BFloat16* a, int64_t a_stride, const uint32_t* b,
                     int64_t b_stride, float* c, int64_t c_stride, bool add) {
        const auto *first = reinterpret_cast<const at::BFloat16*>(a), *second = reinterpret_cast<const at::BFloat16*>(b);
        at::native::cpublas::brgemm(M, N, K, a_stride, b_stride, c_stride, add, first, second, c);
      },
      .release = [] { at::native::cpublas::brgemm_release(); }};
  if (at::native::cpublas::could_pack(at::kBFloat16)) return &amx;
#endif
  return nullptr;
}

}  // namespace gpt_faster
