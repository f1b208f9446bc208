// The operators as PyTorch sees them: schemas, and checks of what comes in, of which headers that begin with torch_ have what
// several share. The algorithms in the other headers check nothing, and know nothing of PyTorch.
//
// Only what is included here is needed: torch/extension.h would treble the time to build.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include "experts.h"
#include "torch_delta.h"
#include "torch_layers.h"
#include "wanted.h"

namespace {

using namespace gpt_faster;

// ---------------------------------------------------------------- linear layers

// x [..., in] -> [..., out]. The last dimension but one is that of the tokens of a request.
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& scales, const OptionalTensor& bias,
              const char* op) {
  const Dtype dtype = dtype_from(x.scalar_type(), op);
  TORCH_CHECK(x.size(-1) > 0, op, ": x has no features");
  const Tensor xc = contiguous(x);
  const Linear layer = layer_of(weight, scales, bias, x.size(-1), dtype, op);
  const int64_t M = x.numel() / layer.in, S = x.dim() > 1 ? x.size(-2) : 1;
  auto shape = x.sizes().vec();
  shape.back() = layer.out;
  Tensor y = at::empty(shape, x.options());
  with_type_of(dtype, [&](auto element) {
    using Element = decltype(element);
    layer.multiply(data<Element>(xc), static_cast<Element*>(y.mutable_data_ptr()), M, S, all_threads());
  });
  return y;
}

// F.linear for bfloat16: x [..., K], weight [N, K], bias [N] or none -> [..., N]; sums in float32.
Tensor linear_bf16(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "linear_bf16: wrong dtype");
  return linear(x, contiguous(weight), std::nullopt, contiguous(bias), "linear_bf16");
}

// A linear layer of codes: x [..., in], weight uint8 [tiles, bytes] of int8, int4 or e2m1 codes, or of nibbles and the 16
// float32 numbers that they stand for, or float8_e4m3fn; scales [tiles, groups, 1 or 2, 16], bias float32 [tiles * 16] or
// none -> [..., tiles * 16] in x's dtype.
Tensor linear_codes(const Tensor& x, const Tensor& weight, const Tensor& scales, const OptionalTensor& bias) {
  return linear(x, weight, scales, bias, "linear_codes");
}

// A linear layer of which 2 of 4 weights are kept: x [..., in], weight int8 [tiles, bytes] as `TwoFourWeight` has it, of x's
// dtype or with scales bfloat16 [tiles, groups, 1, 16] int8, bias float32 [tiles * 16] or none -> [..., tiles * 16].
Tensor linear_two_four(const Tensor& x, const Tensor& weight, const OptionalTensor& scales, const OptionalTensor& bias) {
  TORCH_CHECK(weight.scalar_type() == at::kChar, "linear_two_four: wrong dtype");
  return linear(x, weight, scales, bias, "linear_two_four");
}

// A linear layer of few rows: x [..., in], weight by input, see `SparseWeight` -> [..., out].
Tensor linear_sparse(const Tensor& x, const Tensor& weight, const OptionalTensor& scales, const OptionalTensor& bias,
                     int64_t out, double threshold) {
  const Dtype dtype = dtype_from(x.scalar_type(), "linear_sparse");
  const SparseWeight sparse = sparse_of(weight, scales, bias, out, threshold, "linear_sparse");
  TORCH_CHECK(x.size(-1) == sparse.in, "linear_sparse: x has ", x.size(-1), " features, weight takes ", sparse.in);
  const Tensor xc = contiguous(x);
  auto shape = x.sizes().vec();
  shape.back() = out;
  Tensor y = at::empty(shape, x.options());
  with_type_of(dtype, [&](auto element) {
    using Element = decltype(element);
    multiply_sparse(sparse, data<Element>(xc), static_cast<Element*>(y.mutable_data_ptr()), x.numel() / sparse.in,
                    all_threads());
  });
  return y;
}

