"""What a folder's quantization_config says: the method, and from it a reader of the layers that are quantised."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from weights.files import Config, read_json
from weights.layout import Kept, Readers
from weights.shipped.bitsandbytes import float4_layer, int8_layer
from weights.shipped.float4 import mxfp4_layer, nvfp4_layer, packed_mxfp4_layer
from weights.shipped.float8 import float8_layer
from weights.shipped.integers import awq_layer, gptq_layer, packed_layer, plain_int8_layer

# Reads the layer of a name in the file, among all its tensors, that has so many inputs; None: the layer is float.
ReadLayer = Callable[[str, Readers, int], Kept | None]

KEYS = ("quantization_config", "compression_config", "quantization")  # of config.json; the last is MLX's
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}  # of old
OLD_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}  # of AWQ
SCALES_OF_FLOAT8 = ("weight_scale_inv", "weight_scale")


def read_layer_of(config: dict, folder: Path) -> ReadLayer | None:
    """How to read the quantised layers of a folder with this config.json; None: all are float."""
    for key in KEYS:
        if isinstance(config.get(key), dict):
            where, settings = f"{folder / 'config.json'}, {key}", config[key]
            break
    else:
        name = next((name for name in FILES if (folder / name).exists()), None)
        if name is None:
            return None
        where, settings = str(folder / name), {"quant_method": FILES[name]} | read_json(folder / name)
    settings = Config({OLD_KEYS.get(key, key): value for key, value in settings.items()}, where)
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise settings.error(
            f"the weights are quantised by the method {method!r}, which is not supported; supported: "
            f"{', '.join(METHODS)}; use the float model it was made from, or a GGUF file"
        )
    return METHODS[method](settings)


def one_of(settings: Config, key: str, *supported, default=None):
    """The setting `key`, which must be one of those supported."""
    value = settings.get(key, default)
    if not any(value == each and type(value) is type(each) for each in supported):
        known = ", ".join(map(repr, supported))
        raise settings.error(f"{key} is {value!r}, which is not supported; supported: {known}")
    return value


def groupsize_in(settings: Config, default: int | None = None) -> int:
    """The setting group_size; -1: all inputs of a row."""
    return -1 if settings.get("group_size") == -1 else settings.whole("group_size", default)


def awq(settings: Config) -> ReadLayer:
    one_of(settings, "bits", 4)
    one_of(settings, "zero_point", True, default=True)
    version = "version" if settings.get("version") is not None else "format"
    one_of(settings, version, "gemm", "GEMM", default="gemm")
    return partial(awq_layer, groupsize=groupsize_in(settings, 128))


def gptq(settings: Config) -> ReadLayer:
    bits, symmetric = one_of(settings, "bits", 4, 8), one_of(settings, "sym", True, False, default=True)
    if settings.get("dynamic"):
        raise settings.error("settings that differ by layer (dynamic) are not supported")
    version = one_of(settings, "checkpoint_format", "gptq", "gptq_v2", default="gptq")
    added = 1 if version == "gptq" else 0
    return partial(gptq_layer, bits=bits, groupsize=groupsize_in(settings), symmetric=symmetric, added=added)


def float8(settings: Config) -> ReadLayer:
    block = block_of(settings, "weight_block_size")
    return lambda name, raw, n_in: read_float8(name, raw, n_in, block)


def block_of(settings: Config, key: str) -> tuple[int, int] | None:
    """Rows and columns of the blocks that share a scale."""
    block = settings.get(key)
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block)):
        raise settings.error(f"{key} is {block!r}; two sizes are needed")
    return None if block is None else tuple(block)


def read_float8(name: str, raw: Readers, n_in: int, block: tuple[int, int] | None) -> Kept | None:
    leaf = next((leaf for leaf in SCALES_OF_FLOAT8 if f"{name}.{leaf}" in raw), None)
    return None if leaf is None else float8_layer(name, raw, n_in, leaf, block)


def compressed(settings: Config) -> ReadLayer:
    """The scheme of compressed-tensors; layers are in groups, each of which is quantised in one way."""
    for key in ("sparsity_config", "transform_config"):
        part = settings.get(key) or {}
        if part and not (key == "sparsity_config" and part.get("format") == "dense"):
            raise settings.error(f"{key} is set, which is not supported")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise settings.error("config_groups is no object of groups")
    readers = [(targets_of(group, settings), of_group(group, settings)) for group in groups.values()]

    def read(name: str, raw: Readers, n_in: int) -> Kept | None:
        if f"{name}.weight_scale" not in raw:
            return None
        # a class of layers is the last resort: a name is more
        for by_name in (True, False):
            for targets, read_layer in readers:
                if any(is_target(name, each) if by_name else each == "Linear" for each in targets):
                    return read_layer(name, raw, n_in)
        raise settings.error(f"{name} is quantised, and no group has it as a target")

    return read


def targets_of(group: dict, settings: Config) -> list[str]:
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
        raise settings.error(f"the targets of a group are {targets!r}; a list of names is needed")
    return targets


def is_target(name: str, target: str) -> bool:
    """Whether a layer is meant by a target: its name, or a regular expression that fits from the beginning."""
    return re.match(target[3:], name) is not None if target.startswith("re:") else name == target


def of_group(group: dict, settings: Config) -> ReadLayer:
    """How a group's layers are read."""
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise settings.error("a group has no weights")
    form = group.get("format") or settings.get("format")
    weights = Config(weights, f"{settings.where}, {form}")
    kind = one_of(weights, "type", "int", "float", default="int")
    bits = one_of(weights, "num_bits", 4, 8)
    if form in ("float-quantized", "naive-quantized") and (kind, bits) == ("float", 8):
        one_of(weights, "strategy", "tensor", "channel", "block")
        block = block_of(weights, "block_structure") if weights.get("strategy") == "block" else None
        return partial(float8_layer, leaf="weight_scale", block=block)
    if (kind, bits) == ("float", 4) and form in FLOAT4:
        groupsize, read_layer = FLOAT4[form]
        one_of(weights, "group_size", groupsize)
        one_of(weights, "symmetric", True, default=True)
        return read_layer
    symmetric = one_of(weights, "symmetric", True, False, default=True)
    strategy = one_of(weights, "strategy", "channel", "group", default="group")
    groupsize = weights.whole("group_size") if strategy == "group" else -1
    if form == "pack-quantized" and kind == "int":
        return partial(packed_layer, bits=bits, groupsize=groupsize, symmetric=symmetric)
    if form in ("int-quantized", "naive-quantized") and (kind, bits) == ("int", 8):
        return partial(plain_int8_layer, groupsize=groupsize, symmetric=symmetric)
    raise settings.error(f"format {form!r} of {bits}-bit {kind} weights is not supported")


def bitsandbytes(settings: Config) -> ReadLayer:
    if settings.get("load_in_4bit") is not True:
        one_of(settings, "load_in_8bit", True)
        return int8_layer
    return partial(float4_layer, kind=one_of(settings, "bnb_4bit_quant_type", "nf4", "fp4", default="fp4"))


FLOAT4 = {"nvfp4-pack-quantized": (16, nvfp4_layer), "mxfp4-pack-quantized": (32, packed_mxfp4_layer)}
METHODS = {
    "awq": awq,
    "gptq": gptq,
    "compressed-tensors": compressed,
    "fp8": float8,
    "fbgemm_fp8": float8,
    "mxfp4": lambda _: mxfp4_layer,
    "bitsandbytes": bitsandbytes,
}
