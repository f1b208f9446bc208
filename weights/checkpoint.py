"""From a path to a model, and back to a file."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cli import ROOT, progress, say_once
from layers.fastest import pack_
from layers.low_rank import WithAdapter
from layers.quantized import QuantSpec, linear_table, quantize_weight, replace_, table_to_json
from layers.sparse import Thresholded
from model import ModelArgs, Transformer
from ranks import Ranks
from stages import Stage, StageBlocks
from tp import apply_tp, rank_args, require_split, shard, split_of
from weights.device import DTYPES, free_memory, require_memory
from weights.files import WEIGHTS, forget, read_json, write_torch
from weights.gguf import open_gguf
from weights.gguf_file import gguf_models, is_gguf
from weights.huggingface import open_hf
from weights.layout import Layout, ModelFile, Pair, dequantized
from weights.registry import args_from_name
from weights.shipped.adapter import adapted
from weights.tiers.place import Tier, fill_slots, place
from weights.tiers.placement import MemoryBudget
from weights.torch_files import open_torch

CHECKPOINTS = ROOT / "checkpoints"
ADAPTER = "give the base model as --checkpoint_path and this as --adapter"
DEFAULT_CHECKPOINT = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct/model.pth")


def find_checkpoint(path: str | Path) -> Path:
    """`path`; if nothing is there, what this clone has in checkpoints/ under that name, such as OWNER/NAME."""
    path = Path(path)
    own = CHECKPOINTS / (path.relative_to("checkpoints") if path.parts[:1] == ("checkpoints",) else path)
    return own if own.exists() and not path.exists() else path


def open_model(
    path: str | Path,
    model_name: str | None = None,
    dequantize: bool = False,
    adapter: str | Path | None = None,
) -> ModelFile:
    """Find out what `path` is by its content, and read its sizes.

    model_name: a registry name, needed only for a file that does not say what it is. dequantize: codes become floats.
    adapter: the folder of a LoRA adapter.
    """
    path = Path(path)
    if path.is_dir():
        opened = open_folder(path, model_name, keep_codes=not dequantize)
    elif not path.is_file():
        raise ValueError(missing_checkpoint(path))
    elif not os.access(path, os.R_OK):
        raise ValueError(f"cannot read {path}: permission denied")
    elif is_gguf(path):
        opened = open_gguf(path, keep_codes=not dequantize)
    elif path.name.startswith("adapter_model."):
        raise ValueError(f"{path} is {adapter_in(path.parent) or 'an adapter'}, no model; {ADAPTER}")
    elif path.suffix == ".safetensors":
        opened = open_hf(path.parent, path)
    else:
        opened = open_torch(path, model_name)
    if model_name is not None:
        reject_contradiction(opened.args, args_from_name(model_name), path, model_name)
    opened = dequantized(opened) if dequantize else opened
    return opened if adapter is None else adapted(opened, Path(adapter), path)


def open_folder(
    folder: Path, model_name: str | None = None, converted: bool = True, keep_codes: bool = True
) -> ModelFile:
    """The model in a folder, as `model_in` finds it; of an adapter it is said that it is not used by itself."""
    opened = model_in(folder, model_name, converted, keep_codes)
    if adapter := adapter_in(folder):
        if opened is None:
            raise ValueError(f"{folder} holds {adapter}, no model; {ADAPTER}")
        say_once(f"{folder} also holds {adapter}, which is used only where --adapter names it")
    if opened is None:
        wanted = "no model.pth, no *.safetensors with config.json, and no *.gguf"
        raise ValueError(f"{folder} holds no model: it has {wanted}")
    return opened


def adapter_in(folder: Path) -> str | None:
    """What adapter of peft a folder holds, in words."""
    if not (folder / "adapter_config.json").exists():
        return None
    config = read_json(folder / "adapter_config.json")
    return f"an adapter ({config.get('peft_type', 'LORA')} of {config.get('base_model_name_or_path')})"


def model_in(folder: Path, model_name: str | None, converted: bool, keep_codes: bool) -> ModelFile | None:
    """model.pth first (unless not `converted`), then a Hugging Face model, then a single GGUF file.

    keep_codes: see `open_gguf`.
    """
    if converted and (folder / "model.pth").is_file():
        return open_torch(folder / "model.pth", model_name)
    opened = open_hf(folder)
    if opened is not None:
        return opened
    files = gguf_models(folder)
    if len(files) > 1:
        raise ValueError(f"{folder} has several models; give the path of one: {', '.join(map(str, files))}")
    return open_gguf(files[0], keep_codes) if files else None


def missing_checkpoint(path: Path) -> str:
    in_own = path.parts[:1] == ("checkpoints",)
    repo = "/".join(path.parts[1:3] if in_own else path.parts)
    hint = "give the path of a file or folder, or OWNER/NAME of a model in checkpoints/"
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo) and (in_own or path.suffix not in WEIGHTS):
        hint = f"fetch it with: {CHECKPOINTS.parent}/scripts/prepare.sh {repo}"
    return f"there is no checkpoint at {path}; {hint}"


def reject_contradiction(args: ModelArgs, named: ModelArgs, path: Path, model_name: str) -> None:
    """What a file says about itself wins; a name that says otherwise is an error."""
    named = replace(named, max_seq_length=args.max_seq_length, tie_embeddings=args.tie_embeddings)
    ours, theirs = args.to_dict(), named.to_dict()
    differing = [f"{key} {ours[key]} (not {theirs[key]})" for key in ours if ours[key] != theirs[key]]
    if differing:
        raise ValueError(f"{path} is not {model_name}: it has {', '.join(differing)}; leave out --model_name")


def new_table(opened: ModelFile, spec: QuantSpec | None, path: str | Path, head: str = "int8") -> dict[str, QuantSpec]:
    """The layers of a float model to be quantised by `spec`, none if it is None; head: int8, float, or int4 as `spec`.

    A file that is quantised already is refused.
    """
    if spec is None:
        return {}
    coded = {str(each) for each in opened.table.values() if each.has_codes}
    if coded:
        specs = ", ".join(sorted(coded))
        what = "quantised" if any(each.bits for each in opened.table.values()) else "pruned"
        raise ValueError(f"{path} is {what} already ({specs}); start from the float file, or give --dequantize")
    heads = {"int8": QuantSpec(8), "float": None, "int4": spec}
    table = linear_table(opened.layout.model, spec, heads[head])
    thresholds = {name: each.threshold for name, each in opened.table.items()}
    return {name: replace(each, threshold=thresholds.get(name)) for name, each in table.items()}


def read_tensors(
    opened: ModelFile,
    device: torch.device,
    dtype: torch.dtype,
    what: str,
    quantize: dict[str, QuantSpec] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Tensor]:
    """Fetch every tensor, one at a time, onto `device`: floats as `dtype`, quantised layers as they are stored.

    what: the title of the progress bar. quantize: float layers to round to nearest on the way. ranks: keep this rank's
    part only, by the names of its stage. A wrong shape, NaN and infinite values are refused.
    """
    stage = stage_of(opened.args, ranks)

    def part(name: str, tensor: Tensor) -> Tensor:
        if ranks is None:
            return tensor
        return shard(name, tensor, opened.args, ranks.of_stage.rank, ranks.of_stage.size).contiguous()

    quantize, layout, state = quantize or {}, opened.layout, {}
    for name, read in progress(opened.tensors.items(), desc=what, unit="tensor"):
        module, _, leaf = name.rpartition(".")
        is_tied = module == layout.head_source != "output"  # then two layers have this weight
        layers = [each for each in ([module, "output"] if is_tied else [module]) if stage.own_name(each)]
        if not layers:
            continue
        tensor = checked(name, read, layout.tensors[name])
        for layer in layers:
            own = stage.own_name(layer)
            if layer in quantize and leaf == "weight":
                check_finite(name, tensor)
                rounded = quantize_weight(tensor.to(device), quantize[layer], layer)
                state |= {f"{own}.{key}": part(f"{layer}.{key}", value) for key, value in rounded.items()}
            elif layer == module or stage.count > 1:  # alone, a tied head takes the embedding itself
                kept = part(name, tensor)
                kept = kept.to(device=device, dtype=kept.dtype if layout.keeps_dtype(name) else dtype, copy=True)
                state[f"{own}.{leaf}"] = kept
                check_finite(name, kept)
    return state


def stage_of(args: ModelArgs, ranks: Ranks | None) -> Stage:
    """This process's pipeline stage of a model."""
    return Stage(args, 0, 1) if ranks is None else Stage(args, ranks.stage, ranks.n_stage)


