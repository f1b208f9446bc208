"""A mixture of experts larger than its budget of memory: seconds a token against what memory and disk allow.

Random int4 weights in Mixtral's shape, scaled down (8 experts, 2 used, dim 2048), with as many layers as make a
file of the size asked for; a third of it is the budget. A hook makes the experts' use follow Zipf's law: the expert of
rank r in a layer is drawn with a share like 1 / r, and an input draws the same experts each time.
"""

import ctypes
import mmap
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from engine.cache import planned_bytes
from engine.engine import Engine, generate
from engine.sampling import Sampling
from layers.offload import OffloadedExperts, Slots, Unit
from layers.quantized import QuantSpec, linear_table
from measure.machine import disk_rate, measured_bandwidth
from measure.memory import main_memory, peak_main_memory
from mixers.experts import MixtureOfExperts
from model import ModelArgs, Transformer
from scripts.bench.random_weights.experts import EXPERTS
from scripts.bench.report import Report, markdown, run_command, shared_flags, take_turns
from weights.checkpoint import load_model, random_model, save_checkpoint
from weights.files import GB, size_text, write_json
from weights.layout import Layout, weight_bytes
from weights.tiers.packed_copy import PAGE
from weights.tiers.place import beside
from weights.tiers.placement import MemoryBudget

SPEC, HEAD = QuantSpec(4, 32), QuantSpec(8)
SHARE = 1 / 3  # of the file, that the budget is
ANY = Sampling(temperature=1.0, top_k=0)
LENGTH = 512  # tokens that a cache has room for
SHORTER = 5  # a turn of `measure_whole` has so many times fewer tokens, and there are so many times more turns
SMALL = ModelArgs(64, 1, 2, 1, 32, 96, 256, 512, n_expert=2, n_expert_used=1)
SPARE = 1.2  # times the file: a budget that holds all
PARTS, SAME = ("found",), ("threads", "file_gb", "new_tokens")


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/placement.json", rounds=5, model="")
    parser.add_argument("--file_gb", type=float, default=6.0, help="size of the model's file (default: %(default)s)")
    parser.add_argument("--folder", help="where files of twice that size are put (default: that for temporary files)")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens decoded a run (default: %(default)s)")


def fill(report: Report, *, file_gb: float, folder: str | None, rounds: int, new_tokens: int, threads: int) -> None:
    missing = [name for name in KINDS if not report.result["found"].get(name)]
    if not missing:
        return
    args = sized(EXPERTS, int(file_gb * GB))
    with tempfile.TemporaryDirectory(dir=folder) as own:
        path = Path(own) / "model.pth"
        make_file(args, path)
        for name in missing:
            command = [sys.executable, "-m", "scripts.bench.random_weights.placement", name, path]
            command += [threads, new_tokens, rounds]
            report.once(report.result["found"], name, partial(run_command, command))


# ---------------------------------------------------------------- the file


def table_of(layout: Layout) -> dict[str, QuantSpec]:
    return linear_table(layout.model, SPEC, HEAD)


def sized(args: ModelArgs, size: int) -> ModelArgs:
    """With as many layers as a file of so many bytes holds. Raises ValueError if it does not hold one."""

    def bytes_of(n_layer: int) -> int:
        layout = Layout(replace(args, n_layer=n_layer))
        return layout.quantized(table_of(layout)).bytes(torch.bfloat16)

    one, two = bytes_of(1), bytes_of(2)
    n_layer = int((size - one) // (two - one)) + 1
    if n_layer < 2:
        raise ValueError(f"--file_gb {size / GB:g} is too small; give at least {two / GB:.2f}, which two layers take")
    return replace(args, n_layer=n_layer)


def make_file(args: ModelArgs, path: Path) -> None:
    """Write a checkpoint of random codes, if the disk has room for it and for the copy that a budget makes."""
    layout = Layout(args)
    table = table_of(layout)
    layout = layout.quantized(table)
    size, free = 2 * layout.bytes(torch.bfloat16), shutil.disk_usage(path.parent).free
    if size > free:
        need = f"two files of {size_text(size / 2)} do not fit in {path.parent}, where {size_text(free)} are free"
        raise ValueError(f"{need}; give a smaller --file_gb or another --folder")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: drawn(name, meta, generator) for name, meta in layout.tensors.items()}
    save_checkpoint(path, args, tensors, table)


