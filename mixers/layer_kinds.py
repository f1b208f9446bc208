"""How layers of one model differ, and what each keeps of a row of the cache. args: a `model.ModelArgs`."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from mixers.recurrent.delta_net import DeltaCache, is_delta
from mixers.recurrent.short_conv import ConvCache, is_short_conv


def key_heads(args, windowed: bool) -> tuple[int, int]:
    """Key heads, and the size of every head, of the layers with a window, or of those without one."""
    if windowed:
        return args.n_kv_head, args.head_dim
    return args.full_kv_head or args.n_kv_head, args.full_head_dim or args.head_dim


def source_layer(args, layer: int) -> int:
    """The layer whose keys and values a layer attends to: itself or, of the last, the last before them of its kind."""
    first = args.n_layer - (args.n_reusing_layer or 0)
    if layer < first:
        return layer
    return next(i for i in reversed(range(first)) if args.window(i) == args.window(layer))


def source_layers(args) -> list[int]:
    """The `source_layer` of each layer."""
    return [source_layer(args, layer) for layer in range(args.n_layer)]


def state_layers(args) -> set[int]:
    """The layers that keep a state of the tokens before in the place of their keys and values."""
    return {layer for layer in range(args.n_layer) if is_delta(args, layer) or is_short_conv(args, layer)}


def projected_heads(args, layer: int) -> tuple[int, int, int, int]:
    """How many heads of q, k, v and the output's gate a layer makes of its input.

    Values may be keys, and both be those of another layer.
    """
    is_full, n_gate = args.window(layer) is None, args.n_head if args.attention_gate else 0
    n_kv_head, _ = key_heads(args, not is_full)
    if source_layer(args, layer) != layer:
        return args.n_head, 0, 0, n_gate
    return args.n_head, n_kv_head, 0 if args.keys_as_values and is_full else n_kv_head, n_gate


def args_of_layers(args, layers: list[int]):
    """The args of a model of some layers alone, which lie one after another there."""

    def moved(numbers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(layers) if layer in numbers)

    changes = {name: moved(getattr(args, name)) for name in ("full_layers", "unrotated_layers")}
    for name in ("delta", "short_conv"):
        if (sizes := getattr(args, name)) is not None:
            own = moved(sizes.layers)
            changes[name] = replace(sizes, layers=own) if own else None
    dense = moved(args.dense_layers)
    if len(dense) == len(layers):  # no layer with experts
        changes |= {"intermediate_size": args.dense_size, "dense_layers": (), "dense_size": None}
        changes |= dict.fromkeys(("n_expert", "n_expert_used", "shared_size", "n_expert_group", "n_group_used"))
    else:
        changes |= {"dense_layers": dense, "dense_size": args.dense_size if dense else None}
    return replace(args, n_layer=len(layers), **changes)


def check_layer_kinds(args) -> None:
    """Raise ValueError if the fields by which layers differ contradict each other."""
    needs = {"full_head_dim": "sliding_window", "full_kv_head": "sliding_window", "reusing_size": "n_reusing_layer"}
    needs |= {"layer_input_size": "layer_scales"}
    for name, needed in needs.items():
        if getattr(args, name) and not getattr(args, needed):
            raise ValueError(f"{name} {getattr(args, name)} needs {needed}")
    if args.full_kv_head and args.n_head % args.full_kv_head:
        raise ValueError(f"n_head {args.n_head} is not a multiple of full_kv_head {args.full_kv_head}")
    if args.full_head_dim and (args.full_head_dim % 2 or args.rope_dim or args.joint_qk_norm):
        raise ValueError(f"full_head_dim {args.full_head_dim} must be even, without rope_dim and joint_qk_norm")
    if args.n_reusing_layer:
        first, windows = args.n_layer - args.n_reusing_layer, args.windows()
        if first < 1 or set(windows[max(first, 0) :]) - set(windows[: max(first, 0)]):
            raise ValueError(f"n_reusing_layer {args.n_reusing_layer} needs a layer of each kind before them")
        if args.n_expert and args.reusing_size:
            raise ValueError(f"reusing_size {args.reusing_size} is for a model without experts")


def quantize_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] as int8 codes [..., D] and float32 scales [...]: x is codes * scales but for rounding."""
    scales = (x.abs().amax(-1).float() / 127).clamp(min=1e-30)  # of zeros too: a code is never 0 / 0
    return (x / scales[..., None]).round().to(torch.int8), scales