def checked(name: str, read: Callable[[], Tensor], expected: Tensor) -> Tensor:
    """The tensor that `read` fetches, which must fit in the place of the meta tensor `expected`."""
    try:
        tensor = read()
    except (RuntimeError, IndexError) as error:  # parts that cannot be concatenated, types torch does not have
        raise ValueError(f"{name} cannot be read: {str(error).splitlines()[0]}") from None
    if tensor.is_floating_point() and tensor.dtype not in DTYPES.values():
        tensor = tensor.float()  # float8 and float64: few operators take them
    if expected.is_floating_point():
        fits, wanted = tensor.is_floating_point(), "plain floats"
    else:
        fits, wanted = tensor.dtype == expected.dtype, f"codes of {expected.dtype}"
    if not fits:
        raise ValueError(f"{name} is a tensor of {tensor.dtype}; {wanted} are needed")
    if tensor.shape != expected.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; the model's sizes need {list(expected.shape)}")
    return tensor


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a float tensor that holds NaN or infinite values."""
    if tensor.is_floating_point() and not all(extreme.isfinite() for extreme in tensor.aminmax()):  # NaN is in both
        raise ValueError(f"{name} holds NaN or infinite values in {str(tensor.dtype).removeprefix('torch.')}")


def build(
    args: ModelArgs, state: dict[str, Tensor], table: dict[str, QuantSpec] | None = None, ranks: Ranks | None = None
) -> Transformer:
    """A model of these sizes around these tensors, each layer in the fastest form its device has.

    table: the layers that are quantised in `state`. ranks: the tensors are one rank's part.
    """
    return fill(own_layout(Layout(args, table), ranks), state, args, ranks)


def own_layout(layout: Layout, ranks: Ranks | None) -> Layout:
    """The layout of this rank's part of a model."""
    if ranks is None:
        return layout
    stage = stage_of(layout.args, ranks)
    args = rank_args(stage.own_args(), ranks.of_stage.size)
    return Layout(args, stage.own(layout.table), stage.meta_model(args))