def drawn(name: str, meta: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of the file: weights with a deviation of 0.02, in codes or as floats; norms of 1."""
    if meta.dtype in (torch.uint8, torch.int8):
        bits = torch.randint(-(2**63), 2**63 - 1, (-(-meta.numel() // 8),), generator=generator)
        return bits.view(meta.dtype)[: meta.numel()].view(meta.shape)
    if name.endswith((".scales", ".zeros")):
        spread = 74.0 if name.startswith("output.") else 4.6  # the deviation of codes that are equally likely
        return torch.full(meta.shape, 0.02 / spread if name.endswith("scales") else 0.0, dtype=meta.dtype)
    if meta.ndim == 1:
        return torch.ones(meta.shape, dtype=torch.bfloat16)
    return (0.02 * torch.randn(meta.shape, generator=generator)).bfloat16()


# ---------------------------------------------------------------- the hook


class ZipfGate(nn.Module):
    """A gate in the place of one with random weights, whose choices follow Zipf's law.

    What the other says of normalised inputs is normally distributed; made Gumbel's and added to the logarithms of the
    shares, the largest are a draw by these shares. So the next layer's choice can be guessed as that of any gate can.
    """

    def __init__(self, gate: nn.Module, seed: int):
        super().__init__()
        n_expert, self.deviation = gate.weight.shape[0], 0.02 * gate.weight.shape[1] ** 0.5
        ranks = 1 + torch.randperm(n_expert, generator=torch.Generator().manual_seed(seed))
        self.gate = gate
        self.register_buffer("logarithms", -ranks.float().log())

    def forward(self, x: Tensor) -> Tensor:  # [..., dim] -> [..., E]
        normal = self.gate(x).float() / self.deviation
        uniform = torch.special.ndtr(normal).clamp(1e-6, 1 - 1e-6)
        return self.logarithms - torch.log(-torch.log(uniform))


def follow_zipf_(model: Transformer) -> None:
    """Give all mixtures such gates."""
    mixtures = [layer for layer in model.modules() if isinstance(layer, MixtureOfExperts)]
    for seed, layer in enumerate(mixtures):
        layer.gate = ZipfGate(layer.gate, seed)


class Watch:
    """Counts the experts that calls use, and those of them that had to be read for it, asked for or ahead."""

    def __init__(self, slots: Slots):
        self.slots, self.used, self.missed, self.ahead = slots, 0, 0, set()
        self.use, self.read_ahead = slots.use, slots.read_ahead
        slots.use, slots.read_ahead = self.count, self.note

    def count(self, module: str, units: list[Unit]) -> None:
        self.use(module, units)
        self.used += len(units)
        self.missed += sum(unit in self.ahead or unit not in self.slots.slot_of for unit in units)
        self.ahead -= set(units)

    def note(self, units: list[Unit]) -> None:
        before = set(self.slots.slot_of)
        self.read_ahead(units)
        self.ahead |= self.slots.slot_of.keys() - before


# ---------------------------------------------------------------- one process


def budget_of(size: int) -> MemoryBudget:
    return MemoryBudget(size, lambda args: planned_bytes(args, torch.bfloat16, 1, LENGTH))


def measure_within(path: Path, new_tokens: int, rounds: int) -> dict:
    """Decoding within a third of the file, beside what the measured rates of memory and disk allow."""
    decode(Engine(random_model(SMALL)), 2, 0)  # Python's modules and the operators are no part of a budget
    own, budget = main_memory(), int(SHARE * path.stat().st_size)
    model = load_model(path, budget=budget_of(budget))
    follow_zipf_(model)
    [slots] = {layer.slots for layer in model.modules() if isinstance(layer, OffloadedExperts)}
    engine, watch, packed = Engine(model), Watch(slots), beside(path, "packed")
    decode(engine, new_tokens, 0, watch)
    held, cached = peak_main_memory() - own, sum(map(cached_bytes, (path, packed)))  # before buffers that measure rates
    seeds = count(1)

    def run() -> dict[str, float]:
        rates = [(disk_rate(packed), measured_bandwidth(model.device))]
        found = decode(engine, new_tokens, next(seeds), watch)
        rates.append((disk_rate(packed), measured_bandwidth(model.device)))  # a shared machine's rates change
        disk, memory = (GB * sum(each) / 2 for each in zip(*rates, strict=True))
        return found | allowed(found, model, slots, disk, memory) | {"disk_gb_s": disk / GB, "memory_gb_s": memory / GB}

    facts = {"budget_gb": budget / GB, "held_gb": held / GB, "page_cache_gb": cached / GB, "python_gb": own / GB}
    return take_turns(rounds, {"within": run}, warm_up=False)["within"] | facts


def allowed(found: dict, model: Transformer, slots: Slots, disk: float, memory: float) -> dict[str, float]:
    """Seconds a token that the rates, bytes/s, allow for what was found, and their share of those that it took."""
    missed = found["missed"] * (slots.nbytes // slots.n_slot)
    hit = weight_bytes(model) - missed
    seconds = missed / disk + hit / memory
    return {"allowed_s": seconds, "share": seconds / found["s"], "missed_gb": missed / GB, "hit_gb": hit / GB}


def decode(engine: Engine, new_tokens: int, seed: int, watch: Watch | None = None) -> dict[str, float]:
    """Seconds a token after the first, and the experts that each missed: of 8 random tokens, and what is drawn then."""
    prompt = torch.randint(engine.model.args.vocab_size, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
    marks = []
    for _ in generate(engine, [prompt], new_tokens, ANY, seeds=[seed]):
        marks.append((time.perf_counter(), 0 if watch is None else watch.missed))
    (began, missed_before), (ended, missed) = marks[0], marks[-1]
    n_token = len(marks) - 1
    return {"s": (ended - began) / n_token, "missed": (missed - missed_before) / n_token}


def measure_whole(path: Path, new_tokens: int, rounds: int) -> dict:
    """Decoding with a budget that holds all, beside that without one: in short turns, because 3 % are looked for."""
    budgets = {"budget": budget_of(int(SPARE * path.stat().st_size)), "none": None}
    engines = {name: Engine(load_model(path, budget=budget)) for name, budget in budgets.items()}
    for engine in engines.values():
        follow_zipf_(engine.model)
    sides = {name: partial(decode, engine, max(new_tokens // SHORTER, 2), 0) for name, engine in engines.items()}
    turns = take_turns(SHORTER * rounds, sides)
    pairs = zip(*(turns[name]["runs"] for name in sides), strict=True)
    return turns | {"ratio": statistics.median(none["s"] / within["s"] for within, none in pairs)}


def cached_bytes(path: Path) -> int:
    """Bytes of a file that the page cache of Linux holds."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages, begin = (ctypes.c_ubyte * -(-len(mapped) // PAGE))(), ctypes.c_char.from_buffer(mapped)
        address, size = ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(len(mapped))
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, size, pages)
        del begin  # a mapping that is used cannot be closed
    assert not failed, ctypes.get_errno()
    return PAGE * sum(page & 1 for page in pages)


