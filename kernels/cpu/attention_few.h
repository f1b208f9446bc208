// Attention of few queries a row, in float32.
#pragma once

#include "attention.h"

namespace gpt_faster {

// The slots come in parts, which threads share out: first each part of each query by itself, then all parts of a query
// together. Parts are equally long and each is summed in one order, so no query's result depends on the number of threads
// or on the queries beside it. Up to three query heads of a key head share each load of its keys and values: to make
// float32 of a number costs as much as to multiply it.
template <class Element>
struct FewQueries {
  const Attention<Element>& all;
  float* found;  // of each part of each query [D + 2]: sum of values times e^(score - largest), sum of these, largest

  static constexpr int64_t kPart = 512, kBlock = 32, kQueries = 16;  // slots, slots and queries at a time

  int64_t parts() const { return divide_up(all.slots, kPart); }
  int64_t queries() const { return all.S * all.group; }  // of a key head
  int64_t tasks() const { return all.B * all.kv_heads() * parts() * queries(); }
  int64_t found_size() const { return tasks() * (all.D + 2); }
  int64_t scratch_size() const { return kQueries * (kPart + all.D); }

  struct Query {
    int64_t b, s, h;
  };

  // Query number i; those of a key head come one after another.
  Query query(int64_t i) const {
    const int64_t head = i / queries(), s = i % queries() / all.group, g = i % all.group;
    return {head / all.kv_heads(), s, head % all.kv_heads() * all.group + g};
  }

  int64_t place_of(Query query) const { return ((query.b * all.S + query.s) * all.H + query.h) * all.D; }

  // Tasks are the queries of the first part of a key head, then those of its next part ...
  void attend(Range some, float* scratch) const {
    for (int64_t i = some.begin, end; i < some.end; i = end) {
      end = std::min({some.end, i + kQueries, (i / queries() + 1) * queries()});
      attend_part({i, end}, scratch);
    }
  }

  // Tasks of one part of a key head.
  void attend_part(Range tasks, float* scratch) const {
    const int64_t head = tasks.begin / queries() / parts(), part = tasks.begin / queries() % parts();
    const int64_t first = head * queries() + tasks.begin % queries(), count = tasks.end - tasks.begin;
    const int64_t start = all.cache_start(head / all.kv_heads(), head % all.kv_heads());
    const Range among{part * kPart, std::min(all.slots, (part + 1) * kPart)};
    float* const scaled = scratch + kQueries * kPart;  // queries
    float *scores[kQueries], *sums[kQueries];
    Range seen[kQueries];
    for (int64_t i = 0; i < count; i++) {
      const Query at = query(first + i);
      seen[i] = all.seen_slots(at.b, at.s, among);
      scores[i] = scratch + i * kPart - among.begin;
      sums[i] = found + (tasks.begin + i) * (all.D + 2);
      for (int64_t d = 0; d < all.D; d += 16) {
        store(scaled + i * all.D + d, load(all.q + place_of(at) + d) * every(all.scale));
      }
    }
    for_blocks(first, count, all.k, start, among, seen, [&](auto R, int64_t i, Range slots, const auto* keys) {
      score<R>(scaled + i * all.D, slots, keys, scores + i);
    });
    for (int64_t i = 0; i < count; i++) softmax(query(first + i), start, seen[i], scores[i], sums[i]);
    for_blocks(first, count, all.v, start, among, seen, [&](auto R, int64_t i, Range slots, const auto* values) {
      weighted_sum<R>(slots, values, scores + i, sums + i);
    });
  }

  // Calls work(R, i, slots, numbers) for queries i .. i + R - 1, which see the same, and the slots of each block that they
  // see, whose keys or values are `numbers`.
  template <class Work>
  void for_blocks(int64_t first, int64_t count, const Vectors& vectors, int64_t start, Range among, const Range* seen,
                  const Work& work) const {
    const auto with_numbers = [&](auto R, int64_t i, Range slots) {
      const int64_t at = (start + slots.begin) * all.D;
      if (vectors.scales) work(R, i, slots, static_cast<const int8_t*>(vectors.data) + at);
      else work(R, i, slots, static_cast<const Element*>(vectors.data) + at);
    };
    for (int64_t c = among.begin; c < among.end; c += kBlock) {
      for (int64_t i = 0, next; i < count; i = next) {
        next = std::min({count, i + 3, i + all.group - (first + i) % all.group});
        const Range slots{std::max(c, seen[i].begin), std::min(c + kBlock, seen[i].end)};
        if (slots.begin >= slots.end) continue;
        if (next - i == 3) with_numbers(std::integral_constant<int, 3>(), i, slots);
        else if (next - i == 2) with_numbers(std::integral_constant<int, 2>(), i, slots);
        else with_numbers(std::integral_constant<int, 1>(), i, slots);
      }
    }
  }

