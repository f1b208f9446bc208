"""The mathematics of a decoder-only Transformer: configuration, layers, static KV cache, rope and masks.

Shapes: B rows, S new tokens a row, R rows of logits wanted, C cache slots, D head_dim, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from types import NoneType, UnionType
from typing import get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

FEW = 16  # queries a row, or tokens in all, up to which a device's own operators serve
MAX_SIZE, MAX_LAYERS = 1 << 24, 1 << 10  # far above any real model; larger ones would be built forever


def _positive(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30


def check_fields(config) -> None:
    """Raise ValueError if a field of a config is not of its type, or no size or factor of any model."""
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        limit = MAX_LAYERS if name in ("n_layer", "n_expert") else MAX_SIZE
        if float in kinds:
            fits, wanted = _positive(value), "a positive number"
        elif tuple[float, ...] in kinds:
            fits, wanted = isinstance(value, tuple) and all(map(_positive, value)), "positive numbers"
        elif tuple[int, ...] in kinds:
            are_layers = isinstance(value, tuple) and all(type(each) is int and each >= 0 for each in value)
            fits, wanted = are_layers, "numbers of layers, from 0"
        elif int in kinds:
            fits, wanted = type(value) is int and 1 <= value <= limit, f"a whole number from 1 to {limit}"
        else:
            is_bool = isinstance(value, bool)  # which Python counts as an int
            fits, wanted = isinstance(value, kinds) and is_bool == (bool in kinds), field.type
        if not fits and not (value is None and NoneType in kinds):
            raise ValueError(f"{name} is {value!r}; it must be {wanted}")


@dataclass(frozen=True)
class RopeScaling:
    """How rope frequencies are stretched beyond the trained context.

    `linear` divides all by `factor` (Chen et al. 2023); `llama3` divides the low ones and blends between the two
    wavelengths (Llama 3.1); `yarn` does so between two numbers of turns within the trained context, and makes cosines
    and sines larger by `attention_factor` (Peng et al. 2023); `factors` divides each by its own number, as GGUF files
    store Llama 3.1's result.
    """

    type: str
    factor: float = 1.0
    low_freq_factor: float = 1.0  # turns at which llama3 and yarn divide in full
    high_freq_factor: float = 4.0  # turns at which they do not divide
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    whole_pairs: bool = True  # yarn blends between whole numbers of rope pairs

    def __post_init__(self):
        if self.type not in ("linear", "llama3", "yarn", "factors"):
            raise ValueError(f"rope type {self.type!r} is not supported; supported: default, {', '.join(ROPE_TYPES)}")
        check_fields(self)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}"
            )

    def apply(self, freqs: Tensor, base: float) -> Tensor:
        """Scale `freqs` [D/2], radians per position, the powers of 1 / base."""
        if self.type == "linear":
            return freqs / self.factor
        if self.type == "factors":
            return freqs / torch.tensor(self.factors, dtype=freqs.dtype, device=freqs.device)
        keep = self.kept_by_yarn(freqs, base) if self.type == "yarn" else self.kept_by_llama3(freqs)
        return (
            keep * freqs + (1 - keep) * freqs / self.factor
        )  # keep 1: a high frequency as it is; 0: a low one, divided

    def kept_by_llama3(self, freqs: Tensor) -> Tensor:
        turns = self.original_max_position_embeddings * freqs / (2 * math.pi)  # within the trained context
        return ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)

    def kept_by_yarn(self, freqs: Tensor, base: float) -> Tensor:
        n_pair = len(freqs)

        def pair_of(turns: float) -> float:
            return n_pair * math.log(self.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(base)

        first, last = pair_of(self.high_freq_factor), pair_of(self.low_freq_factor)
        if self.whole_pairs:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * n_pair - 1)
        pairs = torch.arange(n_pair, device=freqs.device, dtype=freqs.dtype)
        return 1 - ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)


ROPE_TYPES = ("linear", "llama3", "yarn")  # that a config.json can name
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


@dataclass(frozen=True)
class ModelArgs:
    """The sizes and switches of one model; each field names the mathematics, none a brand."""

    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_seq_length: int
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # a token sees itself and the window - 1 before it
    full_layers: tuple[int, ...] = ()  # of a model with a window: the layers that have none
    window_rope_base: float | None = None  # of the layers with a window, whose rope is not scaled; None: as the others
    qkv_bias: bool = False
    qk_norm: bool = False  # each head of q and k is normalised
    joint_qk_norm: bool = False  # all heads of q are normalised as one vector, and all of k
    attention_scale: float | None = None  # of q k before the softmax; None: head_dim ** -0.5
    attention_softcap: float | None = None
    activation: str = "silu"
    norm_offset: bool = False  # norms multiply by 1 + weight
    pre_norm: bool = True  # norms before attention and feed-forward
    post_norm: bool = False  # norms after them, before the sum
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    n_expert: int | None = None  # feed-forwards of a block, each of intermediate_size; None: one, for all tokens
    n_expert_used: int | None = None  # for each token
    normalize_experts: bool = True  # whether the weights of those used add up to 1
    shared_size: int | None = None  # width of one more feed-forward, for all tokens
    tie_embeddings: bool = False

    def __post_init__(self):
        check_fields(self)
        if self.n_head * self.head_dim > MAX_SIZE:
            raise ValueError(f"n_head {self.n_head} x head_dim {self.head_dim} is more than {MAX_SIZE}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rope turns pairs")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        if self.full_layers and (self.sliding_window is None or max(self.full_layers) >= self.n_layer):
            raise ValueError(f"full_layers {self.full_layers} need a sliding_window and {self.n_layer} layers or more")
        if not (self.n_expert_used or 0) <= (self.n_expert or 0) or bool(self.n_expert) != bool(self.n_expert_used):
            raise ValueError(
                f"n_expert is {self.n_expert} and n_expert_used {self.n_expert_used}; it must be some of them"
            )
        if self.shared_size and not self.n_expert:
            raise ValueError(f"shared_size {self.shared_size} is for a model with n_expert, a mixture of experts")
        factors = self.rope_scaling.factors if self.rope_scaling else ()
        if factors and len(factors) != self.head_dim // 2:
            raise ValueError(f"rope has {len(factors)} frequency factors; head_dim {self.head_dim} needs half as many")

    def to_dict(self) -> dict:
        """JSON types only."""
        return asdict(self, dict_factory=lambda items: {k: list(v) if type(v) is tuple else v for k, v in items})

    @classmethod
    def from_dict(cls, fields: dict) -> "ModelArgs":
        """The inverse of `to_dict`. Raises ValueError on a field that is missing or unknown."""
        scaling, full_layers = fields.get("rope_scaling"), fields.get("full_layers", ())
        try:
            if scaling is not None:
                scaling = RopeScaling(**{**scaling, "factors": tuple(scaling.get("factors", ()))})
            full_layers = tuple(full_layers) if isinstance(full_layers, list) else full_layers
            return cls(**{**fields, "rope_scaling": scaling, "full_layers": full_layers})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the model's args do not fit this version: {error}") from None

    @classmethod
    def from_name(cls, name: str) -> "ModelArgs":
        """A registry entry by its exact name. Raises ValueError that lists the names."""
        if name not in REGISTRY:
            raise ValueError(f"no model is named {name!r}; known: {', '.join(REGISTRY)}")
        return REGISTRY[name]


def _llama(dim, n_layer, n_head, n_kv_head, intermediate_size, vocab_size, max_seq_length, **others) -> ModelArgs:
    head_dim = others.pop("head_dim", dim // n_head)
    return ModelArgs(dim, n_layer, n_head, n_kv_head, head_dim, intermediate_size, vocab_size, max_seq_length, **others)


_LLAMA_31 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
_LLAMA_32 = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
_LLAMA_3 = {"rope_base": 500000.0}
_QWEN_3 = {"norm_eps": 1e-6, "rope_base": 1e6, "qk_norm": True}

# For benchmarks and tests only: a checkpoint brings its own sizes.
REGISTRY = {
    "Llama-2-7B": _llama(4096, 32, 32, 32, 11008, 32000, 4096),
    "Llama-2-13B": _llama(5120, 40, 40, 40, 13824, 32000, 4096),
    "Llama-2-70B": _llama(8192, 80, 64, 8, 28672, 32000, 4096),
    "CodeLlama-7B": _llama(4096, 32, 32, 32, 11008, 32016, 16384, rope_base=1e6),
    "CodeLlama-34B": _llama(8192, 48, 64, 8, 22016, 32000, 16384, rope_base=1e6),
    "Llama-3-8B": _llama(4096, 32, 32, 8, 14336, 128256, 8192, **_LLAMA_3),
    "Llama-3-70B": _llama(8192, 80, 64, 8, 28672, 128256, 8192, **_LLAMA_3),
    "Llama-3.1-8B": _llama(4096, 32, 32, 8, 14336, 128256, 131072, rope_scaling=_LLAMA_31, **_LLAMA_3),
    "Llama-3.1-70B": _llama(8192, 80, 64, 8, 28672, 128256, 131072, rope_scaling=_LLAMA_31, **_LLAMA_3),
    "Llama-3.1-405B": _llama(16384, 126, 128, 8, 53248, 128256, 131072, rope_scaling=_LLAMA_31, **_LLAMA_3),
    "Llama-3.2-1B": _llama(
        2048, 16, 32, 8, 8192, 128256, 131072, rope_scaling=_LLAMA_32, tie_embeddings=True, **_LLAMA_3
    ),
    "Llama-3.2-3B": _llama(
        3072, 28, 24, 8, 8192, 128256, 131072, rope_scaling=_LLAMA_32, tie_embeddings=True, **_LLAMA_3
    ),
    "Mistral-7B": _llama(4096, 32, 32, 8, 14336, 32000, 32768, sliding_window=4096),
    "TinyLlama-1.1B": _llama(2048, 22, 32, 4, 5632, 32000, 2048),
    "Qwen2.5-7B": _llama(3584, 28, 28, 4, 18944, 152064, 32768, norm_eps=1e-6, rope_base=1e6, qkv_bias=True),
    "Qwen3-8B": _llama(4096, 36, 32, 8, 12288, 151936, 40960, **_QWEN_3, head_dim=128),
    "Mixtral-8x7B": _llama(4096, 32, 32, 8, 14336, 32000, 32768, rope_base=1e6, n_expert=8, n_expert_used=2),
    "Qwen3-30B-A3B": _llama(
        2048, 48, 32, 4, 768, 151936, 40960, **_QWEN_3, head_dim=128, n_expert=128, n_expert_used=8
    ),
    "stories15M": _llama(288, 6, 6, 6, 768, 32000, 256, tie_embeddings=True),
    "stories110M": _llama(768, 12, 12, 12, 2048, 32000, 1024, tie_embeddings=True),
    "SmolLM2-135M": _llama(576, 30, 9, 3, 1536, 49152, 8192, rope_base=1e5, tie_embeddings=True),
}


class RMSNorm(nn.Module):
    """Root mean square normalisation, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, args: ModelArgs):
        super().__init__()
        self.eps, self.offset = args.norm_eps, args.norm_offset
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(self.mean_square(h) + self.eps)
        if self.offset:  # the sum is not rounded to the dtype of the weight, which is small
            return (h * (1 + self.weight.float())).to(x.dtype)
        return h.to(x.dtype) * self.weight

    def mean_square(self, h: Tensor) -> Tensor:  # [..., dim] -> [..., 1]
        return h.square().mean(-1, keepdim=True)