def assigned(layout: Layout, state: dict[str, Tensor]) -> Transformer:
    """The meta model of the layout with these tensors, every layer in its plain form."""
    model, is_tied = layout.model, layout.head_source != "output"
    if is_tied:
        state = state | {"output.weight": state["tok_embeddings.weight"]}
    model.load_state_dict(state, strict=True, assign=True)
    if is_tied:
        model.tie()
    return model


def fill(
    layout: Layout,
    state: dict[str, Tensor],
    args: ModelArgs,
    ranks: Ranks | None,
    beside: dict[str, Pair] | None = None,
    apart: bool = False,
) -> Transformer:
    """The meta model of the layout with these tensors. args: of the whole model, of which a rank has its part.

    beside: adapters, by the layers that they are added to. apart: see `pack_`. The blocks of a pipeline stage stand
    between its messages.
    """
    model = assigned(layout, state)
    del state  # frees each tensor once `pack_` has made another form of it
    for name, pair in (beside or {}).items():
        replace_(model, name, WithAdapter(model.get_submodule(name), *pair))
    for name, spec in layout.table.items():
        if spec.threshold is not None:
            replace_(model, name, Thresholded(model.get_submodule(name), spec.threshold))
    if ranks is not None:
        apply_tp(model, stage_of(args, ranks).own_args(), ranks.of_stage)
        model.ranks = ranks
    pack_(model, free_memory(torch.device("cpu")), apart)  # copies are made on CPUs only
    if ranks is not None and ranks.n_stage > 1:
        model.layers = StageBlocks(model.layers, ranks, model.dtype)
    return model.requires_grad_(False).eval()


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    model_name: str | None = None,
    quantize: QuantSpec | None = None,
    ranks: Ranks | None = None,
    dequantize: bool = False,
    adapter: str | Path | None = None,
    budget: MemoryBudget | None = None,
    apart: bool = False,
) -> Transformer:
    """The model in `path`: our .pth, a gpt-fast or llama2.c one, a Hugging Face folder or a GGUF file.

    model_name, dequantize, adapter: see `open_model`. quantize: round the linear layers of a float file to nearest.
    ranks: those that share the model, each with its part of the weights. budget: what does not fit lies elsewhere.
    apart: see `pack_`.
    """
    opened = open_model(path, model_name, dequantize, adapter)
    table = new_table(opened, quantize, path)
    return fetch(opened, path, torch.device(device), dtype, table, "Loading", ranks, budget, apart)