def table(result: dict) -> str:
    rows, found = [], result["found"]
    if within := found.get(WITHIN):
        median, held = within["median"], within["held_gb"] + within["page_cache_gb"]
        rows.append(["a token", f"{median['s'] * 1e3:.0f} ms"])
        rows.append(["read from the disk, from memory", f"{median['missed_gb']:.3f}, {median['hit_gb']:.3f} GB"])
        rows.append(["rate of the disk, of memory", f"{median['disk_gb_s']:.1f}, {median['memory_gb_s']:.1f} GB/s"])
        rows.append(["which allow", f"{median['allowed_s'] * 1e3:.0f} ms ({median['share']:.0%} of the rate reached)"])
        rows.append(["held at most, of the budget", f"{held:.2f} of {within['budget_gb']:.2f} GB"])
        rows.append(["Python and PyTorch beside it", f"{within['python_gb']:.2f} GB"])
    if whole := found.get(WHOLE):
        ratio = f"x{whole['ratio']:.3f} ({1 / whole['budget']['median']['s']:.1f} tok/s)"
        rows.append(["a budget that holds all, to the rate without one", ratio])
    return markdown([f"a mixture of experts of {result['file_gb']:g} GB", "a third of it in memory"], rows)


WITHIN, WHOLE = "a third in memory", "all in memory"
KINDS = {WITHIN: measure_within, WHOLE: measure_whole}

if __name__ == "__main__":
    name, path, threads, new_tokens, rounds, _, output = sys.argv[1:]
    torch.set_num_threads(int(threads))
    write_json(output, KINDS[name](Path(path), int(new_tokens), int(rounds)))
