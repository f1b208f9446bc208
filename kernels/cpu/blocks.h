// All blocks of a model, fused into one operator.
//
// One by one, the operators of a block are nine, each with its call from Python, its buffer and its parallel regions; and
// all tensors of all layers, hundreds, are arguments of the compiled graph. Both take about a millisecond, a quarter of
// the step of a small model. Here, for few tokens, one parallel region runs through all blocks, in which threads wait for
// each other where one needs what another made. For many tokens every step is a region of its own.
#pragma once

#include "attention_many.h"
#include "linear.h"

namespace gpt_faster {

// ---------------------------------------------------------------- steps of one row; n is a multiple of 16

// Root mean square normalisation of n values, rounded as model.RMSNorm rounds them.
template <class Element>
void rms_norm(const Element* x, const Element* weight, Element* y, int64_t n, float eps) {
  Floats squares = every(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const Floats value = load(x + i);
    squares = multiply_add(value, value, squares);
  }
  const float scale = 1.0f / std::sqrt(reduce_add(squares) / n + eps);
  for (int64_t i = 0; i < n; i += 16) {
    store(y + i, load(x + i) * every(scale));
    store(y + i, load(y + i) * load(weight + i));
  }
}

// Rotary embedding of one head, n values in two halves, in place: cos and sin [n / 2]. n is a multiple of 32.
template <class Element>
void rotate(Element* x, const float* cos, const float* sin, int64_t n) {
  for (int64_t i = 0, half = n / 2; i < half; i += 16) {
    const Floats a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, multiply_add(a, c, -(b * s)));
    store(x + half + i, multiply_add(b, c, a * s));
  }
}

// silu(gate) * up of n values.
template <class Element>
void silu_times(const Element* gate, const Element* up, Element* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    store(y + i, silu_of(load(gate + i)) * load(up + i));
  }
}

// y += x, n values.
template <class Element>
void add(const Element* x, Element* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store(y + i, load(y + i) + load(x + i));
}

// ---------------------------------------------------------------- blocks

struct Block {
  const void *attention_norm, *ffn_norm, *q_norm, *k_norm;  // [dim], [dim], [D] or null, [D] or null
  Linear wqkv, wo, w13, w2;
};

struct LayerCache {
  Vectors k, v;
};

// One call: sizes, arguments and scratch. Rows m = 0 .. M - 1 are the S tokens of row 0 of the batch, then of row 1 ...
template <class Element>
struct Blocks {
  const std::vector<Block>& blocks;
  const std::vector<LayerCache>& caches;
  Threads threads;
  const MatrixUnit* matrix_unit;                      // for attention; null: there is none
  int64_t B, S, M, dim, width, n_head, n_kv_head, D;  // width: of the feed-forward
  int64_t cache_slots, slots;                         // C', and C <= C' to attend to
  float eps, scale;                                   // of the norms, of q k
  const int64_t* cache_rows;                          // [B] or null
  const int64_t* pos;                                 // [M]
  const float *cos, *sin;                             // [M, D / 2]
  const Element* mask;                                // [B, S, C]
  Element* x;                                         // [M, dim], from block to block
  Element *normed, *qkv, *q, *attended, *gate_up, *hidden, *made;
  // quantised activations, in turn: one is written while another thread may still read the other
  void *quantised, *other_quantised;
  float *found, *attend_scratch;  // see FewQueries; of the latter each thread has its own
  float* sums;                    // see multiply_sparse

  void take_scratch(Scratch& scratch) {
    const int64_t widest = std::max({dim, width, n_head * D});
    normed = scratch.take<Element>(M * dim), made = scratch.take<Element>(M * dim);
    qkv = scratch.take<Element>(M * (n_head + 2 * n_kv_head) * D), gate_up = scratch.take<Element>(M * 2 * width);
    q = scratch.take<Element>(M * n_head * D), attended = scratch.take<Element>(M * n_head * D);
    hidden = scratch.take<Element>(M * width);
    quantised = scratch.take<char>(Activations::bytes(M, widest, true));  // some layers may take floats, some not
    other_quantised = scratch.take<char>(Activations::bytes(M, widest, true));
    if (M > kFewRows) return;
    const Attention<Element> attention = this->attention(caches[0]);
    const FewQueries<Element> few{attention, nullptr};
    found = scratch.take<float>(few.found_size());
    attend_scratch = scratch.take<float>(threads.count * few.scratch_size());
    const int64_t most = std::max({dim, 2 * width, (n_head + 2 * n_kv_head) * D});
    sums = scratch.take<float>(sums_size(M, most, threads.count));
  }

  void normalise(const void* norm, const Linear& next, Range rows) const {
    for (int64_t m = rows.begin; m < rows.end; m++) {
      rms_norm(x + m * dim, static_cast<const Element*>(norm), normed + m * dim, dim, eps);
      next.take_inputs(normed, M, S, quantised, m, {0, dim});
    }
  }

  // Normalised and rotated queries into q, keys and values into the cache. `heads` are those of the queries and keys of
  // row 0, then of row 1 ...
  void place_heads(const Block& block, const LayerCache& cache, Range heads) const {
    const int64_t rotated = n_head + n_kv_head;
    for (int64_t i = heads.begin; i < heads.end; i++) {
      const int64_t m = i / rotated, h = i % rotated;
      const bool is_key = h >= n_head;
      const int64_t cache_row = cache_rows ? cache_rows[m / S] : m / S;
      const int64_t slot = (cache_row * n_kv_head + h - n_head) * cache_slots + pos[m];
      const Element* from = qkv + (m * (rotated + n_kv_head) + h) * D;
      Element key[256], *to = is_key ? key : q + (m * n_head + h) * D;  // no head_dim is larger
      const void* norm = is_key ? block.k_norm : block.q_norm;
      if (norm) rms_norm(from, static_cast<const Element*>(norm), to, D, eps);
      else std::memcpy(to, from, D * sizeof(Element));
      rotate(to, cos + m * D / 2, sin + m * D / 2, D);
      if (!is_key) continue;
      cache.k.write(slot, key, D);
      cache.v.write(slot, from + n_kv_head * D, D);
    }
  }

