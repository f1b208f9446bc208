"""Carrying out a plan: feed-forwards of a meta model become forms that find some of their weights in a second tier."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from cli import progress, say
from kernels import cpu
from layers.fastest import pack_
from layers.offload import (
    FarFeedForward,
    OffloadedExperts,
    OffloadedFeedForward,
    Slots,
    SplitExperts,
    Unit,
    set_tensors,
)
from layers.quantized import QuantSpec, replace_
from weights.device import require_memory
from weights.files import dropping_page_cache, size_text
from weights.layout import Layout, ModelFile, Parts
from weights.tiers.packed_copy import PackedCopy, source_facts, state_bytes
from weights.tiers.placement import AHEAD, MemoryBudget, Plan, is_part, make_plan, units_of

Read = Callable[[ModelFile], dict[str, Tensor]]  # the tensors of a file, on a CPU
CPU = torch.device("cpu")


class Tier(NamedTuple):
    """The tensors of a file that are read to one device, and the layers to be rounded on the way."""

    opened: ModelFile
    device: torch.device
    table: dict[str, QuantSpec]


def beside(path: str | Path, ending: str) -> Path:
    """The file that belongs to a checkpoint, a file or a folder."""
    path = Path(path)
    return path.with_name(f"{path.resolve().name}.{ending}")


def place(
    opened: ModelFile,
    layout: Layout,
    dtype: torch.dtype,
    first: Tier,
    budget: MemoryBudget,
    path: str | Path,
    read: Read,
) -> list[Tier]:
    """Make the plan, say it, and give the layout's model its forms of layers: what is then to be read to where.

    first: all that would be read to the first tier. path: of the checkpoint.
    """
    if not opened.paths or opened.beside:
        what = "an adapter beside codes" if opened.beside else "weights that are in no file"
        raise ValueError(f"--memory_budget does not go with {what}; leave out one of them")
    modules, on_disk = units_of(layout), budget.second is None
    if on_disk and any(spec.threshold is not None for spec in layout.table.values()):
        raise ValueError(
            f"--memory_budget does not go with {path}, which skips inputs; leave it out, or use the file that "
            "it was made of"
        )
    if on_disk:
        forms = empty_forms(opened, layout, modules, dtype)
        sizes = {Unit(name, e): state_bytes(forms[name]) for name, n in modules.items() for e in range(n)}
    else:
        sizes = {Unit(name, e): stored_bytes(layout, name, dtype) // n for name, n in modules.items() for e in range(n)}
    plan = make_plan(layout, dtype, budget, sizes, beside(path, "profile.json"))
    say(plan.table(budget))
    advice = "give a smaller --memory_budget, or use a smaller model"
    require_memory(plan.near_bytes, first.device, f"the weights of {path} that --memory_budget keeps there", advice)
    layout.model.cache_room = plan.must["caches"]
    if plan.far and on_disk:
        opened = offload_(opened, layout, plan, dtype, path, forms, read)
    opened = replace(opened, tensors=dropping_page_cache(opened.tensors, opened.paths))
    if not plan.far or on_disk:
        return [first._replace(opened=opened)]
    what = f"the other weights of {path}, for which a third tier, the disk behind main memory, is not supported,"
    require_memory(plan.far_bytes, budget.second, what, "use int8 or int4 weights, or give a larger --memory_budget")
    return split_(opened, layout, plan, first, budget.second)


def stored_bytes(layout: Layout, module: str, dtype: torch.dtype) -> int:
    """Bytes of the units of a feed-forward, as they are stored."""
    own = {name: t for name, t in layout.tensors.items() if is_part(name, {module: 1})}
    return sum(t.numel() * (t.itemsize if layout.keeps_dtype(name) else dtype.itemsize) for name, t in own.items())


# ---------------------------------------------------------------- main memory and the disk


def packed_unit(layer: nn.Module, tensors: dict[str, Tensor], layout: Layout, dtype: torch.dtype) -> nn.Module:
    """The layers w13 and w2 of one unit, from the tensors of these by name, in the form that is fastest on a CPU."""
    unit = nn.Module()
    unit.w13, unit.w2 = copy.deepcopy(layer.w13), copy.deepcopy(layer.w2)
    unit.args, unit.dtype, unit.device = layout.args, dtype, CPU  # of a model, which decide the form
    pack_(set_tensors(unit, tensors))
    return unit


def empty_forms(opened: ModelFile, layout: Layout, modules: dict[str, int], dtype: torch.dtype) -> dict[str, nn.Module]:
    """For each feed-forward, what `packed_unit` makes of a unit of zeros; like ones share it, because it takes time."""

    is_torch = opened.gguf is None and all(path.suffix != ".safetensors" for path in opened.paths)

    def zeros(name: str, tensor: Tensor) -> Tensor:
        kept = tensor.dtype if layout.keeps_dtype(name) else dtype
        if is_torch and opened.layout.is_coded(name) and name.endswith(("scales", "zeros")):
            kept = opened.tensors[name]().dtype  # which files of older versions do not tell; the tensor is mapped
        shape = (1, *tensor.shape[1:]) if layout.args.n_expert else tensor.shape
        return torch.zeros(shape, dtype=kept, device=CPU)

    forms, made = {}, {}
    for name in modules:
        layer = layout.model.get_submodule(name)
        own = {key: t for key, t in layer.state_dict().items() if is_part(f".{key}", {"": 1})}
        tensors = {key: zeros(f"{name}.{key}", tensor) for key, tensor in own.items()}
        kind = repr((type(layer.w13), type(layer.w2), [(key, t.dtype, t.shape) for key, t in tensors.items()]))
        if kind not in made:
            made[kind] = packed_unit(layer, tensors, layout, dtype)
        forms[name] = made[kind]
    return forms


def offload_(
    opened: ModelFile,
    layout: Layout,
    plan: Plan,
    dtype: torch.dtype,
    path: str | Path,
    forms: dict[str, nn.Module],
    read: Read,
) -> ModelFile:
    """Replace the feed-forwards of which units stay in the packed copy, made if need be; the file without them."""
    numbers = units_of(layout)
    how = (str(dtype), repr(sorted((name, str(spec)) for name, spec in layout.table.items())))
    packer = "ours" if cpu.available() else torch.backends.cpu.get_cpu_capability()  # by which torch packs
    facts = source_facts(opened.paths, *how, torch.__version__, packer)
    packed = PackedCopy(beside(path, "packed"), facts, numbers, forms)
    if not packed.is_there():
        say(f"Writing {packed.path}, {size_text(packed.size)}, once: feed-forwards in the order in which they are read")
        packed.write(packed_units(opened, layout, dtype, numbers, read))
    packed.open()
    far = {unit.module for unit in plan.far}
    away = numbers if layout.args.n_expert else {name: 1 for name in numbers if name in far}  # as they run
    kinds = {}
    for name in away:
        shapes = [(key, t.dtype, t.shape) for key, t in forms[name].state_dict().items()]
        kinds.setdefault(repr((forms[name], shapes)), []).append(name)
    slots = {}
    for names in kinds.values():
        slots |= dict.fromkeys(names, slots_of(forms[names[0]], set(names), plan, layout, packed))
    replace_all_(layout, list(away), slots)
    return replace(opened, tensors={n: each for n, each in opened.tensors.items() if not is_part(n, away)})


def packed_units(opened: ModelFile, layout: Layout, dtype: torch.dtype, numbers: dict[str, int], read: Read):
    """Every unit with its packed layers, one after another."""
    for name, number in progress(numbers.items(), desc="Packing", unit="layer"):
        layer = layout.model.get_submodule(name)
        for e, tensors in enumerate(read_units(opened, name, number, read)):
            own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}
            yield Unit(name, e), packed_unit(layer, own, layout, dtype)


def read_units(opened: ModelFile, name: str, number: int, read: Read) -> Iterator[dict[str, Tensor]]:
    """The tensors of each unit of a feed-forward: read one by one from files that are mapped, else together."""
    readers = {key: each for key, each in opened.tensors.items() if is_part(key, {name: 1})}
    is_each = opened.gguf is None and all(isinstance(each, Parts) for each in readers.values())
    source = copy.copy(opened.layout)
    if opened.layout.args.n_expert and is_each:
        source.tensors = opened.layout.tensors | first_of({key: opened.layout.tensors[key] for key in readers}, 1)
        for e in range(number):
            own = {key: partial(each.expert, e) for key, each in readers.items()}
            yield read(replace(opened, layout=source, tensors=dropping_page_cache(own, opened.paths)))
        return
    found = read(replace(opened, tensors=dropping_page_cache(readers, opened.paths)))
    for e in range(number):
        yield {key: tensor[e : e + 1] if opened.layout.args.n_expert else tensor for key, tensor in found.items()}


def slots_of(form: nn.Module, names: set[str], plan: Plan, layout: Layout, packed: PackedCopy) -> Slots:
    """Slots for the units of the feed-forwards `names`, and those that the plan has in memory, to be read later."""
    n_used, use = layout.args.n_expert_used, {u: share for u, share in plan.use.items() if u.module in names}
    if not n_used:
        return Slots(form, False, AHEAD, packed.read, use)
    near = [unit for unit in plan.near if unit.module in names]
    if len(near) < n_used:
        raise ValueError(
            f"--memory_budget leaves memory for {len(near)} experts of a form of which {n_used} are needed"
        )
    return Slots(form, True, len(near), packed.read, use, near)


def fill_slots(model: nn.Module) -> None:
    """Read what the plan has in memory. It comes last: reading other weights takes memory that is free until then."""
    for slots in {layer.slots for layer in model.modules() if isinstance(layer, OffloadedExperts)}:
        slots.take(slots.near)


def replace_all_(layout: Layout, names: list[str], slots: dict[str, Slots]) -> None:
    """Give the model the forms of the feed-forwards `names` that find their units in slots, the last one first."""
    following = ()
    for name in reversed(names):
        layer = layout.model.get_submodule(name)
        if layout.args.n_expert:
            new = OffloadedExperts(layer, name, slots[name], following)
            following = (new,)
        else:
            alike = [other for other in names if slots[other] is slots[name]]
            new = OffloadedFeedForward(layer, name, slots[name], alike[(alike.index(name) + 1) % len(alike)])
        replace_(layout.model, name, new)


# ---------------------------------------------------------------- two devices


def split_(opened: ModelFile, layout: Layout, plan: Plan, first: Tier, second: torch.device) -> list[Tier]:
    """Replace the feed-forwards of which units lie on the second device: what is read to each of the two."""
    tensors, shapes = dict(opened.tensors), dict(opened.layout.tensors)
    table, known, far_names = dict(first.table), dict(opened.table), set()
    for name in dict.fromkeys(unit.module for unit in plan.far):
        layer = layout.model.get_submodule(name)
        own = [key for key in tensors if is_part(key, {name: 1})]
        if not layout.args.n_expert:
            replace_(layout.model, name, FarFeedForward(layer, second))
            far_names |= set(own)
            continue
        near = sorted(unit.expert for unit in plan.near if unit.module == name)
        far = sorted(unit.expert for unit in plan.far if unit.module == name)
        new = SplitExperts(layer, near, second)
        replace_(layout.model, name, new)
        for side, numbers, prefix in ((new, near, name), (new.far, far, f"{name}.far")):
            for part in ("w13", "w2") if numbers else ():
                shell = getattr(layer, part)
                setattr(side, part, set_tensors(copy.deepcopy(shell), first_of(shell.state_dict(), len(numbers))))
                for specs in (table, known):
                    specs |= {f"{prefix}.{part}": specs[f"{name}.{part}"]} if f"{name}.{part}" in specs else {}
        for key in own:
            one, shape = tensors.pop(key), shapes.pop(key)
            for numbers, prefix in ((near, name), (far, f"{name}.far")):
                if numbers:
                    new_key = f"{prefix}{key.removeprefix(name)}"
                    tensors[new_key] = lambda one=one, numbers=numbers: one()[numbers]
                    shapes |= first_of({new_key: shape}, len(numbers))
        far_names |= {key for key in tensors if key.startswith(f"{name}.far.")}
    source = copy.copy(opened.layout)
    source.tensors, source.table = shapes, known
    here = replace(opened, layout=source, tensors={n: one for n, one in tensors.items() if n not in far_names})
    there = replace(opened, layout=source, tensors={n: tensors[n] for n in far_names})
    return [Tier(here, first.device, table), Tier(there, second, table)]


def first_of(tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Meta tensors in the shape of the first `number` experts of these."""
    return {k: torch.empty(number, *t.shape[1:], dtype=t.dtype, device="meta") for k, t in tensors.items()}
