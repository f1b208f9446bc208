"""The families of models: what each adds to a plain Llama."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from mixers.fields import MAX_LAYERS, MAX_SIZE
from mixers.rope_scaling import ROPE_TYPES, RopeScaling
from model import ModelArgs

# Our module -> the source's modules whose rows it holds, in order; # is the layer's number, and @ that of an expert.
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


HF_FUSED = {
    "layers.#.attention.wqkv": ("model.layers.#.self_attn.qkv_proj",),
    "layers.#.feed_forward.w13": ("model.layers.#.mlp.gate_up_proj",),
}


HF_POST_NORMS = {
    "layers.#.post_attention_norm": ("model.layers.#.post_attention_layernorm",),
    "layers.#.post_ffn_norm": ("model.layers.#.post_feedforward_layernorm",),
}


HF_EXPERTS = {
    "layers.#.feed_forward.gate": ("model.layers.#.mlp.gate",),
    "layers.#.feed_forward.w13": ("model.layers.#.mlp.experts.@.gate_proj", "model.layers.#.mlp.experts.@.up_proj"),
    "layers.#.feed_forward.w2": ("model.layers.#.mlp.experts.@.down_proj",),
    "layers.#.feed_forward.shared.w13": tuple(f"model.layers.#.mlp.shared_expert.{x}_proj" for x in ("gate", "up")),
    "layers.#.feed_forward.shared.w2": ("model.layers.#.mlp.shared_expert.down_proj",),
    "layers.#.feed_forward.shared_gate": ("model.layers.#.mlp.shared_expert_gate",),
}


HF_MIXTRAL = {
    "layers.#.feed_forward.gate": ("model.layers.#.block_sparse_moe.gate",),
    "layers.#.feed_forward.w13": tuple(f"model.layers.#.block_sparse_moe.experts.@.w{i}" for i in (1, 3)),
    "layers.#.feed_forward.w2": ("model.layers.#.block_sparse_moe.experts.@.w2",),
}


HF_FOUR_NORMS = HF_POST_NORMS | {"layers.#.ffn_norm": ("model.layers.#.pre_feedforward_layernorm",)}


def _number(config: dict, key: str, kind: type = int, default=None):
    """config[key] as a positive number; ValueError if it is missing or anything else."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ValueError(f"config.json: {key} is {value!r}; a number is needed")
    limit = 1e30 if kind is float else MAX_LAYERS if key in ("num_hidden_layers", "block_count") else MAX_SIZE
    if not 0 < value <= limit:
        raise ValueError(f"config.json: {key} is {value!r}, which is no possible size")
    return kind(value)


def _rope(config: dict, window_key: str | None) -> tuple[float, RopeScaling | None, float | None]:
    """Base and scaling, and the base of layers with a window if they have one of their own, without scaling.

    They occur as rope_theta and rope_scaling, or together as rope_parameters, which may be told apart by kind of layer.
    window_key: the number that is the windowed layers' base where they are not told apart.
    """
    parameters = _object(config.get("rope_parameters") or config.get("rope_scaling"))
    window_base = None
    if "full_attention" in parameters:
        windowed, parameters = (_object(parameters.get(f"{kind}_attention")) for kind in ("sliding", "full"))
        if windowed.get("rope_type", "default") != "default":
            raise ValueError(f"config.json: rope type {windowed['rope_type']!r} of windowed layers is not supported")
        window_base = _number(windowed, "rope_theta", float, 10000.0)
    elif window_key is not None:
        window_base = _number(config, window_key, float)
    base = _number({"rope_theta": parameters.get("rope_theta", config.get("rope_theta"))}, "rope_theta", float, 10000.0)
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return base, None if kind in (None, "default") else _rope_scaling(kind, parameters), window_base


def _object(value) -> dict:
    if not isinstance(value, dict | None):
        raise ValueError(f"config.json: the rope settings are {value!r}; an object is needed")
    return value or {}


