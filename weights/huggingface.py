"""Hugging Face folders: safetensors or .bin files and their config.json."""

import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from weights.families import HF_MODULES, args_from_hf, family_of
from weights.files import read_json, read_torch
from weights.layout import Source, readers, rename

SEEING = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def weights_from_hf(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Every tensor of a Hugging Face folder by its own name: safetensors, else .bin; sharded or single."""
    for stem, reader in (("model.safetensors", safetensors_file), ("pytorch_model.bin", torch_file)):
        index = folder / f"{stem}.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
                raise ValueError(f"{index} has no weight_map of tensor names to file names")
            names = sorted(set(weight_map.values()))
        else:
            names = [stem] if (folder / stem).is_file() else []
        if not names and stem.endswith("safetensors"):
            names = [path.name for path in folder.glob("*.safetensors")]
        if names:
            if len(names) > 1 and not index.exists():
                raise ValueError(f"{folder} has several .safetensors files and no {index.name} that says which belong")
            tensors = {}
            for name in names:
                if Path(name).name != name or not (folder / name).is_file():
                    raise ValueError(f"{folder} lacks {name}, which its index names; download it again")
                tensors |= reader(folder / name)
            return tensors
    return {}


def safetensors_file(path: Path) -> dict[str, Callable[[], Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        return {name: lambda name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or is cut short or damaged: {error}") from None


def torch_file(path: Path) -> dict[str, Callable[[], Tensor]]:
    return readers(read_torch(path), path)


def source_from_hf(folder: Path) -> Source | None:
    """A Hugging Face model as downloaded; None if the folder holds no weights of one."""
    raw = weights_from_hf(folder)
    if not raw:
        return None
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has weights but no config.json, which tells their architecture")
    config = read_json(folder / "config.json")
    if isinstance(config.get("text_config"), dict):  # of a model that sees, too: Gemma 3 from 4B on
        config, raw = config["text_config"], text_part(raw)
    args = args_from_hf(config)
    return Source(args, rename(args, raw, HF_MODULES | family_of(config).modules, False, folder))


def text_part(raw: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """The tensors of the language model in one that also sees, by the names that they have without the rest."""
    return {name.replace("language_model.", "", 1): read for name, read in raw.items() if not SEEING.match(name)}
