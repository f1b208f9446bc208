"""From a config, in Hugging Face's words, to ModelArgs: what each family of models adds to a plain Llama."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mixers.fields import LARGEST, MAX_LAYERS, MAX_SIZE, SMALLEST
from mixers.rope_scaling import ROPE_TYPES, RopeScaling
from model import ModelArgs


@dataclass(frozen=True)
class Config:
    """A model's config by the keys of Hugging Face's config.json; null counts as missing.

    where: the file, for errors. names: what the file calls a key, where it is another name.
    """

    values: dict
    where: str | Path = "config.json"
    names: dict[str, str] = field(default_factory=dict)

    def get(self, key: str, default=None):
        value = self.values.get(key)
        return default if value is None else value

    def error(self, text: str) -> ValueError:
        return ValueError(f"{self.where}: {text}")

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        return self._positive(key, (int,), default, 1, MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE)

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        return float(self._positive(key, (int, float), default, SMALLEST, LARGEST))

    def _positive(self, key: str, types: tuple[type, ...], default, smallest: float, limit: float):
        value, name = self.get(key, default), self.names.get(key, key)
        if type(value) not in types:
            raise self.error(f"{name} is {'missing' if value is None else repr(value)}; it must be a number")
        if not smallest <= value <= limit:
            raise self.error(f"{name} is {value!r}, which is no possible size")
        return value

    def part(self, values) -> "Config":
        """The rope settings, or part of them, as a config of the same file."""
        if not isinstance(values, dict | None):
            raise self.error(f"the rope settings are {values!r}; an object is needed")
        return Config(values or {}, self.where, self.names)


def rope(config: Config, window_key: str | None) -> tuple[float, RopeScaling | None, float | None]:
    """Base and scaling, and the base of layers with a window if they have one of their own, without scaling.

    Settings occur as rope_theta and rope_scaling, or together as rope_parameters, which may differ by layer type.
    window_key: the number that is the base of layers with a window, where the settings do not differ by layer type.
    """
    settings, windowed = config.part(config.get("rope_scaling") or config.get("rope_parameters")), config.part(None)
    differs = "full_attention" in settings.values
    if differs:
        windowed, settings = (config.part(settings.get(f"{name}_attention")) for name in ("sliding", "full"))
        if windowed.get("rope_type", "default") != "default":
            raise config.error(f"rope type {windowed.get('rope_type')!r} of windowed layers is not supported")
    window_base = None
    if differs or window_key is not None:
        window_base = windowed.number("rope_theta", config.get(window_key or "rope_theta"))
    base = settings.number("rope_theta", config.get("rope_theta"))
    if settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise config.error("partial_rotary_factor other than 1 is not supported")
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    return base, None if rope_type == "default" else rope_scaling(rope_type, settings, config), window_base


def rope_scaling(rope_type: str, settings: Config, config: Config) -> RopeScaling:
    if rope_type not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise settings.error(f"rope type {rope_type!r} is not supported; supported: default, {known}")
    fields = {"factor": settings.number("factor")}
    if rope_type == "llama3":
        fields |= {key: settings.number(key) for key in ("low_freq_factor", "high_freq_factor")}
    if rope_type == "yarn":
        fields |= {
            "low_freq_factor": settings.number("beta_slow", 1.0),
            "high_freq_factor": settings.number("beta_fast", 32.0),
            "whole_pairs": bool(settings.values.get("truncate", True)),
            "attention_factor": settings.number("attention_factor", yarn_growth(fields["factor"], settings)),
        }
    if rope_type != "linear":  # the trained context stands beside the settings, in them, or is the whole one
        key = "original_max_position_embeddings"
        beside = config.get(key) is not None
        fields[key] = (config if beside else settings).whole(key, config.get("max_position_embeddings"))
    return RopeScaling(rope_type, **fields)


def yarn_growth(factor: float, settings: Config) -> float:
    """YaRN's factor of cosines and sines, where the config does not give it."""

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return growth(settings.number("mscale")) / growth(settings.number("mscale_all_dim"))
    return growth(1.0)


