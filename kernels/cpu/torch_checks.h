// What every operator checks of its tensors, and how their data are taken out.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <optional>

#include "parallel.h"
#include "simd.h"

namespace gpt_faster {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Threads all_threads() { return {at::get_num_threads()}; }

inline Dtype dtype_from(at::ScalarType type, const char* op) {
  TORCH_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op, ": dtype ", type,
              " is not float32, float16 or bfloat16");
  return type == at::kFloat ? Dtype::float32 : type == at::kHalf ? Dtype::float16 : Dtype::bfloat16;
}

template <class Element>
const Element* data(const Tensor& tensor) {
  return static_cast<const Element*>(tensor.const_data_ptr());
}

template <class Element>
const Element* data(const OptionalTensor& tensor) {
  return tensor ? data<Element>(*tensor) : nullptr;
}

// The row of the cache that each row of the batch uses, or null: row b uses row b.
inline const int64_t* checked_rows(const OptionalTensor& rows, int64_t B, int64_t R, const char* op) {
  if (!rows) {
    TORCH_CHECK(B <= R, op, ": ", B, " rows for a cache of ", R);
    return nullptr;
  }
  TORCH_CHECK(rows->scalar_type() == at::kLong && rows->dim() == 1 && rows->size(0) == B && rows->is_contiguous(), op,
              ": cache_rows is not int64 [", B, "] and contiguous");
  const int64_t* each = data<int64_t>(*rows);
  for (int64_t b = 0; b < B; b++) {
    TORCH_CHECK(0 <= each[b] && each[b] < R, op, ": row ", each[b], " is not in a cache of ", R);
  }
  return each;
}

inline Tensor contiguous(const Tensor& tensor) { return tensor.contiguous(); }
inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

}  // namespace gpt_faster
