"""Which feed-forwards lie in fast memory: a plan within a budget, made before a weight is read.

The first tier is the GPU's memory with main memory behind it or, without a GPU, main memory with the disk behind it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from layers.offload import Unit
from mixers.experts import MixtureOfExperts
from model import FeedForward, ModelArgs
from weights.files import GB, damaged, read_json, size_text
from weights.layout import Layout
from weights.tiers.packed_copy import PIECE

SIZES = {"GB": 10**9, "GiB": 1 << 30, "MB": 10**6, "MiB": 1 << 20}
AHEAD = 2  # units that are read at a time
GOLDEN = 0.618034  # multiples of it, but for whole numbers, are spread evenly, however many are taken


@dataclass(frozen=True)
class MemoryBudget:
    """size: bytes of the first tier. cache_bytes: what caches will take of it, of a model of these sizes.

    second: where the rest lies and is computed; None: on the disk. rates: bytes/s of the first tier and of the second.
    """

    size: int
    cache_bytes: Callable[[ModelArgs], int] = lambda args: 0
    second: torch.device | None = None
    rates: tuple[float, float] | None = None


def parse_size(text: str) -> int:
    """Bytes of a size such as 6GB (1e9) or 6GiB (2^30)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|MB|MiB)", text)
    size = int(float(match[1]) * SIZES[match[2]]) if match else 0
    if size <= 0:
        raise ValueError(f"{text!r} is no size; give a number above 0 with its unit, {', '.join(SIZES)}, such as 6GB")
    return size


@dataclass(frozen=True)
class Plan:
    """near, far: units of the first tier, the hottest first, and of the second.

    must: bytes of what has to lie in the first tier, by what it is. sizes: bytes of each unit. use: the share of tokens
    that uses each. is_known: whether that was counted.
    """

    near: list[Unit]
    far: list[Unit]
    must: dict[str, int]
    sizes: dict[Unit, int]
    use: dict[Unit, float]
    is_known: bool

    @property
    def near_bytes(self) -> int:
        return sum(self.must.values()) + sum(self.sizes[unit] for unit in self.near)

    @property
    def far_bytes(self) -> int:
        return sum(self.sizes[unit] for unit in self.far)

    def tokens_per_second(self, first: float, second: float) -> float:
        """From the rates of the tiers, bytes/s: all of a token's weights are read once, where they lie."""
        near = self.must["weights outside of feed-forwards"] + sum(self.use[u] * self.sizes[u] for u in self.near)
        return 1 / (near / first + sum(self.use[u] * self.sizes[u] for u in self.far) / second)

    def table(self, budget: MemoryBudget) -> str:
        """What lies where, for the person."""
        second = "disk" if budget.second is None else str(budget.second)
        n_unit, kind = len(self.sizes), "experts" if any(u.expert for u in self.sizes) else "feed-forwards"
        rows = [*self.must.items(), (f"{len(self.near)} of {n_unit} {kind}", self.near_bytes - sum(self.must.values()))]
        lines = [f"Placement within {size_text(budget.size)}:"]
        lines += [f"  memory  {size_text(size):>9}  {what}" for what, size in rows]
        lines += [f"  {second:<6}  {size_text(self.far_bytes):>9}  {len(self.far)} of {n_unit} {kind}"]
        if budget.rates is not None:
            first, other = (f"{rate / GB:.1f} GB/s" for rate in budget.rates)
            hot = "by the profile" if self.is_known else "each as often"
            expected = f"{self.tokens_per_second(*budget.rates):.1f} tok/s at batch 1, used {hot}"
            lines += [f"  expected: {expected}; measured: {first} of the first, {other} of the second"]
        return "\n".join([*lines, "  Python, PyTorch and the numbers of a prompt in the making come on top"])


def units_of(layout: Layout) -> dict[str, int]:
    """The feed-forwards that may lie in a second tier, by name, and the number of units in each.

    Where some layers have experts, the feed-forwards of the others, which every token uses, have to be in the first.
    """
    named = list(layout.model.named_modules())
    mixtures = {name: layer.gate.weight.shape[0] for name, layer in named if isinstance(layer, MixtureOfExperts)}
    return mixtures or {name: 1 for name, layer in named if type(layer) is FeedForward}


