// Attention of many queries a row, in bfloat16; and of any number.
#pragma once

#include "attention_few.h"

namespace gpt_faster {

// The queries of some positions and of all heads that share a key head are the rows of three matrix products: scores =
// queries x keys, their softmax, and its product with the values. Slots that no query of a tile sees are left out: with a
// causal mask, half of the work.
struct ManyQueries {
  const Attention<BFloat16>& all;
  static constexpr int64_t kPositions = 64, kKeys = 32, kValues = 128;  // at a time
  static constexpr int64_t kScores = 1 << 18;                           // floats, which stay in the second-level cache
  static constexpr int64_t kUnit = 32;  // rows and slots of which a matrix unit takes multiples: it compiles less then

  // What a thread works on, and its scratch. Row r is head r % group at position first + r / group.
  struct Task {
    int64_t b, kv_head, first, rows, width;  // width: of a row of scores
    std::vector<float> scores, sums, out;    // [rows, width], [rows], [rows, D]
    std::vector<BFloat16> queries, numbers;  // [rows, D] for a matrix unit; keys or values that are stored as codes
    std::vector<uint32_t> panel;             // keys or values, rearranged for dot_pairs
    std::vector<Range> seen;                 // slots, of each row
  };

  int64_t query_start(const Task& task, int64_t r) const {
    const int64_t s = task.first + r / all.group, h = task.kv_head * all.group + r % all.group;
    return ((task.b * all.S + s) * all.H + h) * all.D;
  }

  const MatrixUnit* unit() const { return all.S >= kMatrixTokens ? all.matrix_unit : nullptr; }

  // The slots that any of some rows sees.
  static Range seen_by(const Task& task, int64_t r, int64_t end) {
    Range seen = task.seen[r];
    for (; r < end; r++) seen = {std::min(seen.begin, task.seen[r].begin), std::max(seen.end, task.seen[r].end)};
    return seen;
  }

  // 32 keys, of which there are `count`, into a panel, in which one load has the same two dimensions of 16 keys.
  void rearrange_keys(const BFloat16* k, int64_t count, uint32_t* panel) const {
    for (int64_t half = 0; half < kKeys; half += 16) {
      for (int64_t d = 0; d < all.D; d += 32) {
        Pairs keys[16];
        UNROLL for (int i = 0; i < 16; i++) {
          keys[i] = load_pairs(k + (half + i) * all.D + d, half + i < count ? 32 : 0);
        }
        transpose(keys);
        UNROLL for (int i = 0; i < 16; i++) store(panel + (d / 2 + i) * kKeys + half, keys[i]);
      }
    }
  }

  // `count` values into a panel, in which one load has the same 16 dimensions of two slots; zeros up to whole kUnit slots.
  void rearrange_values(const BFloat16* v, int64_t count, uint32_t* panel) const {
    for (int64_t c = 0; c < count; c += 2) {
      for (int64_t d = 0; d < all.D; d += 16, panel += 16) {
        const BFloat16* first = v + c * all.D + d;
        store(panel, interleave(first, first + all.D, c + 1 < count ? 16 : 0));
      }
    }
    std::fill_n(panel, (round_up(count, kUnit) - round_up(count, 2)) / 2 * all.D, 0);
  }

