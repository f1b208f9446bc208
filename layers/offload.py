"""Feed-forwards that are not all in fast memory: read from a file when they are needed, or computed where they lie.

A unit is one expert of a layer, or the whole feed-forward of a layer without experts.
"""

import copy
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from mixers.activations import activated
from mixers.experts import MixtureOfExperts
from model import FeedForward

READERS = 2  # threads: a disk is faster with a second request in its queue
FADE = 0.05  # of what is counted, at each call of a feed-forward


class Unit(NamedTuple):
    """module: the name of a feed-forward. expert: its number, 0 in a layer without experts."""

    module: str
    expert: int


def set_tensors(layer: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The layer, with other tensors of any shape in the place of those of its state."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = layer.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor
    return layer


class Slots:
    """Memory for some units of one form, of which the least used leave when others are read.

    A count of uses that fades says which: by the time of last use all would leave in turn, where one token uses more
    units than there are slots. packed: the layers w13 and w2 of one unit, those of an expert with a first dimension of
    1. read: fetches a unit into the bytes of its tensors, in the order of their names there. use: the share of tokens
    that is known to use each unit. near: units to be read first.
    """

    def __init__(
        self,
        packed: nn.Module,
        is_expert: bool,
        n_slot: int,
        read: Callable[[Unit, list[memoryview]], None],
        use: dict[Unit, float],
        near: Sequence[Unit] = (),
    ):
        self.n_slot, self.read, self.near = n_slot, read, near
        shapes = {name: (t.shape[1:] if is_expert else t.shape, t.dtype) for name, t in packed.state_dict().items()}
        # a page is taken when it is first written: nothing is held for a slot before its unit comes
        self.tensors = {name: torch.empty(n_slot, *shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        if is_expert:  # whose layers find them by their slots, as otherwise by their numbers
            self.layers = [set_tensors(packed, self.tensors)]
        else:
            each = [{name: tensor[slot] for name, tensor in self.tensors.items()} for slot in range(n_slot)]
            self.layers = [set_tensors(copy.deepcopy(packed), tensors) for tensors in each]
        self.slot_of: dict[Unit, int] = {}
        self.coming: dict[Unit, futures.Future] = {}
        self.in_use: set[Unit] = set()
        self.counts = {unit: math.log(max(share, 1e-9) / FADE) for unit, share in use.items()}  # logarithms
        self.times = dict.fromkeys((unit.module for unit in use), 0)  # that each feed-forward was called
        self.expected: set[Unit] = set()
        self.trust = 1.0  # the share of expected units that were used, which fades too
        self.free = list(range(n_slot))
        self.threads = futures.ThreadPoolExecutor(READERS)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def buffers(self, slot: int) -> list[memoryview]:
        return [t[slot].reshape(-1).view(torch.uint8).numpy().data for t in self.tensors.values()]

    def use(self, module: str, units: list[Unit]) -> None:
        """Count one call of a feed-forward that uses these units."""
        if self.expected:
            self.trust += FADE * (len(self.expected & set(units)) / len(self.expected) - self.trust)
        self.times[module] += 1
        for unit in units:  # counts that grow by more each time stand for older ones that fade
            now, old = FADE * self.times[module], self.counts[unit]
            self.counts[unit] = max(now, old) + math.log1p(math.exp(-abs(now - old)))

    def take(self, units: list[Unit]) -> list[int]:
        """The slots of units, as many at most as there are slots, once all of them are in memory."""
        self.in_use = set(units)
        self.begin(units)
        for unit in units:
            if unit in self.coming:
                self.wait(unit)
        return [self.slot_of[unit] for unit in units]

    def expect(self, units: list[Unit]) -> None:
        """Begin to read units that the next call may use, unless too many of those expected before were not used."""
        self.expected = set(units)
        if self.trust > 0.5:
            self.read_ahead(units)

    def read_ahead(self, units: list[Unit]) -> None:
        """Begin to read some of the units, as many as find a place beside those in use."""
        some = units[: self.n_slot - len(self.in_use)]
        self.in_use |= set(some)
        self.begin(some)

    def begin(self, units: list[Unit]) -> None:
        for unit in units:
            if unit not in self.slot_of:
                slot = self.free.pop() if self.free else self.leave()
                self.coming[unit] = self.threads.submit(self.read, unit, self.buffers(slot))
                self.slot_of[unit] = slot

    def leave(self) -> int:
        """The slot of the unit that leaves."""
        others = self.slot_of.keys() - self.in_use
        unit = min(others, key=lambda unit: self.counts[unit] - FADE * self.times[unit.module])
        if unit in self.coming and not self.coming[unit].cancel():
            self.wait(unit)
        self.coming.pop(unit, None)
        return self.slot_of.pop(unit)

    def wait(self, unit: Unit) -> None:
        futures.wait([self.coming[unit]])  # Ctrl-C may end this and change nothing
        error = self.coming.pop(unit).exception()
        if error is not None:  # what was not read is not there
            self.free.append(self.slot_of.pop(unit))
            raise error

    def parts(self, units: list[Unit]) -> Iterator[list[Unit]]:
        """The units in parts that fit, those in memory first; while one is used the next is read."""
        units = sorted(units, key=lambda unit: unit not in self.slot_of)
        size = len(units) if len(units) <= self.n_slot else max(1, self.n_slot // 2)
        for begin in range(0, len(units), size):
            yield units[begin : begin + size]


class Offloaded(nn.Module):
    """A feed-forward that hides in an operator. key [1]: the number by which the operator finds it."""

    waits_for_host = True  # see `MixtureOfExperts`

    def hide(self) -> None:
        number = next(_NUMBERS)
        _OFFLOADED[number] = self
        self.register_buffer("key", torch.tensor([number]), persistent=False)


_NUMBERS = itertools.count()
_OFFLOADED: weakref.WeakValueDictionary[int, Offloaded] = weakref.WeakValueDictionary()


class OffloadedMixture(Offloaded, MixtureOfExperts):
    """A mixture, but for its experts."""

    def __init__(self, mixture: MixtureOfExperts):
        nn.Module.__init__(self)
        vars(self).update(vars(mixture))  # its gate, shared feed-forward and settings
        self._modules = {key: each for key, each in self._modules.items() if key not in ("w13", "w2")}
        self._buffers = dict(self._buffers)
        self.n_expert = mixture.gate.weight.shape[0]
        self.hide()

    def run(self, x: Tensor, chosen: Tensor) -> Tensor:
        return _run(x, chosen, self.key)


class OffloadedExperts(OffloadedMixture):
    """A mixture whose experts are in `slots` by their names and numbers.

    following: the next such mixture, or nothing, in a tuple, so that it is no part of this one.
    """

    def __init__(self, mixture: MixtureOfExperts, name: str, slots: Slots, following: tuple):
        super().__init__(mixture)
        self.name, self.slots, self.following = name, slots, following
        self.bytes_away = self.n_expert * slots.nbytes // slots.n_slot

    def compute(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x [T, dim] through the experts chosen [T, K] -> [T, K, dim]; each is read at most once."""
        units = [Unit(self.name, e) for e in chosen.unique().tolist()]
        self.slots.use(self.name, units)
        parts = list(self.slots.parts(units))
        y = x.new_empty(*chosen.shape, x.shape[-1]) if len(parts) > 1 else None
        for part, later in itertools.zip_longest(parts, parts[1:]):
            table = torch.full((self.n_expert,), -1)
            table[[unit.expert for unit in part]] = torch.tensor(self.slots.take(part))
            if later is None:
                self.slots.expect(self.likely(x))
            else:
                self.slots.read_ahead(later)
            [layers], places = self.slots.layers, table[chosen]
            if y is None:
                return _experts(layers, self.activation, x[:, None], places)
            tokens, ranks = (places >= 0).nonzero(as_tuple=True)
            own = _experts(layers, self.activation, x[tokens, None], places[tokens, ranks, None])
            y[tokens, ranks] = own[:, 0]
        return y

    def likely(self, x: Tensor) -> list[Unit]:
        """What the next mixture, if its units are of the same form, would choose for this input; most wanted first."""
        if not self.following or self.following[0].slots is not self.slots:
            return []
        [other] = self.following
        _, chosen = other.choose(other.gate(x).float())
        counts = chosen.flatten().bincount()
        return [Unit(other.name, e) for e in counts.argsort(descending=True).tolist() if counts[e]]


class OffloadedFeedForward(Offloaded):
    """A feed-forward without experts that is read whole. following: the name of one in `slots` to be read meanwhile."""

    def __init__(self, layer: FeedForward, name: str, slots: Slots, following: str):
        super().__init__()
        self.activation, self.gated = layer.activation, layer.gated
        self.name, self.slots, self.following = name, slots, following
        self.bytes_away = slots.nbytes // slots.n_slot
        self.hide()

    def forward(self, x: Tensor) -> Tensor:
        return _run(x, None, self.key)

    def compute(self, x: Tensor, _: None) -> Tensor:
        [slot] = self.slots.take([Unit(self.name, 0)])
        self.slots.read_ahead([Unit(self.following, 0)])
        layers = self.slots.layers[slot]
        return layers.w2(activated(layers.w13(x), self.activation, self.gated))


class SplitExperts(OffloadedMixture):
    """A mixture of which some experts lie, and are computed, on a second device: rows cross over, weights do not.

    Its own w13 and w2 are those of the experts `near`, ascending; `far` has those of the others.
    """

    def __init__(self, mixture: MixtureOfExperts, near: list[int], second: torch.device):
        super().__init__(mixture)
        self.second, self.far = second, nn.Module()
        numbers = torch.arange(self.n_expert, device="cpu")
        is_near = torch.isin(numbers, torch.tensor(near, dtype=torch.long, device="cpu"))
        # the place of each expert among those near, or -1 - that among those far
        self.places = torch.where(is_near, is_near.cumsum(0) - 1, -(~is_near).cumsum(0)).to(second)

    def compute(self, x: Tensor, chosen: Tensor) -> Tensor:
        rows, places = x.to(self.second), self.places[chosen.to(self.second)]  # before work for x's device is queued
        y = x.new_zeros(*chosen.shape, x.shape[-1])
        for layers, own, rows_there in ((self, places >= 0, x), (self.far, places < 0, rows)):
            tokens, ranks = own.nonzero(as_tuple=True)
            if len(tokens):
                at = places[tokens, ranks, None]
                at = torch.where(at < 0, -1 - at, at).to(rows_there.device)
                part = rows_there[tokens.to(rows_there.device), None]
                part = _experts(layers, self.activation, part, at)[:, 0]
                y[tokens.to(x.device), ranks.to(x.device)] = part.to(x.device)
        return y


class FarFeedForward(FeedForward):
    """A feed-forward without experts that lies, and is computed, on a second device."""

    waits_for_host = True

    def __init__(self, layer: FeedForward, second: torch.device):
        nn.Module.__init__(self)
        vars(self).update(vars(layer))
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.second)).to(x.device)


def _experts(layers: nn.Module, activation: Callable, x: Tensor, chosen: Tensor) -> Tensor:
    return layers.w2(activated(layers.w13(x, chosen), activation), chosen)


def _run(x: Tensor, chosen: Tensor | None, key: Tensor) -> Tensor:
    # outside of a compiled function a call of an operator in Python would import the compiler, as of `AnyExperts`
    return (_offloaded_operator if torch.compiler.is_compiling() else _offloaded)(x, chosen, key)


def _offloaded(x: Tensor, chosen: Tensor | None, key: Tensor) -> Tensor:
    return _OFFLOADED[int(key)].compute(x, chosen)


# the choice of experts is read on the host, so no CUDA graph can hold this operator
_offloaded_operator = torch.library.custom_op(
    "gpt_faster::offloaded", _offloaded, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@_offloaded_operator.register_fake
def _(x, chosen, key):
    return torch.empty_like(x) if chosen is None else x.new_empty(*chosen.shape, x.shape[-1])