def fetch(
    opened: ModelFile,
    name: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    table: dict[str, QuantSpec],
    what: str,
    ranks: Ranks | None,
    budget: MemoryBudget | None = None,
    apart: bool = False,
) -> Transformer:
    """The model in an open file, whose float layers in `table` are rounded, once it is sure that it fits."""
    layout = opened.layout.quantized(table)
    if ranks is not None:
        require_split(opened.args, layout.table, ranks.of_stage.size)
        layout = own_layout(layout, ranks)
    tiers = [Tier(opened, device, table)]
    if budget is None:
        require_weights_fit(layout, dtype, device, name)
    else:
        read = partial(read_tensors, device=torch.device("cpu"), dtype=dtype, what="Packing", quantize=table)
        tiers = place(opened, layout, dtype, tiers[0], budget, name, read)
    stage = stage_of(opened.args, ranks)
    here = {name: read for name, read in opened.beside.items() if stage.own_name(name)}
    beside = {stage.own_name(name): part_of(name, read(), opened.args, ranks) for name, read in here.items()}
    beside = {name: (a.to(device, dtype), b.to(device, dtype)) for name, (a, b) in beside.items()}
    # not a name here: `fill` frees what it packs
    model = fill(layout, read_tiers(tiers, dtype, what, ranks), opened.args, ranks, beside, apart)
    if budget is not None:
        forget(opened.paths)
        fill_slots(model)
    return model


def read_tiers(tiers: list[Tier], dtype: torch.dtype, what: str, ranks: Ranks | None) -> dict[str, Tensor]:
    """The tensors of all tiers, each where it stays."""
    state = {}
    for opened, device, table in tiers:
        state |= read_tensors(opened, device, dtype, what, table, ranks)
    return state


def part_of(name: str, pair: Pair, args: ModelArgs, ranks: Ranks | None) -> Pair:
    """This rank's part of the adapter of a layer: the rows of B for its outputs, or the columns of A for its inputs."""
    split = None if ranks is None else split_of(name, args)
    if split is None:
        return pair
    a, b = pair
    own = shard(f"{name}.weight", a if split.dim == -1 else b, args, ranks.of_stage.rank, ranks.of_stage.size)
    own = own.contiguous()
    return (own, b) if split.dim == -1 else (a, own)


def require_weights_fit(layout: Layout, dtype: torch.dtype, device: torch.device, name: str | Path) -> None:
    """Refuse, before anything is read, a model called `name` whose weights do not fit into the device's memory."""
    advice = "use a smaller model or --dtype, or int8 or int4 weights"
    require_memory(layout.loaded_bytes(dtype), device, f"the weights of {name}", advice)


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

    head: of a quantised one, as in `new_table`.
    """
    args, name = (size, "random weights") if isinstance(size, ModelArgs) else (args_from_name(size), size)
    device, layout = torch.device(device), Layout(args)
    generator, numbers = torch.Generator(device).manual_seed(seed), {key: i for i, key in enumerate(layout.tensors, 1)}
    pool = 0.02 * torch.randn(1 << 22, device=device, generator=generator)  # drawing billions takes minutes on a CPU

    def draw(key: str, shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            is_factor = key.endswith(("weight", "scale", "scalar"))  # of a norm, an expert, a layer; else a bias
            return torch.full(shape, float(is_factor), dtype=dtype, device=device)
        tensor = torch.empty(shape, dtype=dtype, device=device)
        generator.manual_seed(seed + numbers[key])  # of its own: a pipeline stage draws only some tensors
        for part in tensor.view(-1).split(pool.numel()):
            shift = int(torch.randint(pool.numel(), (1,), device=device, generator=generator))
            part.copy_(pool.roll(shift)[: part.numel()])
        return tensor

    opened = ModelFile(layout, {key: lambda key=key, t=t: draw(key, t.shape) for key, t in layout.tensors.items()})
    return fetch(opened, name, device, dtype, new_table(opened, quantize, name, head), "Filling", ranks)


def save_checkpoint(
    path: str | Path, args: ModelArgs, tensors: dict[str, Tensor], table: dict[str, QuantSpec] | None = None
) -> None:
    """Write our self-describing file, whole or not at all; the table names the layers that `tensors` has quantised."""
    # torch.save writes the whole storage of a slice
    own = {name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for name, t in tensors.items()}
    quant = table_to_json(table) if table else None
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_torch(path, {"args": args.to_dict(), "quant": quant, "model": own}, size)
