"""From a config, in Hugging Face's words, to ModelArgs: what each family of models adds to a plain Llama."""

import math

from model import ModelArgs
from weights.families.defaults import (
    COHERE_CONFIG,
    DEEPSEEK_2_CONFIG,
    DEEPSEEK_3_CONFIG,
    EPS,
    EXAONE_CONFIG,
    GEMMA_1_CONFIG,
    GEMMA_2_CONFIG,
    GEMMA_3_CONFIG,
    GEMMA_4_CONFIG,
    GLM_4_CONFIG,
    GLM_LITE_CONFIG,
    GLM_MOE_CONFIG,
    GPT_OSS_CONFIG,
    LFM_2_DENSE_CONFIG,
    LFM_2_MOE_CONFIG,
    MINICPM_3_CONFIG,
    MINISTRAL_CONFIG,
    MISTRAL_CONFIG,
    MIXTRAL_CONFIG,
    NEMOTRON_CONFIG,
    OLMO_3_CONFIG,
    OLMOE_CONFIG,
    OPT_CONFIG,
    PHI_CONFIG,
    PLAIN,
    QWEN_2_CONFIG,
    QWEN_2_MOE_CONFIG,
    QWEN_3_5_CONFIG,
    QWEN_3_5_MOE_CONFIG,
    QWEN_3_MOE_CONFIG,
    QWEN_3_NEXT_CONFIG,
    READ_BY_SOME,
    SEED_CONFIG,
    SMOLLM_3_CONFIG,
    YOUTU_CONFIG,
)
from weights.families.experts import clamped_experts, experts, normed_sigmoid_experts, only, unclipped
from weights.families.family import Family, activation
from weights.families.gemma_4 import gemma_4_fields
from weights.families.latent import (
    latent,
    latent_with_scales,
    latent_with_sigmoid_experts,
    latent_with_softmax_experts,
)
from weights.families.recurrent import delta_experts, delta_net, dense_short_convs, short_convs_and_experts
from weights.families.rope import rope
from weights.families.unknown import refuse_unknown
from weights.families.windows import rope_in_some, rope_with_window, windows
from weights.files import Config


def granite_scales(config: Config) -> dict:
    return {
        "attention_scale": config.number("attention_multiplier", 1.0),
        "embedding_scale": config.number("embedding_multiplier", 1.0),
        "residual_scale": config.number("residual_multiplier", 1.0),
        "logit_scale": 1 / config.number("logits_scaling", 1.0),
    }


def granite_experts(config: Config) -> dict:
    return granite_scales(config) | experts(config)


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


def opt_fields(config: Config) -> dict:
    """Learned positions in the place of rope, and one switch for all biases."""
    only(config, "do_layer_norm_before", True)
    only(config, "layer_norm_elementwise_affine", True)
    only(config, "_remove_final_layer_norm", False)
    only(config, "activation_function", "relu")
    only(config, "word_embed_proj_dim", config.whole("hidden_size"))
    has_biases = bool(config.get("enable_bias"))
    biases = dict.fromkeys(("qkv_bias", "wo_bias", "ffn_bias"), has_biases)
    return biases | {"activation": "relu", "unrotated_layers": tuple(range(config.whole("num_hidden_layers")))}


