"""The layers of a quantised folder in the place of float ones."""

import re
from pathlib import Path

import torch
import torch.nn as nn

from layers.quantized import can_be_rounded
from mixers.experts import ExpertLinear
from model import Transformer
from weights.layout import Kept, Layout, Readers, source_modules
from weights.shipped.methods import ReadLayer

# of a quantised layer of a file, but its bias
FILE_LEAVES = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_shape", "weight", "weight_scale")
FILE_LEAVES += ("weight_scale_inv", "weight_zero_point", "weight_g_idx", "weight_global_scale", "blocks")
FILE_LEAVES += ("SCB", "weight_format", "weight.absmax", "weight.nested_absmax", "weight.quant_map")
FILE_LEAVES += ("weight.nested_quant_map", *(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")))
# what activations, keys and values are rounded by elsewhere; here they are not
OF_ACTIVATIONS = re.compile(r".*\.((input|output|activation|k|v|q)_(scale|zero_point|global_scale)(_ub)?)")


def kept_layers(
    layout: Layout, raw: Readers, modules: dict, read_layer: ReadLayer, where: Path
) -> tuple[Layout, Readers]:
    """The layout with the quantised layers of a file, and all its tensors, those layers' by the names of ours.

    modules: see `source_modules`. A layer of whose parts some are quantised in another way, or not, becomes float; so
    does a gate, which has no quantised form here.
    """
    tensors = {name: read for name, read in raw.items() if not OF_ACTIVATIONS.fullmatch(name)}
    table = {}
    for module, layer in layout.model.named_modules():
        if not isinstance(layer, (nn.Linear, ExpertLinear)):
            continue
        n_in, rows = layer.weight.shape[-1], source_modules(module, modules, layout.args)
        parts = [{name: read_layer(name, raw, n_in) for name in of_expert} for of_expert in rows]
        if whole := can_be_rounded(layer) and are_alike(parts):
            table[module] = next(iter(parts[0].values())).spec
        for of_expert in parts:
            for i, (name, kept) in enumerate(of_expert.items()):
                if kept is None:
                    continue
                for leaf in FILE_LEAVES:
                    tensors.pop(f"{name}.{leaf}", None)
                own = kept.tensors if whole else {"weight": kept.weight}
                tensors |= {f"{name}.{leaf}": read for leaf, read in own.items() if i == 0 or leaf != "order"}
                if getattr(layer, "bias", None) is None:
                    drop_empty_bias_(tensors, name)
    if not table and type(layout.model) is Transformer:  # a layer of guesses may be float in a quantised file
        raise ValueError(f"{where} has no quantised layer, though its config says it is quantised")
    return layout.quantized(table), tensors


def are_alike(parts: list[dict[str, Kept | None]]) -> bool:
    """Whether all parts of a layer, of each expert, are quantised in one way and take the inputs in one order."""
    specs = {kept and kept.spec for of_expert in parts for kept in of_expert.values()}
    if len(specs) > 1 or None in specs:
        return False
    orders = [[kept.tensors["order"]() for kept in each.values() if kept.spec.ordered] for each in parts]
    return all(torch.equal(order, each[0]) for each in orders for order in each)


def drop_empty_bias_(tensors: Readers, name: str) -> None:
    """Drop the bias of zeros that old programs wrote for every layer."""
    if f"{name}.bias" in tensors and not tensors[f"{name}.bias"]().any():
        del tensors[f"{name}.bias"]
