"""A walk through a model's blocks in the order in which they run, on calibration text, that changes linear layers.

Each layer is changed for the inputs that it gets once all layers before it are changed: later layers then make up for
what earlier ones have lost.
"""

import sys
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from cli import listed, progress
from model import ModelArgs, Transformer

NOT_WALKED = ("n_reusing_layer", "layer_input_size")  # what makes a block take more than the rows of the one before it
EXPERT_BYTES = 1 << 30  # of the second moments of experts that are collected at a time


def require_walk(args: ModelArgs, mode: str, advice: str) -> None:
    """Refuse a model that `walk_` cannot walk through."""
    apart = [name for name in NOT_WALKED if getattr(args, name)]
    if apart:
        raise ValueError(f"--mode {mode} is not supported for models with {listed(apart)}; {advice}")


class Reached(Exception):
    """Ends a forward at a module, and carries the module's arguments."""


def arguments_of(module: nn.Module, block: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What `block(*batch)` calls `module` with; neither the module nor what comes after it is computed."""

    def stop(_, arguments):
        raise Reached(*arguments)

    with module.register_forward_pre_hook(stop):
        try:
            block(*batch)
        except Reached as reached:
            return reached.args
    raise AssertionError(f"{module} was not called")


def products(x: Tensor) -> Tensor:  # [n, in] -> [in, in]
    """The sum of x x^T over rows x."""
    return x.T @ x


def squares(x: Tensor) -> Tensor:  # [n, in] -> [in]
    """The diagonal of `products`."""
    return x.square().sum(0)


def rows_of(arguments: tuple[Tensor, ...], expert: int | None) -> Tensor:
    """The inputs of a linear layer, or those that are sent to one of its experts: float32 [n, in]."""
    x, *chosen = arguments
    if expert is None:
        return x.flatten(0, -2).float()
    (chosen,) = chosen  # [T, K], and x [T, K or 1, in]
    return x.expand(-1, chosen.shape[1], -1)[chosen == expert].float()


@dataclass(frozen=True)
class Visited:
    """A linear layer that a walk has come to, or one of experts, and what its inputs are computed from."""

    name: str
    layer: nn.Module
    block: nn.Module
    batches: list[tuple[Tensor, ...]]  # what the block is called with

    def moments(self, experts: list[int | None], of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Twice the mean of x x^T, or of its diagonal, over the inputs x of each of some experts; of no inputs, 0.

        It is the Hessian of the layer's squared output error. experts: [None] for a layer without experts. of:
        `products` or `squares`. Inputs that are NaN or infinite are a ValueError.
        """
        totals, counts = [0.0] * len(experts), [0] * len(experts)
        for batch in self.batches:
            arguments = arguments_of(self.layer, self.block, batch)
            for i, expert in enumerate(experts):
                rows = rows_of(arguments, expert)
                totals[i], counts[i] = totals[i] + of(rows), counts[i] + len(rows)
        means = [total * (2 / max(n, 1)) for total, n in zip(totals, counts, strict=True)]
        if not all(mean.isfinite().all() for mean in means):
            advice = "use --dtype float32 or another calibration text"
            raise ValueError(f"the inputs of {self.name} are NaN or infinite; {advice}")
        return means

    def changed(
        self,
        make: Callable[..., dict[str, Tensor]],
        without: Callable[[Tensor], dict[str, Tensor]],
        words: str,
        of: Callable[[Tensor], Tensor] = products,
    ) -> dict[str, Tensor]:
        """What `make(weight [out, in], moments, name=...)` returns; of experts, the tensors of each, stacked: [E, ...].

        An expert that gets no input becomes `without(weight)`, and is named on standard error; words: what it then is.
        """
        weight = self.layer.weight
        if weight.ndim == 2:
            return make(weight, *self.moments([None], of), name=self.name)
        n_expert, _, n_in = weight.shape
        made, unreached = [], []
        for experts in torch.arange(n_expert).split(max(1, EXPERT_BYTES // (4 * n_in * n_in))):
            for e, mean in zip(experts.tolist(), self.moments(experts.tolist(), of), strict=True):
                if mean.any():
                    made.append(make(weight[e], mean, name=f"{self.name}, expert {e}"))
                else:
                    unreached.append(e)
                    made.append(without(weight[e]))
        if unreached:
            listed = ", ".join(map(str, unreached))
            tqdm.write(f"{self.name}: no token reached experts {listed}; they are {words}", file=sys.stderr)
        return {key: torch.stack([tensors[key] for tensors in made]) for key in made[0]}


@torch.no_grad()
def block_calls(
    model: Transformer, windows: Tensor, title: str, batch_size: int
) -> Iterator[tuple[int, nn.Module, list[tuple[Tensor, ...]]]]:
    """Each block with its number and what it is called with, batch by batch; afterwards it runs as it then is.

    windows: the calibration text, int64 [n, S]. title: of the progress bar.
    """
    pos = torch.arange(windows.shape[1], device=model.device).repeat(batch_size, 1)
    parts = windows.to(model.device).split(batch_size)
    hidden = [model.embed(tokens, pos[: len(tokens)]) for tokens in parts]  # updated block by block
    contexts = model.contexts(pos, None)
    for i, block in enumerate(progress(model.layers, desc=title, unit="block")):
        batches = [(x, *(each[: len(x)] for each in (pos, *contexts[i]))) for x in hidden]
        yield i, block, batches
        for x, *others in batches:
            x.copy_(block(x, *others))


@torch.no_grad()
def walk_(
    model: Transformer,
    windows: Tensor,
    names: Container[str],
    change: Callable[[Visited], Tensor],
    *,
    title: str,
    batch_size: int = 8,
) -> None:
    """Give each layer of a block whose name is in `names` the weight that `change` returns, in the order of running.

    windows and title: as of `block_calls`.
    """
    for i, block, batches in block_calls(model, windows, title, batch_size):
        for name, layer in block.named_modules(prefix=f"layers.{i}"):
            if name in names:
                layer.weight.copy_(change(Visited(name, layer, block, batches)))


@torch.no_grad()
def read_watched(model: Transformer, windows: Tensor, hooks: list[RemovableHandle], title: str) -> None:
    """Read windows, int64 [n, S], one by one through all blocks while hooks look on, which are removed afterwards."""
    try:
        for tokens in progress(windows.to(model.device), desc=title, unit="window"):
            model.hidden(tokens[None], torch.arange(len(tokens), device=model.device)[None])
    finally:
        for hook in hooks:
            hook.remove()