class HeadsNorm(RMSNorm):
    """All heads normalised as one vector."""

    def forward(self, x: Tensor) -> Tensor:  # [B, S, H, D]
        return super().forward(x.flatten(2)).view(x.shape)


def head_norm(n_head: int, args: ModelArgs) -> nn.Module:
    """What q or k, of `n_head` heads, goes through before rope."""
    if args.joint_qk_norm:
        return HeadsNorm(n_head * args.head_dim, args)
    return RMSNorm(args.head_dim, args) if args.qk_norm else nn.Identity()


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """x squeezed smoothly between -cap and cap (Gemma 2); None leaves it."""
    return x if cap is None else (cap * torch.tanh(x.float() / cap)).to(x.dtype)


class KVCache(nn.Module):
    """Keys and values of every position so far: the slot is the position. k, v [B, Hkv, C, D]."""

    def __init__(self, batch_size: int, n_kv_head: int, slots: int, head_dim: int, dtype, device):
        super().__init__()
        shape = (batch_size, n_kv_head, slots, head_dim)
        self.register_buffer("k", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("v", torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    def update(self, pos: Tensor, k: Tensor, v: Tensor) -> None:  # pos [B, S]; k, v [B, S, Hkv, D]
        rows = torch.arange(pos.shape[0], device=pos.device)[:, None]
        self.k[rows, :, pos] = k  # index_put stays in place; scatter_ would copy the whole cache
        self.v[rows, :, pos] = v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [B, S, H, D]; cos, sin [B, S, 1, D/2]
    """Rotary position embedding over half-split pairs (Su et al. 2021; the layout of Hugging Face)."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float | None = None) -> Tensor:
    """Grouped-query attention: q [B, S, H, D]; k, v [B, Hkv, C, D]; mask from `additive_mask` -> [B, S, H, D].

    scale: of q k. cap: soft cap of the scaled scores.
    """
    B, S, H, D = q.shape
    n_kv_head = k.shape[1]
    q = q.view(B, S, n_kv_head, -1, D)
    if written_out(S):  # inductor fuses it; a call of scaled_dot_product_attention costs more than the work
        q = q.view(B, n_kv_head, -1, 1, D).float() * scale
        scores = softcap((q * k[:, :, None].float()).sum(-1), cap) + mask[:, None].float()  # [B, Hkv, G, C]
        probs = scores.softmax(-1)
        return (probs[..., None] * v[:, :, None].float()).sum(-2).view(B, 1, H, D).to(v.dtype)
    # the G query heads of one key head go as rows of one head: larger blocks, and no copies of k and v
    q = q.permute(0, 2, 3, 1, 4).reshape(B, n_kv_head, -1, D)  # [B, Hkv, G * S, D]
    if cap is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale)
    else:
        scores = softcap((q @ k.mT).float() * scale, cap) + mask[:, None].float()
        y = scores.softmax(-1).to(v.dtype) @ v
    return y.view(B, n_kv_head, -1, S, D).permute(0, 3, 1, 2, 4).reshape(B, S, H, D)


def written_out(S: int) -> bool:
    """Whether attention for S queries a row is spelt out in elementary operators."""
    return S == 1 and torch.compiler.is_compiling()


def surely_few(size: int) -> bool:
    """Whether a size is at most 16, in every call that a compiled form with this size serves."""
    if torch.compiler.is_compiling():  # comparing the length of a prompt would compile short ones apart
        return torch.fx.experimental.symbolic_shapes.statically_known_true(size <= FEW)
    return size <= FEW


def additive_mask(seen: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """0 where a position is seen [B, S, C] and -inf elsewhere, for each query row of `attend`: [B, G * S, C]."""
    mask = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, float("-inf")).to(dtype)
    return mask if written_out(seen.shape[1]) else mask.repeat(1, groups, 1)


class Attention(nn.Module):
    """Self-attention over the cache. wqkv holds the rows of q, k and v in this order."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = args.n_head, args.n_kv_head, args.head_dim
        rows = (args.n_head + 2 * args.n_kv_head) * args.head_dim
        self.wqkv = nn.Linear(args.dim, rows, bias=args.qkv_bias)
        self.wo = nn.Linear(args.n_head * args.head_dim, args.dim, bias=False)
        self.q_norm, self.k_norm = head_norm(args.n_head, args), head_norm(args.n_kv_head, args)
        self.scale = args.attention_scale or args.head_dim**-0.5
        self.cap = args.attention_softcap
        self.kv_cache: KVCache | None = None
        self.attend: Callable | None = None  # a device's own operator, set by `pack_`
        self.attends_many = False  # whether it is also for more than a few queries a row

    def forward(self, x: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        B, S, _ = x.shape
        heads = (self.n_head, self.n_kv_head, self.n_kv_head)
        q, k, v = self.wqkv(x).view(B, S, sum(heads), self.head_dim).split(heads, dim=2)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        self.kv_cache.update(pos, k, v)
        used = mask.shape[-1]
        if self.attend is not None and (self.attends_many or surely_few(S)):
            y = self.attend(q, self.kv_cache.k, self.kv_cache.v, None, mask[:, :S], self.scale)
        else:
            k, v = self.kv_cache.k[:B, :, :used], self.kv_cache.v[:B, :, :used]
            y = attend(q, k, v, mask, self.scale, self.cap)
        return self.wo(y.reshape(B, S, self.n_head * self.head_dim))


class FeedForward(nn.Module):
    """Gated linear unit (Shazeer 2020). w13 holds the rows of the gate (w1) and of the up projection (w3)."""

    def __init__(self, args: ModelArgs, size: int):
        super().__init__()
        self.activation = ACTIVATIONS[args.activation]
        self.w13 = nn.Linear(args.dim, 2 * size, bias=False)
        self.w2 = nn.Linear(size, args.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(self.activation(gate) * up)


class Gate(nn.Linear):
    """Scores that choose or weigh experts; never quantised, because rounded ones choose others."""


class ExpertLinear(nn.Module):
    """A linear layer for each of E experts: weight [E, out, in]."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def expert(self, e: int) -> Callable[[Tensor], Tensor]:
        return partial(F.linear, weight=self.weight[e])

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x [T, K or 1, in] through the experts chosen [T, K] -> [T, K, out]."""
        return by_expert(self, x, chosen)


def by_expert(layer: nn.Module, x: Tensor, chosen: Tensor) -> Tensor:
    """x [T, K or 1, in] through the experts chosen [T, K] of `layer` -> [T, K, out].

    Each expert gets all its tokens at once, so its weight is read once, and that of one not chosen never.
    """
    x = x.expand(-1, chosen.shape[1], -1)
    y = x.new_empty(*chosen.shape, layer.weight.shape[1])
    for e in chosen.unique().tolist():
        own = chosen == e
        y[own] = layer.expert(e)(x[own])
    return y


class MixtureOfExperts(nn.Module):
    """Feed-forwards of which a gate chooses some for each token (Shazeer et al. 2017; Jiang et al. 2024).

    Another one, shared, may serve all tokens, weighted by a gate of its own (Qwen2-MoE).
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.activation = ACTIVATIONS[args.activation]
        self.n_used, self.normalize = args.n_expert_used, args.normalize_experts
        self.gate = Gate(args.dim, args.n_expert, bias=False)
        self.w13 = ExpertLinear(torch.empty(args.n_expert, 2 * args.intermediate_size, args.dim))
        self.w2 = ExpertLinear(torch.empty(args.n_expert, args.dim, args.intermediate_size))
        self.shared = FeedForward(args, args.shared_size) if args.shared_size else None
        self.shared_gate = Gate(args.dim, 1, bias=False) if args.shared_size else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # [T, dim]
        weights, chosen = self.gate(rows).float().softmax(-1).topk(self.n_used)  # [T, K]
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        gate, up = self.w13(rows[:, None], chosen).chunk(2, dim=-1)
        made = self.w2(self.activation(gate) * up, chosen)  # [T, K, dim]
        y = (made.float() * weights[..., None]).sum(1).to(x.dtype).view_as(x)
        return y if self.shared is None else y + self.shared_gate(x).sigmoid() * self.shared(x)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = MixtureOfExperts(args) if args.n_expert else FeedForward(args, args.intermediate_size)
        self.residual_scale = args.residual_scale
        self.attention_norm, self.ffn_norm = (_norm_if(args.pre_norm, args) for _ in range(2))
        self.post_attention_norm, self.post_ffn_norm = (_norm_if(args.post_norm, args) for _ in range(2))

    def forward(self, x: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        y = self.post_attention_norm(self.attention(self.attention_norm(x), pos, cos, sin, mask))
        x = x + _scaled(y, self.residual_scale)
        y = self.post_ffn_norm(self.feed_forward(self.ffn_norm(x)))
        return x + _scaled(y, self.residual_scale)


def _norm_if(wanted: bool, args: ModelArgs) -> nn.Module:
    return RMSNorm(args.dim, args) if wanted else nn.Identity()


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale  # a multiplication is a kernel


@torch.compiler.nested_compile_region
def _block_region(block: TransformerBlock, *inputs: Tensor) -> Tensor:
    """One block as a region: compiled once for all layers, a quarter of the time it takes to inline them all."""
    return block(*inputs)


class Transformer(nn.Module):
    """A decoder-only language model with a static KV cache; call `setup_caches` before `forward`."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        # its own drawing of values imports the compiler, even on the meta device: a second of start-up
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim, _weight=torch.empty(args.vocab_size, args.dim))
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layer))
        self.norm = RMSNorm(args.dim, args)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.ranks = None  # the processes that share this model, set by `apply_tp`
        self.join_blocks: Callable | None = None  # makes `joined_blocks` once there are caches, set by `pack_`
        self.joined_blocks: nn.Module | None = None  # all blocks as one operator of the device
        self.tie()

    def tie(self) -> None:
        """Share the embedding's weight with the output head, where the model does so."""
        if self.args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.tok_embeddings.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    def setup_caches(self, batch_size: int, slots: int) -> None:
        """Allocate KV caches and rope tables for up to `batch_size` rows and `slots` positions, beside the weights."""
        args, dtype = self.args, self.dtype
        self.embedding_scale = torch.tensor(args.embedding_scale, dtype=dtype).item()  # rounded, as in training
        self.joined_blocks = None  # which would keep the old caches
        for layer in self.layers:
            layer.attention.kv_cache = KVCache(batch_size, args.n_kv_head, slots, args.head_dim, dtype, self.device)
        self.set_rope("", slots, args.rope_base, args.rope_scaling)
        if args.window_rope_base is not None:
            self.set_rope("window_", slots, args.window_rope_base, None)
        self.register_buffer("slots", torch.arange(slots, device=self.device), persistent=False)
        self.joined_blocks = self.join_blocks(self) if self.join_blocks is not None else None

    def set_rope(self, prefix: str, slots: int, base: float, scaling: RopeScaling | None) -> None:
        """Set the buffers `cos` and `sin` [slots, D/2], whose names begin with prefix."""
        freqs = 1.0 / base ** (torch.arange(0, self.args.head_dim, 2, device=self.device).float() / self.args.head_dim)
        scale = 1.0
        if scaling is not None:
            freqs, scale = scaling.apply(freqs, base), scaling.attention_factor
        angles = torch.outer(torch.arange(slots, device=self.device).float(), freqs)  # [C, D/2]
        self.register_buffer(f"{prefix}cos", angles.cos() * scale, persistent=False)
        self.register_buffer(f"{prefix}sin", angles.sin() * scale, persistent=False)

    def embed(self, tokens: Tensor) -> Tensor:  # [B, S] -> [B, S, dim]
        return _scaled(self.tok_embeddings(tokens), self.embedding_scale)

    def contexts(self, pos: Tensor, slots: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """cos, sin and mask of each layer for queries at pos [B, S] and keys in slots [C']."""
        args, groups = self.args, self.args.n_head // self.args.n_kv_head
        seen = slots <= pos[..., None]  # [B, S, C']
        whole = windowed = None
        if args.sliding_window is None or args.full_layers:
            whole = (*_rows_of(self.cos, self.sin, pos), additive_mask(seen, groups, self.dtype))
        if args.sliding_window is not None:
            near = seen & (slots > pos[..., None] - args.sliding_window)
            tables = (self.cos, self.sin) if args.window_rope_base is None else (self.window_cos, self.window_sin)
            windowed = (*_rows_of(*tables, pos), additive_mask(near, groups, self.dtype))
        return [windowed if windowed and i not in args.full_layers else whole for i in range(args.n_layer)]

    def forward(self, tokens: Tensor, pos: Tensor, rows: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """Logits [B, R, V] of tokens [B, S] at positions pos [B, S], which are written to the cache first.

        rows [B, R] picks the positions whose logits are wanted (indices into S; None: all S). slots [C'] is the
        prefix of `self.slots` to attend to (None: all); it must reach every position in pos. In a model that several
        ranks share they are the logits of this rank's part of the vocabulary, see `tp.full_logits`.
        """
        contexts = self.contexts(pos, self.slots if slots is None else slots)
        x = self.embed(tokens)
        joined = self.joined_blocks
        if joined is not None and (joined.takes_many or surely_few(tokens.shape[0] * tokens.shape[1])):
            x = joined(x, pos, *contexts[0])
        else:
            # regions are measured on CPU only; elsewhere the blocks are inlined
            run = _block_region if x.device.type == "cpu" else TransformerBlock.__call__
            for layer, context in zip(self.layers, contexts, strict=True):
                x = run(layer, x, pos, *context)
        if rows is not None:
            x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
        return softcap(_scaled(self.output(self.norm(x)), self.args.logit_scale), self.args.logit_softcap)


def _rows_of(cos: Tensor, sin: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:  # [C, D/2], pos [B, S] -> [B, S, 1, D/2]
    return cos[pos][:, :, None], sin[pos][:, :, None]