// The outputs of few rows of x [..., in] where `wanted` [..., out] is not 0, elsewhere 0: weight by output, with scales as
// `WantedProduct` has them, bias float32 [out] or none.
Tensor linear_wanted(const Tensor& x, const Tensor& weight, const OptionalTensor& scales, const OptionalTensor& bias,
                     const Tensor& wanted) {
  const Tensor xc = contiguous(x), wc = contiguous(wanted);
  const int64_t in = x.size(-1), out = wanted.size(-1);
  const Dtype dtype = dtype_from(x.scalar_type(), "linear_wanted");
  SparseWeight layer = sparse_of(weight, scales, bias, in, 0, "linear_wanted", true);
  TORCH_CHECK(layer.out == out && x.numel() / in == wanted.numel() / out && x.scalar_type() == wanted.scalar_type(),
              "linear_wanted: x, weight and wanted do not fit");
  Tensor y = at::empty(wanted.sizes(), x.options());
  with_type_of(dtype, [&](auto element) {
    using Element = decltype(element);
    multiply_wanted(layer, data<Element>(xc), data<Element>(wc), static_cast<Element*>(y.mutable_data_ptr()),
                    x.numel() / in, all_threads());
  });
  return y;
}

// Linear layers of experts: x [T, 1 or K, in] through the experts chosen [T, K], whose weight [E, ...] and scales [E, ...]
// are as linear_codes takes them, or as linear_bf16 if there are no scales -> [T, K, out].
Tensor linear_experts(const Tensor& x, const Tensor& chosen, const Tensor& weight, const OptionalTensor& scales) {
  TORCH_CHECK(chosen.dim() == 2 && chosen.scalar_type() == at::kLong, "linear_experts: chosen is not int64 [T, K]");
  const int64_t T = chosen.size(0), K = chosen.size(1), n_expert = weight.size(0);
  TORCH_CHECK(x.dim() == 3 && x.size(0) == T && (x.size(1) == 1 || x.size(1) == K) && x.size(2) > 0 && weight.dim() == 3 &&
              n_expert > 0 && (!scales || scales->size(0) == n_expert), "linear_experts: wrong shape");
  const Dtype dtype = dtype_from(x.scalar_type(), "linear_experts");
  const Tensor xc = contiguous(x), cc = contiguous(chosen), wc = weight[0].is_contiguous() ? weight : contiguous(weight);
  const OptionalTensor sc = contiguous(scales), first_scales = sc ? OptionalTensor((*sc)[0]) : std::nullopt;
  const Linear first = layer_of(wc[0], first_scales, std::nullopt, x.size(2), dtype, "linear_experts");
  for (int64_t i = 0; i < T * K; i++) {
    const int64_t e = data<int64_t>(cc)[i];
    TORCH_CHECK(0 <= e && e < n_expert, "linear_experts: there is no expert ", e);
  }
  Tensor y = at::empty({T, K, first.out}, x.options());
  with_type_of(dtype, [&](auto element) {
    using Element = decltype(element);
    const auto stride = [](const Tensor& tensor) { return tensor.stride(0) * tensor.element_size(); };
    Experts<Element>{.first = first, .weight_stride = stride(wc), .scales_stride = sc ? stride(*sc) : 0,
                     .x = data<Element>(xc), .chosen = data<int64_t>(cc), .y = static_cast<Element*>(y.mutable_data_ptr()),
                     .n_expert = n_expert, .T = T, .K = K, .x_rows = x.size(1), .threads = all_threads()}
        .run();
  });
  return y;
}

// ---------------------------------------------------------------- attention

// Keys or values of a layer [R, Hkv, C', D] of a dtype or, with float32 scales [R, Hkv, C'], int8.
Vectors vectors_of(const Tensor& data, const OptionalTensor& scales, at::ScalarType dtype, const char* op) {
  TORCH_CHECK(data.dim() == 4 && data.is_contiguous() && data.is_cpu(), op, ": k or v is no contiguous cache");
  TORCH_CHECK(data.scalar_type() == (scales ? at::kChar : dtype), op, ": several dtypes, or int8 without scales");
  TORCH_CHECK(!scales || (scales->sizes() == data.sizes().slice(0, 3) && scales->scalar_type() == at::kFloat &&
                          scales->is_contiguous()), op, ": scales are not float32 [R, Hkv, C'] and contiguous");
  return {.data = data.mutable_data_ptr(), .scales = scales ? scales->mutable_data_ptr<float>() : nullptr};
}