class Vectors(NamedTuple):
    """Keys or values of one layer, [N, Hkv, C, D]: numbers or, with a scale for each vector, int8 codes."""

    data: Tensor
    scales: Tensor | None = None  # [N, Hkv, C], float32: it multiplies sums in float32, and costs 2 bytes more in 66

    def write(self, rows: Tensor, pos: Tensor, x: Tensor) -> None:
        """Put x [B, S, Hkv, D] at pos [B, S] of rows [B]."""
        at = (rows[:, None], slice(None), pos)
        if self.scales is not None:
            x, self.scales[at] = quantize_vectors(x)
        self.data[at] = x  # index_put stays in place; scatter_ would copy the whole cache

    def read(self, rows: Tensor | None, mask: Tensor) -> Tensor:
        """What mask [B, S, C'] is for: the first slots of rows [B] (None: row b), [B, Hkv, C', D] in its dtype."""
        rows = slice(len(mask)) if rows is None else rows
        data, *scales = (each[:, :, : mask.shape[-1]][rows] for each in self if each is not None)
        return (data * scales[0][..., None]).to(mask.dtype) if scales else data


class LayerCache(nn.Module):
    """Keys and values of one layer, see `Vectors`; int8 ones have scales. The slot of a token is its position."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, names: str = "kv"):
        super().__init__()
        self.names = names
        for name in names:
            scales = torch.zeros(shape[:-1], device=device) if dtype == torch.int8 else None
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)
            self.register_buffer(f"{name}_scales", scales, persistent=False)

    def view(self, cache_rows: Tensor | None) -> tuple:
        """As `CacheView.layer`."""
        return *(Vectors(getattr(self, name), getattr(self, f"{name}_scales")) for name in self.names), cache_rows

    def copy_prefix(self, source: Tensor, target: Tensor, length: int) -> None:
        """Give rows target [n] what rows source [n] hold in their first `length` slots."""
        for each in self.buffers():
            each[target, :, :length] = each[source, :, :length]

    def holds(self, row: int, length: int) -> bool:
        """Whether a row can go on after its first `length` tokens, which all lie in their slots."""
        return True


def layer_caches(
    args, n_rows: int, n_slots: int, dtype: torch.dtype, device: torch.device, rewind: int = 0
) -> list[nn.Module]:
    """What each layer keeps of n_rows sequences of up to n_slots tokens, whose last `rewind` can be taken back.

    A layer that reuses keys and values has the cache of another.
    """
    kinds, sources = [key_heads(args, window is not None) for window in args.windows()], source_layers(args)

    def made(layer: int) -> nn.Module:
        if is_delta(args, layer):
            return DeltaCache(args.delta, n_rows, rewind, device)
        if is_short_conv(args, layer):
            return ConvCache(args.short_conv, n_rows, rewind, device)
        if args.kv_latent is not None:
            return LayerCache((n_rows, 1, n_slots, args.kv_latent + args.rope_dim), dtype, device, names="k")
        n_head, head_dim = kinds[layer]
        return LayerCache((n_rows, n_head, n_slots, head_dim), dtype, device)

    if args.kv_latent is not None and dtype == torch.int8:
        raise ValueError("int8 caches are not supported in latent attention, whose caches are small; use none")
    caches = {layer: made(layer) for layer in sorted(set(sources))}
    return [caches[layer] for layer in sources]


class Handed:
    """Keys or values of a call without a cache, as `Vectors`, for later layers that attend to them too."""

    def write(self, rows: Tensor, pos: Tensor, x: Tensor) -> None:  # x [B, S, Hkv, D]
        self.data = x.transpose(1, 2)

    def read(self, rows: Tensor | None, mask: Tensor) -> Tensor:  # [B, Hkv, S, D]
        return self.data

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.data, None))


class WithoutCache:
    """In the place of a `model.CacheView` where layers attend to keys and values of others and nothing is kept."""

    def __init__(self, args):
        sources = source_layers(args)
        kept = {source: (Handed(), Handed(), None) for source in sources}
        self.layers = [kept[source] for source in sources]

    def layer(self, i: int) -> tuple:
        return self.layers[i]
