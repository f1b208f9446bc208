// Attention of queries to the rows of a cache that hold their keys and values.
#pragma once

#include <type_traits>
#include <vector>

#include "linear_bf16.h"
#include "matrix_unit.h"

namespace gpt_faster {

// Calls work with D / 16, the vectors of a head, as a constant.
template <class Work>
void with_vectors_of(int64_t D, const Work& work) {
  if (D == 64) work(std::integral_constant<int, 4>());
  else if (D == 96) work(std::integral_constant<int, 6>());
  else if (D == 128) work(std::integral_constant<int, 8>());
  else work(std::integral_constant<int, 16>());
}

inline bool has_head_dim(int64_t D) { return D == 64 || D == 96 || D == 128 || D == 256; }

// The keys or the values of one layer, [R, H / group, C', D]: numbers or, if there are scales, int8 codes.
struct Vectors {
  void* data;
  float* scales;  // [R, H / group, C'], or null

  // Puts D numbers at vector `at`.
  template <class Element>
  void write(int64_t at, const Element* x, int64_t D) const {
    if (!scales) {
      std::memcpy(static_cast<Element*>(data) + at * D, x, D * sizeof(Element));
      return;
    }
    Ints bits = every(0);
    for (int64_t i = 0; i < D; i += 16) bits = max(bits, bits_of(abs(load(x + i))));
    scales[at] = std::max(largest_of(bits) / 127, 1e-30f);  // as model.quantize_vectors
    int8_t* codes = static_cast<int8_t*>(data) + at * D;
    for (int64_t i = 0; i < D; i += 16) store(codes + i, round_to_int(load(x + i) / every(scales[at])));
  }
};

// `n` numbers of another type, in `to`; those of the same type stay where they are.
template <class From, class To>
INLINE const To* converted(const From* from, int64_t n, To* to) {
  if constexpr (std::is_same_v<From, To>) return from;
  else {
    for (int64_t i = 0; i < n; i += 16) store(to + i, load(from + i));
    return to;
  }
}

template <class Element>
struct Attention {
  const Element* q;  // [B, S, H, D]
  Vectors k, v;
  const int64_t* cache_rows;  // [B], or null: row b of the batch has row b of the cache
  const Element* mask;        // [B, S, C] of zeros and -inf, over the first C slots
  Element* y;                 // [B, S, H, D]
  int64_t B, S, H, D, group;  // group: query heads of a key head
  int64_t cache_slots, slots, mask_row, mask_query;  // C', C, strides of the mask
  float scale;                                       // of q k
  const float* sinks;                                // [H], a score of nothing for each head, or null
  const MatrixUnit* matrix_unit;                     // for many queries; null: there is none

  int64_t kv_heads() const { return H / group; }

  // The first vector of a key head.
  int64_t cache_start(int64_t b, int64_t kv_head) const {
    return ((cache_rows ? cache_rows[b] : b) * kv_heads() + kv_head) * cache_slots;
  }

  // `count` vectors from number `at` on. Codes are still to be multiplied by the scales.
  template <class To>
  const To* numbers(const Vectors& vectors, int64_t at, int64_t count, To* scratch) const {
    if (vectors.scales) return converted(static_cast<const int8_t*>(vectors.data) + at * D, count * D, scratch);
    return converted(static_cast<const Element*>(vectors.data) + at * D, count * D, scratch);
  }

  // What takes its share of head h's softmax and has no value; without sinks its share is 0.
  float sink(int64_t h) const { return sinks ? sinks[h] : -INFINITY; }

  const Element* mask_of(int64_t b, int64_t s) const { return mask + b * mask_row + s * mask_query; }

  // Those of some slots that query s of row b sees: the masked ends are left out, 16 slots at a time. `among` begins at a
  // multiple of 16; what is seen may be nothing.
  Range seen_slots(int64_t b, int64_t s, Range among) const {
    const Element* row = mask_of(b, s);
    const auto any_seen = [&](int64_t c) {
      return any((load(row + c, among.end - c) == every(0.0f)) & first_lanes(among.end - c));
    };
    int64_t begin = among.begin, end = round_up(among.end, 16);
    while (end > begin && !any_seen(end - 16)) end -= 16;
    while (begin < end && !any_seen(begin)) begin += 16;
    return {begin, std::min(end, among.end)};
  }
};

}  // namespace gpt_faster