def _rope_scaling(kind: str, parameters: dict) -> RopeScaling:
    if kind not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise ValueError(f"config.json: rope type {kind!r} is not supported; supported: default, {known}")
    factors = {"factor": _number(parameters, "factor", float)}
    if kind == "llama3":
        factors["low_freq_factor"] = _number(parameters, "low_freq_factor", float)
        factors["high_freq_factor"] = _number(parameters, "high_freq_factor", float)
    if kind == "yarn":
        factors["low_freq_factor"] = _number(parameters, "beta_slow", float, 1.0)
        factors["high_freq_factor"] = _number(parameters, "beta_fast", float, 32.0)
        factors["whole_pairs"] = parameters.get("truncate") is not False
        factors["attention_factor"] = _number(
            parameters, "attention_factor", float, _yarn_growth(factors["factor"], parameters)
        )
    if kind != "linear":
        factors["original_max_position_embeddings"] = _number(parameters, "original_max_position_embeddings")
    return RopeScaling(kind, **factors)


def _yarn_growth(factor: float, parameters: dict) -> float:
    """What YaRN multiplies cosines and sines by, unless told."""

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return growth(_number(parameters, "mscale", float)) / growth(_number(parameters, "mscale_all_dim", float))
    return growth(1.0)


def _windows(config: dict, n_layer: int, period: int | None) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers without one. use_sliding_window: false wins over a window size.

    period: every so many layers one has none, unless the config says which.
    """
    kinds = config.get("layer_types")
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        return None, ()
    if kinds is not None:
        known = {"full_attention": True, "sliding_attention": False}
        if not isinstance(kinds, list) or len(kinds) != n_layer or not all(str(kind) in known for kind in kinds):
            raise ValueError(f"config.json: layer_types is {kinds!r}; {n_layer} of {' and '.join(known)} are needed")
        full = tuple(i for i, kind in enumerate(kinds) if known[kind])
    elif period is not None:
        period = _number(config, "sliding_window_pattern", default=period)
        full = tuple(range(period - 1, n_layer, period))
    else:  # the first layers may be full
        n_full = config.get("max_window_layers", 28) if "use_sliding_window" in config else 0
        if type(n_full) is not int:
            raise ValueError(f"config.json: max_window_layers is {n_full!r}; a number is needed")
        full = tuple(range(min(n_full, n_layer)))
    return (None, ()) if len(full) == n_layer else (_number(config, "sliding_window"), full)


def _cap(config: dict, key: str) -> float | None:
    return None if config.get(key) is None else _number(config, key, float)


ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
    """What a model_type adds to the plain Llama row."""

    fields: dict = field(default_factory=dict)  # of ModelArgs
    fields_from: Callable[[dict], dict] = lambda config: {}  # ... that depend on the config
    defaults: dict = field(default_factory=dict)  # what the config may leave out
    modules: dict = field(default_factory=dict)  # names other than those in HF_MODULES
    full_layers_every: int | None = None  # the period of layers without a window
    window_rope_base: str | None = None  # the config's name of the rope base of layers with one
    expert_size: str = "intermediate_size"  # the config's name of the width of feed-forwards
    activations: dict = field(default_factory=lambda: ACTIVATION_NAMES)


def _granite_scales(config: dict) -> dict:
    return {
        "attention_scale": _number(config, "attention_multiplier", float, 1.0),
        "embedding_scale": _number(config, "embedding_multiplier", float, 1.0),
        "residual_scale": _number(config, "residual_multiplier", float, 1.0),
        "logit_scale": 1 / _number(config, "logits_scaling", float, 1.0),
    }


def _experts(config: dict) -> dict:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise ValueError("config.json: experts in some layers only are not supported")
    count = "num_local_experts" if "num_local_experts" in config else "num_experts"
    shared = config.get("shared_expert_intermediate_size")
    return {
        "n_expert": _number(config, count),
        "n_expert_used": _number(config, "num_experts_per_tok"),
        "normalize_experts": bool(config.get("norm_topk_prob", False)),
        "shared_size": _number(config, "shared_expert_intermediate_size") if shared else None,
    }


def _embedding_scale(config: dict) -> dict:
    return {"embedding_scale": math.sqrt(_number(config, "hidden_size"))}


def _gemma_scales(config: dict) -> dict:
    return _embedding_scale(config) | {
        "attention_scale": _number(config, "query_pre_attn_scalar", float, 256.0) ** -0.5,
        "attention_softcap": _cap(config, "attn_logit_softcapping"),
        "logit_softcap": _cap(config, "final_logit_softcapping"),
    }


GEMMA = {"norm_offset": True}


GEMMA_2 = GEMMA | {"post_norm": True}


# old configs say gelu, but the models are trained with its approximation
GEMMA_ACTIVATIONS = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


GEMMA_CONFIG = {"tie_word_embeddings": True, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"}


GEMMA_3_CONFIG = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208, "sliding_window": 4096}


GEMMA_3_CONFIG |= {"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4}


OLMO = {"pre_norm": False, "post_norm": True, "joint_qk_norm": True}


HF_FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family({"qkv_bias": True}),
    "qwen3": Family({"qk_norm": True}),
    "mixtral": Family({}, _experts, {"norm_topk_prob": True}, HF_MIXTRAL),
    "qwen2_moe": Family({"qkv_bias": True}, _experts, {}, HF_EXPERTS, expert_size="moe_intermediate_size"),
    "qwen3_moe": Family({"qk_norm": True}, _experts, {}, HF_EXPERTS, expert_size="moe_intermediate_size"),
    "phi3": Family(modules=HF_FUSED),
    "granite": Family(fields_from=_granite_scales),
    "olmo2": Family(OLMO, modules=HF_POST_NORMS),
    "olmo3": Family(OLMO, modules=HF_POST_NORMS, full_layers_every=4, window_rope_base="rope_theta"),
    "gemma": Family(GEMMA, _embedding_scale, GEMMA_CONFIG, activations=GEMMA_ACTIVATIONS),
    "gemma2": Family(
        GEMMA_2,
        _gemma_scales,
        GEMMA_CONFIG | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
        HF_FOUR_NORMS,
        full_layers_every=2,
        activations=GEMMA_ACTIVATIONS,
    ),
    "gemma3_text": Family(
        GEMMA_2 | {"qk_norm": True},
        _gemma_scales,
        GEMMA_CONFIG | GEMMA_3_CONFIG,
        HF_FOUR_NORMS,
        full_layers_every=6,
        window_rope_base="rope_local_base_freq",
        activations=GEMMA_ACTIVATIONS,
    ),
}


def family_of(config: dict) -> Family:
    """The row of HF_FAMILIES for a config.json. Raises ValueError, with what is supported, if it has none."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in HF_FAMILIES:
        name = name or config.get("architectures")
        raise ValueError(f"config.json: architecture {name!r} is not supported; supported: {', '.join(HF_FAMILIES)}")
    return HF_FAMILIES[name]