// Queries and the filled part of the cache: q [B, S, H, D], k and v [R, Hkv, C', D], of which row b uses row cache_rows[b],
// or b if there are no cache_rows; mask [B, S, C] of zeros and -inf over the first C slots; scale of q k -> [B, S, H, D].
// D is 64, 96, 128 or 256, or for up to 16 queries a row any multiple of 32. More queries are bfloat16. k and v are int8 if
// they have scales [R, Hkv, C']. sinks float32 [H] or none: scores of nothing, which take their shares of the softmax.
Tensor attend(const Tensor& q, const Tensor& k, const OptionalTensor& k_scales, const Tensor& v,
              const OptionalTensor& v_scales, const OptionalTensor& cache_rows, const Tensor& mask, double scale,
              const OptionalTensor& sinks) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && mask.dim() == 3, "attend: q, k, v and mask have 4, 4, 4 and 3 dimensions");
  const int64_t B = q.size(0), S = q.size(1), H = q.size(2), D = q.size(3), n_kv_head = k.size(1), slots = mask.size(2);
  const Dtype dtype = dtype_from(q.scalar_type(), "attend");
  if (D % 32 || D == 0 || S > kFewRows) check_head_dim(D, "attend");
  check_queries(S, dtype, "attend");
  const Vectors keys = vectors_of(k, k_scales, q.scalar_type(), "attend");
  const Vectors values = vectors_of(v, v_scales, q.scalar_type(), "attend");
  TORCH_CHECK(k.sizes() == v.sizes() && k.size(3) == D && n_kv_head > 0 && H % n_kv_head == 0 &&
              mask.size(0) == B && mask.size(1) == S && 0 < slots && slots <= k.size(2),
              "attend: sizes of q, k and mask do not fit");
  TORCH_CHECK(mask.scalar_type() == q.scalar_type(), "attend: several dtypes");
  TORCH_CHECK(!sinks || (sinks->scalar_type() == at::kFloat && sinks->numel() == H && sinks->is_contiguous()),
              "attend: sinks are not float32 [", H, "] and contiguous");
  const int64_t* rows = checked_rows(cache_rows, B, k.size(0), "attend");
  Tensor y = at::empty(q.sizes(), q.options());
  const Tensor qc = contiguous(q), mc = mask.stride(2) == 1 ? mask : contiguous(mask);
  with_type_of(dtype, [&](auto element) {
    using Element = decltype(element);
    attend_queries(Attention<Element>{.q = data<Element>(qc), .k = keys, .v = values, .cache_rows = rows,
                              .mask = data<Element>(mc), .y = static_cast<Element*>(y.mutable_data_ptr()), .B = B, .S = S,
                              .H = H, .D = D, .group = H / n_kv_head, .cache_slots = k.size(2), .slots = slots,
                              .mask_row = mc.stride(0), .mask_query = mc.stride(1), .scale = static_cast<float>(scale),
                              .sinks = data<float>(sinks), .matrix_unit = matrix_unit()},
           all_threads());
  });
  return y;
}

// ---------------------------------------------------------------- fused blocks

// An object that Python holds as a tensor of its bytes. A copy of the bytes is refused: it would outlive the object.
template <class Object>
struct Handle {
  const Handle* self = this;  // which a copy does not have
  const char* made_by = Object::kMadeBy;
  Object object;
};

template <class Object>
Tensor handle_of(Object object) {
  auto* handle = new Handle<Object>{.object = std::move(object)};
  return at::from_blob(handle, {sizeof(*handle)}, [handle](void*) { delete handle; }, at::kByte);
}

template <class Object>
const Object& object_of(const Tensor& tensor, const char* op) {
  const auto* handle = data<Handle<Object>>(tensor);
  TORCH_CHECK(tensor.scalar_type() == at::kByte && tensor.numel() == sizeof(*handle) && handle->self == handle &&
              handle->made_by == Object::kMadeBy, op, ": a handle is not made by ", Object::kMadeBy, ", or is a copy");
  return handle->object;
}

struct JoinedBlocks {
  static constexpr char kMadeBy[] = "join_blocks";
  std::vector<Block> blocks;
  std::vector<OptionalTensor> tensors;  // kept alive
  Dtype dtype;
  double eps, scale;
  int64_t head_norm;  // size of q_norm and k_norm; 0 if there are none
};

