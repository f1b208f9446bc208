// How tensors become the layers that the algorithms take, and what is checked of them.
#pragma once

#include "attention_many.h"
#include "blocks.h"
#include "linear.h"
#include "torch_checks.h"
#include "torch_products.h"

namespace gpt_faster {

inline void check_head_dim(int64_t D, const char* op) {
  TORCH_CHECK(has_head_dim(D), op, ": head_dim ", D, " is not 64, 96, 128 or 256");
}

inline void check_queries(int64_t S, Dtype dtype, const char* op) {
  TORCH_CHECK(can_attend(S, dtype), op, ": more than ", kFewRows, " queries a row are for bfloat16");
}

// A layer of which 2 of 4 weights are kept: weight int8 [tiles, bytes], scales of int8 weights, float32 bias.
inline Linear two_four_of(const Tensor& weight, const OptionalTensor& scales, const OptionalTensor& bias, int64_t in,
                          Dtype dtype, const char* op) {
  const int64_t tiles = weight.size(0), groups = scales && tiles ? scales->numel() / (tiles * kLanes) : 1;
  const int64_t blocks = divide_up(in, kGroup), value = scales ? 1 : dtype == Dtype::float32 ? 4 : 2;
  TORCH_CHECK(weight.size(1) == blocks * kLanes * kGroup / 8 * (1 + 4 * value), op, ": weight takes other than ", in,
              " features, or another dtype");
  TORCH_CHECK((!scales || (scales->scalar_type() == at::kBFloat16 && scales->is_contiguous() && groups > 0 &&
                           blocks % groups == 0 && scales->numel() == tiles * groups * kLanes)) &&
              (!bias || (bias->scalar_type() == at::kFloat && bias->numel() == tiles * kLanes)), op,
              ": scales or bias do not fit the weight");
  const TwoFourWeight two_four{.tiles = data<uint8_t>(weight), .scales = data<BFloat16>(scales),
                               .bias = data<float>(bias), .in = in, .n_tile = tiles, .groups = groups};
  return {.has_codes = false, .codes = {}, .bf16 = {}, .in = in, .out = tiles * kLanes, .many_rows_product = nullptr,
          .matrix_unit = nullptr, .two_four = two_four};
}

// A layer of int8 bytes as `two_four_of`, else of codes if there are scales, of bfloat16 if not. The tensors must be kept as
// long as it.
inline Linear layer_of(const Tensor& weight, const OptionalTensor& scales, const OptionalTensor& bias, int64_t in,
                       Dtype dtype, const char* op) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && (!bias || bias->is_contiguous()), op,
              ": a weight is not contiguous [out, in] or [tiles, bytes], or a bias is not contiguous");
  if (weight.scalar_type() == at::kChar) return two_four_of(weight, scales, bias, in, dtype, op);
  if (!scales) {
    const bool all_bf16 = dtype == Dtype::bfloat16 && weight.scalar_type() == at::kBFloat16 &&
                          (!bias || bias->scalar_type() == at::kBFloat16);
    TORCH_CHECK(all_bf16, op, ": wrong dtype; a layer without scales is all bfloat16");
    TORCH_CHECK(weight.size(1) == in && (!bias || bias->numel() == weight.size(0)), op, ": x has ", in,
                " features, weight takes ", weight.size(1), ", or the bias is not as long as the output");
    const int64_t out = weight.size(0);
    const Bf16Weight bf16{.weight = data<BFloat16>(weight), .bias = data<BFloat16>(bias), .N = out, .K = in};
    return {.has_codes = false, .codes = {}, .bf16 = bf16, .in = in, .out = out,
            .many_rows_product = product_of_many_rows, .matrix_unit = nullptr};
  }
  const Tensor& s = *scales;
  const int64_t tiles = weight.size(0);
  TORCH_CHECK(s.dim() == 4 && s.size(0) == tiles && s.size(3) == kLanes && s.is_contiguous(), op,
              ": scales are not contiguous [tiles, groups, 1 or 2, 16]");
  const int64_t nibbles = round_up(in, kGroup) * kLanes / 2;  // bytes of those of a tile
  const bool has_zeros = s.size(2) == 2, has_nibbles = weight.size(1) == nibbles;
  const CodesWeight codes{.codes = data<uint8_t>(weight), .scales = s.const_data_ptr(),
                          .scale_dtype = dtype_from(s.scalar_type(), op), .bias = data<float>(bias), .in = in,
                          .tiles = tiles, .groups = s.size(1),
                          .is_int4 = has_nibbles && has_zeros, .is_float4 = has_nibbles && !has_zeros,
                          .is_numbers4 = weight.size(1) == nibbles + kNumbersBytes,
                          .is_float8 = weight.scalar_type() == at::kFloat8_e4m3fn, .has_zeros = has_zeros};
  const bool has_our_codes = weight.scalar_type() == at::kByte ? !(codes.is_numbers4 && codes.has_zeros)
                                                               : codes.is_float8 && !codes.has_zeros;
  TORCH_CHECK(has_our_codes && (!bias || bias->scalar_type() == at::kFloat), op, ": wrong dtype");
  TORCH_CHECK(weight.size(1) == codes.bytes_a_tile(), op, ": weight takes other than ", in, " features");
  TORCH_CHECK((s.size(2) == 1 || s.size(2) == 2) && codes.groups > 0 && codes.K() / kHalfGroup % codes.groups == 0 &&
              (!bias || bias->numel() == tiles * kLanes), op,
              ": scales or bias do not fit the weight");
  return {.has_codes = true, .codes = codes, .bf16 = {}, .in = in, .out = tiles * kLanes, .many_rows_product = nullptr,
          .matrix_unit = dtype == Dtype::bfloat16 ? matrix_unit() : nullptr};
}