GEMMA_2 = {"norm_offset": True, "post_norm": True}
GEMMA_3 = GEMMA_2 | {"qk_norm": True}
GEMMA_4 = {"post_norm": True, "qk_norm": True, "value_norm": True, "attention_scale": 1.0, "layer_scales": True}
MOE_SIZE, CLAMPED = "moe_intermediate_size", {"silu": "clamped_swiglu"}
# old configs say gelu, but the models are trained with its approximation
GELU = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
POST_NORM = {"pre_norm": False, "post_norm": True}
OLMO = POST_NORM | {"joint_qk_norm": True}
UNGATED = {"gated": False, "mean_norm": True, "norm_bias": True}
COHERE = {"mean_norm": True, "parallel": True}
GPT_OSS = {"attention_sinks": True, "ffn_bias": True}
DELTA = {"norm_offset": True, "qk_norm": True}
SILU = {"silu": "silu"}  # which is also that of the convolution

ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "wo_bias")}
QKV_BIAS = {"attention_bias": ("qkv_bias",)}
BIASES = ATTENTION_BIAS | {"mlp_bias": ("ffn_bias",)}
SEED_BIASES = QKV_BIAS | {"attention_out_bias": ("wo_bias",), "mlp_bias": ("ffn_bias",)}
LATENT_EXPERTS = {"expert_size": MOE_SIZE, "biases": ATTENTION_BIAS}

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
    "qwen3_next": Family(
        DELTA, delta_experts, QWEN_3_NEXT_CONFIG, expert_size=MOE_SIZE, biases=ATTENTION_BIAS, activations=SILU
    ),
    "qwen3_5_text": Family(DELTA, delta_net, QWEN_3_5_CONFIG, biases=ATTENTION_BIAS, activations=SILU),
    "qwen3_5_moe_text": Family(
        DELTA, delta_experts, QWEN_3_5_MOE_CONFIG, expert_size=MOE_SIZE, biases=ATTENTION_BIAS, activations=SILU
    ),
    "lfm2": Family({"qk_norm": True}, dense_short_convs, LFM_2_DENSE_CONFIG, norm_eps="norm_eps"),
    "lfm2_moe": Family(
        {"qk_norm": True}, short_convs_and_experts, LFM_2_MOE_CONFIG, expert_size=MOE_SIZE, norm_eps="norm_eps"
    ),
    "phi3": Family(defaults=PHI_CONFIG),
    "glm4": Family({"post_norm": True}, defaults=GLM_4_CONFIG, biases=QKV_BIAS),
    "glm4_moe": Family({}, normed_sigmoid_experts, GLM_MOE_CONFIG, expert_size=MOE_SIZE, biases=QKV_BIAS),
    "deepseek_v2": Family({}, latent_with_softmax_experts, DEEPSEEK_2_CONFIG, **LATENT_EXPERTS),
    "deepseek_v3": Family({}, latent_with_sigmoid_experts, DEEPSEEK_3_CONFIG, **LATENT_EXPERTS),
    "kimi_k2": Family({}, latent_with_sigmoid_experts, DEEPSEEK_3_CONFIG, **LATENT_EXPERTS),
    "glm4_moe_lite": Family({}, latent_with_sigmoid_experts, GLM_LITE_CONFIG, **LATENT_EXPERTS),
    "youtu": Family({}, latent, YOUTU_CONFIG, biases=ATTENTION_BIAS),
    "minicpm3": Family({}, latent_with_scales, MINICPM_3_CONFIG, biases=ATTENTION_BIAS),
    "gpt_oss": Family(GPT_OSS, clamped_experts, GPT_OSS_CONFIG, 2, biases=ATTENTION_BIAS, activations=CLAMPED),
    "seed_oss": Family(defaults=SEED_CONFIG, biases=SEED_BIASES),
    "granite": Family({}, granite_scales, biases=BIASES),
    "granitemoe": Family({}, granite_experts, biases=ATTENTION_BIAS),
    "hunyuan_v1_dense": Family({"qk_norm": True, "qk_norm_last": True}, defaults=EPS, biases=ATTENTION_BIAS),
    "exaone4": Family(POST_NORM | {"qk_norm": True}, exaone_fields, EXAONE_CONFIG, 4),
    "cohere2": Family(COHERE, cohere_fields, COHERE_CONFIG, 4, norm_eps="layer_norm_eps", biases=ATTENTION_BIAS),
    "nemotron": Family(UNGATED | {"norm_offset": True}, defaults=NEMOTRON_CONFIG, norm_eps="norm_eps", biases=BIASES),
    "opt": Family(UNGATED | {"learned_positions": True}, opt_fields, OPT_CONFIG, expert_size="ffn_dim"),
    "olmo2": Family(OLMO, defaults=EPS, biases=ATTENTION_BIAS),
    "olmo3": Family(
        OLMO, defaults=OLMO_3_CONFIG, full_layers_every=4, window_rope_base="rope_theta", biases=ATTENTION_BIAS
    ),
    "olmoe": Family({"joint_qk_norm": True}, unclipped, OLMOE_CONFIG, biases=ATTENTION_BIAS),
    "gemma": Family({"norm_offset": True}, root_of_dim, GEMMA_1_CONFIG, biases=ATTENTION_BIAS, activations=GELU),
    "gemma2": Family(GEMMA_2, gemma_scales, GEMMA_2_CONFIG, full_layers_every=2, biases=ATTENTION_BIAS),
    "gemma3_text": Family(GEMMA_3, gemma_scales, GEMMA_3_CONFIG, 6, "rope_local_base_freq", biases=ATTENTION_BIAS),
    "gemma4_text": Family(GEMMA_4, gemma_4_fields, GEMMA_4_CONFIG, 6, biases=ATTENTION_BIAS),
}


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
        if config.get(key, False) not in (False, "vision") and key not in family.biases:  # vision: of pictures alone
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
