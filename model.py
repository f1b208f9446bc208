"""The Transformer in one flat file: configuration, KV cache, rope, attention, feed-forward.

The mathematics of a decoder-only language model and nothing else: which form of a layer is fastest on a device is
decided in `layers/`, and who uses which row of the cache in `engine/cache.py`.

Shapes: B rows of the batch, S new tokens a row, N rows and C slots of the cache, D head_dim, H heads, V vocabulary.
"""

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mixers.activations import ACTIVATIONS, activated
from mixers.experts import MixtureOfExperts, SeparateExperts, check_experts
from mixers.fields import check_fields, check_sizes
from mixers.latent import LatentAttention, check_latent
from mixers.layer_inputs import LayerInput, LayerInputs
from mixers.layer_kinds import (
    Vectors,
    WithoutCache,
    check_layer_kinds,
    key_heads,
    layer_caches,
    projected_heads,
    source_layer,
    state_layers,
)
from mixers.norms import block_norm, head_norm
from mixers.recurrent.delta_net import DeltaNet, DeltaSizes, is_delta
from mixers.recurrent.short_conv import ConvSizes, ShortConv, is_short_conv
from mixers.rope import LearnedPositions, RopeScaling, has_finite_rope, rope_table, rotate


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
    full_head_dim: int | None = None  # of layers without a window; None: as the others
    full_kv_head: int | None = None  # ... n_kv_head
    window_rope_base: float | None = None  # of the layers with a window, whose rope is not scaled; None: as the others
    rope_dim: int | None = None  # of each head's numbers, how many rope turns: the first of both halves; None: all
    unrotated_layers: tuple[int, ...] = ()  # layers without rope
    late_query_scale: float | None = None  # queries are times 1 + it * log(1 + pos // context before rope's scaling)
    qkv_bias: bool = False
    wo_bias: bool = False
    qk_norm: bool = False  # each head of q and k is normalised
    qk_norm_last: bool = False  # ... after rope
    joint_qk_norm: bool = False  # all heads of q are normalised as one vector, and all of k
    value_norm: bool = False  # each head of v is normalised, without a weight
    keys_as_values: bool = False  # values of layers without a window are their keys before norm and rope
    n_reusing_layer: int | None = None  # so many last layers use the keys and values of an earlier one of their kind
    reusing_size: int | None = None  # width of their feed-forward; None: intermediate_size
    kv_latent: int | None = None  # size of the vector that all keys and values of a token are made of
    q_latent: int | None = None  # ... and all queries; None: of the token itself
    value_dim: int | None = None  # size of a value where it is not head_dim; rope turns the last rope_dim of head_dim
    attention_scale: float | None = None  # of q k before the softmax; None: head_dim ** -0.5
    attention_softcap: float | None = None
    attention_sinks: bool = False  # each head has a score of nothing, which takes its share
    attention_gate: bool = False  # the output's numbers are weighed, by gates whose rows in wqkv are the last
    delta: DeltaSizes | None = None  # of the layers that have gated DeltaNet in the place of attention
    short_conv: ConvSizes | None = None  # ... a gated short convolution
    learned_positions: bool = False  # an embedding of its position is added to that of each token
    activation: str = "silu"
    gated: bool = True  # feed-forwards have a gate; else the activation takes the up projection
    ffn_bias: bool = False  # of all layers of feed-forwards, and of the gate that chooses among them
    norm_offset: bool = False  # norms multiply by 1 + weight
    mean_norm: bool = False  # the norms of blocks and the last subtract the mean first
    norm_bias: bool = False  # ... and add a bias
    parallel: bool = False  # the feed-forward takes what attention takes, not its result
    pre_norm: bool = True  # norms before attention and feed-forward
    post_norm: bool = False  # norms after them, before the sum
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    n_expert: int | None = None  # feed-forwards of a block, each of intermediate_size; None: one, for all tokens
    n_expert_used: int | None = None  # for each token
    normalize_experts: bool = True  # whether the weights of those used add up to 1
    expert_scale: float = 1.0  # of these weights
    sigmoid_experts: bool = False  # each is scored alone, and a bias has a say in the choice, not in the weight
    n_expert_group: int | None = None  # only the experts of the best groups can be chosen; None: all
    n_group_used: int | None = None
    shared_size: int | None = None  # width of one more feed-forward, for all tokens
    shared_gate: bool = True  # whether a gate weighs that one
    dense_layers: tuple[int, ...] = ()  # of a mixture of experts: the layers that have one feed-forward, of dense_size
    dense_size: int | None = None
    separate_experts: bool = False  # experts and the shared one have norms of their own, see `SeparateExperts`
    layer_input_size: int | None = None  # numbers that each layer takes of an embedding of its own
    layer_scales: bool = False  # what a layer returns is times a number of its own
    tie_embeddings: bool = False

    def __post_init__(self):
        check_fields(self)
        check_sizes(self)
        check_experts(self)
        check_layer_kinds(self)
        check_latent(self)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        if not has_finite_rope(self):
            raise ValueError(f"rope_base {self.rope_base} with {self.rope_scaling} makes angles that are not finite")

    @property
    def turned(self) -> int:
        """How many numbers of a head rope turns."""
        return self.rope_dim or self.head_dim

    def window(self, layer: int) -> int | None:
        """The window of a layer; None: it has none."""
        return None if layer in self.full_layers else self.sliding_window

    def windows(self) -> list[int | None]:
        """The window of each layer."""
        return [self.window(layer) for layer in range(self.n_layer)]

    def to_dict(self) -> dict:
        """JSON types only."""
        return asdict(self, dict_factory=lambda items: {k: list(v) if type(v) is tuple else v for k, v in items})

    @classmethod
    def from_dict(cls, fields: dict) -> "ModelArgs":
        """The inverse of `to_dict`. Raises ValueError on a field that is missing or unknown."""

        def with_tuples(values: dict) -> dict:
            return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}

        kinds = {"rope_scaling": RopeScaling, "delta": DeltaSizes, "short_conv": ConvSizes}
        given = [key for key in kinds if fields.get(key) is not None]
        try:
            parts = {key: kinds[key](**with_tuples(fields[key])) for key in given}
            return cls(**with_tuples(fields) | parts)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the model's args do not fit this version: {error}") from None


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """x squeezed smoothly between -cap and cap (Gemma 2); None leaves it."""
    return x if cap is None else (cap * torch.tanh(x.float() / cap)).to(x.dtype)