// A layer whose weight lies by input [in, columns], of which inputs up to `threshold` are skipped; or by output, `transposed`:
// [out, columns], whose columns are the inputs. `width`: outputs, or inputs. The tensors must be kept as it.
inline SparseWeight sparse_of(const Tensor& weight, const OptionalTensor& scales, const OptionalTensor& bias, int64_t width,
                              double threshold, const char* op, bool transposed = false) {
  using Kind = SparseWeight::Kind;
  const auto type = weight.scalar_type();
  const Kind kind = type == at::kFloat ? Kind::float32 : type == at::kBFloat16 ? Kind::bfloat16
                    : type == at::kChar ? Kind::int8 : Kind::int4;
  const bool has_codes = kind == Kind::int8 || kind == Kind::int4;
  TORCH_CHECK((kind != Kind::int4 || type == at::kByte) && has_codes == scales.has_value() && threshold >= 0 &&
              weight.dim() == 2 && weight.is_contiguous() && weight.size(0) > 0 && width > 0, op,
              ": wrong dtype, shape or threshold");
  const int64_t parts = kind == Kind::int4 ? 2 : 1, rows = weight.size(0), columns = round_up(width, kColumns);
  const int64_t groups = scales ? scales->size(transposed ? 2 : 0) : 1, in = transposed ? width : rows;
  const SparseWeight sparse{.kind = kind, .weight = weight.const_data_ptr(), .scales = data<BFloat16>(scales),
                            .bias = data<float>(bias), .in = in, .out = transposed ? rows : width,
                            .groups = groups, .threshold = static_cast<float>(threshold)};
  TORCH_CHECK(weight.size(1) * parts == columns && (!transposed || width == columns) && groups > 0 && in % groups == 0 &&
              (!transposed || in / groups % kColumns == 0), op, ": weight does not fit ", width, " columns");
  const int64_t n_bias = transposed ? rows : columns;
  TORCH_CHECK((!bias || (bias->scalar_type() == at::kFloat && bias->numel() == n_bias && bias->is_contiguous())) &&
              (!scales || (scales->scalar_type() == at::kBFloat16 && scales->is_contiguous() &&
                           scales->numel() == groups * parts * n_bias)),
              op, ": scales or bias do not fit the weight");
  return sparse;
}

}  // namespace gpt_faster
