// The operators without PyTorch, so that an emulator of another processor can run them: each call comes on standard input
// as emulated.py writes it, and what it makes goes to standard output. It checks nothing.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "blocks.h"
#include "delta.h"
#include "experts.h"
#include "linear.h"

using namespace gpt_faster;

namespace {

const Threads kThreads{1};

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);  // the end of the last call
}

template <class Number>
Number read() {
  Number number;
  read(&number, sizeof(number));
  return number;
}

constexpr Dtype kFloat8{3}, kInt8{4};  // of emulated.py

struct Tensor {
  Dtype dtype = Dtype::float32;  // of numbers that are neither integers nor bytes
  std::vector<int64_t> sizes;
  std::vector<char> bytes;  // none: there is no such tensor

  template <class Element>
  Element* data() {
    return bytes.empty() ? nullptr : reinterpret_cast<Element*>(bytes.data());
  }
  int64_t size(int i) const { return sizes[i < 0 ? sizes.size() + i : i]; }
  int64_t rows() const {  // if all dimensions but the last are one
    int64_t n = 1;
    for (size_t i = 0; i + 1 < sizes.size(); i++) n *= sizes[i];
    return n;
  }
};

Tensor read_tensor() {
  Tensor tensor{.dtype = static_cast<Dtype>(read<int64_t>())};
  tensor.sizes.resize(read<int64_t>());
  read(tensor.sizes.data(), tensor.sizes.size() * sizeof(int64_t));
  tensor.bytes.resize(read<int64_t>());
  read(tensor.bytes.data(), tensor.bytes.size());
  return tensor;
}

void write(const void* from, size_t bytes) { std::fwrite(from, 1, bytes, stdout); }
void write(const Tensor& tensor) { write(tensor.bytes.data(), tensor.bytes.size()); }

// Stands for PyTorch's.
void product_of_many_rows(const Bf16Weight& layer, const BFloat16* x, BFloat16* y, int64_t M) {
  for (int64_t i = 0; i < M * layer.N; i++) {
    const int64_t m = i / layer.N, n = i % layer.N;
    alignas(64) float sum[16] = {layer.bias ? to_float(layer.bias[n]) : 0.0f};
    for (int64_t k = 0; k < layer.K; k++) sum[0] += to_float(x[m * layer.K + k]) * to_float(layer.weight[n * layer.K + k]);
    BFloat16 rounded[16];
    store(rounded, load(sum));
    y[i] = rounded[0];
  }
}

#ifdef GPT_FASTER_AMX

bool held = false;  // the unit, by a thread that has multiplied

constexpr MatrixUnit kUnit{
    .multiply = [](int64_t M, int64_t N, int64_t K, const BFloat16* a, int64_t a_stride, const uint32_t* b,
                   int64_t b_stride, float* c, int64_t c_stride, bool add) {
      held = true;
      for (int64_t m = 0; m < M; m++) for (int64_t n = 0; n < N; n += 16) {
        float* to = c + m * c_stride + n;
        Floats sum = add ? load(to) : every(0.0f);
        for (int64_t k = 0; k < K; k += 2) {
          sum = dot_pairs(sum, load_pairs(b + k / 2 * b_stride + n), every_pair(a + m * a_stride + k));
        }
        store(to, sum);
      }
    },
    .release = [] { held = false; }};
const MatrixUnit* const kMatrixUnit = &kUnit;

#else

constexpr bool held = false;
constexpr const MatrixUnit* kMatrixUnit = nullptr;

#endif