  // Scores of rows r .. r + R - 1 and the 32 keys of a panel.
  template <int R>
  void score(Task& task, int64_t r, int64_t c) const {
    Floats sum[R][2];
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < 2; j++) sum[i][j] = every(0.0f);
    const BFloat16* rows[R];
    UNROLL for (int i = 0; i < R; i++) rows[i] = all.q + query_start(task, r + i);
    for (int64_t d = 0; d < all.D; d += 2) {
      const uint32_t* keys = task.panel.data() + d / 2 * kKeys;
      const Pairs low = load_pairs(keys), high = load_pairs(keys + 16);
      UNROLL for (int i = 0; i < R; i++) {
        const Pairs query = every_pair(rows[i] + d);
        sum[i][0] = dot_pairs(sum[i][0], low, query);
        sum[i][1] = dot_pairs(sum[i][1], high, query);
      }
    }
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < 2; j++) {
      store(task.scores.data() + (r + i) * task.width + c + 16 * j, sum[i][j]);
    }
  }

  // The softmax of row r but for its division: e^(score - largest), which it sums, in bfloat16, in the first half of the
  // memory of the scores. It is 0 for slots of `columns` that the row does not see. The sum has the sink's share too. Scales
  // multiply scores and result.
  void softmax(Task& task, int64_t r, Range columns) const {
    float* row = task.scores.data() + r * task.width;
    BFloat16* to = reinterpret_cast<BFloat16*>(row);
    const Range seen = task.seen[r];
    const float sink = all.sink(task.kv_head * all.group + r % all.group);
    const BFloat16* mask = all.mask_of(task.b, task.first + r / all.group);
    const int64_t start = all.cache_start(task.b, task.kv_head);
    const Floats none = every(-INFINITY);
    Floats largest = none, sum = every(0.0f);
    for (int64_t c = seen.begin; c < seen.end; c += 16) {
      const int64_t left = all.slots - c;
      const Floats scale = all.k.scales ? every(all.scale) * load(all.k.scales + start + c, left) : every(all.scale);
      const Floats scaled = multiply_add(load(row + c), scale, load(mask + c, left));
      const Floats score = select(first_lanes(left), scaled, none);
      store(row + c, score);
      largest = max(largest, score);
    }
    const float most = std::max(sink, reduce_max(largest));
    for (int64_t c = columns.begin; c < columns.end; c += 16) {
      const bool inside = seen.begin <= c && c < seen.end;
      const Floats power = inside ? exp_of(load(row + c) - every(most)) : every(0.0f);
      sum = sum + power;
      store(to + c, inside && all.v.scales ? power * load(all.v.scales + start + c, all.slots - c) : power);
    }
    task.sums[r] = reduce_add(sum) + std::exp(sink - most);
  }

  // Adds softmax x values c .. end - 1 to rows r .. r + R - 1. N = D / 16.
  template <int N, int R>
  void weighted_sum(Task& task, int64_t r, int64_t c, int64_t end) const {
    Floats sum[R][N];
    float* out = task.out.data() + r * 16 * N;
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < N; j++) sum[i][j] = load(out + (i * N + j) * 16);
    const uint32_t* panel = task.panel.data();
    for (; c < end; c += 2, panel += 16 * N) {
      Pairs values[N];
      UNROLL for (int j = 0; j < N; j++) values[j] = load_pairs(panel + 16 * j);
      UNROLL for (int i = 0; i < R; i++) {
        const float* row = task.scores.data() + (r + i) * task.width;
        const Pairs weights = every_pair(reinterpret_cast<const BFloat16*>(row) + c);
        UNROLL for (int j = 0; j < N; j++) sum[i][j] = dot_pairs(sum[i][j], values[j], weights);
      }
    }
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < N; j++) store(out + (i * N + j) * 16, sum[i][j]);
  }

  // Scores of all rows, ...
  void score_by_unit(Task& task, int64_t c) const {
    unit()->multiply(round_up(task.rows, kUnit), kKeys, all.D, task.queries.data(), all.D, task.panel.data(), kKeys,
                     task.scores.data() + c, task.width, false);
  }

  // ... and the weighted sums of the values c .. end - 1, which are added.
  void weighted_sum_by_unit(Task& task, int64_t c, int64_t end) const {
    const BFloat16* weights = reinterpret_cast<const BFloat16*>(task.scores.data()) + c;
    unit()->multiply(round_up(task.rows, kUnit), all.D, round_up(end - c, kUnit), weights, 2 * task.width,
                     task.panel.data(), all.D, task.out.data(), all.D, true);
  }

  // All rows from r on, R at a time; those left over half as many at a time.
  template <int R>
  void score_rows(Task& task, int64_t r, int64_t c) const {
    for (; r + R <= task.rows; r += R) {
      const Range seen = seen_by(task, r, r + R);
      if (seen.begin < c + kKeys && c < seen.end) score<R>(task, r, c);
    }
    if constexpr (R > 1) score_rows<R / 2>(task, r, c);
  }

  template <int N, int R>
  void weighted_sum_rows(Task& task, int64_t r, int64_t c, int64_t end) const {
    for (; r + R <= task.rows; r += R) {
      const Range seen = seen_by(task, r, r + R);
      if (seen.begin < end && c < seen.end) weighted_sum<N, R>(task, r, c, std::min(end, round_up(seen.end, 2)));
    }
    if constexpr (R > 1) weighted_sum_rows<N, R / 2>(task, r, c, end);
  }

  template <int N>
  void attend(Task& task) const {
    const int64_t start = all.cache_start(task.b, task.kv_head);
    const Range seen = seen_by(task, 0, task.rows);
    for (int64_t r = 0; unit() && r < task.rows; r++) {
      std::memcpy(task.queries.data() + r * all.D, all.q + query_start(task, r), all.D * sizeof(BFloat16));
    }
    for (int64_t c = seen.begin / kKeys * kKeys; c < seen.end; c += kKeys) {
      const int64_t count = std::min(kKeys, seen.end - c);
      rearrange_keys(all.numbers(all.k, start + c, count, task.numbers.data()), count, task.panel.data());
      if (unit()) score_by_unit(task, c);
      else score_rows<kScoreRows>(task, 0, c);
    }
    const Range columns{seen.begin / kValues * kValues, round_up(seen.end, kValues)};  // of whole blocks of values
    for (int64_t r = 0; r < task.rows; r++) softmax(task, r, columns);
    std::fill(task.out.begin(), task.out.end(), 0.0f);
    for (int64_t c = columns.begin; c < seen.end; c += kValues) {
      const int64_t end = std::min(seen.end, c + kValues);
      const BFloat16* values = all.numbers(all.v, start + c, end - c, task.numbers.data());
      rearrange_values(values, end - c, task.panel.data());
      if (unit()) weighted_sum_by_unit(task, c, end);
      else weighted_sum_rows<N, std::max(1, kValueVectors / N)>(task, 0, c, end);
    }
    if (unit()) unit()->release();
    for (int64_t r = 0; r < task.rows; r++) {
      const float scale = 1.0f / task.sums[r];
      BFloat16* y = all.y + query_start(task, r);
      for (int j = 0; j < N; j++) store(y + 16 * j, load(task.out.data() + (r * N + j) * 16) * every(scale));
    }
  }

  void attend_all(const Threads& threads) const {
    const int64_t heads = all.kv_heads(), width = round_up(all.slots, kValues);
    const int64_t positions = std::max<int64_t>(1, std::min(kPositions, kScores / (width * all.group)));
    const int64_t parts = divide_up(all.S, positions);
    const int64_t rows = round_up(positions * all.group, kUnit);
    const auto prepare = [&] {
      Task task{.width = width};
      task.scores.resize(rows * width), task.sums.resize(rows), task.out.resize(rows * all.D);
      task.panel.resize(std::max(kKeys, kValues) * all.D / 2);
      task.numbers.resize(std::max(kKeys, kValues) * all.D), task.queries.resize(unit() ? rows * all.D : 0);
      return task;
    };
    threads.for_each(parts * all.B * heads, prepare, [&](Task& task, int64_t i) {
      const int64_t part = parts - 1 - i / (all.B * heads);  // the last positions, which see most, come first
      task.b = i / heads % all.B, task.kv_head = i % heads, task.first = part * positions;
      task.rows = std::min(positions, all.S - task.first) * all.group;
      task.seen.resize(task.rows);
      for (int64_t r = 0; r < task.rows; r++) {
        task.seen[r] = r % all.group ? task.seen[r - 1] : all.seen_slots(task.b, task.first + r / all.group, {0, all.slots});
      }
      with_vectors_of(all.D, [&](auto n) { attend<n>(task); });
    });
  }
};

// Whether there is code for S queries a row.
inline bool can_attend(int64_t S, Dtype dtype) {
  return S <= kFewRows || dtype == Dtype::bfloat16;
}

template <class Element>
void attend_queries(const Attention<Element>& queries, const Threads& threads) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    if (queries.S > kFewRows) return ManyQueries{queries}.attend_all(threads);
  }
  FewQueries<Element>::attend_all(queries, threads);
}

}  // namespace gpt_faster
