"""Hugging Face folders: safetensors or .bin files and their config.json."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cli import say_once
from weights.families.recurrent import rows_in_file
from weights.families.table import args_from_config
from weights.files import Config, damaged, read_json, read_torch
from weights.layout import Layout, ModelFile, Readers, head_as_stored, is_unused, readers, rename, rope_order
from weights.shipped.guesses import guess_layout, guesses_in, without_guesses
from weights.shipped.layers import kept_layers
from weights.shipped.methods import read_layer_of

# Our module -> theirs, see `source_modules`.
HF_MODULES = {
    "tok_embeddings": ("model.embed_tokens",),
    "layers.#.attention.wqkv": tuple(f"model.layers.#.self_attn.{x}_proj" for x in "qkv"),
    "layers.#.attention.wo": ("model.layers.#.self_attn.o_proj",),
    "layers.#.attention.q_norm": ("model.layers.#.self_attn.q_norm",),
    "layers.#.attention.k_norm": ("model.layers.#.self_attn.k_norm",),
    "layers.#.feed_forward.w13": ("model.layers.#.mlp.gate_proj", "model.layers.#.mlp.up_proj"),
    "layers.#.feed_forward.w2": ("model.layers.#.mlp.down_proj",),
    "layers.#.dense.w13": ("model.layers.#.mlp.gate_proj", "model.layers.#.mlp.up_proj"),
    "layers.#.dense.w2": ("model.layers.#.mlp.down_proj",),
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
SHARED_EXPERTS = {  # that stand under another name, without a gate
    "layers.#.feed_forward": ("model.layers.#.mlp.gate",),  # its bias
    "layers.#.feed_forward.shared.w13": tuple(f"model.layers.#.mlp.shared_experts.{x}_proj" for x in ("gate", "up")),
    "layers.#.feed_forward.shared.w2": ("model.layers.#.mlp.shared_experts.down_proj",),
}
LATENT = {
    "layers.#.attention.wq": ("model.layers.#.self_attn.q_proj",),
    "layers.#.attention.wq_a": ("model.layers.#.self_attn.q_a_proj",),
    "layers.#.attention.query_norm": ("model.layers.#.self_attn.q_a_layernorm",),
    "layers.#.attention.wq_b": ("model.layers.#.self_attn.q_b_proj",),
    "layers.#.attention.wkv_a": ("model.layers.#.self_attn.kv_a_proj_with_mqa",),
    "layers.#.attention.latent_norm": ("model.layers.#.self_attn.kv_a_layernorm",),
    "layers.#.attention.wkv_b": ("model.layers.#.self_attn.kv_b_proj",),
}
LATENT_EXPERTS = EXPERTS | SHARED_EXPERTS | LATENT
GPT_OSS = {
    "layers.#.attention.attend": ("model.layers.#.self_attn",),  # its sinks
    "layers.#.feed_forward.gate": ("model.layers.#.mlp.router",),
    "layers.#.feed_forward.w13": ("model.layers.#.mlp.experts.gate_up_proj",),
    "layers.#.feed_forward.w2": ("model.layers.#.mlp.experts.down_proj",),
}
DELTA_NET = {
    "layers.#.attention": ("model.layers.#.linear_attn",),  # its decay
    "layers.#.attention.wqkvz": tuple(f"model.layers.#.linear_attn.in_proj_{x}" for x in ("qkv", "z")),
    "layers.#.attention.gates": tuple(f"model.layers.#.linear_attn.in_proj_{x}" for x in "ba"),
    "layers.#.attention.conv": ("model.layers.#.linear_attn.conv1d",),
    "layers.#.attention.norm": ("model.layers.#.linear_attn.norm",),
    "layers.#.attention.out": ("model.layers.#.linear_attn.out_proj",),
}
JOINED_DELTA_NET = DELTA_NET | {
    "layers.#.attention.wqkvz": ("model.layers.#.linear_attn.in_proj_qkvz",),
    "layers.#.attention.gates": ("model.layers.#.linear_attn.in_proj_ba",),
}
SHORT_CONV = {
    "layers.#.attention.wo": ("model.layers.#.self_attn.out_proj",),
    "layers.#.attention.q_norm": ("model.layers.#.self_attn.q_layernorm",),
    "layers.#.attention.k_norm": ("model.layers.#.self_attn.k_layernorm",),
    "layers.#.attention.wbcx": ("model.layers.#.conv.in_proj",),
    "layers.#.attention.conv": ("model.layers.#.conv.conv",),
    "layers.#.attention.out": ("model.layers.#.conv.out_proj",),
    "layers.#.feed_forward.w13": tuple(f"model.layers.#.feed_forward.w{i}" for i in (1, 3)),
    "layers.#.feed_forward.w2": ("model.layers.#.feed_forward.w2",),
    "layers.#.attention_norm": ("model.layers.#.operator_norm",),
    "layers.#.ffn_norm": ("model.layers.#.ffn_norm",),
    "norm": ("model.embedding_norm",),
}
SHORT_CONV_EXPERTS = SHORT_CONV | {
    "layers.#.feed_forward": ("model.layers.#.feed_forward.gate",),  # its bias
    "layers.#.feed_forward.gate": ("model.layers.#.feed_forward.gate",),
    "layers.#.feed_forward.w13": tuple(f"model.layers.#.feed_forward.experts.@.w{i}" for i in (1, 3)),
    "layers.#.feed_forward.w2": ("model.layers.#.feed_forward.experts.@.w2",),
    "layers.#.dense.w13": SHORT_CONV["layers.#.feed_forward.w13"],
    "layers.#.dense.w2": SHORT_CONV["layers.#.feed_forward.w2"],
}
GRANITE_EXPERTS = {
    "layers.#.feed_forward.gate": ("model.layers.#.block_sparse_moe.router.layer",),
    "layers.#.feed_forward.w13": ("model.layers.#.block_sparse_moe.input_linear",),
    "layers.#.feed_forward.w2": ("model.layers.#.block_sparse_moe.output_linear",),
}
GEMMA_4 = FOUR_NORMS | {
    "layers.#": ("model.layers.#",),  # its scale
    "layers.#.layer_input.gate": ("model.layers.#.per_layer_input_gate",),
    "layers.#.layer_input.projection": ("model.layers.#.per_layer_projection",),
    "layers.#.layer_input.norm": ("model.layers.#.post_per_layer_input_norm",),
    "layer_inputs.embeddings": ("model.embed_tokens_per_layer",),
    "layer_inputs.projection": ("model.per_layer_model_projection",),
    "layer_inputs.norm": ("model.per_layer_projection_norm",),
    "layers.#.feed_forward": ("model.layers.#.router",),  # the scale of what it takes
    "layers.#.feed_forward.experts": ("model.layers.#.router",),  # the scales of experts
    "layers.#.feed_forward.experts.gate": ("model.layers.#.router.proj",),
    "layers.#.feed_forward.experts.w13": ("model.layers.#.experts.gate_up_proj",),
    "layers.#.feed_forward.experts.w2": ("model.layers.#.experts.down_proj",),
    "layers.#.feed_forward.shared.w13": HF_MODULES["layers.#.feed_forward.w13"],
    "layers.#.feed_forward.shared.w2": HF_MODULES["layers.#.feed_forward.w2"],
    "layers.#.feed_forward.shared_norm": ("model.layers.#.pre_feedforward_layernorm",),
    "layers.#.feed_forward.experts_norm": ("model.layers.#.pre_feedforward_layernorm_2",),
    "layers.#.feed_forward.post_shared_norm": ("model.layers.#.post_feedforward_layernorm_1",),
    "layers.#.feed_forward.post_experts_norm": ("model.layers.#.post_feedforward_layernorm_2",),
}
GLM_NORMS = {
    "layers.#.post_attention_norm": ("model.layers.#.post_self_attn_layernorm",),
    "layers.#.post_ffn_norm": ("model.layers.#.post_mlp_layernorm",),
}
LAST_NORMS = {
    "layers.#.attention.q_norm": ("model.layers.#.self_attn.query_layernorm",),
    "layers.#.attention.k_norm": ("model.layers.#.self_attn.key_layernorm",),
}
FUSED_GATE = {"layers.#.feed_forward.w13": FUSED["layers.#.feed_forward.w13"]}
UNGATED = {"layers.#.feed_forward.w13": ("model.layers.#.mlp.up_proj",)}
OPT = {
    "positions": ("model.embed_positions",),
    "layers.#.attention.wo": ("model.layers.#.self_attn.out_proj",),
    "layers.#.feed_forward.w13": ("model.layers.#.fc1",),
    "layers.#.feed_forward.w2": ("model.layers.#.fc2",),
    "layers.#.attention_norm": ("model.layers.#.self_attn_layer_norm",),
    "layers.#.ffn_norm": ("model.layers.#.final_layer_norm",),
    "norm": ("model.final_layer_norm",),
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
    "qwen3_next": EXPERTS | JOINED_DELTA_NET,
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_moe_text": EXPERTS | DELTA_NET,
    "lfm2": SHORT_CONV,
    "lfm2_moe": SHORT_CONV_EXPERTS,
    "phi3": FUSED,
    "nemotron": UNGATED,
    "opt": OPT,
    "olmo2": POST_NORMS,
    "olmo3": POST_NORMS,
    "gemma2": FOUR_NORMS,
    "gemma3_text": FOUR_NORMS,
    "gemma4_text": GEMMA_4,
    "glm4": GLM_NORMS | FUSED_GATE,
    "glm4_moe": EXPERTS | SHARED_EXPERTS,
    "gpt_oss": GPT_OSS,
    "olmoe": EXPERTS,
    "granitemoe": GRANITE_EXPERTS,
    "hunyuan_v1_dense": LAST_NORMS,
    "exaone4": POST_NORMS,
    "deepseek_v2": LATENT_EXPERTS,
    "deepseek_v3": LATENT_EXPERTS,
    "kimi_k2": LATENT_EXPERTS,
    "glm4_moe_lite": LATENT_EXPERTS,
    "youtu": LATENT,
    "minicpm3": LATENT,
}
# model types in whose files rope turns neighbouring pairs, unless the config says otherwise
INTERLEAVED = {"glm4", "cohere2", "deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "youtu"}
# gpt-oss's (mlp) or Gemma 4's
STACKED_EXPERTS = re.compile(r"(.*?\.(mlp\.)?experts\.(gate_up|down)_proj)(_(bias|blocks|scales))?")

# what may stand before a name: nothing in the file of an inner model, too much in that of a wrapped one
OWN = r"embed_tokens\w*|embed_positions|layers|\w*norm|per_layer_\w+|(?P<head>lm_head)"
PREFIXES = re.compile(rf"^((model|language_model|decoder)\.)*(?=({OWN})\.)")
EXPERT_BIAS = (".expert_bias", ".gate.e_score_correction_bias")  # what LFM2 calls it, and others
VISION = re.compile(r"(model\.)?(vision_tower|visual|audio_tower|embed_vision|embed_audio|multi_modal_projector)\.")
WHOLE_FILES = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}  # each may be an index and shards


def hf_modules(model_type: str) -> dict[str, tuple[str, ...]]:
    return HF_MODULES | OTHER_MODULES.get(model_type, {})


def open_hf(folder: Path, file: Path | None = None) -> ModelFile | None:
    """A Hugging Face model as downloaded; None if the folder holds no weights of one.

    file: the one of its files to read, with the others of its set.
    """
    paths = weight_files(folder) if file is None else files_with(file)
    if not paths:
        return None
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has weights but no config.json, which tells their architecture")
    config = read_json(folder / "config.json")
    read_layer = read_layer_of(config, folder)
    raw = {}
    for path in paths:
        raw |= safetensors_file(path) if path.suffix == ".safetensors" else readers(read_torch(path), path)
    if isinstance(config.get("text_config"), dict):  # of a vision-language model
        config = text_config(config)
        raw = {name: read for name, read in raw.items() if not VISION.match(name)}
        say_once(f"{folder} also takes other input than text; its text part is read")
    where = folder if file is None else file
    raw = with_rows_of_outputs(with_usual_names(raw, where))
    args, raw = head_as_stored(
        args_from_config(Config(config, folder / "config.json")), raw, "model.embed_tokens.weight", "lm_head.weight"
    )
    n_guess, model_type = config.get("num_nextn_predict_layers") or 0, config["model_type"]
    interleaved = model_type in INTERLEAVED and bool(config.get("rope_interleave", True))

    def opened(layout: Layout, raw: Readers) -> ModelFile:
        args, modules = layout.args, hf_modules(model_type)
        raw = {name: read for name, read in raw.items() if not is_unused(name, args)}
        if read_layer is not None:
            layout, raw = kept_layers(layout, raw, modules, read_layer, where)
        order, rows = rope_order(args, interleaved), rows_in_file(args, model_type)
        if args.learned_positions:  # the first two in a file are those of no position
            rows["positions"] = 2 + torch.arange(args.max_seq_length)
        return ModelFile(layout, rename(layout, raw, modules, where, order, rows), tuple(paths))

    model = opened(Layout(args), without_guesses(raw, args.n_layer, n_guess))
    guesses = guesses_in(raw, args.n_layer)
    return replace(model, guesses=(lambda: opened(guess_layout(args), guesses)) if guesses else None)


def with_rows_of_outputs(raw: Readers) -> Readers:
    """Experts as other files have them: a row for each output, those of the gate before those of the rest.

    Gemma 4's lack no more than the word weight in their names.
    """

    def turned(read: Callable[[], Tensor], part: str, leaf: str) -> Tensor:
        tensor = read().mT if leaf == "weight" else read()
        return torch.cat([tensor[:, ::2], tensor[:, 1::2]], dim=1) if part == "gate_up" else tensor

    out = {}
    for name, read in raw.items():
        if match := STACKED_EXPERTS.fullmatch(name):
            leaf = match[5] or "weight"
            name, read = f"{match[1]}.{leaf}", partial(turned, read, match[3], leaf) if match[2] else read
        out[name] = read
    return out


def text_config(config: dict) -> dict:
    """The config of the language part; whether its head is tied is said beside it, or in it."""
    tied = config.get("tie_word_embeddings")
    return config["text_config"] | ({} if tied is None else {"tie_word_embeddings": tied})


def with_usual_names(raw: Readers, where: Path) -> Readers:
    """The tensors with `model.` before each name but the head's, as the causal model of transformers has them."""
    usual = {PREFIXES.sub(lambda match: "" if match["head"] else "model.", name): name for name in raw}
    if len(usual) < len(raw):
        twice = sorted(raw.keys() - usual.values())[0]
        raise ValueError(f"{where} holds {twice} twice, with and without a prefix, and does not say which is meant")
    return {name.replace(*EXPERT_BIAS): raw[theirs] for name, theirs in usual.items()}


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read, or any one .safetensors file.

    Like transformers we take a whole file before an index, which may be left from another save.
    """
    for name in WHOLE_FILES.values():
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            return [present(folder / name, index) for name in named_in(index)]
    paths = [path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter")]
    if len(paths) > 1:
        raise ValueError(
            f"{folder} has several .safetensors files and no model.safetensors.index.json that says which belong; "
            "name one of them"
        )
    return paths


def files_with(file: Path) -> list[Path]:
    """A file of weights, and the others of its set if the index beside it names it."""
    index = file.with_name(f"{WHOLE_FILES.get(file.suffix, file.name)}.index.json")
    names = named_in(index) if index.exists() else []
    return [present(file.with_name(name), index) for name in names] if file.name in names else [file]


def named_in(index: Path) -> list[str]:
    """The names of files in an index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to file names")
    return sorted(set(weight_map.values()))


def present(path: Path, index: Path) -> Path:
    """A file that an index names, which must lie beside it."""
    if path.parent != index.parent or not os.path.isfile(path):  # of a name too long, path.is_file() raises
        raise ValueError(f"{index.parent} lacks {path.name}, which its index names; download it again")
    return path


def safetensors_file(path: Path) -> Readers:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        return {name: lambda name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError) as error:
        raise damaged(path, "a safetensors file", error) from None