def args_from_hf(config: dict) -> ModelArgs:
    """ModelArgs from a Hugging Face config.json. Raises ValueError on anything that is not supported."""
    family = family_of(config)
    config = family.defaults | config
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if config.get(key):
            raise ValueError(f"config.json: {key} is set, which is not supported; of biases those on q, k and v are")
    dim, n_head, n_layer = (_number(config, f) for f in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    rope_base, rope_scaling, window_rope_base = _rope(config, family.window_rope_base)
    window, full_layers = _windows(config, n_layer, family.full_layers_every)
    fields = {
        "dim": dim,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": _number(config, "num_key_value_heads", default=n_head),
        "head_dim": _number(config, "head_dim", default=dim // n_head),
        "intermediate_size": _number(config, family.expert_size),
        "vocab_size": _number(config, "vocab_size"),
        "max_seq_length": _number(config, "max_position_embeddings", default=2048),
        "norm_eps": _number(config, "rms_norm_eps", float, 1e-6),
        "rope_base": rope_base,
        "rope_scaling": rope_scaling,
        "sliding_window": window,
        "full_layers": full_layers,
        "window_rope_base": None if window is None else window_rope_base,
        "activation": _activation(config, family),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    return ModelArgs(**fields | family.fields | family.fields_from(config))


def _activation(config: dict, family: Family) -> str:
    name = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in family.activations:
        known = ", ".join(family.activations)
        raise ValueError(f"config.json: activation {name!r} is not supported; supported: {known}")
    return family.activations[name]