// Weight and scales may be those of the first of several experts.
Linear layer_of(Tensor& weight, Tensor& scales, Tensor& bias, int64_t in, Dtype dtype) {
  if (weight.dtype == kInt8) {
    const int64_t tiles = weight.size(0), groups = scales.bytes.empty() ? 1 : scales.size(-3);
    const TwoFourWeight two_four{.tiles = weight.data<uint8_t>(), .scales = scales.data<BFloat16>(),
                                 .bias = bias.data<float>(), .in = in, .n_tile = tiles, .groups = groups};
    return {.has_codes = false, .codes = {}, .bf16 = {}, .in = in, .out = tiles * kLanes, .many_rows_product = nullptr,
            .matrix_unit = nullptr, .two_four = two_four};
  }
  if (scales.bytes.empty()) {
    const int64_t out = weight.size(-2);
    const Bf16Weight bf16{.weight = weight.data<BFloat16>(), .bias = bias.data<BFloat16>(), .N = out, .K = in};
    return {.has_codes = false, .codes = {}, .bf16 = bf16, .in = in, .out = out,
            .many_rows_product = product_of_many_rows, .matrix_unit = nullptr};
  }
  const int64_t nibbles = round_up(in, kGroup) * kLanes / 2;
  const bool has_zeros = scales.size(-2) == 2, has_nibbles = weight.size(-1) == nibbles;
  const CodesWeight codes{.codes = weight.data<uint8_t>(), .scales = scales.data<void>(), .scale_dtype = scales.dtype,
                          .bias = bias.data<float>(), .in = in, .tiles = weight.size(-2), .groups = scales.size(-3),
                          .is_int4 = has_nibbles && has_zeros, .is_float4 = has_nibbles && !has_zeros,
                          .is_numbers4 = weight.size(-1) == nibbles + kNumbersBytes,
                          .is_float8 = weight.dtype == kFloat8, .has_zeros = has_zeros};
  return {.has_codes = true, .codes = codes, .bf16 = {}, .in = in, .out = codes.tiles * kLanes,
          .many_rows_product = nullptr, .matrix_unit = dtype == Dtype::bfloat16 ? kMatrixUnit : nullptr};
}

template <class Element>
void run_linear(Tensor* args) {
  Tensor& x = args[0];
  const int64_t M = x.rows(), S = x.sizes.size() > 1 ? x.size(-2) : 1;
  const Linear layer = layer_of(args[1], args[2], args[3], x.size(-1), x.dtype);
  std::vector<Element> y(M * layer.out);
  layer.multiply(x.data<Element>(), y.data(), M, S, kThreads);
  write(y.data(), y.size() * sizeof(Element));
}

template <class Element>
void run_experts(Tensor* args) {
  Tensor &x = args[0], &chosen = args[1], &weight = args[2], &scales = args[3], none = args[4];
  const int64_t n_expert = weight.size(0), T = chosen.size(0), K = chosen.size(1);
  const Linear first = layer_of(weight, scales, none, x.size(-1), x.dtype);
  std::vector<Element> y(T * K * first.out);
  const auto stride = [&](const Tensor& tensor) { return static_cast<int64_t>(tensor.bytes.size()) / n_expert; };
  Experts<Element>{.first = first, .weight_stride = stride(weight), .scales_stride = stride(scales),
                   .x = x.data<Element>(), .chosen = chosen.data<int64_t>(), .y = y.data(), .n_expert = n_expert, .T = T,
                   .K = K, .x_rows = x.size(1), .threads = kThreads}
      .run();
  write(y.data(), y.size() * sizeof(Element));
}

// Keys or values, and their scales or none.
Vectors vectors_of(Tensor* two) { return {.data = two[0].data<void>(), .scales = two[1].data<float>()}; }

template <class Element>
void run_attend(Tensor* args) {
  Tensor &q = args[0], &k = args[1], &cache_rows = args[5], &mask = args[6];
  std::vector<Element> y(q.rows() * q.size(3));
  const int64_t slots = mask.size(2);
  attend_queries(Attention<Element>{.q = q.data<Element>(), .k = vectors_of(args + 1), .v = vectors_of(args + 3),
                                    .cache_rows = cache_rows.data<int64_t>(), .mask = mask.data<Element>(), .y = y.data(),
                                    .B = q.size(0), .S = q.size(1), .H = q.size(2), .D = q.size(3),
                                    .group = q.size(2) / k.size(1), .cache_slots = k.size(2), .slots = slots,
                                    .mask_row = q.size(1) * slots, .mask_query = slots,
                                    .scale = *args[7].data<float>(), .sinks = args[8].data<float>(),
                                    .matrix_unit = kMatrixUnit},
                 kThreads);
  write(y.data(), y.size() * sizeof(Element));
}

