// Loads of fewer values than a vector has, for levels without instructions that leave some values out. They are functions
// of their own, because Clang never inlines one that calls itself.
#pragma once

namespace gpt_faster {

// Copies of the first `count` values, followed by zeros.
template <int N, class Element>
struct Padded {
  Element values[N] = {};

  INLINE Padded(const Element* from, int64_t count) { std::memcpy(values, from, count * sizeof(Element)); }
};

template <class Element>
INLINE Floats load(const Element* from, int64_t count) {
  return count < 16 ? load(Padded<16, Element>(from, count).values) : load(from);
}

INLINE Pairs load_pairs(const BFloat16* from, int64_t count) {
  return count < 32 ? load_pairs(Padded<32, BFloat16>(from, count).values) : load_pairs(from);
}

INLINE Pairs interleave(const BFloat16* first, const BFloat16* second, int64_t count) {
  return count < 16 ? interleave(first, Padded<16, BFloat16>(second, count).values) : interleave(first, second);
}

}  // namespace gpt_faster