struct JoinedCache {
  static constexpr char kMadeBy[] = "join_cache";
  std::vector<LayerCache> layers;
  std::vector<OptionalTensor> tensors;  // kept alive
};

constexpr int64_t kTensors = 16;  // of a block

// A layer from three tensors: weight, scales and bias. threshold: of one that skips small inputs, else negative; by_input:
// whether its weight lies so.
Linear joined_layer(OptionalTensor* tensors, int64_t in, Dtype dtype, double threshold, bool by_input) {
  TORCH_CHECK(tensors[0] && tensors[0]->dim() == 2, "join_blocks: a weight is missing");
  for (int i = 0; i < 3; i++) tensors[i] = contiguous(tensors[i]);
  if (by_input) {
    const int64_t out = tensors[0]->size(1) * (tensors[0]->scalar_type() == at::kByte ? 2 : 1);
    const SparseWeight sparse = sparse_of(*tensors[0], tensors[1], tensors[2], out, threshold, "join_blocks");
    TORCH_CHECK(sparse.in == in, "join_blocks: wrong size");
    return {.has_codes = false, .codes = {}, .bf16 = {}, .in = in, .out = out, .many_rows_product = nullptr,
            .matrix_unit = nullptr, .sparse = sparse};
  }
  Linear layer = layer_of(*tensors[0], tensors[1], tensors[2], in, dtype, "join_blocks");
  TORCH_CHECK(threshold < 0 || layer.has_codes, "join_blocks: a threshold of a layer without codes");
  layer.threshold = threshold;
  return layer;
}

const void* joined_norm(OptionalTensor& norm, int64_t size, Dtype dtype) {
  if (!norm) return nullptr;
  TORCH_CHECK(dtype_from(norm->scalar_type(), "join_blocks") == dtype, "join_blocks: several dtypes");
  TORCH_CHECK(norm->numel() == size, "join_blocks: a norm of ", norm->numel(), " values where ", size, " belong");
  norm = contiguous(norm);
  return norm->const_data_ptr();
}

Block joined_block(OptionalTensor* t, const c10::List<double>& thresholds, const c10::List<bool>& by_input, size_t number,
                   int64_t dim, int64_t attended, int64_t head_norm, Dtype dtype) {
  const auto layer = [&](int at, int64_t in, size_t i) {
    return joined_layer(t + at, in, dtype, thresholds[4 * number + i], by_input[4 * number + i]);
  };
  Block block{.wqkv = layer(1, dim, 0), .wo = layer(6, attended, 1), .w13 = layer(10, dim, 2), .w2 = {}};
  block.w2 = layer(13, block.w13.out / 2, 3);
  TORCH_CHECK(t[0] && t[9], "join_blocks: a norm is missing");
  block.attention_norm = joined_norm(t[0], dim, dtype), block.ffn_norm = joined_norm(t[9], dim, dtype);
  block.q_norm = joined_norm(t[4], head_norm, dtype), block.k_norm = joined_norm(t[5], head_norm, dtype);
  TORCH_CHECK(block.wo.out == dim && block.w2.out == dim && dim % kLanes == 0 && block.wqkv.out % kLanes == 0 &&
              block.w13.out % (2 * kGroup) == 0 && block.wqkv.out > block.wo.in, "join_blocks: wrong size");
  return block;
}