def windows(config: Config, n_layer: int, period: int | None) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers without one. use_sliding_window: false wins over a window size.

    period: one layer in so many has none, unless the config says which.
    """
    layer_types, is_full = config.get("layer_types"), {"full_attention": True, "sliding_attention": False}
    if config.get("sliding_window") is None or not config.get("use_sliding_window", True):
        return None, ()
    if layer_types is not None:
        fits = isinstance(layer_types, list) and len(layer_types) == n_layer
        if not fits or not all(str(each) in is_full for each in layer_types):
            needed = f"{n_layer} of {' and '.join(is_full)}"
            raise config.error(f"layer_types is {layer_types!r}; {needed} are needed")
        full = tuple(i for i, each in enumerate(layer_types) if is_full[each])
    elif period is not None:
        period = config.whole("sliding_window_pattern", period)
        full = tuple(range(period - 1, n_layer, period))
    else:  # the first layers may be full
        n_full = config.get("max_window_layers", 0)
        if type(n_full) is not int:
            raise config.error(f"max_window_layers is {n_full!r}; a number is needed")
        full = tuple(range(min(n_full, n_layer)))
    return (None, ()) if len(full) == n_layer else (config.whole("sliding_window"), full)


ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Family:
    """What a model_type adds to the plain Llama row."""

    fields: dict = field(default_factory=dict)  # of ModelArgs
    fields_from: Callable[[Config], dict] = lambda config: {}  # ... that depend on the config
    defaults: dict = field(default_factory=dict)  # what the config may leave out
    full_layers_every: int | None = None  # the period of layers without a window
    window_rope_base: str | None = None  # the config's name of the rope base of layers with one
    expert_size: str = "intermediate_size"  # the config's name of the width of feed-forwards
    activations: dict = field(default_factory=lambda: ACTIVATION_NAMES)


def granite_scales(config: Config) -> dict:
    return {
        "attention_scale": config.number("attention_multiplier", 1.0),
        "embedding_scale": config.number("embedding_multiplier", 1.0),
        "residual_scale": config.number("residual_multiplier", 1.0),
        "logit_scale": 1 / config.number("logits_scaling", 1.0),
    }


def experts(config: Config) -> dict:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise config.error("experts in some layers only are not supported")
    shared = config.get("shared_expert_intermediate_size")
    return {
        "n_expert": config.whole("num_local_experts" if "num_local_experts" in config.values else "num_experts"),
        "n_expert_used": config.whole("num_experts_per_tok"),
        "normalize_experts": bool(config.get("norm_topk_prob", True)),
        "shared_size": config.whole("shared_expert_intermediate_size") if shared else None,
    }


def root_of_dim(config: Config) -> dict:
    return {"embedding_scale": math.sqrt(config.whole("hidden_size"))}


def gemma_scales(config: Config) -> dict:
    keys = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    caps = {name: config.number(key) for name, key in keys.items() if config.get(key) is not None}
    return root_of_dim(config) | caps | {"attention_scale": config.number("query_pre_attn_scalar", 256.0) ** -0.5}


GEMMA_2 = {"norm_offset": True, "post_norm": True}
GEMMA_3 = GEMMA_2 | {"qk_norm": True}
# old configs say gelu, but the models are trained with its approximation
GEMMA_ACTIVATIONS = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
OLMO = {"pre_norm": False, "post_norm": True, "joint_qk_norm": True}

# What transformers takes for a key that a config leaves out; null means none. Sizes of the layers have no default.
PLAIN = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048}
EPS = {"rms_norm_eps": 1e-5}
WINDOW = {"sliding_window": 4096, "layer_types": None}
MISTRAL_CONFIG = WINDOW | {"max_position_embeddings": 131072, "num_key_value_heads": 8}
MIXTRAL_CONFIG = EPS | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": None}
MIXTRAL_CONFIG |= {"rope_theta": 1e6}
QWEN_CONFIG = {"sliding_window": 4096, "use_sliding_window": False, "max_position_embeddings": 32768}
QWEN_2_CONFIG = QWEN_CONFIG | {"max_window_layers": 28, "layer_types": None, "num_key_value_heads": 32}
QWEN_2_MOE_CONFIG = QWEN_2_CONFIG | {"num_key_value_heads": 16, "shared_expert_intermediate_size": 5632}
QWEN_2_MOE_CONFIG |= {"norm_topk_prob": False}
QWEN_3_MOE_CONFIG = QWEN_CONFIG | {"num_key_value_heads": 4, "norm_topk_prob": False}
PHI_CONFIG = EPS | {"sliding_window": None, "max_position_embeddings": 4096}
OLMO_3_CONFIG = EPS | WINDOW | {"rope_theta": 5e5}
GEMMA_CONFIG = {"tie_word_embeddings": True, "head_dim": 256, "max_position_embeddings": 8192}
GEMMA_1_CONFIG = GEMMA_CONFIG | {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16}
GEMMA_WINDOW = WINDOW | {"hidden_activation": "gelu_pytorch_tanh", "num_attention_heads": 8, "num_key_value_heads": 4}
GEMMA_2_CONFIG = GEMMA_CONFIG | GEMMA_WINDOW | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA_3_CONFIG = GEMMA_CONFIG | GEMMA_WINDOW | {"vocab_size": 262208, "final_logit_softcapping": None}
GEMMA_3_CONFIG |= {"max_position_embeddings": 131072, "sliding_window_pattern": None}
GEMMA_3_CONFIG |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
# keys that a family reads only if its defaults name them, as transformers does
READ_BY_SOME = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern"}
READ_BY_SOME |= {"hidden_activation", "attn_logit_softcapping", "final_logit_softcapping", "norm_topk_prob"}

FAMILIES = {
    "llama": Family(),
    "mistral": Family(defaults=MISTRAL_CONFIG),
    "qwen2": Family({"qkv_bias": True}, defaults=QWEN_2_CONFIG),
    "qwen3": Family({"qk_norm": True}, defaults=QWEN_2_CONFIG | {"head_dim": 128}),
    "mixtral": Family({}, experts, MIXTRAL_CONFIG),
    "qwen2_moe": Family({"qkv_bias": True}, experts, QWEN_2_MOE_CONFIG, expert_size="moe_intermediate_size"),
    "qwen3_moe": Family({"qk_norm": True}, experts, QWEN_3_MOE_CONFIG, expert_size="moe_intermediate_size"),
    "phi3": Family(defaults=PHI_CONFIG),
    "granite": Family({}, granite_scales),
    "olmo2": Family(OLMO, defaults=EPS),
    "olmo3": Family(OLMO, defaults=OLMO_3_CONFIG, full_layers_every=4, window_rope_base="rope_theta"),
    "gemma": Family({"norm_offset": True}, root_of_dim, GEMMA_1_CONFIG, activations=GEMMA_ACTIVATIONS),
    "gemma2": Family(GEMMA_2, gemma_scales, GEMMA_2_CONFIG, full_layers_every=2),
    "gemma3_text": Family(GEMMA_3, gemma_scales, GEMMA_3_CONFIG, 6, "rope_local_base_freq"),
}


def args_from_config(config: Config) -> ModelArgs:
    """The sizes and switches of the model that a config describes; what is not supported is refused."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        name = name or config.get("architectures")
        raise config.error(f"architecture {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    read = {key: value for key, value in config.values.items() if key in family.defaults or key not in READ_BY_SOME}
    config = Config(PLAIN | family.defaults | read, config.where, config.names)
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if config.get(key):
            raise config.error(f"{key} is set, which is not supported; of biases those on q, k and v are")
    dim, n_head, n_layer = map(config.whole, ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    rope_base, scaling, window_rope_base = rope(config, family.window_rope_base)
    window, full_layers = windows(config, n_layer, family.full_layers_every)
    fields = {
        "dim": dim,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": config.whole("num_key_value_heads", n_head),
        "head_dim": config.whole("head_dim", dim // n_head),
        "intermediate_size": config.whole(family.expert_size),
        "vocab_size": config.whole("vocab_size"),
        "max_seq_length": config.whole("max_position_embeddings"),
        "norm_eps": config.number("rms_norm_eps"),
        "rope_base": rope_base,
        "rope_scaling": scaling,
        "sliding_window": window,
        "full_layers": full_layers,
        "window_rope_base": None if window is None else window_rope_base,
        "activation": activation(config, family),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    return ModelArgs(**fields | family.fields | family.fields_from(config))


def activation(config: Config, family: Family) -> str:
    name = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in family.activations:
        raise config.error(f"activation {name!r} is not supported; supported: {', '.join(family.activations)}")
    return family.activations[name]
