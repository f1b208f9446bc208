"""The layer of guesses that some models ship, among the tensors of a file."""

import re

from layers.guess_layer import GuessLayer
from model import ModelArgs
from weights.layout import Layout, Readers

FRONT = {  # modules of files that stand before or after the block -> ours, or that of all models
    "fc": "joined",
    "pre_fc_norm_embedding": "embedding_norm",
    "pre_fc_norm_hidden": "hidden_norm",
    "norm": "model.norm",
    "eh_proj": "joined",
    "enorm": "embedding_norm",
    "hnorm": "hidden_norm",
    "shared_head.norm": "model.norm",
    "nextn.eh_proj": "joined",
    "nextn.enorm": "embedding_norm",
    "nextn.hnorm": "hidden_norm",
    "nextn.shared_head_norm": "output_norm",
}
# copies of the model's own, which serve in their place
SHARED = {"embed_tokens", "shared_head.head", "nextn.embed_tokens", "nextn.shared_head_head"}


def is_of_guesses(name: str, n_layer: int, n_guess: int) -> bool:
    """Whether a tensor is of layers of guesses, which have names of their own or are n_guess ones after n_layer."""
    layer = re.match(r"(?:model\.layers|blk)\.(\d+)\.", name)
    return name.startswith("mtp.") or bool(layer and int(layer[1]) in range(n_layer, n_layer + n_guess))


def guesses_in(tensors: dict, n_layer: int) -> dict:
    """What `tensors`, by a file's names, holds of the first layer of guesses, by the names of a model of one layer."""
    where = re.compile(rf"(mtp\.layers\.0|mtp|(model\.layers|blk)\.{n_layer})\.(.*)")
    found = {}
    for name, value in tensors.items():
        if (match := where.fullmatch(name)) is None or name.startswith("mtp.layers.") and match[1] == "mtp":
            continue
        module, _, leaf = match[3].rpartition(".")
        if module not in SHARED:
            found[f"{FRONT[module]}.{leaf}" if module in FRONT else f"{match[2] or 'model.layers'}.0.{match[3]}"] = (
                value
            )
    return found


def guess_layout(args: ModelArgs) -> Layout:
    """The layout of the layer of guesses of a model of these sizes."""
    return Layout(args, kind=GuessLayer)


def without_guesses(raw: Readers, n_layer: int, n_guess: int) -> Readers:
    return {name: read for name, read in raw.items() if not is_of_guesses(name, n_layer, n_guess)}
