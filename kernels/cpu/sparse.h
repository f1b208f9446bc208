// A linear layer whose weight lies by input, for few rows of which small inputs are skipped: of a weight only the rows of
// the others are read. Several rows are read side by side, of places far apart: of rows in one page the processor's own
// prefetcher would follow one. Inputs are dealt out to the threads, whose sums are added in the end: with a part of each row
// to read, two threads were as slow as one (benchmarks/LOG.md).
#pragma once

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace gpt_faster {

constexpr int64_t kColumns = 32;  // outputs whose number is padded to a multiple; nibbles of so many are read at once

struct Nibbles {  // codes of outputs l and 16 + l of 32 in byte l, plus 8 each
  uint8_t both;
};

struct SparseWeight {
  enum class Kind { float32, bfloat16, int8, int4 };
  Kind kind;
  const void* weight;      // [in, columns], of nibbles half as many bytes; columns is `out` rounded up to whole kColumns
  const BFloat16* scales;  // [groups, 1, columns], of int4 with zeros [groups, 2, columns]; null: floats
  const float* bias;       // [columns] or null
  int64_t in, out, groups;
  float threshold;  // of the inputs' magnitudes: those up to it are skipped

  int64_t columns() const { return round_up(out, kColumns); }
};

template <class Code>
INLINE void load_two(const Code* row, int64_t o, Floats (&to)[2]) {
  to[0] = load(row + o), to[1] = load(row + o + 16);
}
INLINE void load_two(const Nibbles* row, int64_t o, Floats (&to)[2]) {
  load_nibbles(&row[o / 2].both, to[0], to[1]);
}

// Whether n of so many rows are nearly all: then the processor's own prefetcher, which follows rows in order, is better than
// fetching by hand, which is better where rows between are left out.
inline bool nearly_all(int64_t n, int64_t of) { return 10 * n > 9 * of; }

template <class Code>
INLINE void fetch(const Code* row, int64_t bits) {
  __builtin_prefetch(reinterpret_cast<const char*>(row) + bits / 8);
}

// Calls work with a value of the C++ type of the weight's codes.
template <class Work>
void with_code_of(const SparseWeight& weight, const Work& work) {
  using Kind = SparseWeight::Kind;
  if (weight.kind == Kind::float32) work(float{});
  else if (weight.kind == Kind::bfloat16) work(BFloat16{});
  else if (weight.kind == Kind::int8) work(int8_t{});
  else work(Nibbles{});
}

// `value` with 0 where its magnitude is up to a threshold.
INLINE Floats without_small(Floats value, float threshold) {
  return select(abs(value) < every(std::nextafter(threshold, INFINITY)), every(0.0f), value);
}

// Makes those of n numbers 0 whose magnitude is up to a threshold.
template <class Element>
void skip_small(Element* x, int64_t n, float threshold) {
  for (int64_t i = 0; i < n; i += 16) {
    Element values[16];
    store(values, without_small(load(x + i, std::min<int64_t>(16, n - i)), threshold));
    std::memcpy(x + i, values, std::min<int64_t>(16, n - i) * sizeof(Element));
  }
}

// Those of some inputs that are not skipped, in some row at least, and their values in every row.
struct ActiveInputs {
  Range among;
  std::vector<int32_t> index;  // [n]
  std::vector<float> values;   // [M, in], of which n a row are used; 0 where that row skips the input
  std::vector<int64_t> ends;   // [1 + groups]: which are in which group of the weight
  int64_t stride;

  // inputs: whole groups of them or, if there is one group, from a multiple of 16 on.
  template <class Element>
  void find(const Element* x, int64_t M, const SparseWeight& weight, Range inputs) {
    const int64_t in = weight.in, groupsize = in / weight.groups;
    among = inputs, stride = round_up(in, 16);
    index.resize(in), values.resize(M * stride), ends.assign(1, 0);
    for (int64_t m = 0; m < M; m++) for (int64_t i = among.begin; i < among.end; i += 16) {
      const Floats value = load(x + m * in + i, std::min<int64_t>(16, in - i));
      store(&values[m * stride + i], without_small(value, weight.threshold));
    }
    for (int64_t g = 0, n = 0; g < weight.groups; g++) {
      const Range group{std::max(g * groupsize, among.begin), std::min((g + 1) * groupsize, among.end)};
      n = M == 1 ? place<1>(group, n, 1) : place<0>(group, n, M);
      ends.push_back(n);
    }
  }

  // Moves the inputs of a group that are active in any row to places from n on; returns the end of these. ROWS: M, or 0.
  template <int64_t ROWS>
  int64_t place(Range group, int64_t n, int64_t M) {
    int32_t* const to = index.data();
    float* const all = values.data();
    const int64_t rows = ROWS ? ROWS : M, stride = this->stride;
    for (int64_t i = group.begin; i < group.end; i++) {
      bool is_active = false;
      to[n] = i;
      for (int64_t m = 0; m < rows; m++) {
        const float value = all[m * stride + i];
        all[m * stride + n] = value;  // n <= i: what is overwritten has been seen
        is_active |= value != 0;      // NaN is active
      }
      n += is_active;
    }
    return n;
  }
};

template <class Code>
struct SparseProduct {
  const SparseWeight& weight;
  const ActiveInputs& active;
  int64_t M;
  Range outputs;  // all of them
  static constexpr bool kIsInt4 = std::is_same_v<Code, Nibbles>;
  static constexpr int kAtOnce = 8;  // inputs, of one row of x

  const Code* row(int64_t k) const {
    return static_cast<const Code*>(weight.weight) + active.index[k] * weight.columns() / (kIsInt4 ? 2 : 1);
  }

  // To the sums of one row of x [outputs], the products of the inputs k, k + stride ..., R of them. Meanwhile, if asked to,
  // it fetches the one after each.
  template <int R, bool FETCH>
  void add_inputs(int64_t k, int64_t stride, float* sums) const {
    const int64_t last = active.ends.back() - 1;
    const Code *rows[R], *next[R];
    Floats x[R];
    UNROLL for (int r = 0; r < R; r++) {
      const int64_t own = k + r * stride;
      rows[r] = row(own), next[r] = row(std::min(own + 1, last)), x[r] = every(active.values[own]);
    }
    for (int64_t o = outputs.begin; o < outputs.end; o += kColumns, sums += kColumns) {
      Floats sum[2] = {load(sums), load(sums + 16)};
      UNROLL for (int r = 0; r < R; r++) {
        if constexpr (FETCH) fetch(next[r], o * kColumnBits);
        Floats codes[2];
        load_two(rows[r], o, codes);
        UNROLL for (int i = 0; i < 2; i++) sum[i] = multiply_add(codes[i], x[r], sum[i]);
      }
      store(sums, sum[0]), store(sums + 16, sum[1]);
    }
  }
  static constexpr int kColumnBits = kIsInt4 ? 4 : 8 * sizeof(Code);

  // To the sums of several rows of x [M, outputs], the products of two inputs, whose weights are read once.
  void add_two_inputs(int64_t k, int64_t end, float* sums) const {
    const int64_t n = outputs.end - outputs.begin, second = k + 1 < end;
    for (int64_t o = 0; o < n; o += kColumns) {
      Floats a[2], b[2];
      load_two(row(k), outputs.begin + o, a), load_two(row(k + second), outputs.begin + o, b);
      for (int64_t m = 0; m < M; m++) {
        const float* x = &active.values[m * active.stride + k];
        const Floats first = every(x[0]), other = every(second ? x[1] : 0.0f);
        float* to = sums + m * n + o;
        UNROLL for (int i = 0; i < 2; i++) {
          store(to + 16 * i, multiply_add(b[i], other, multiply_add(a[i], first, load(to + 16 * i))));
        }
      }
    }
  }

  void add_all(int64_t k, int64_t end, float* sums) const {
    if (M > 1) {
      for (; k < end; k += 2) add_two_inputs(k, end, sums);
      return;
    }
    if (nearly_all(active.ends.back(), active.among.end - active.among.begin)) add_streams<false>(k, end, sums);
    else add_streams<true>(k, end, sums);
  }

  template <bool FETCH>
  void add_streams(int64_t k, int64_t end, float* sums) const {
    const int64_t stream = (end - k) / kAtOnce;
    for (int64_t i = 0; i < stream; i++) add_inputs<kAtOnce, FETCH>(k + i, stream, sums);
    k += stream * kAtOnce;
    for (; k + 2 <= end; k += 2) add_inputs<2, FETCH>(k, 1, sums);
    if (k < end) add_inputs<1, FETCH>(k, 1, sums);
  }

  // To the sums of one row of x [outputs], the products of R inputs from k on, all of group g, in one pass over the outputs.
  // Meanwhile it fetches as many that follow, and the scales of the next group.
  template <int R>
  void add_scaled(int64_t g, int64_t k, float* sums) const {
    const int64_t last = active.ends.back() - 1, columns = weight.columns(), of_group = (kIsInt4 ? 2 : 1) * columns;
    const BFloat16 *scales = weight.scales + g * of_group, *others = g + 1 < weight.groups ? scales + of_group : scales;
    const Code *rows[R], *next[R];
    Floats x[R];
    float sum_of_inputs = 0.0f;
    UNROLL for (int r = 0; r < R; r++) {
      rows[r] = row(k + r), next[r] = row(std::min(k + R + r, last)), x[r] = every(active.values[k + r]);
      sum_of_inputs += active.values[k + r];
    }
    const Floats begin = every(kIsInt4 ? -8 * sum_of_inputs : 0.0f);
    for (int64_t o = outputs.begin; o < outputs.end; o += kColumns, sums += kColumns) {
      Floats sum[2] = {begin, begin};
      __builtin_prefetch(others + o);
      if constexpr (kIsInt4) __builtin_prefetch(others + columns + o);
      UNROLL for (int r = 0; r < R; r++) {
        fetch(next[r], o * kColumnBits);
        Floats codes[2];
        load_two(rows[r], o, codes);
        UNROLL for (int i = 0; i < 2; i++) sum[i] = multiply_add(codes[i], x[r], sum[i]);
      }
      UNROLL for (int i = 0; i < 2; i++) {
        const BFloat16* scale = scales + o + 16 * i;
        Floats whole = multiply_add(load(scale), sum[i], load(sums + 16 * i));
        if constexpr (kIsInt4) whole = multiply_add(load(scale + columns), every(sum_of_inputs), whole);
        store(sums + 16 * i, whole);
      }
    }
  }

  // As add_scaled for the n inputs of group g from k on, AT_ONCE or fewer in a pass.
  template <int AT_ONCE = kAtOnce>
  void add_all_scaled(int64_t g, int64_t k, int64_t n, float* sums) const {
    for (; n >= AT_ONCE; n -= AT_ONCE, k += AT_ONCE) add_scaled<AT_ONCE>(g, k, sums);
    if constexpr (AT_ONCE > 1) {
      if (n) add_all_scaled<AT_ONCE - 1>(g, k, n, sums);
    }
  }

  // Scales the sums of group g's codes [M, outputs] and adds them to those of all groups.
  void add_group(int64_t g, const float* sums, float* to) const {
    const int64_t n = outputs.end - outputs.begin, columns = weight.columns();
    const BFloat16* scales = weight.scales + g * (kIsInt4 ? 2 : 1) * columns + outputs.begin;
    for (int64_t m = 0; m < M; m++) {
      float sum_of_inputs = 0.0f;
      for (int64_t k = active.ends[g]; k < active.ends[g + 1]; k++) sum_of_inputs += active.values[m * active.stride + k];
      for (int64_t o = 0; o < n; o += 16) {
        Floats sum = load(sums + m * n + o), whole = load(to + m * n + o);
        if constexpr (kIsInt4) {
          sum = sum - every(8 * sum_of_inputs);
          whole = multiply_add(load(scales + columns + o), every(sum_of_inputs), whole);
        }
        store(to + m * n + o, multiply_add(load(scales + o), sum, whole));
      }
    }
  }

  // Into `sums` [M, outputs].
  void multiply(float* sums) const {
    const int64_t size = M * (outputs.end - outputs.begin);
    std::fill_n(sums, size, 0.0f);
    if (!weight.scales) return add_all(0, active.ends.back(), sums);
    thread_local std::vector<float> of_group;
    for (int64_t g = 0; g < weight.groups; g++) {
      const int64_t begin = active.ends[g], end = active.ends[g + 1];
      if (begin == end) continue;
      if (M == 1 && weight.groups > 1) {
        add_all_scaled(g, begin, end - begin, sums);
        continue;
      }
      of_group.assign(size, 0.0f);
      add_all(begin, end, of_group.data());
      add_group(g, of_group.data(), sums);
    }
  }
};

// How many numbers `multiply_sparse` needs for the sums of its threads.
inline int64_t sums_size(int64_t M, int64_t columns, int threads) { return threads * M * columns; }

// The share of a thread of few rows of x [M, in], in a region that all threads call this in: of the products some inputs,
// then, once all threads are there, of y [M, out] some outputs, whole 16 of them. sums: see sums_size, one for all threads.
template <class Element>
void multiply_sparse(const SparseWeight& weight, const Element* x, Element* y, int64_t M, float* sums, int thread,
                     int threads, std::initializer_list<Range> outputs) {
  thread_local ActiveInputs active;
  const int64_t columns = weight.columns(), unit = weight.groups > 1 ? weight.in / weight.groups : 16;
  active.find(x, M, weight, share_of(weight.in, unit, thread, threads));
  with_code_of(weight, [&](auto code) {
    SparseProduct<decltype(code)>{weight, active, M, Range{0, columns}}.multiply(sums + thread * M * columns);
  });
  wait_for_all();
  for (const Range& range : outputs) for (int64_t m = 0; m < M; m++) for (int64_t o = range.begin; o < range.end; o += 16) {
    Floats value = load(sums + m * columns + o);
    for (int t = 1; t < threads; t++) value = value + load(sums + (t * M + m) * columns + o);
    if (weight.bias) value = value + load(weight.bias + o);
    Element rounded[16];
    store(rounded, value);
    std::memcpy(y + m * weight.out + o, rounded, std::clamp<int64_t>(weight.out - o, 0, 16) * sizeof(Element));
  }
}

// All outputs, by all threads.
template <class Element>
void multiply_sparse(const SparseWeight& weight, const Element* x, Element* y, int64_t M, const Threads& threads) {
  const int64_t useful = divide_up(weight.in * weight.columns(), 131072);  // below so many weights a thread does not pay
  const Threads used{static_cast<int>(std::min<int64_t>(threads.count, useful))};
  std::vector<float> sums(sums_size(M, weight.columns(), used.count));
  used.region([&](int thread, int count) {
    multiply_sparse(weight, x, y, M, sums.data(), thread, count, {share_of(weight.columns(), 16, thread, count)});
  });
}

}  // namespace gpt_faster
