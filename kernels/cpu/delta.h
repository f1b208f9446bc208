// Gated DeltaNet (Yang et al. 2025) between its linear layers: convolution, gated delta rule, norm and gate.
//
// Prompts too go token by token. The columns of a state do not depend on each other, so a few of them stay in the
// first-level cache while many tokens pass. Matrices of 64 tokens a chunk, as on GPUs, would be no fewer multiplications.
#pragma once

#include "linear.h"

namespace gpt_faster {

template <class Element>
struct DeltaNet {
  const Element* x;       // [B, S, C + H V]: q, k and v of all heads, C channels that are convolved, then the gate
  const float* gates;     // [B, S, 2 H]: of each head what decides how much it learns, then how much it keeps
  const int64_t* pos;     // [B, S], consecutive
  const int64_t* counts;  // [B]: so many first tokens of a row are its own
  const float* taps;      // [n_tap, C], the last is that of the token itself
  const float* rates;     // [2, H]: of the decay, below 0, and what is added to its gate
  const float* norm;      // [V]
  float* states;          // [N, R, H, K, V]: those of the last tokens of each row, at their position modulo R
  float* inputs;          // [N, W, C]: the last of the convolution, at their position modulo W
  int64_t* stands;        // [N, R]: the positions of the states; -1: none
  const int64_t* rows;    // [B], or null: row b of the batch has row b of the cache
  Element* y;             // [B, S, H V]
  int64_t B, S, C, H, key_heads, K, V, n_tap, R, W;
  float eps;
  Threads threads;

  static constexpr int kVectors = 2;                  // of a row of a state that are worked on together ...
  static constexpr int64_t kColumns = 16 * kVectors;  // ... whose sums for a token stay in registers
  static constexpr int64_t kAhead = 12;               // rows of a state that are requested of the memory early
  static constexpr int64_t kTokens = 64;              // between two of whose convolution and rule threads wait

  // What a token does to a state. q and k are not normalised: their scales are.
  struct Token {
    const float *q, *k;
    float* v;  // then the output
    float keep, learn, q_scale, k_scale, q_times_k;
    bool is_first;  // of its sequence: it finds nothing
  };

  int64_t row(int64_t b) const { return rows ? rows[b] : b; }
  int64_t width() const { return C + H * V; }
  bool keeps_all() const { return S <= R; }

  float* state(int64_t b, int64_t h, int64_t place) const {
    return states + ((row(b) * R + (place + R) % R) * H + h) * K * V;  // place -1 is that before the first
  }

  // The convolution of a token, some channels of it. Its input takes its place among the last ones.
  void convolve(int64_t b, int64_t t, Range channels, float* to) const {
    const int64_t place = pos[b * S] + t;
    const Element* token = x + (b * S + t) * width();
    float* kept = inputs + row(b) * W * C;
    const int64_t before = std::min(n_tap - 1, place);
    for (int64_t c = channels.begin; c < channels.end; c += 16) {
      const Floats own = load(token + c);
      store(to + c, own * load(taps + (n_tap - 1) * C + c));
    }
    for (int64_t i = 1; i <= before; i++) {
      const float *from = kept + (place - i) % W * C, *tap = taps + (n_tap - 1 - i) * C;
      for (int64_t c = channels.begin; c < channels.end; c += 16) {
        store(to + c, multiply_add(load(from + c), load(tap + c), load(to + c)));
      }
    }
    for (int64_t c = channels.begin; c < channels.end; c += 16) {
      store(kept + place % W * C + c, load(token + c));
      store(to + c, silu_of(load(to + c)));
    }
  }

  Token token(int64_t b, int64_t t, int64_t h, float* mixed) const {
    const float *q = mixed + h / (H / key_heads) * K, *k = q + key_heads * K, *gate = gates + (b * S + t) * 2 * H + h;
    Floats qq = every(0.0f), kk = qq, qk = qq;
    for (int64_t i = 0; i < K; i += 16) {
      const Floats query = load(q + i), key = load(k + i);
      qq = multiply_add(query, query, qq), kk = multiply_add(key, key, kk), qk = multiply_add(query, key, qk);
    }
    const auto scale = [](Floats squares) { return 1.0f / std::sqrt(reduce_add(squares) + 1e-6f); };
    const float open = gate[H] + rates[H + h], softplus = open > 20 ? open : std::log1p(std::exp(open));
    return {.q = q, .k = k, .v = mixed + 2 * key_heads * K + h * V, .keep = std::exp(rates[h] * softplus),
            .learn = 1 / (1 + std::exp(-gate[0])), .q_scale = scale(qq) / std::sqrt(static_cast<float>(K)),
            .k_scale = scale(kk), .q_times_k = reduce_add(qk), .is_first = pos[b * S] + t == 0};
  }