// Arguments: x, eps, scale, cache_rows, pos, cos, sin, mask; then of each layer keys and values, each with its scales, and
// the 16 tensors of a block.
template <class Element>
void run_blocks(Tensor* args, int count) {
  Tensor &x = args[0], &mask = args[7], &keys = args[8];
  const int64_t dim = x.size(2), D = keys.size(3), n_kv_head = keys.size(1);
  std::vector<Block> blocks;
  std::vector<LayerCache> caches;
  for (Tensor* t = args + 8; t < args + count; t += 20) {
    caches.push_back({.k = vectors_of(t), .v = vectors_of(t + 2)});
    Tensor* b = t + 4;
    const auto layer = [&](int i, int64_t in) { return layer_of(b[i], b[i + 1], b[i + 2], in, x.dtype); };
    const Linear wqkv = layer(1, dim), w13 = layer(10, dim);
    blocks.push_back({.attention_norm = b[0].data<void>(), .ffn_norm = b[9].data<void>(), .q_norm = b[4].data<void>(),
                      .k_norm = b[5].data<void>(), .wqkv = wqkv, .wo = layer(6, wqkv.out - 2 * n_kv_head * D),
                      .w13 = w13, .w2 = layer(13, w13.out / 2)});
  }
  Blocks<Element>{.blocks = blocks, .caches = caches, .threads = kThreads, .matrix_unit = kMatrixUnit,
                  .B = x.size(0), .S = x.size(1), .M = x.rows(), .dim = dim, .width = blocks[0].w13.out / 2,
                  .n_head = blocks[0].wo.in / D, .n_kv_head = n_kv_head, .D = D, .cache_slots = keys.size(2),
                  .slots = mask.size(2), .eps = *args[1].data<float>(), .scale = *args[2].data<float>(),
                  .cache_rows = args[3].data<int64_t>(), .pos = args[4].data<int64_t>(), .cos = args[5].data<float>(),
                  .sin = args[6].data<float>(), .mask = mask.data<Element>(), .x = x.data<Element>()}
      .run();
  write(x);
  for (Tensor* t = args + 8; t < args + count; t += 20) for (int i = 0; i < 4; i++) write(t[i]);
}

// Arguments: x, gates, pos, counts, taps, rates, norm, states, inputs, stands, cache_rows, eps.
template <class Element>
void run_delta(Tensor* args) {
  Tensor &x = args[0], &taps = args[4], &states = args[7], &inputs = args[8], &stands = args[9];
  const int64_t B = x.size(0), S = x.size(1), C = taps.size(1), H = states.size(2), K = states.size(3), V = states.size(4);
  std::vector<Element> y(B * S * H * V);
  DeltaNet<Element>{.x = x.data<Element>(), .gates = args[1].data<float>(), .pos = args[2].data<int64_t>(),
                    .counts = args[3].data<int64_t>(), .taps = taps.data<float>(), .rates = args[5].data<float>(),
                    .norm = args[6].data<float>(), .states = states.data<float>(), .inputs = inputs.data<float>(),
                    .stands = stands.data<int64_t>(), .rows = args[10].data<int64_t>(), .y = y.data(), .B = B, .S = S,
                    .C = C, .H = H, .key_heads = (C - H * V) / (2 * K), .K = K, .V = V, .n_tap = taps.size(0),
                    .R = states.size(1), .W = inputs.size(1), .eps = *args[11].data<float>(), .threads = kThreads}
      .run();
  write(y.data(), y.size() * sizeof(Element));
  for (const Tensor* each : {&states, &inputs, &stands}) write(*each);
}

}  // namespace

int main() {
  while (true) {
    const int64_t name = read<int64_t>(), count = read<int64_t>();
    std::vector<Tensor> args;
    for (int64_t i = 0; i < count; i++) args.push_back(read_tensor());
    with_type_of(args[0].dtype, [&](auto element) {
      using Element = decltype(element);
      if (name == 0) run_linear<Element>(args.data());
      else if (name == 1) run_experts<Element>(args.data());
      else if (name == 2) run_attend<Element>(args.data());
      else if (name == 3) run_blocks<Element>(args.data(), count);
      else run_delta<Element>(args.data());
    });
    if (held) return 1;
    std::fflush(stdout);
  }
}
