"""From a path to a model, and back to a file."""

import os
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from layers.fastest import pack_
from layers.quantized import QuantSpec, linear_table, quantize_weight, table_to_json
from model import ModelArgs, Transformer
from ranks import Ranks
from tp import apply_tp, rank_args, require_split, shard
from weights.device import DTYPES, require_memory
from weights.files import GB, atomic_path, require_space, require_writable
from weights.gguf import source_from_gguf
from weights.gguf_file import is_gguf
from weights.huggingface import source_from_hf
from weights.layout import Source, expected_tensors, model_bytes, shell
from weights.registry import args_from_name
from weights.torch_files import source_from_torch

DEFAULT_CHECKPOINT = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct/model.pth")


def source_from_folder(
    folder: Path, model_name: str | None = None, converted: bool = True, keep_quantized: bool = False
) -> Source:
    """model.pth first (unless not `converted`), then a Hugging Face model, then a single GGUF file.

    keep_quantized: see `source_from_gguf`; a ValueError for a Hugging Face model, which is float.
    """
    if converted and (folder / "model.pth").is_file():
        return source_from_torch(folder / "model.pth", model_name)
    source = source_from_hf(folder)
    if source is not None:
        if keep_quantized:
            raise ValueError(f"{folder} holds float weights; --keep_quantized is for a folder with only a GGUF file")
        return source
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return source_from_gguf(files[0], keep_quantized)
    found = f"{len(files)} .gguf files: name one" if files else "none of these"
    raise ValueError(f"{folder} holds no model: model.pth, *.safetensors with config.json, or *.gguf ({found})")


def open_source(path: str | Path, model_name: str | None = None) -> Source:
    """Find out what `path` is by its content and read its sizes. Raises ValueError on what cannot be a model."""
    path = Path(path)
    if path.is_dir():
        source = source_from_folder(path, model_name)
    elif not path.is_file():
        raise ValueError(missing_checkpoint(path))
    elif not os.access(path, os.R_OK):
        raise ValueError(f"cannot read {path}: permission denied")
    elif is_gguf(path):
        source = source_from_gguf(path)
    elif path.suffix == ".safetensors":
        source = source_from_folder(path.parent, converted=False)
    else:
        source = source_from_torch(path, model_name)
    if model_name is not None:
        reject_contradiction(source.args, args_from_name(model_name), path, model_name)
    return source


def missing_checkpoint(path: Path) -> str:
    repo = "/".join(path.parts[-3:-1]) if path.parts[:1] == ("checkpoints",) and len(path.parts) == 4 else None
    hint = f"fetch it with: scripts/prepare.sh {repo}" if repo else "give --checkpoint_path a file or folder"
    return f"there is no checkpoint at {path}; {hint}"


def reject_contradiction(args: ModelArgs, named: ModelArgs, path: Path, model_name: str) -> None:
    """What a file says about itself wins; a name that says otherwise is an error."""
    named = replace(named, max_seq_length=args.max_seq_length, tie_embeddings=args.tie_embeddings)
    ours, theirs = args.to_dict(), named.to_dict()
    differing = [f"{key} {ours[key]} (not {theirs[key]})" for key in ours if ours[key] != theirs[key]]
    if differing:
        raise ValueError(f"{path} is not {model_name}: it has {', '.join(differing)}; leave out --model_name")


def read_tensors(
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    what: str,
    quantize: dict[str, QuantSpec] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Tensor]:
    """Fetch every tensor, one at a time, onto `device`: floats as `dtype`, quantised layers as they are stored.

    quantize: float layers to round to nearest on the way. ranks: keep this rank's part only. Raises ValueError on a
    wrong shape or NaN.
    """

    def part(name: str, tensor: Tensor) -> Tensor:
        return tensor if ranks is None else shard(name, tensor, source.args, ranks.rank, ranks.size).contiguous()

    quantize, expected, state = quantize or {}, expected_tensors(source.args, source.table), {}
    for name, read in tqdm(source.tensors.items(), desc=what, unit="tensor", disable=None, leave=False):
        try:
            tensor = read()
        except (RuntimeError, IndexError) as error:  # parts that cannot be joined, types torch does not have
            raise ValueError(f"{name} cannot be read: {str(error).splitlines()[0]}") from None
        if tensor.is_floating_point() and tensor.dtype not in DTYPES.values():
            tensor = tensor.float()  # float8 and float64: few operators take them
        check_tensor(name, tensor, expected[name])
        module, _, leaf = name.rpartition(".")
        tied_head = module == "tok_embeddings" and "output.weight" not in source.tensors
        for layer in (module, "output") if tied_head else (module,):
            if layer in quantize and leaf == "weight":
                check_finite(name, tensor)
                rounded = quantize_weight(tensor.to(device), quantize[layer], layer)
                state |= {f"{layer}.{key}": part(f"{layer}.{key}", value) for key, value in rounded.items()}
        if module not in quantize or leaf != "weight":
            as_stored = module in source.table and leaf != "bias"  # codes, scales and zeros
            kept = part(name, tensor)
            state[name] = kept.to(device=device, dtype=kept.dtype if as_stored else dtype, copy=True)
            check_finite(name, state[name])
    return state


def check_tensor(name: str, tensor: Tensor, expected: Tensor) -> None:
    """Raise ValueError unless the tensor can stand in the place of `expected`."""
    if expected.is_floating_point():
        fits, wanted = tensor.is_floating_point(), "plain floats"
    else:
        fits, wanted = tensor.dtype == expected.dtype, f"codes of {expected.dtype}"
    if not fits or tensor.layout is not torch.strided or tensor.is_meta:
        raise ValueError(f"{name} is a {tensor.layout} tensor of {tensor.dtype}; {wanted} are needed")
    if tensor.shape != expected.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; the model's sizes need {list(expected.shape)}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a float tensor holds NaN or infinite values."""
    if tensor.is_floating_point() and not all(extreme.isfinite() for extreme in tensor.aminmax()):  # a NaN is both
        raise ValueError(f"{name} holds NaN or infinite values in {str(tensor.dtype).removeprefix('torch.')}")


