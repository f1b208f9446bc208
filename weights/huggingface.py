"""Hugging Face folders: safetensors or .bin files and their config.json."""

import re
from pathlib import Path

from weights.families import Config, args_from_config
from weights.files import read_json, read_torch
from weights.layout import Layout, ModelFile, Readers, readers, rename

# Our module -> theirs, see `source_modules`.
HF_MODULES = {
    "tok_embeddings": ("model.embed_tokens",),
    "layers.#.attention.wqkv": tuple(f"model.layers.#.self_attn.{x}_proj" for x in "qkv"),
    "layers.#.attention.wo": ("model.layers.#.self_attn.o_proj",),
    "layers.#.attention.q_norm": ("model.layers.#.self_attn.q_norm",),
    "layers.#.attention.k_norm": ("model.layers.#.self_attn.k_norm",),
    "layers.#.feed_forward.w13": ("model.layers.#.mlp.gate_proj", "model.layers.#.mlp.up_proj"),
    "layers.#.feed_forward.w2": ("model.layers.#.mlp.down_proj",),
    "layers.#.attention_norm": ("model.layers.#.input_layernorm",),
    "layers.#.ffn_norm": ("model.layers.#.post_attention_layernorm",),
    "norm": ("model.norm",),
    "output": ("lm_head",),
}
FUSED = {
    "layers.#.attention.wqkv": ("model.layers.#.self_attn.qkv_proj",),
    "layers.#.feed_forward.w13": ("model.layers.#.mlp.gate_up_proj",),
}
POST_NORMS = {
    "layers.#.post_attention_norm": ("model.layers.#.post_attention_layernorm",),
    "layers.#.post_ffn_norm": ("model.layers.#.post_feedforward_layernorm",),
}
FOUR_NORMS = POST_NORMS | {"layers.#.ffn_norm": ("model.layers.#.pre_feedforward_layernorm",)}
EXPERTS = {
    "layers.#.feed_forward.gate": ("model.layers.#.mlp.gate",),
    "layers.#.feed_forward.w13": tuple(f"model.layers.#.mlp.experts.@.{x}_proj" for x in ("gate", "up")),
    "layers.#.feed_forward.w2": ("model.layers.#.mlp.experts.@.down_proj",),
    "layers.#.feed_forward.shared.w13": tuple(f"model.layers.#.mlp.shared_expert.{x}_proj" for x in ("gate", "up")),
    "layers.#.feed_forward.shared.w2": ("model.layers.#.mlp.shared_expert.down_proj",),
    "layers.#.feed_forward.shared_gate": ("model.layers.#.mlp.shared_expert_gate",),
}
MIXTRAL = {
    "layers.#.feed_forward.gate": ("model.layers.#.block_sparse_moe.gate",),
    "layers.#.feed_forward.w13": tuple(f"model.layers.#.block_sparse_moe.experts.@.w{i}" for i in (1, 3)),
    "layers.#.feed_forward.w2": ("model.layers.#.block_sparse_moe.experts.@.w2",),
}
OTHER_MODULES = {  # of a model_type, where HF_MODULES does not hold
    "mixtral": MIXTRAL,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "phi3": FUSED,
    "olmo2": POST_NORMS,
    "olmo3": POST_NORMS,
    "gemma2": FOUR_NORMS,
    "gemma3_text": FOUR_NORMS,
}

VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def hf_modules(model_type: str) -> dict[str, tuple[str, ...]]:
    return HF_MODULES | OTHER_MODULES.get(model_type, {})


def open_hf(folder: Path) -> ModelFile | None:
    """A Hugging Face model as downloaded; None if the folder holds no weights of one."""
    raw = weights_from_hf(folder)
    if not raw:
        return None
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has weights but no config.json, which tells their architecture")
    config = read_json(folder / "config.json")
    if isinstance(config.get("text_config"), dict):  # of a vision-language model: Gemma 3 from 4B on
        config = config["text_config"]
        raw = {name.replace("language_model.", "", 1): read for name, read in raw.items() if not VISION.match(name)}
    layout = Layout(args_from_config(Config(config)))
    return ModelFile(layout, rename(layout, raw, hf_modules(config["model_type"]), folder))


def weights_from_hf(folder: Path) -> Readers:
    """Every tensor of a Hugging Face folder by its own name: safetensors, else .bin; sharded or single."""
    tensors = {}
    for path in weight_files(folder, "model.safetensors"):
        tensors |= safetensors_file(path)
    if not tensors:
        for path in weight_files(folder, "pytorch_model.bin"):
            tensors |= readers(read_torch(path), path)
    return tensors


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files of one format: those that the index names, or the one called `stem`, or any one .safetensors file."""
    index = folder / f"{stem}.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map of tensor names to file names")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ValueError(f"{folder} lacks {name}, which its index names; download it again")
        return [folder / name for name in names]
    if (folder / stem).is_file():
        return [folder / stem]
    paths = list(folder.glob("*.safetensors")) if stem.endswith("safetensors") else []
    if len(paths) > 1:
        raise ValueError(f"{folder} has several .safetensors files and no {index.name} that says which belong")
    return paths


def safetensors_file(path: Path) -> Readers:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        return {name: lambda name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or is cut short or damaged: {error}") from None
