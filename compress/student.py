"""Who learns: a model of some of its teacher's blocks, or one that is given; its numbers in float32, with gradients."""

import re
from dataclasses import replace

import torch
import torch.nn as nn

from cli import listed
from layers.quantized import QuantizedLinear
from mixers.layer_kinds import args_of_layers
from model import Transformer
from weights.checkpoint import assigned, read_tensors
from weights.layout import EXACT, Layout, ModelFile

# what ties a layer to others, or to its number
NOT_CUT = ("n_reusing_layer", "layer_input_size", "delta", "short_conv")


def kept_layers(n_layer: int, n_kept: int) -> list[int]:
    """The blocks that a student of n_kept takes from n_layer: the first, the last, and between them evenly spread.

    The first turns embeddings into what all others read, and the last makes what the head reads; neighbours between
    them do like work (Men et al. 2024), so that each kept one can stand in for those on both of its sides.
    """
    return [round(i * (n_layer - 1) / max(n_kept - 1, 1)) for i in range(n_kept)]


def student_of(teacher: ModelFile, n_layer: int) -> ModelFile:
    """The open file of a teacher with float weights, as that of a model of n_layer of its blocks."""
    args = teacher.args
    if not 1 <= n_layer <= args.n_layer:
        raise ValueError(f"--layers is {n_layer}; the teacher has {args.n_layer}, and a student has from 1 to all")
    apart = [name for name in NOT_CUT if getattr(args, name)]
    if apart:
        raise ValueError(f"--layers is not supported for models with {listed(apart)}; give a student with --finetune")
    kept = kept_layers(args.n_layer, n_layer)
    layout = Layout(args_of_layers(args, kept))
    tensors = {name: teacher.tensors[name_in(name, kept)] for name in layout.tensors}
    return replace(teacher, layout=layout, tensors=tensors)


def name_in(name: str, kept: list[int]) -> str:
    """The teacher's name of a student's tensor."""
    return re.sub(r"(?<=^layers\.)\d+", lambda number: str(kept[int(number[0])]), name)


def trainable(opened: ModelFile, device: torch.device) -> Transformer:
    """The model in an open file, every layer in its plain form, with float32 parameters that take gradients.

    Of a quantised layer the codes stay as they are, and its scales and zeros learn (Kim et al. 2023, PEQA).
    """
    state = read_tensors(opened, device, torch.float32, "Loading the student")
    model = assigned(opened.layout, state)
    for layer in model.modules():
        for leaf in ("scales", "zeros") if isinstance(layer, QuantizedLinear) else ():
            value = getattr(layer, leaf)
            if value is not None:
                delattr(layer, leaf)
                setattr(layer, leaf, nn.Parameter(value.float()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(EXACT))
    return model


def keep_zeros_(model: Transformer) -> None:
    """Weights that are 0 now stay 0: no gradient reaches them, and so no moment of the optimizer either."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.ndim > 1 and name.endswith(".weight") and not weight.all():
            kept = weight.detach() != 0
            weight.register_hook(lambda gradient, kept=kept: gradient * kept)


def stored_tensors(model: Transformer, layout: Layout, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a trained student as its file holds them: floats in `dtype`, scales and zeros as they were."""
    state = model.state_dict()
    return {
        name: state[name].to("cpu", shape.dtype if layout.is_coded(name) else dtype)
        if not name.endswith(EXACT)
        else state[name].cpu()
        for name, shape in layout.tensors.items()
    }