  // Products of R queries and the keys of some slots. Those of 16 keys are summed across lanes together.
  template <int R, class Number>
  void score(const float* q, Range slots, const Number* keys, float* const* scores) const {
    for (int64_t c = slots.begin; c < slots.end; c += 16, keys += 16 * all.D) {
      Floats dots[R][16];
      UNROLL for (int i = 0; i < 16; i++) {
        const Number* key = keys + std::min<int64_t>(i, slots.end - c - 1) * all.D;
        Floats dot[R];
        UNROLL for (int r = 0; r < R; r++) dot[r] = every(0.0f);
        for (int64_t d = 0; d < all.D; d += 16) {
          const Floats numbers = load(key + d);
          UNROLL for (int r = 0; r < R; r++) dot[r] = multiply_add(numbers, load(q + r * all.D + d), dot[r]);
        }
        UNROLL for (int r = 0; r < R; r++) dots[r][i] = dot[r];
      }
      UNROLL for (int r = 0; r < R; r++) store(scores[r] + c, sums_of(dots[r]));
    }
  }

  // Products to e^(score - largest), times the scales of the values; what is found of them, and zeros for the values.
  void softmax(Query at, int64_t start, Range seen, float* scores, float* found) const {
    const Element* mask = all.mask_of(at.b, at.s);
    Floats largest = every(-INFINITY), sum = every(0.0f);
    for (int64_t c = seen.begin; c < seen.end; c += 16) {
      const int64_t left = seen.end - c;
      const Floats scale = all.k.scales ? load(all.k.scales + start + c, left) : every(1.0f);
      const Floats score = multiply_add(load(scores + c), scale, load(mask + c, left));
      store(scores + c, select(first_lanes(left), score, every(-INFINITY)));
      largest = max(largest, load(scores + c));
    }
    const float most = reduce_max(largest);
    for (int64_t c = seen.begin; c < seen.end; c += 16) {
      const Floats power = exp_of(load(scores + c) - every(most));
      sum = sum + power;
      store(scores + c, all.v.scales ? power * load(all.v.scales + start + c, seen.end - c) : power);
    }
    std::fill(found, found + all.D, 0.0f);
    found[all.D] = reduce_add(sum), found[all.D + 1] = most;
  }

  // Adds the values of some slots, weighted, for R queries; D is a multiple of 32.
  template <int R, class Number>
  void weighted_sum(Range slots, const Number* values, float* const* weights, float* const* sums) const {
    for (int64_t d = 0; d < all.D; d += 32) {
      Floats sum[R][2];
      UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) sum[r][j] = load(sums[r] + d + 16 * j);
      const Number* value = values + d;
      for (int64_t c = slots.begin; c < slots.end; c++, value += all.D) {
        const Floats numbers[2] = {load(value), load(value + 16)};
        UNROLL for (int r = 0; r < R; r++) {
          const Floats weight = every(weights[r][c]);
          UNROLL for (int j = 0; j < 2; j++) sum[r][j] = multiply_add(weight, numbers[j], sum[r][j]);
        }
      }
      UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < 2; j++) store(sums[r] + d + 16 * j, sum[r][j]);
    }
  }

  // Joins what was found of query i in all parts, and its head's sink.
  void join(int64_t i) const {
    const int64_t stride = queries() * (all.D + 2);
    float* first = found + (i / queries() * parts() * queries() + i % queries()) * (all.D + 2);
    const float sink = all.sink(query(i).h);
    float *end = first + parts() * stride, most = sink;
    for (float* part = first; part != end; part += stride) most = std::max(most, part[all.D + 1]);
    float sum = std::exp(sink - most);
    for (float* part = first; part != end; part += stride) {
      float& weight = part[all.D + 1];
      weight = part[all.D] == 0.0f ? 0.0f : std::exp(weight - most);  // a part in which nothing is seen has no largest
      sum += weight * part[all.D];
    }
    Element* to = all.y + place_of(query(i));
    for (int64_t d = 0; d < all.D; d += 16) {
      Floats y = every(0.0f);
      for (float* part = first; part != end; part += stride) y = multiply_add(every(part[all.D + 1]), load(part + d), y);
      store(to + d, y * every(1.0f / sum));
    }
  }

  static void attend_all(const Attention<Element>& all, const Threads& threads) {
    std::vector<float> found(FewQueries{all, nullptr}.found_size());
    const FewQueries self{all, found.data()};
    const int64_t grain = std::max<int64_t>(1, 16384 / (std::min(all.slots, kPart) * all.D));
    threads.for_shares(self.tasks(), grain, [&](Range share) {
      std::vector<float> scratch(self.scratch_size());
      self.attend(share, scratch.data());
    });
    threads.for_shares(all.B * all.H * all.S, grain * self.parts(), [&](Range share) {
      for (int64_t i = share.begin; i < share.end; i++) self.join(i);
    });
  }
};

}  // namespace gpt_faster