// The blocks of a model as one handle for run_blocks, which keeps the tensors it is made of. Of each block, in this order:
// attention_norm, wqkv, q_norm and k_norm or none, wo, ffn_norm, w13, w2. A linear layer is its weight, scales and bias,
// as linear_codes or linear_two_four takes them, or linear_bf16. attended: inputs of wo; eps: of the norms; scale: of
// q k. thresholds, by_input: of its four layers, see `joined_layer`.
Tensor join_blocks(const c10::List<OptionalTensor>& tensors, const c10::List<double>& thresholds,
                   const c10::List<bool>& by_input, int64_t attended, double eps, double scale) {
  const size_t layers = tensors.size() / kTensors * 4;
  TORCH_CHECK(!tensors.empty() && tensors.size() % kTensors == 0 && thresholds.size() == layers &&
              by_input.size() == layers, "join_blocks: ", tensors.size(), " tensors, ", thresholds.size(), " thresholds");
  JoinedBlocks joined{.tensors = tensors.vec(), .eps = eps, .scale = scale};
  OptionalTensor* all = joined.tensors.data();
  TORCH_CHECK(all[0], "join_blocks: a norm is missing");
  joined.dtype = dtype_from(all[0]->scalar_type(), "join_blocks");
  const int64_t dim = all[0]->numel();
  for (int i : {4, 5}) if (all[i]) joined.head_norm = all[i]->numel();
  for (size_t t = 0; t < tensors.size(); t += kTensors) {
    const size_t number = t / kTensors;
    joined.blocks.push_back(
        joined_block(all + t, thresholds, by_input, number, dim, attended, joined.head_norm, joined.dtype));
    const Block &first = joined.blocks[0], &block = joined.blocks.back();
    TORCH_CHECK(first.wqkv.out == block.wqkv.out && first.wo.in == block.wo.in && first.w13.out == block.w13.out,
                "join_blocks: unlike blocks");
  }
  return handle_of(std::move(joined));
}

// The caches of all layers as one handle for run_blocks, which keeps them: of each layer, in this order, keys
// [R, n_kv_head, C', D], their scales or none, values, their scales or none.
Tensor join_cache(const c10::List<OptionalTensor>& tensors) {
  TORCH_CHECK(!tensors.empty() && tensors.size() % 4 == 0, "join_cache: ", tensors.size(), " tensors");
  JoinedCache joined{.tensors = tensors.vec()};
  const auto& all = joined.tensors;
  for (size_t i = 0; i < all.size(); i += 2) {
    TORCH_CHECK(all[0] && all[i] && all[i]->sizes() == all[0]->sizes() && all[i + 1].has_value() == all[1].has_value(),
                "join_cache: keys or values are missing, or unlike the first");
    const auto dtype = all[0]->scalar_type();
    if (!all[1]) dtype_from(dtype, "join_cache");
    const Vectors vectors = vectors_of(*all[i], all[i + 1], dtype, "join_cache");
    if (i % 4 == 0) joined.layers.push_back({.k = vectors, .v = {}});
    else joined.layers.back().v = vectors;
  }
  check_head_dim(all[0]->size(3), "join_cache");
  return handle_of(std::move(joined));
}

// x [B, S, dim] through blocks from join_blocks. Keys and values are written first, to the cache from join_cache, at pos
// [B, S] of rows cache_rows [B], or rows 0 .. B - 1 if there are none; rows that are named twice must differ in pos. cos and
// sin [B, S, 1, D / 2] float32; mask [B, S, C] of zeros and -inf over the first C slots, in x's dtype, which is bfloat16 if
// there are more than 16 tokens a row.
Tensor run_blocks(const Tensor& x, const Tensor& blocks, const Tensor& cache, const OptionalTensor& cache_rows,
                  const Tensor& pos, const Tensor& cos, const Tensor& sin, const Tensor& mask) {
  const auto& joined = object_of<JoinedBlocks>(blocks, "run_blocks");
  const auto& caches = object_of<JoinedCache>(cache, "run_blocks");
  const Block& first = joined.blocks[0];
  const Tensor& keys = *caches.tensors[0];
  const int64_t D = keys.size(3), n_kv_head = keys.size(1), n_head = first.wo.in / D, cache_slots = keys.size(2);
  TORCH_CHECK(joined.blocks.size() == caches.layers.size() && (caches.tensors[1] || keys.scalar_type() == x.scalar_type()) &&
              first.wo.in == n_head * D && first.wqkv.out == (n_head + 2 * n_kv_head) * D && n_head % n_kv_head == 0 &&
              (joined.head_norm == 0 || joined.head_norm == D), "run_blocks: the cache does not fit the blocks");

  TORCH_CHECK(x.dim() == 3 && mask.dim() == 3, "run_blocks: x and mask have 3 dimensions");
  const int64_t B = x.size(0), S = x.size(1), M = B * S, dim = x.size(2), slots = mask.size(2);
  TORCH_CHECK(dtype_from(x.scalar_type(), "run_blocks") == joined.dtype && mask.scalar_type() == x.scalar_type() &&
              pos.scalar_type() == at::kLong && cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat,
              "run_blocks: wrong dtype");
  if (M > kFewRows) check_queries(S, joined.dtype, "run_blocks");
  TORCH_CHECK(dim == first.wqkv.in && 0 < slots && slots <= cache_slots && cos.numel() == M * D / 2 &&
              sin.numel() == M * D / 2 && pos.numel() == M && mask.numel() == M * slots, "run_blocks: wrong size");
  const int64_t* rows = checked_rows(cache_rows, B, keys.size(0), "run_blocks");
  const Tensor pc = contiguous(pos), cc = contiguous(cos), sc = contiguous(sin), mc = contiguous(mask);
  for (int64_t m = 0; m < M; m++) {
    const int64_t at = data<int64_t>(pc)[m];
    TORCH_CHECK(0 <= at && at < cache_slots, "run_blocks: position ", at, " is not in a cache of ", cache_slots);
  }
  Tensor y = x.clone(at::MemoryFormat::Contiguous);
  with_type_of(joined.dtype, [&](auto element) {
    using Element = decltype(element);
    Blocks<Element>{.blocks = joined.blocks, .caches = caches.layers, .threads = all_threads(),
                    .matrix_unit = matrix_unit(), .B = B, .S = S, .M = M, .dim = dim,
                    .width = first.w13.out / 2, .n_head = n_head, .n_kv_head = n_kv_head, .D = D,
                    .cache_slots = cache_slots, .slots = slots, .eps = static_cast<float>(joined.eps),
                    .scale = static_cast<float>(joined.scale), .cache_rows = rows, .pos = data<int64_t>(pc),
                    .cos = data<float>(cc), .sin = data<float>(sc), .mask = data<Element>(mc),
                    .x = static_cast<Element*>(y.mutable_data_ptr())}
        .run();
  });
  return y;
}

}  // namespace