def build(
    args: ModelArgs,
    state: dict[str, Tensor],
    table: dict[str, QuantSpec] | None = None,
    ranks: Ranks | None = None,
) -> Transformer:
    """A model of these sizes around these tensors, each layer in the fastest form its device has.

    table: the layers that are quantised in `state`. ranks: the tensors are one rank's part.
    """
    table = table or {}
    model = shell(args if ranks is None else rank_args(args, ranks.size), table)
    tied = args.tie_embeddings and "output" not in table
    if tied:
        state = state | {"output.weight": state["tok_embeddings.weight"]}
    model.load_state_dict(state, strict=True, assign=True)
    del state  # else the packed forms would stand beside what they are made from
    if tied:
        model.tie()
    pack_(model)
    if ranks is not None:
        apply_tp(model, args, ranks)
    return model.requires_grad_(False).eval()


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    model_name: str | None = None,
    quantize: QuantSpec | None = None,
    ranks: Ranks | None = None,
) -> Transformer:
    """The model in `path`: our .pth, a gpt-fast or llama2.c one, a Hugging Face folder or a GGUF file.

    model_name: a registry name, needed only for a file that does not say what it is. quantize: round the linear layers
    of a float file to nearest. ranks: those that share the model, each with its part of the weights. Raises ValueError,
    in words for the person at the terminal, on every file that cannot be loaded.
    """
    source = open_source(path, model_name)
    return fetch(source, path, torch.device(device), dtype, new_table(source, quantize, path), "Loading", ranks)


def fetch(
    source: Source,
    name: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    table: dict[str, QuantSpec],
    what: str,
    ranks: Ranks | None,
) -> Transformer:
    """The model of a source, whose float layers in `table` are rounded, once it is sure that it fits."""
    whole = source.table | table
    share = source.args
    if ranks is not None:
        require_split(source.args, whole, ranks.size)
        share = rank_args(source.args, ranks.size)
    require_weights_fit(share, dtype, whole, device, name)
    return build(source.args, read_tensors(source, device, dtype, what, table, ranks), whole, ranks)


def new_table(source: Source, spec: QuantSpec | None, path: str | Path, head: str = "int8") -> dict[str, QuantSpec]:
    """The layers of a float model to be quantised by `spec`, none if it is None; head: int8, float, or as `spec`.

    Raises ValueError if the source is quantised already, or a groupsize does not fit.
    """
    if spec is None:
        return {}
    if source.table:
        kinds = ", ".join(sorted({str(each) for each in source.table.values()}))
        raise ValueError(f"{path} is quantised already ({kinds}); start from the float file")
    heads = {"int8": QuantSpec(8), "float": None, "int4": spec}
    return linear_table(shell(source.args, {}), spec, heads[head])


def require_weights_fit(
    args: ModelArgs, dtype: torch.dtype, table: dict[str, QuantSpec], device: torch.device, name: str | Path
) -> None:
    """Raise ValueError, before anything is read, if the weights of model `name` do not fit into the device's memory."""
    advice = "use a smaller model, --dtype or --quantize"
    require_memory(model_bytes(args, dtype, table), device, f"the weights of {name}", advice)


def random_model(
    size: str | ModelArgs,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1234,
    quantize: QuantSpec | None = None,
    ranks: Ranks | None = None,
    head: str = "int8",
) -> Transformer:
    """A model of a size, or of that with a name in the registry, with random weights, made on the device.

    head: of a quantised one, as in `new_table`. Raises ValueError on an unknown name.
    """
    args, name = (size, "random weights") if isinstance(size, ModelArgs) else (args_from_name(size), size)
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    pool = 0.02 * torch.randn(1 << 22, device=device, generator=generator)  # drawing billions takes minutes on a CPU

    def fill(key: str, shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, float(key.endswith("weight")), dtype=dtype, device=device)  # norms, biases
        tensor = torch.empty(shape, dtype=dtype, device=device)
        for part in tensor.view(-1).split(pool.numel()):
            shift = int(torch.randint(pool.numel(), (1,), device=device, generator=generator))
            part.copy_(pool.roll(shift)[: part.numel()])
        return tensor

    expected = expected_tensors(args)
    source = Source(args, {key: lambda key=key: fill(key, expected[key].shape) for key in expected})
    return fetch(source, name, device, dtype, new_table(source, quantize, name, head), "Filling", ranks)


def save_checkpoint(
    path: str | Path, args: ModelArgs, tensors: dict[str, Tensor], table: dict[str, QuantSpec] | None = None
) -> None:
    """Write our self-describing file, whole or not at all; the table names the layers that `tensors` has quantised.

    Raises ValueError if the disk is full or refuses.
    """
    path = Path(path)
    require_writable(path)
    size = sum(tensor.nbytes for tensor in tensors.values())
    require_space(path, size)
    # torch.save writes the whole storage of a slice
    own = {name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for name, t in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            quant = table_to_json(table) if table else None
            torch.save({"args": args.to_dict(), "quant": quant, "model": own}, temporary)
            whole = zipfile.is_zipfile(temporary)  # it has its end: torch.save overlooks a last write that fails
        except RuntimeError:  # all torch.save tells of a full disk is that some position is wrong
            whole = False
        if not whole:
            raise OSError(f"the disk is full, or takes no file of {size / GB:.2f} GB")