  Attention<Element> attention(const LayerCache& cache) const {
    return {.q = q, .k = cache.k, .v = cache.v,
            .cache_rows = cache_rows, .mask = mask, .y = attended, .B = B, .S = S, .H = n_head, .D = D,
            .group = n_head / n_kv_head, .cache_slots = cache_slots, .slots = slots, .mask_row = S * slots,
            .mask_query = slots, .scale = scale, .sinks = nullptr, .matrix_unit = matrix_unit};
  }

  // silu(gate) * up, and its quantised form: some outputs of some rows, whole groups of them.
  void gate(const Block& block, Range rows, Range outputs) const {
    for (int64_t m = rows.begin; m < rows.end; m++) {
      const Element *gate = gate_up + 2 * m * width + outputs.begin, *up = gate + width;
      silu_times(gate, up, hidden + m * width + outputs.begin, outputs.end - outputs.begin);
      block.w2.take_inputs(hidden, M, S, other_quantised, m, outputs);
    }
  }

  void add_made(Range rows, Range outputs) const {
    for (int64_t m = rows.begin; m < rows.end; m++) {
      add(made + m * dim + outputs.begin, x + m * dim + outputs.begin, outputs.end - outputs.begin);
    }
  }

  // A thread's share of the work of few tokens.
  void run_few(const Block& block, const LayerCache& cache, int thread, int threads) const {
    const auto share = [&](int64_t n, int64_t unit) { return share_of(n, unit, thread, threads); };
    const Range all_rows{0, M}, rows = share(M, 1), queries = share(M * n_head, 1);
    const Range outputs = share(dim, kColumns), inner = share(width, kGroup);
    const auto multiply = [&](const Linear& layer, const Element* x, Element* y, void* quantised,
                              std::initializer_list<Range> outputs) {
      if (layer.sparse.weight) return multiply_sparse(layer.sparse, x, y, M, sums, thread, threads, outputs);
      for (const Range& range : outputs) layer.multiply_few_rows(x, y, M, quantised, range);
    };
    normalise(block.attention_norm, block.wqkv, rows);
    wait_for_all();
    multiply(block.wqkv, normed, qkv, quantised, {share(block.wqkv.out, kColumns)});
    wait_for_all();
    place_heads(block, cache, share(M * (n_head + n_kv_head), 1));
    wait_for_all();
    const Attention<Element> attention = this->attention(cache);
    const FewQueries<Element> few{attention, found};
    few.attend(share(few.tasks(), 1), attend_scratch + thread * few.scratch_size());
    if (few.parts() > 1) wait_for_all();  // else a thread joins what it has found itself
    for (int64_t i = queries.begin; i < queries.end; i++) {
      few.join(i);
      const auto [b, s, h] = few.query(i);
      block.wo.take_inputs(attended, M, S, other_quantised, b * S + s, {h * D, (h + 1) * D});
    }
    wait_for_all();
    multiply(block.wo, attended, made, other_quantised, {outputs});
    add_made(all_rows, outputs);
    wait_for_all();
    normalise(block.ffn_norm, block.w13, rows);
    wait_for_all();
    multiply(block.w13, normed, gate_up, quantised, {inner, {width + inner.begin, width + inner.end}});
    gate(block, all_rows, inner);
    wait_for_all();
    multiply(block.w2, hidden, made, other_quantised, {outputs});
    add_made(all_rows, outputs);
    wait_for_all();
  }

  // The whole work of many tokens.
  void run_many(const Block& block, const LayerCache& cache) const {
    const int64_t rotated = n_head + n_kv_head;
    const auto for_rows = [&](const auto& work) { threads.for_shares(M, 1, work); };
    const auto multiply = [&](const Linear& layer, const Element* x, Element* y, void* quantised) {
      layer.multiply_many_rows(x, y, M, S, quantised, threads);
    };
    for_rows([&](Range rows) { normalise(block.attention_norm, block.wqkv, rows); });
    multiply(block.wqkv, normed, qkv, quantised);
    for_rows([&](Range rows) { place_heads(block, cache, {rows.begin * rotated, rows.end * rotated}); });
    attend_queries(attention(cache), threads);
    block.wo.quantise_rows(attended, M, S, other_quantised, threads);
    multiply(block.wo, attended, made, other_quantised);
    for_rows([&](Range rows) {
      add_made(rows, {0, dim});
      normalise(block.ffn_norm, block.w13, rows);
    });
    multiply(block.w13, normed, gate_up, quantised);
    for_rows([&](Range rows) { gate(block, rows, {0, width}); });
    multiply(block.w2, hidden, made, other_quantised);
    for_rows([&](Range rows) { add_made(rows, {0, dim}); });
  }

  void run() {
    const bool few = M <= kFewRows;
    Scratch scratch(few);
    take_scratch(scratch);
    if (few) {
      threads.region([&](int thread, int threads) {
        for (size_t i = 0; i < blocks.size(); i++) run_few(blocks[i], caches[i], thread, threads);
      });
    } else {
      for (size_t i = 0; i < blocks.size(); i++) run_many(blocks[i], caches[i]);
    }
  }
};

}  // namespace gpt_faster
