"""From a config, in Hugging Face's words, to ModelArgs: what each family of models adds to a plain Llama."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from mixers.activations import CLAMP, SWIGLU_SLOPE
from mixers.rope_scaling import ROPE_TYPES, RopeScaling
from model import ModelArgs
from weights.files import Config


def rope(config: Config, family: "Family", head_dim: int) -> dict:
    """The fields of rope; layers with a window may have a base of their own, and then no scaling.

    Settings occur as rope_theta and rope_scaling, or together as rope_parameters, which may differ by layer type.
    """
    settings, windowed = config.part(config.get("rope_scaling") or config.get("rope_parameters")), config.part(None)
    differs = "full_attention" in settings.values
    if differs:
        windowed, settings = (config.part(settings.get(f"{name}_attention")) for name in ("sliding", "full"))
        if windowed.get("rope_type", "default") != "default":
            raise config.error(f"rope type {windowed.get('rope_type')!r} of windowed layers is not supported")
    window_base = None
    if differs or family.window_rope_base is not None:
        window_base = windowed.number("rope_theta", config.get(family.window_rope_base or "rope_theta"))
    base = settings.number("rope_theta", config.get("rope_theta"))
    part = settings.number("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if part > 1 or (part < 1 and "partial_rotary_factor" not in family.defaults):
        raise config.error(f"partial_rotary_factor {part} is not supported in models of this type")
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    if rope_type == "dynamic" and settings.get("alpha"):  # a fixed growth of the base
        rope_type, base = "default", base * settings.number("alpha") ** (head_dim / (head_dim - 2))
    return {
        "rope_base": base,
        "rope_scaling": None if rope_type == "default" else rope_scaling(rope_type, settings, config),
        "rope_dim": None if part == 1 else int(part * head_dim),
        "window_rope_base": window_base,
        "late_query_scale": settings.number("llama_4_scaling_beta") if settings.get("llama_4_scaling_beta") else None,
    }


def rope_scaling(rope_type: str, settings: Config, config: Config) -> RopeScaling:
    rope_type = "longrope" if rope_type == "su" else rope_type  # its first name
    if rope_type not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise settings.error(f"rope type {rope_type!r} is not supported; supported: default, {known}")
    fields, key = {}, "original_max_position_embeddings"
    if rope_type != "linear":  # the trained context stands beside the settings, in them, or is the whole one
        beside = config.get(key) is not None
        fields[key] = (config if beside else settings).whole(key, config.get("max_position_embeddings"))
    if rope_type == "longrope":
        return RopeScaling(rope_type, **fields, **longrope(settings, config, fields[key]))
    fields["factor"] = settings.number("factor")
    if rope_type == "llama3":
        fields |= {key: settings.number(key) for key in ("low_freq_factor", "high_freq_factor")}
    if rope_type == "yarn":
        fields |= {
            "low_freq_factor": settings.number("beta_slow", 1.0),
            "high_freq_factor": settings.number("beta_fast", 32.0),
            "whole_pairs": bool(settings.values.get("truncate", True)),
            "attention_factor": settings.number("attention_factor", yarn_growth(fields["factor"], settings)),
        }
    return RopeScaling(rope_type, **fields)


def longrope(settings: Config, config: Config, trained: int) -> dict:
    factor = settings.number("factor", config.whole("max_position_embeddings") / trained)
    growth = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 < trained else 1.0
    return {
        "factors": tuple(settings.list_of(int | float, "short_factor")),
        "long_factors": tuple(settings.list_of(int | float, "long_factor")),
        "attention_factor": settings.number("attention_factor", growth),
    }


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


def rope_in_some(config: Config) -> dict:
    """The config says which layers have rope, or that one in so many has none."""
    n_layer, window = config.whole("num_hidden_layers"), bool(config.get("use_sliding_window"))
    period = config.whole("no_rope_layer_interval")
    rotated = [(i + 1) % period for i in range(n_layer)]
    if config.get("no_rope_layers") is not None:
        rotated = config.list_of(int, "no_rope_layers")[:n_layer]
    if window and config.get("layer_types") is None:
        raise config.error("use_sliding_window needs layer_types, which say the layers with a window")
    return {"unrotated_layers": tuple(i for i, has_rope in enumerate(rotated) if not has_rope)}


def rope_with_window(config: Config) -> dict:
    """Only layers with a window have rope."""
    n_layer = config.whole("num_hidden_layers")
    window, full_layers = windows(config, n_layer, 4)
    return {"unrotated_layers": tuple(range(n_layer)) if window is None else full_layers}


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
    norm_eps: str = "rms_norm_eps"  # the config's name of the norms' epsilon
    biases: dict = field(default_factory=dict)  # the config's names of what has biases -> fields of ModelArgs
    activations: dict = field(default_factory=lambda: ACTIVATION_NAMES)


def granite_scales(config: Config) -> dict:
    return {
        "attention_scale": config.number("attention_multiplier", 1.0),
        "embedding_scale": config.number("embedding_multiplier", 1.0),
        "residual_scale": config.number("residual_multiplier", 1.0),
        "logit_scale": 1 / config.number("logits_scaling", 1.0),
    }


def granite_experts(config: Config) -> dict:
    return granite_scales(config) | experts(config)


def experts(config: Config) -> dict:
    n_layer, step = config.whole("num_hidden_layers"), config.whole("decoder_sparse_step", 1)
    without = config.list_of(int, "mlp_only_layers") if config.get("mlp_only_layers") else []
    dense = tuple(i for i in range(n_layer) if i in without or (i + 1) % step)
    shared = config.get("shared_expert_intermediate_size")
    return dense_layers(config, dense) | {
        "n_expert": config.whole("num_local_experts" if "num_local_experts" in config.values else "num_experts"),
        "n_expert_used": config.whole("num_experts_per_tok"),
        "normalize_experts": bool(config.get("norm_topk_prob", True)),
        "shared_size": config.whole("shared_expert_intermediate_size") if shared else None,
    }


def dense_layers(config: Config, layers: tuple[int, ...]) -> dict:
    """Of a mixture of experts: the layers that have one feed-forward, and its width."""
    return {"dense_layers": layers, "dense_size": config.whole("intermediate_size") if layers else None}


def sigmoid_experts(config: Config) -> dict:
    groups, n_dense = config.whole("n_group"), config.count("first_k_dense_replace")
    return dense_layers(config, tuple(range(n_dense))) | {
        "n_expert": config.whole("n_routed_experts"),
        "n_expert_used": config.whole("num_experts_per_tok"),
        "normalize_experts": bool(config.get("norm_topk_prob")),
        "expert_scale": config.number("routed_scaling_factor"),
        "sigmoid_experts": True,
        "n_expert_group": groups if groups > 1 else None,
        "n_group_used": config.whole("topk_group") if groups > 1 else None,
        "shared_size": config.whole("n_shared_experts") * config.whole("moe_intermediate_size"),
        "shared_gate": False,
        "qk_norm": bool(config.get("use_qk_norm")),
    }


def clamped_experts(config: Config) -> dict:
    for key, wanted in (("swiglu_alpha", SWIGLU_SLOPE), ("swiglu_limit", CLAMP)):
        if config.number(key, wanted) != wanted:
            raise config.error(f"{key} is {config.get(key)}; only {wanted} is supported")
    return experts(config)


def unclipped(config: Config) -> dict:
    if config.get("clip_qkv") is not None:
        raise config.error(f"clip_qkv is {config.get('clip_qkv')}, which is not supported")
    return experts(config)


def cohere_fields(config: Config) -> dict:
    return rope_with_window(config) | {"logit_scale": config.number("logit_scale")}


def exaone_fields(config: Config) -> dict:
    return rope_with_window(config) if config.get("sliding_window") is not None else {}


def root_of_dim(config: Config) -> dict:
    return {"embedding_scale": math.sqrt(config.whole("hidden_size"))}


def gemma_scales(config: Config) -> dict:
    keys = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    caps = {name: config.number(key) for name, key in keys.items() if config.get(key) is not None}
    return root_of_dim(config) | caps | {"attention_scale": config.number("query_pre_attn_scalar", 256.0) ** -0.5}


GEMMA_2 = {"norm_offset": True, "post_norm": True}
GEMMA_3 = GEMMA_2 | {"qk_norm": True}
MOE_SIZE, CLAMPED = "moe_intermediate_size", {"silu": "clamped_swiglu"}
# old configs say gelu, but the models are trained with its approximation
GELU = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
POST_NORM = {"pre_norm": False, "post_norm": True}
OLMO = POST_NORM | {"joint_qk_norm": True}
COHERE = {"mean_norm": True, "parallel": True}
GPT_OSS = {"attention_sinks": True, "ffn_bias": True}

ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "wo_bias")}
QKV_BIAS = {"attention_bias": ("qkv_bias",)}
BIASES = ATTENTION_BIAS | {"mlp_bias": ("ffn_bias",)}
SEED_BIASES = QKV_BIAS | {"attention_out_bias": ("wo_bias",), "mlp_bias": ("ffn_bias",)}

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
MOE_CONFIG = {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None}
QWEN_2_MOE_CONFIG |= MOE_CONFIG | {"qkv_bias": True}
QWEN_3_MOE_CONFIG = QWEN_CONFIG | MOE_CONFIG | {"num_key_value_heads": 4}
PHI_CONFIG = EPS | {"sliding_window": None, "max_position_embeddings": 4096, "partial_rotary_factor": 1.0}
PHI_CONFIG |= {"original_max_position_embeddings": 4096}
OLMO_3_CONFIG = EPS | WINDOW | {"rope_theta": 5e5}
GEMMA_CONFIG = {"tie_word_embeddings": True, "head_dim": 256, "max_position_embeddings": 8192}
GEMMA_1_CONFIG = GEMMA_CONFIG | {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16}
GEMMA_WINDOW = WINDOW | {"hidden_activation": "gelu_pytorch_tanh", "num_attention_heads": 8, "num_key_value_heads": 4}
GEMMA_2_CONFIG = GEMMA_CONFIG | GEMMA_WINDOW | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA_3_CONFIG = GEMMA_CONFIG | GEMMA_WINDOW | {"vocab_size": 262208, "final_logit_softcapping": None}
GEMMA_3_CONFIG |= {"max_position_embeddings": 131072, "sliding_window_pattern": None}
GEMMA_3_CONFIG |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
SMOLLM_3_CONFIG = {"rope_theta": 2e6, "max_position_embeddings": 32768, "num_key_value_heads": 4, "layer_types": None}
SMOLLM_3_CONFIG |= {"sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True}
SMOLLM_3_CONFIG |= {"no_rope_layers": None, "no_rope_layer_interval": 4}
GLM_CONFIG = {"partial_rotary_factor": 0.5, "max_position_embeddings": 131072}
GLM_4_CONFIG = GLM_CONFIG | {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7}
GLM_4_CONFIG |= {"attention_bias": True}
GLM_MOE_CONFIG = GLM_CONFIG | EPS | {"num_key_value_heads": 8, "n_group": 1, "topk_group": 1, "use_qk_norm": False}
GLM_MOE_CONFIG |= {"first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
GLM_MOE_CONFIG |= {"n_shared_experts": 1}
GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
GPT_OSS_CONFIG = EPS | {"rope_theta": 1.5e5, "max_position_embeddings": 131072, "num_key_value_heads": 8}
GPT_OSS_CONFIG |= {"head_dim": 64}
GPT_OSS_CONFIG |= {"sliding_window": 128, "layer_types": None, "rope_parameters": GPT_OSS_ROPE, "attention_bias": True}
MINISTRAL_ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
MINISTRAL_ROPE |= {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
MINISTRAL_CONFIG = EPS | {"max_position_embeddings": 262144, "num_key_value_heads": 8, "head_dim": 128}
MINISTRAL_CONFIG |= {"sliding_window": None, "rope_parameters": MINISTRAL_ROPE}
SEED_CONFIG = {"max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True}
OLMOE_CONFIG = EPS | {"max_position_embeddings": 4096, "norm_topk_prob": False, "clip_qkv": None}
EXAONE_CONFIG = EPS | WINDOW | {"num_key_value_heads": 32, "sliding_window_pattern": 4}
COHERE_CONFIG = WINDOW | {"layer_norm_eps": 1e-5, "max_position_embeddings": 8192, "logit_scale": 0.0625}
COHERE_CONFIG |= {"tie_word_embeddings": True, "sliding_window_pattern": 4}
# keys that a family reads only if its defaults name them, as transformers does
READ_BY_SOME = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern"}
READ_BY_SOME |= {"hidden_activation", "attn_logit_softcapping", "final_logit_softcapping", "norm_topk_prob"}
READ_BY_SOME |= {"decoder_sparse_step", "mlp_only_layers"}

FAMILIES = {
    "llama": Family(biases=BIASES),
    "smollm3": Family({}, rope_in_some, SMOLLM_3_CONFIG, biases=BIASES),
    "mistral": Family(defaults=MISTRAL_CONFIG),
    "ministral3": Family(defaults=MINISTRAL_CONFIG),
    "qwen2": Family({"qkv_bias": True}, defaults=QWEN_2_CONFIG),
    "qwen3": Family({"qk_norm": True}, defaults=QWEN_2_CONFIG | {"head_dim": 128}, biases=ATTENTION_BIAS),
    "mixtral": Family({}, experts, MIXTRAL_CONFIG),
    "qwen2_moe": Family({}, experts, QWEN_2_MOE_CONFIG, expert_size=MOE_SIZE, biases={"qkv_bias": ("qkv_bias",)}),
    "qwen3_moe": Family({"qk_norm": True}, experts, QWEN_3_MOE_CONFIG, expert_size=MOE_SIZE, biases=ATTENTION_BIAS),
    "phi3": Family(defaults=PHI_CONFIG),
    "glm4": Family({"post_norm": True}, defaults=GLM_4_CONFIG, biases=QKV_BIAS),
    "glm4_moe": Family({}, sigmoid_experts, GLM_MOE_CONFIG, expert_size=MOE_SIZE, biases=QKV_BIAS),
    "gpt_oss": Family(GPT_OSS, clamped_experts, GPT_OSS_CONFIG, 2, biases=ATTENTION_BIAS, activations=CLAMPED),
    "seed_oss": Family(defaults=SEED_CONFIG, biases=SEED_BIASES),
    "granite": Family({}, granite_scales, biases=BIASES),
    "granitemoe": Family({}, granite_experts, biases=ATTENTION_BIAS),
    "hunyuan_v1_dense": Family({"qk_norm": True, "qk_norm_last": True}, defaults=EPS, biases=ATTENTION_BIAS),
    "exaone4": Family(POST_NORM | {"qk_norm": True}, exaone_fields, EXAONE_CONFIG, 4),
    "cohere2": Family(COHERE, cohere_fields, COHERE_CONFIG, 4, norm_eps="layer_norm_eps", biases=ATTENTION_BIAS),
    "olmo2": Family(OLMO, defaults=EPS, biases=ATTENTION_BIAS),
    "olmo3": Family(
        OLMO, defaults=OLMO_3_CONFIG, full_layers_every=4, window_rope_base="rope_theta", biases=ATTENTION_BIAS
    ),
    "olmoe": Family({"joint_qk_norm": True}, unclipped, OLMOE_CONFIG, biases=ATTENTION_BIAS),
    "gemma": Family({"norm_offset": True}, root_of_dim, GEMMA_1_CONFIG, biases=ATTENTION_BIAS, activations=GELU),
    "gemma2": Family(GEMMA_2, gemma_scales, GEMMA_2_CONFIG, full_layers_every=2, biases=ATTENTION_BIAS),
    "gemma3_text": Family(GEMMA_3, gemma_scales, GEMMA_3_CONFIG, 6, "rope_local_base_freq", biases=ATTENTION_BIAS),
}


# keys that change no number: words about the file, training and generation, and what is true of a whole family
WITHOUT_EFFECT = re.compile(
    r"_.*|.*token(_id|_ids|izer|izer_class)|.*(dropout|pdrop|version|jitter_noise|_coef|_penalty|_ids)|initializer\w*"
    r"|(transformers|unsloth|output|return|router|num_return|forced|suppress|id2|label)\W?\w*|architectures|auto_map"
    r"|model_type|intermediate_size|(bos|eos|pad|unk|sep|mask)_token|(\w+_)?(max|min|seq|sequence)_length|n_ctx"
    r"|gradient_checkpointing|(use_)?(flash_attn|attn_implementation)\w*|(anyres|vit|image|vision|video|audio)_\w+"
    r"|(torch_)?dtype|use_cache|cache_implementation|(tie|is)_(encoder_)?decoder|is_llama_config|pretraining_tp|prefix"
    r"|num_(labels|beams|beam_groups|nextn_predict_layers|mtp_layers)|do_sample|early_stopping|typical_p"
    r"|temperature|top_[kp]|(encoder_)?no_repeat_ngram_size|remove_invalid_values|finetuning_task|problem_type"
    r"|task_specific_params|pruned_heads|chunk_size_feed_forward|torchscript|use_bfloat16|neftune_noise_alpha|hidden_act"
    r"|rope_(theta|scaling|parameters|local_base_freq)|use_(gated_activation|rotary_pos_emb|qk_norm|embedding_sharing)"
    r"|use_parallel_(block|embedding)|position_embedding_type|order_of_interleaved_layers|layer_switch|norm_type|pool_type"
    r"|attention_head_dim|org_vocab_size|cla_share_factor|dense_list|(pad|mask_init|(im|text)_(start|end))_id"
    r"|enable_lm_head_fp32|initial_context_length|experts_per_token|(quantization|compression)_config"
)


def refuse_unknown(given: dict, config: Config, family: Family) -> None:
    """Refuse a key that might change the model and that nothing here reads; as off count null, false, 0, 1 and empty.

    given: the keys of the file.
    """
    for key, value in given.items():
        is_off = (
            value is None or value is False or value in ("", [], {}) or (type(value) is not bool and value in (0, 1))
        )
        known = key in config.read or key in family.defaults or key in READ_BY_SOME or WITHOUT_EFFECT.fullmatch(key)
        if not known and not is_off:
            raise config.error(f"{key} is {value!r}, which is not known here; if it changes nothing, take it out")


def args_from_config(config: Config) -> ModelArgs:
    """The sizes and switches of the model that a config describes; what is not supported is refused."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        name = name or config.get("architectures")
        raise config.error(f"architecture {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    given = config.values
    read = {key: value for key, value in given.items() if key in family.defaults or key not in READ_BY_SOME}
    config = Config(PLAIN | family.defaults | read, config.where, config.names)
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if config.get(key) and key not in family.biases:
            raise config.error(f"{key} is set, which is not supported in models of type {name}")
    dim, n_head, n_layer = map(config.whole, ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    head_dim = config.whole("head_dim", dim // n_head)
    window, full_layers = windows(config, n_layer, family.full_layers_every)
    fields = {
        "dim": dim,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": config.whole("num_key_value_heads", n_head),
        "head_dim": head_dim,
        "intermediate_size": config.whole(family.expert_size),
        "vocab_size": config.whole("vocab_size"),
        "max_seq_length": config.whole("max_position_embeddings"),
        "norm_eps": config.number(family.norm_eps),
        **rope(config, family, head_dim),
        "sliding_window": window,
        "full_layers": full_layers,
        "activation": activation(config, family),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    if window is None:
        fields["window_rope_base"] = None
    for key, names in family.biases.items():
        fields |= dict.fromkeys(names, bool(config.get(key)))
    args = ModelArgs(**fields | family.fields | family.fields_from(config))
    if not config.names:  # a config.json; other files have keys that others read
        refuse_unknown(given, config, family)
    return args


def activation(config: Config, family: Family) -> str:
    name = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in family.activations:
        raise config.error(f"activation {name!r} is not supported; supported: {', '.join(family.activations)}")
    return family.activations[name]