TORCH_LIBRARY(gpt_faster, m) {
  m.def("linear_bf16(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("bf16_rows_apart() -> bool", [] { return !kHasBf16Matrices; });  // whether many rows are multiplied one by one
  m.def("linear_codes(Tensor x, Tensor weight, Tensor scales, Tensor? bias) -> Tensor");
  m.def("linear_two_four(Tensor x, Tensor weight, Tensor? scales, Tensor? bias) -> Tensor");
  m.def("linear_experts(Tensor x, Tensor chosen, Tensor weight, Tensor? scales) -> Tensor");
  m.def("attend(Tensor q, Tensor k, Tensor? k_scales, Tensor v, Tensor? v_scales, Tensor? cache_rows, Tensor mask, "
        "float scale, Tensor? sinks=None) -> Tensor");
  m.def("linear_sparse(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, int out, float threshold) -> Tensor");
  m.def("linear_wanted(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, Tensor wanted) -> Tensor");
  m.def("join_blocks(Tensor?[] tensors, float[] thresholds, bool[] by_input, int attended, float eps, float scale) "
        "-> Tensor");
  m.def("join_cache(Tensor?[] tensors) -> Tensor");
  // Both that follow write to caches. Their schemas do not say so, because the compiler would then copy the handle or the
  // states: nothing else reads the caches in the same graph, and every use of the result comes after.
  m.def("run_blocks(Tensor x, Tensor blocks, Tensor cache, Tensor? cache_rows, Tensor pos, Tensor cos, Tensor sin, "
        "Tensor mask) -> Tensor");
  m.def("delta_net(Tensor x, Tensor gates, Tensor pos, Tensor counts, Tensor taps, Tensor rates, Tensor norm, "
        "Tensor states, Tensor inputs, Tensor stands, Tensor? cache_rows, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(gpt_faster, CPU, m) {
  m.impl("linear_bf16", &linear_bf16);
  m.impl("linear_codes", &linear_codes);
  m.impl("linear_two_four", &linear_two_four);
  m.impl("linear_experts", &linear_experts);
  m.impl("linear_sparse", &linear_sparse);
  m.impl("linear_wanted", &linear_wanted);
  m.impl("attend", &attend);
  m.impl("join_blocks", &join_blocks);
  m.impl("join_cache", &join_cache);
  m.impl("run_blocks", &run_blocks);
  m.impl("delta_net", &delta_net);
}