SPARE_SLOTS = 8  # of a cache: they stay empty, see `engine/cache.py`


class KVCache(nn.Module):
    """What every layer keeps, see `layer_caches`, and tables for the positions of its tokens."""

    def __init__(self, args: ModelArgs, n_rows: int, n_slots: int, dtype: torch.dtype, device: torch.device, rewind=0):
        super().__init__()
        self.layers = nn.ModuleList(layer_caches(args, n_rows, n_slots, dtype, device, rewind))
        slots = torch.arange(n_slots, device=device)
        uniforms = torch.zeros(n_rows, n_slots, device=device)  # decide what is drawn, see `engine/sampling.py`
        length = n_slots - SPARE_SLOTS
        tables = (slots, uniforms, *rope_table(args, slots, False, length), *rope_table(args, slots, True, length))
        for name, table in zip(("slots", "uniforms", "cos", "sin", "window_cos", "window_sin"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)
        self.n_rows, self.n_slots, self.rewind = n_rows, n_slots, rewind
        self.handle: Tensor | None = None  # this cache as an operator for all blocks takes it, set by `Blocks.bind`

    def view(self, cache_rows: Tensor | None = None, length: int | None = None, counts=None) -> "CacheView":
        """What one call uses: row cache_rows[b] for row b of the batch (None: row b), and the first `length` slots.

        The prefix must reach every position that the call attends to. counts: see `CacheView`.
        """
        return CacheView(self, cache_rows, self.slots if length is None else self.slots[:length], counts)


class CacheView(NamedTuple):
    """The part of a cache that one call uses, see `KVCache.view`. The sizes of its tensors decide compiled shapes."""

    cache: KVCache
    cache_rows: Tensor | None  # [B]
    slots: Tensor  # [C'] = 0, 1, ...
    counts: Tensor | None  # [B], the tokens of each row, which padding follows; None: there is none

    def layer(self, i: int) -> tuple:
        """What layer i takes of the cache, beside its input."""
        return self.cache.layers[i].view(self.cache_rows)

    def rope(self, pos: Tensor, windowed: bool) -> tuple[Tensor, Tensor]:
        """As `rope_table`, looked up."""
        names = ("window_cos", "window_sin") if windowed else ("cos", "sin")
        return tuple(getattr(self.cache, name)[pos] for name in names)


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a position is seen and -inf elsewhere."""
    return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, float("-inf")).to(dtype)


class Attend(nn.Module):
    """Grouped-query attention. scale: of q k. cap: soft cap of the scaled scores. sinks [H]: scores of nothing."""

    def __init__(self, head_dim: int, scale: float | None, cap: float | None, sinks: nn.Parameter | None = None):
        super().__init__()
        self.head_dim, self.scale, self.cap, self.sinks = head_dim, scale or head_dim**-0.5, cap, sinks

    def forward(self, q: Tensor, k: Vectors, v: Vectors, cache_rows: Tensor | None, mask: Tensor) -> Tensor:
        """q [B, S, H, D]; cache_rows [B]: see `KVCache.view`; mask [B, S, C'] -> [B, S, H, D]."""
        B, S, H, D = q.shape
        k, v = (each.read(cache_rows, mask) for each in (k, v))
        # the G query heads of one key head become rows of one head: larger blocks, and no copies of k and v
        q = q.view(B, S, k.shape[1], -1, D).permute(0, 2, 3, 1, 4).reshape(B, k.shape[1], -1, D)  # [B, Hkv, G * S, D]
        mask = mask.repeat(1, H // k.shape[1], 1)[:, None]  # [B, 1, G * S, C']
        if self.cap is None and self.sinks is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        else:
            y = self.shares(softcap((q @ k.mT).float() * self.scale, self.cap) + mask.float()).to(v.dtype) @ v
        return y.view(B, k.shape[1], -1, S, D).permute(0, 3, 1, 2, 4).reshape(B, S, H, D)

    def shares(self, scores: Tensor) -> Tensor:
        """The softmax of scores [B, Hkv, G * S, C'], of which a sink takes its share."""
        shares = scores.softmax(-1)
        if self.sinks is None:
            return shares
        sinks = self.sinks.float().view(scores.shape[1], -1, 1)  # [Hkv, G, 1]
        sinks = sinks.expand(-1, -1, scores.shape[2] // sinks.shape[1]).reshape(1, *scores.shape[1:3], 1)
        return shares * (scores.logsumexp(-1, keepdim=True) - sinks).sigmoid()


class Attention(nn.Module):
    """Self-attention over the cache. wqkv holds the rows of its `projected_heads`, in their order.

    window: see `Context.mask`.
    """

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.heads, self.window = projected_heads(args, layer), args.window(layer)
        self.n_head, (_, self.head_dim) = args.n_head, key_heads(args, self.window is not None)
        self.wqkv = nn.Linear(args.dim, sum(self.heads) * self.head_dim, bias=args.qkv_bias)
        self.wo = nn.Linear(args.n_head * self.head_dim, args.dim, bias=args.wo_bias)
        self.q_norm, self.k_norm = (head_norm(n_head, self.head_dim, args) for n_head in self.heads[:2])
        self.value_eps = args.norm_eps if args.value_norm else None
        self.norm_last, self.late_scale = args.qk_norm_last, args.late_query_scale
        self.late = args.rope_scaling.original_max_position_embeddings if self.late_scale else None
        sinks = nn.Parameter(torch.zeros(args.n_head)) if args.attention_sinks else None
        self.attend = Attend(self.head_dim, args.attention_scale, args.attention_softcap, sinks)

    def forward(self, x: Tensor, pos: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, *cache) -> Tensor:
        """x [B, S, dim] -> [B, S, dim], see `Context`. cache: as `CacheView.layer`, written first; none: x alone."""
        B, S, _ = x.shape
        q, k, v, gate = self.wqkv(x).view(B, S, sum(self.heads), self.head_dim).split(self.heads, dim=2)
        q = self.rotated(q, self.q_norm, cos, sin)
        if self.late_scale is not None:
            q = q * (1 + self.late_scale * torch.log(1 + pos // self.late))[..., None, None].to(q.dtype)
        if self.heads[1]:  # else an earlier layer has written them
            v = v if self.heads[2] else k
            v = v if self.value_eps is None else F.rms_norm(v, v.shape[-1:], eps=self.value_eps)
            cache = self.keep(self.rotated(k, self.k_norm, cos, sin), v, pos, *cache)
        y = self.attend(q, *cache, mask)
        return self.wo((y * gate.sigmoid() if self.heads[3] else y).reshape(B, S, self.n_head * self.head_dim))

    def rotated(self, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
        """q or k [B, S, H, D] after norm and rope."""
        return norm(rotate(x, cos, sin)) if self.norm_last else rotate(norm(x), cos, sin)

    def keep(self, k: Tensor, v: Tensor, pos: Tensor, *cache) -> tuple:
        """The cache with k and v [B, S, Hkv, D] written to it; without one, k and v in its form."""
        if not cache:
            return Vectors(k.transpose(1, 2)), Vectors(v.transpose(1, 2)), None
        keys, values, cache_rows = cache
        rows = torch.arange(len(k), device=pos.device) if cache_rows is None else cache_rows
        keys.write(rows, pos, k)
        values.write(rows, pos, v)
        return cache


class FeedForward(nn.Module):
    """Gated linear unit (Shazeer 2020), or one without a gate.

    w13 holds the rows of the gate (w1), if there is one, and of the up projection (w3).
    """

    def __init__(self, args: ModelArgs, size: int):
        super().__init__()
        self.activation, self.gated = ACTIVATIONS[args.activation], args.gated
        self.w13 = nn.Linear(args.dim, (1 + args.gated) * size, bias=args.ffn_bias)
        self.w2 = nn.Linear(size, args.dim, bias=args.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(activated(self.w13(x), self.activation, self.gated))


def mixer(args: ModelArgs, layer: int) -> nn.Module:
    """What brings the tokens of a sequence together in one layer, the first being 0."""
    if is_delta(args, layer):
        return DeltaNet(args)
    if is_short_conv(args, layer):
        return ShortConv(args)
    return Attention(args, layer) if args.kv_latent is None else LatentAttention(args)


def feed_forward(args: ModelArgs, layer: int) -> nn.Module:
    """The feed-forward of one layer."""
    if args.n_expert is None or layer in args.dense_layers:
        own = args.reusing_size if source_layer(args, layer) != layer else None
        return FeedForward(args, own or (args.intermediate_size if args.n_expert is None else args.dense_size))
    shared = FeedForward(args, args.shared_size) if args.shared_size else None
    return SeparateExperts(args, shared) if args.separate_experts else MixtureOfExperts(args, shared)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.attention = mixer(args, layer)
        self.feed_forward = feed_forward(args, layer)
        self.residual_scale, self.parallel = args.residual_scale, args.parallel
        self.attention_norm = _norm_if(args.pre_norm, args)
        self.ffn_norm = _norm_if(args.pre_norm and not args.parallel and not args.separate_experts, args)
        self.post_attention_norm, self.post_ffn_norm = (_norm_if(args.post_norm, args) for _ in range(2))

    def forward(self, x: Tensor, pos: Tensor, *context_and_cache) -> Tensor:
        """x [B, S, dim] at pos [B, S]; the rest is as `Attention.forward` takes it."""
        h = self.attention_norm(x)
        y = self.post_attention_norm(self.attention(h, pos, *context_and_cache))
        x = x + _scaled(y, self.residual_scale)
        y = self.post_ffn_norm(self.feed_forward(h if self.parallel else self.ffn_norm(x)))
        return x + _scaled(y, self.residual_scale)


class ScaledBlock(TransformerBlock):
    """A block whose result is times a number of its own, and which may take an input of its own."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__(args, layer)
        self.layer_input = LayerInput(args) if args.layer_input_size else None
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, pos: Tensor, *inputs) -> Tensor:
        """As TransformerBlock; inputs: before the others its own [B, S, layer_input_size], if it takes one."""
        if self.layer_input is None:
            return super().forward(x, pos, *inputs) * self.layer_scalar
        own, *others = inputs
        return self.layer_input(super().forward(x, pos, *others), own) * self.layer_scalar


def _norm_if(wanted: bool, args: ModelArgs) -> nn.Module:
    return block_norm(args) if wanted else nn.Identity()


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale  # a multiplication is a kernel


class Blocks(nn.ModuleList):
    """All blocks of a model, one after another."""

    def forward(self, x: Tensor, pos: Tensor, contexts: list["Context"], cache: CacheView | None) -> Tensor:
        for i, block in enumerate(self):
            x = self.run(block, x, pos, *contexts[i], *(() if cache is None else cache.layer(i)))
        return x

    def run(self, block: TransformerBlock, *inputs) -> Tensor:
        return block(*inputs)

    def bind(self, cache: KVCache) -> None:
        """Prepare a new cache for these blocks, once."""


class Context(NamedTuple):
    """What one layer's attention needs to know of the positions."""

    cos: Tensor  # [B, S, 1, D/2]
    sin: Tensor
    mask: Tensor  # [B, S, C'], additive


class Transformer(nn.Module):
    """A decoder-only language model."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        # its own drawing of values imports the compiler, even on the meta device: a second of start-up
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim, _weight=torch.empty(args.vocab_size, args.dim))
        self.positions = LearnedPositions(args) if args.learned_positions else None
        self.layer_inputs = LayerInputs(args) if args.layer_input_size else None
        block = ScaledBlock if args.layer_scales else TransformerBlock
        self.layers = Blocks(block(args, layer) for layer in range(args.n_layer))
        self.norm = block_norm(args)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.ranks = None  # the processes that share this model, set by `apply_tp`
        self.cache_dtype: torch.dtype | None = None  # of keys and values, int8 or, None, as the model's
        self.cache_room: int | None = None  # bytes that a plan of memory leaves for caches; None: there is no plan
        self.tie()

    def tie(self) -> None:
        """Share the embedding's weight with the output head, where the model does so."""
        if self.args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def new_cache(self, n_rows: int, n_slots: int, rewind: int = 0) -> KVCache:
        """A cache beside the weights, see `layer_caches`."""
        cache = KVCache(self.args, n_rows, n_slots, self.cache_dtype or self.dtype, self.device, rewind)
        self.layers.bind(cache)
        return cache

    def forward(
        self, tokens: Tensor, pos: Tensor, cache: CacheView | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Logits [B, S, V] of tokens [B, S] at positions pos [B, S], which are written to the cache first.

        cache: None: the tokens attend to each other alone, and gradients flow. rows [B, R]: the places in S whose
        logits [B, R, V] are wanted. In a model that several ranks share they are the logits of this rank's part of the
        vocabulary, see `tp.full_logits`.
        """
        return self.logits(self.hidden(tokens, pos, cache), rows)

    def hidden(self, tokens: Tensor, pos: Tensor, cache: CacheView | None = None) -> Tensor:
        """What the blocks make of the tokens [B, S, dim], before the last norm and the head."""
        x, contexts = self.embed(tokens, pos), self.contexts(pos, cache)
        if self.layer_inputs is not None:
            contexts = [(own, *each) for own, each in zip(self.layer_inputs(tokens, x), contexts, strict=True)]
        if cache is None and self.args.n_reusing_layer:
            cache = WithoutCache(self.args)
        return self.layers(x, pos, contexts, cache)

    def logits(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """The last norm and the head of what `hidden` returned; rows as in `forward`."""
        if rows is not None:
            x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
        return self.head(self.norm(x))

    def head(self, x: Tensor) -> Tensor:  # [..., dim] -> [..., V]
        return softcap(_scaled(self.output(x), self.args.logit_scale), self.args.logit_softcap)

    def embed(self, tokens: Tensor, pos: Tensor) -> Tensor:  # [B, S], [B, S] -> [B, S, dim]
        x = _scaled(self.tok_embeddings(tokens), rounded(self.args.embedding_scale, self.dtype))
        return x if self.positions is None else x + self.positions(pos)

    def contexts(self, pos: Tensor, cache: CacheView | None) -> list[tuple]:
        """The `Context` of each layer, for queries at pos [B, S]; of one with states the count of own tokens [B]."""
        key_pos = pos[:, None] if cache is None else cache.slots  # [B, 1, S] or [C']
        seen = key_pos <= pos[..., None]  # [B, S, C']

        def context(windowed: bool, rotated: bool) -> Context:
            alone = cache is None
            cos, sin = rope_table(self.args, pos, windowed, pos.shape[1]) if alone else cache.rope(pos, windowed)
            if not rotated:  # by an angle of 0
                cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
            near = seen & (key_pos > pos[..., None] - self.args.sliding_window) if windowed else seen
            return Context(cos[:, :, None], sin[:, :, None], additive_mask(near, self.dtype))

        windows, unrotated = self.args.windows(), self.args.unrotated_layers
        kinds = [(window is not None, i not in unrotated) for i, window in enumerate(windows)]
        made = {kind: context(*kind) for kind in sorted(set(kinds))}
        with_states = state_layers(self.args)
        if not with_states:
            return [made[kind] for kind in kinds]
        counts = None if cache is None else cache.counts
        counts = torch.full_like(pos[:, 0], pos.shape[1]) if counts is None else counts
        return [(counts,) if i in with_states else made[kind] for i, kind in enumerate(kinds)]


def rounded(value: float, dtype: torch.dtype) -> float:
    """The number of this dtype that is nearest to value, in Python's arithmetic, which the compiler can follow."""
    unit = torch.finfo(dtype).eps * 2.0 ** (math.frexp(value)[1] - 1)
    return round(value / unit) * unit