  // A token through kColumns columns of a state. v becomes the output.
  void step(const Token& token, const float* from, int64_t from_stride, float* to, int64_t to_stride, float* v) const {
    Floats found[kVectors], seen[kVectors], update[kVectors];
    UNROLL for (int w = 0; w < kVectors; w++) found[w] = seen[w] = every(0.0f);
    for (int64_t i = 0; i < K; i++) {
      const Floats key = every(token.k[i]), query = every(token.q[i]);
      const float* ahead = from + (i + kAhead) * from_stride;  // of other cache lines than those that follow in memory
      for (int64_t c = 0; c < kColumns; c += 16) __builtin_prefetch(ahead + c);
      UNROLL for (int w = 0; w < kVectors; w++) {
        const Floats state = load(from + i * from_stride + 16 * w);
        found[w] = multiply_add(state, key, found[w]);
        seen[w] = multiply_add(state, query, seen[w]);
      }
    }
    const Floats keep = every(token.keep), expected = every(token.keep * token.k_scale);
    UNROLL for (int w = 0; w < kVectors; w++) {
      update[w] = (load(v + 16 * w) - expected * found[w]) * every(token.learn * token.k_scale);
      store(v + 16 * w, multiply_add(keep, seen[w], every(token.q_times_k) * update[w]) * every(token.q_scale));
    }
    for (int64_t i = 0; i < K; i++) {
      const Floats key = every(token.k[i]);
      UNROLL for (int w = 0; w < kVectors; w++) {
        const Floats kept = load(from + i * from_stride + 16 * w) * keep;
        store(to + i * to_stride + 16 * w, multiply_add(key, update[w], kept));
      }
    }
  }

  // Tokens first .. first + n - 1 of row b through the state of a head.
  void run_tokens(int64_t b, int64_t h, int64_t first, int64_t n, const Token* tokens, float* between) const {
    alignas(64) static constexpr float kNothing[kColumns] = {};
    const int64_t begin = pos[b * S], last = begin + counts[b] - 1;
    for (int64_t c = 0; c < V; c += kColumns) {
      const float* from = state(b, h, keeps_all() ? begin + first - 1 : first == 0 ? begin - 1 : last) + c;
      int64_t from_stride = V;
      for (int64_t i = 0; i < n; i++) {
        const bool goes_on = !keeps_all() && i + 1 < n;
        float* to = goes_on ? between : state(b, h, keeps_all() ? begin + first + i : last) + c;
        const int64_t to_stride = goes_on ? kColumns : V;
        const bool is_first = tokens[i].is_first;
        step(tokens[i], is_first ? kNothing : from, is_first ? 0 : from_stride, to, to_stride, tokens[i].v + c);
        from = to, from_stride = to_stride;
      }
    }
  }

  // The output of a head, normalised, times the SiLU of its gate.
  void normalise(int64_t b, int64_t t, int64_t h, const float* output) const {
    Floats squares = every(0.0f);
    for (int64_t i = 0; i < V; i += 16) squares = multiply_add(load(output + i), load(output + i), squares);
    const Floats scale = every(1.0f / std::sqrt(reduce_add(squares) / V + eps));
    const Element* gate = x + (b * S + t) * width() + C + h * V;
    Element* to = y + ((b * S + t) * H + h) * V;
    for (int64_t i = 0; i < V; i += 16) store(to + i, load(output + i) * scale * load(norm + i) * silu_of(load(gate + i)));
  }

  // Tokens `among` of row b, what the convolution made of them, through a head.
  void run_head(int64_t b, Range among, int64_t h, float* mixed, float* between) const {
    const int64_t n = std::clamp<int64_t>(counts[b] - among.begin, 0, among.end - among.begin);
    Token tokens[kTokens];
    for (int64_t i = 0; i < n; i++) tokens[i] = token(b, among.begin + i, h, mixed + i * C);
    run_tokens(b, h, among.begin, n, tokens, between);
    for (int64_t i = 0; i < n; i++) normalise(b, among.begin + i, h, tokens[i].v);
    for (int64_t t = among.begin + n; t < among.end; t++) {
      std::memset(y + ((b * S + t) * H + h) * V, 0, V * sizeof(Element));
    }
  }

  // Which states there are: not those of tokens that were taken back.
  void note_stands(int64_t b) const {
    const int64_t begin = pos[b * S], end = begin + counts[b];
    for (int64_t i = 0; i < R; i++) {
      int64_t& stand = stands[row(b) * R + i];
      if (stand >= begin) stand = -1;
    }
    for (int64_t place = keeps_all() ? begin : std::max(begin, end - 1); place < end; place++) {
      stands[row(b) * R + place % R] = place;
    }
  }

  void run() const {
    Scratch scratch(true);
    const int64_t at_once = std::min(S, kTokens), n_row = std::min(B, kTokens / at_once);
    float* mixed = scratch.take<float>(n_row * at_once * C);
    float* between = scratch.take<float>(threads.count * K * kColumns);
    threads.region([&](int thread, int threads) {
      const Range channels = share_of(C, 16, thread, threads);
      for (int64_t b = 0; b < B; b += n_row) for (int64_t t = 0; t < S; t += at_once) {
        const int64_t n = std::min(n_row, B - b);
        const Range among{t, std::min(S, t + at_once)}, heads = share_of(n * H, 1, thread, threads);
        const auto of_row = [&](int64_t i) { return mixed + i * at_once * C; };
        for (int64_t i = 0; i < n; i++) for (int64_t s = t; s < std::min(among.end, counts[b + i]); s++) {
          convolve(b + i, s, channels, of_row(i) + (s - t) * C);
        }
        wait_for_all();
        for (int64_t i = heads.begin; i < heads.end; i++) {
          run_head(b + i / H, among, i % H, of_row(i / H), between + thread * K * kColumns);
        }
        wait_for_all();
      }
    });
    for (int64_t b = 0; b < B; b++) note_stands(b);
  }
};

}  // namespace gpt_faster