def make_plan(layout: Layout, dtype: torch.dtype, budget: MemoryBudget, sizes: dict[Unit, int], profile: Path) -> Plan:
    """The plan for a model whose floats become `dtype`. sizes: of its units. profile: a file that need not exist."""
    modules = units_of(layout)
    counted = read_profile(profile, layout, modules)
    use = even_use(layout.args, sizes) if counted is None else counted
    others = {name: t for name, t in layout.tensors.items() if not is_part(name, modules)}
    must = {
        "weights outside of feed-forwards": sum(
            t.numel() * (t.itemsize if layout.keeps_dtype(name) else dtype.itemsize) for name, t in others.items()
        )
        + (layout.loaded_bytes(dtype) - layout.bytes(dtype)),  # copies
        "caches": budget.cache_bytes(layout.args),
    }
    layer_of = {module: i for i, module in enumerate(modules)}
    order = sorted(sizes, key=lambda unit: (-use[unit], unit.expert, layer_of[unit.module] * GOLDEN % 1))
    free = budget.size - sum(must.values())
    near = hottest(order, sizes, free)
    if len(near) < len(order) and budget.second is None:
        largest = max(sizes.values())
        # experts are read to where others were; feed-forwards of each form, which differ in size, to slots of their own
        slots = 0 if layout.args.n_expert else AHEAD * sum(set(sizes.values()))
        must["to read by"] = slots + AHEAD * min(PIECE, largest)
        free = budget.size - sum(must.values())
        near = hottest(order, sizes, free)
    least = layout.args.n_expert_used if budget.second is None and layout.args.n_expert else 0
    if free < 0 or len(near) < len(order) and len(near) < least:
        need = sum(must.values()) + least * max(sizes.values())
        parts = ", ".join(f"{what} {size_text(size)}" for what, size in must.items())
        raise ValueError(
            f"--memory_budget {size_text(budget.size)} does not hold what has to be in memory, {size_text(need)} "
            f"({parts}{f', {least} experts' if least else ''}); give as much, or a shorter "
            "--max_seq_length, or use int4 weights"
        )
    return Plan(near, [u for u in order if u not in set(near)], must, sizes, use, counted is not None)


def is_part(name: str, modules: dict[str, int]) -> bool:
    """Whether a tensor is one of the units' of these feed-forwards."""
    return any(name.startswith((f"{module}.w13.", f"{module}.w2.")) for module in modules)


def hottest(order: list[Unit], sizes: dict[Unit, int], room: int) -> list[Unit]:
    """Those of the units, the hottest first, that fit into `room` bytes.

    What a unit saves is its use times its bytes, so by byte the most used save the most.
    """
    kept = []
    for unit in order:
        if sizes[unit] <= room:
            kept.append(unit)
            room -= sizes[unit]
    return kept


def even_use(args: ModelArgs, units: dict[Unit, int]) -> dict[Unit, float]:
    """The share of tokens that uses each unit, where nothing better is known."""
    share = args.n_expert_used / args.n_expert if args.n_expert else 1.0
    return dict.fromkeys(units, share)


def fingerprint(args: ModelArgs) -> str:
    """What a profile says of the model that it belongs to: all that its args do, but for a tied head.

    Once turned into floats, codes of a tied head's own are a head of its own.
    """
    return repr(sorted(replace(args, tie_embeddings=False).to_dict().items()))


def read_profile(path: Path, layout: Layout, modules: dict[str, int]) -> dict[Unit, float] | None:
    """The share of tokens that used each expert, of a file that `sparsify.py --mode profile` wrote; None: no file.

    {"model": fingerprint, "tokens": n, "experts": {layer: [counts]}, ...}
    """
    if not path.exists() or not layout.args.n_expert:
        return None
    profile = read_json(path)
    if profile.get("model") != fingerprint(layout.args):
        raise ValueError(f"{path} is the profile of another model; make one of this, or remove it")
    use, tokens, counts = {}, profile.get("tokens"), profile.get("experts")
    for module, n_expert in modules.items():
        own = counts.get(module.split(".")[1]) if isinstance(counts, dict) else None
        if not isinstance(own, list) or len(own) != n_expert or not all(type(n) is int and n >= 0 for n in own):
            raise damaged(path, "a profile", f"it has no counts of the {n_expert} experts of {module}")
        if type(tokens) is not int or tokens <= 0 or max(own) > tokens:
            raise damaged(path, "a profile", f"it counts {max(own)} uses by {tokens!r} tokens")
        use |= {Unit(module, e): n / tokens for e, n in enumerate(own)}
    return use
