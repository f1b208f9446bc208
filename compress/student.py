"""Models of some of another's blocks; what each block changes; a model that learns: float32, with gradients."""

import re
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from cli import listed
from compress.walk import read_watched
from layers.formats import QuantizedLinear
from layers.quantized import QuantSpec, replace_
from layers.two_four import TwoFourLinear, compress
from mixers.layer_kinds import args_of_layers
from model import ModelArgs, Transformer
from weights.checkpoint import assigned, read_tensors
from weights.layout import EXACT, LEAVES, Layout, ModelFile

# what ties a layer to others, or to its number
NOT_CUT = ("n_reusing_layer", "layer_input_size", "delta", "short_conv")


def kept_layers(n_layer: int, n_kept: int) -> list[int]:
    """The blocks that a student of n_kept takes from n_layer: the first, the last, and between them evenly spread.

    The first turns embeddings into what all others read, and the last makes what the head reads; neighbours between
    them do like work (Men et al. 2024), so that each kept one can stand in for those on both of its sides.
    """
    return [round(i * (n_layer - 1) / max(n_kept - 1, 1)) for i in range(n_kept)]


def stood_for(n_layer: int, n_kept: int) -> list[int]:
    """For each block of such a student the teacher's last for which it stands: itself, and what comes after it."""
    return [*(layer - 1 for layer in kept_layers(n_layer, n_kept)[1:]), n_layer - 1]


def block_influences(model: Transformer, windows: Tensor) -> list[float]:
    """How much each block changes its input: 1 - the cosine of what it takes and returns, mean of all tokens.

    windows: text, int64 [n, S]. Of Men et al. (2024, arXiv 2403.03853), who remove the blocks of least influence.
    """
    sums = torch.zeros(len(model.layers), dtype=torch.float64)

    def add(i: int, _: nn.Module, inputs: tuple, output: Tensor) -> None:
        sums[i] += F.cosine_similarity(inputs[0].float(), output.float(), dim=-1).sum().item()

    hooks = [block.register_forward_hook(partial(add, i)) for i, block in enumerate(model.layers)]
    read_watched(model, windows, hooks, "Comparing")
    return (1 - sums / windows.numel()).clamp(min=0).tolist()  # rounding: a cosine is at most 1


def student_of(teacher: ModelFile, n_layer: int) -> ModelFile:
    """The open file of a teacher with float weights, as that of a model of n_layer of its blocks."""
    if not 1 <= n_layer <= teacher.args.n_layer:
        has = f"the teacher has {teacher.args.n_layer}, and a student has from 1 to all"
        raise ValueError(f"--layers is {n_layer}; {has}")
    require_cut(teacher.args, "--layers", "give a student with --finetune")
    return cut(teacher, kept_layers(teacher.args.n_layer, n_layer))


def require_cut(args: ModelArgs, flag: str, advice: str) -> None:
    """Refuse a model that `cut` cannot cut."""
    apart = [name for name in NOT_CUT if getattr(args, name)]
    if apart:
        raise ValueError(f"{flag} is not supported for models with {listed(apart)}; {advice}")


def cut(opened: ModelFile, kept: list[int], table: dict[str, QuantSpec] | None = None) -> ModelFile:
    """An open file, as that of a model of some of its blocks, in their order. table: of the layers that are left."""
    layout = Layout(args_of_layers(opened.args, kept), table)
    tensors = {name: opened.tensors[name_in(name, kept)] for name in layout.tensors}
    return replace(opened, layout=layout, tensors=tensors)


def table_of(table: dict[str, QuantSpec], kept: list[int]) -> dict[str, QuantSpec]:
    """What a model's table of layers says of some of its blocks, and of what stands outside of blocks."""
    own = {f"layers.{layer}": f"layers.{i}" for i, layer in enumerate(kept)}
    left = {}
    for name, spec in table.items():
        block = re.match(r"layers\.\d+|", name)[0]
        if block in own or not block:
            left[own.get(block, "") + name.removeprefix(block)] = spec
    return left


def name_in(name: str, kept: list[int]) -> str:
    """The name that a tensor of a model of some blocks has in the whole one."""
    return re.sub(r"(?<=^layers\.)\d+", lambda number: str(kept[int(number[0])]), name)


def trainable(opened: ModelFile, device: torch.device) -> Transformer:
    """The model in an open file, every layer in its plain form, with float32 parameters that take gradients.

    Of a quantised layer the codes stay as they are, and its scales and zeros learn (Kim et al. 2023, PEQA). A 2:4 layer
    has all its weights here, and `keep_zeros_` keeps its pattern.
    """
    state = read_tensors(opened, device, torch.float32, "Loading the student")
    model = assigned(opened.layout, state)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, TwoFourLinear):
            replace_(model, name, layer.dense())
    for layer in model.modules():
        for leaf in ("scales", "zeros") if isinstance(layer, QuantizedLinear) else ():
            value = getattr(layer, leaf)
            if value is not None and (leaf == "scales" or value.any()):  # zeros of 0 keep pruned weights at 0
                delattr(layer, leaf)
                setattr(layer, leaf, nn.Parameter(value.float()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(EXACT))
    return model


def freeze_ends_(model: Transformer) -> None:
    """Embeddings and head stay the teacher's: half of a small student's weights, which already fit each other."""
    for layer in (model.tok_embeddings, model.output):
        layer.requires_grad_(False)


def keep_zeros_(model: Transformer) -> None:
    """Weights that are 0 now stay 0: no gradient reaches them, and so no moment of the optimizer either."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.ndim > 1 and name.endswith(".weight") and not weight.all():
            kept = weight.detach() != 0
            weight.register_hook(lambda gradient, kept=kept: gradient * kept)


def stored_tensors(model: Transformer, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a trained student as its file holds them: floats in `dtype`, scales and zeros as they were."""
    state = model.state_dict()
    for name, spec in layout.table.items():
        if spec.pattern is not None:
            own = {leaf: state[f"{name}.{leaf}"] for leaf in LEAVES if f"{name}.{leaf}" in state}
            state |= {f"{name}.{leaf}": value for leaf, value in compress(own).items()}
    return {
        name: state[name].to("cpu", shape.dtype if layout.keeps_dtype(name) else dtype)
        if not name.endswith(EXACT)
        else state[name].cpu()
        for name, shape in layout.tensors.items()
    }
