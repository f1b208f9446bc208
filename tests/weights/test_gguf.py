"""GGUF files written by the package `gguf` from tiny transformers models; and files that lie about themselves."""

import os
import re
import struct
import time

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from transformers import (
    Cohere2Config,
    DeepseekV2Config,
    DeepseekV3Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GraniteConfig,
    GraniteMoeConfig,
    HunYuanDenseV1Config,
    Lfm2Config,
    Lfm2MoeConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SeedOssConfig,
    SmolLM3Config,
    YoutuConfig,
)

from engine.speculation.own_layer import load_guesses
from scripts.convert_hf_checkpoint import main as convert
from tests.weights.converted import converted
from weights.checkpoint import load_model, open_model, read_tensors, save_checkpoint
from weights.gguf import open_gguf
from weights.gguf_file import GGUFFile, read_gguf_metadata
from weights.shipped.gguf_blocks import KEPT

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.out_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.": "mlp.shared_expert.",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.gate.": "ffn_gate_inp.",
    "mlp.router.": "ffn_gate_inp.",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "query_layernorm": "attn_q_norm",
    "key_layernorm": "attn_k_norm",
    "self_attn.": "",
    "mlp.gate_up_proj": "ffn_up",
    "qkv_proj": "attn_qkv",
}
POST_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
SHORT_CONV = {
    "model.embedding_norm": "token_embd_norm",
    "operator_norm": "attn_norm",
    "q_layernorm": "attn_q_norm",
    "k_layernorm": "attn_k_norm",
    ".conv.": ".shortconv.",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
OTHER_NAMES = {  # of some families
    "gemma2": POST_NORMS | {"pre_feedforward_layernorm": "ffn_norm"},
    "gemma3": POST_NORMS | {"pre_feedforward_layernorm": "ffn_norm"},
    "olmo2": POST_NORMS,
    "exaone4": POST_NORMS,
    "seed_oss": POST_NORMS,
    "qwen3next": POST_NORMS,
    "glm4moe": POST_NORMS,
    "qwen35": POST_NORMS,
    "qwen35moe": POST_NORMS,
    "gemma4": {  # longer names first, which hold shorter ones
        "post_feedforward_layernorm_1": "post_ffw_norm_1",
        "post_feedforward_layernorm_2": "post_ffw_norm_2",
        "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_per_layer_input_norm": "post_norm",
        "per_layer_input_gate": "inp_gate",
        "model.per_layer_model_projection": "per_layer_model_proj",
        "model.per_layer_projection_norm": "per_layer_proj_norm",
        "per_layer_projection": "proj",
        "token_embd_per_layer": "per_layer_token_embd",
        "layer_scalar": "layer_output_scale.weight",
        "router.proj": "ffn_gate_inp",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "experts.gate_up_proj": "ffn_gate_up_exps.weight",
        "experts.down_proj": "ffn_down_exps.weight",
    }
    | POST_NORMS,
    "lfm2": SHORT_CONV,
    "lfm2moe": SHORT_CONV
    | {
        "feed_forward.experts.down_proj": "ffn_down_exps.weight",
        "feed_forward.expert_bias": "exp_probs_b.bias",
        "feed_forward.gate.": "ffn_gate_inp.",
    },
    "glm4": {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"},
}
# model_type -> what the package calls it, where that is another name
ARCHITECTURES = {"gemma3_text": "gemma3", "gemma4_text": "gemma4", "olmo3": "olmo2", "mixtral": "llama"}
ARCHITECTURES |= {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "hunyuan_v1_dense": "hunyuan-dense"}
ARCHITECTURES |= {"qwen3_next": "qwen3next", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe"}
ARCHITECTURES |= {"glm4_moe": "glm4moe", "lfm2_moe": "lfm2moe"}
ARCHITECTURES |= dict.fromkeys(("deepseek_v2", "deepseek_v3", "youtu"), "deepseek2")
OFFSET = ("gemma", "gemma2", "gemma3", "qwen3next", "qwen35", "qwen35moe")  # norms are 1 + weight
PERMUTED = ("llama", "granite", "granitemoe", "smollm3")  # of which the converter turns q and k


def tiny(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if weight.ndim == 1:
                weight.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    return model


def interleaved(weight, n_head):
    """q and k rows as llama.cpp's converter orders them for the llama architecture: rope pairs are neighbours."""
    return weight.reshape(n_head, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def parts_of(model):
    """Names and tensors; the gates and up projections of experts, one tensor there, are two here."""
    of_layers = ("layer_scalar", "e_score_correction_bias", "expert_bias")
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(of_layers)]
    for name, weight in [*model.named_parameters(), *buffers]:  # a tied head is not among them
        name = name.replace("block_sparse_moe", "mlp")
        if name.endswith(("mlp.experts.gate_up_proj", "feed_forward.experts.gate_up_proj")):
            gate, up = weight.chunk(2, dim=1)
            blk = name.removesuffix("experts.gate_up_proj").removesuffix("mlp.").removesuffix("feed_forward.")
            yield f"{blk}ffn_gate_exps.weight", gate
            yield f"{blk}ffn_up_exps.weight", up
        else:
            yield name, weight


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# where a block has float16 numbers, of types that the package does not write
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q3_K": (108,), "IQ2_XS": (0,), "MXFP4": ()}
HALVES |= {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)}


def random_blocks(shape, kind, seed=0):
    """Random bytes, with numbers in float16 that make weights below 1."""
    generator, (size, n_byte) = np.random.default_rng(seed), GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // size, n_byte), dtype=np.uint8)
    for place in HALVES[kind.name]:
        numbers = generator.uniform(2**-13, 2**-12, blocks.shape[:-1]).astype(np.float16)
        blocks[..., place : place + 2] = numbers[..., None].view(np.uint8)
    if kind == Type.MXFP4:
        blocks[..., 0] = generator.integers(115, 125, blocks.shape[:-1])  # a power of two
    return blocks.reshape(*shape[:-1], -1)


def blocks_of(weight, kind):
    """What `kind` makes of a weight; some blocks of its shape where the package cannot tell."""
    try:
        return quantize(weight, kind)
    except NotImplementedError:
        return random_blocks(weight.shape, kind, seed=weight.size)


def is_matrix(name, weight):
    return weight.ndim > 1 and not re.search(r"gate_inp|\.gate\.|conv1d|conv\.conv", name)


def write_gguf(path, model, kind=Type.F32, fields=None, tensors=None, kinds=None, **parts):
    """`model` of transformers as a GGUF file; matrices become what `kind` leaves of them, in the model too.

    kinds: the type of those matrices in whose name in `model` a certain part occurs. parts: how the file is split.
    """
    config = model.config
    config.allow_global_per_layer_attribute_access = True  # where layers differ in heads, that of those with a window
    family = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, family, **parts)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1 if family == "deepseek2" else config.num_key_value_heads)
    if config.model_type == "cohere2":
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps if family.startswith("lfm2") else config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    for add, value in (fields or {}).items():
        getattr(writer, add)(value)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in parts_of(model):
        own = next((own for part, own in (kinds or {}).items() if part in name), kind)
        if is_matrix(name, weight):
            weight.data.copy_(torch.tensor(dequantize(blocks_of(weight.detach().numpy(), own), own)))
        for part, tensor in converted(config, name, weight.detach()):
            for theirs, ours in (NAMES | OTHER_NAMES.get(family, {})).items():
                part = part.replace(theirs, ours)
            codes = np.ascontiguousarray(tensor.numpy())
            if is_matrix(part, tensor):
                codes = blocks_of(codes, own)
            for head, n_head in heads.items():
                if family in PERMUTED and head in part:
                    codes = interleaved(codes, n_head)
            if family in OFFSET and part.endswith("norm.weight") and "ssm" not in part:
                codes = codes + 1
            if "shexp" in part and "inp" in part:
                codes = codes[0]
            own_type = own if is_matrix(part, tensor) else None
            writer.add_tensor(part, np.ascontiguousarray(codes), raw_dtype=own_type)
    finish(writer)
    return path


@torch.inference_mode()
def assert_same_logits(path, theirs):
    ours = load_model(path, dtype=torch.float32)
    tokens = torch.randint(SIZES["vocab_size"], (1, 100), generator=torch.Generator().manual_seed(1))
    atol = 1e-4 if ours.args.delta is None else 1e-3  # a state sums up all tokens before, each with its rounding
    torch.testing.assert_close(ours(tokens, torch.arange(100)[None]), theirs(tokens).logits, atol=atol, rtol=1e-4)
    return ours


@pytest.mark.parametrize(
    "config, kind, tied",
    [(LlamaConfig, Type.F32, False), (LlamaConfig, Type.F16, True), (LlamaConfig, Type.Q8_0, False)]
    + [(LlamaConfig, Type.Q4_0, True), (Qwen2Config, Type.F32, True), (Qwen2Config, Type.BF16, False)]
    + [(Qwen2Config, Type.Q4_1, True)],
)
def test_logits_equal_those_of_transformers(config, kind, tied, tmp_path):
    theirs = tiny(config(**SIZES, tie_word_embeddings=tied))
    assert_same_logits(write_gguf(tmp_path / "m.gguf", theirs, kind), theirs)
    ours = load_model(tmp_path / "m.gguf", dtype=torch.float32, dequantize=True)
    assert (ours.output.weight is ours.tok_embeddings.weight) == tied


LINEAR = {"add_rope_scaling_type": gguf.RopeScalingType.LINEAR, "add_rope_scaling_factor": 2.5}
YARN = {
    "add_rope_scaling_type": gguf.RopeScalingType.YARN,
    "add_rope_scaling_factor": 4.0,
    "add_rope_scaling_orig_ctx_len": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
GEMMA_2 = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7}
HEAD = {"add_key_length": 32, "add_value_length": 32}
GRANITE = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 0.7}
GRANITE_FILE = {
    "add_attention_scale": 0.2,
    "add_embedding_scale": 3.0,
    "add_residual_scale": 0.6,
    "add_logit_scale": 0.7,
}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
EXPERTS_FILE = {"add_expert_count": 4, "add_expert_used_count": 3, "add_expert_feed_forward_length": 32}
SHARED, SHARED_FILE = {"shared_expert_intermediate_size": 64}, {"add_expert_shared_feed_forward_length": 64}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
OLMO_3_ROPE = {"full_attention": YARN_ROPE, "sliding_attention": {"rope_theta": 10000.0}}
OLMO_3 = {"num_hidden_layers": 5, "sliding_window": 16, "rope_parameters": OLMO_3_ROPE}
GEMMA_3_ROPE = {"full_attention": LINEAR_ROPE, "sliding_attention": {"rope_theta": 10000.0}}
NO_PAD, WINDOW = {"pad_token_id": None}, {"add_sliding_window": 16}
IN_TURN = {"num_hidden_layers": 5, "sliding_window": 16}
COHERE_FILE = WINDOW | {"add_logit_scale": 0.3}
MIXTRAL_FILE = {"add_expert_count": 4, "add_expert_used_count": 2}
OLMOE_FILE = {"add_expert_count": 4, "add_expert_used_count": 3}
FAMILIES = {  # config, and what the file says beside the sizes
    "qwen3": (Qwen3Config, {"head_dim": 32}, HEAD),
    "mixtral": (MixtralConfig, MIXTRAL, MIXTRAL_FILE),
    "qwen2moe": (Qwen2MoeConfig, EXPERTS | SHARED, EXPERTS_FILE | SHARED_FILE),
    "qwen3moe": (Qwen3MoeConfig, EXPERTS | {"head_dim": 32, "norm_topk_prob": True}, HEAD | EXPERTS_FILE),
    "smollm3": (SmolLM3Config, NO_PAD | {"num_hidden_layers": 5}, {}),
    "glm4": (Glm4Config, NO_PAD | {"head_dim": 32}, HEAD | {"add_rope_dimension_count": 16}),
    "seed_oss": (SeedOssConfig, NO_PAD | {"head_dim": 32}, HEAD),
    "hunyuan": (HunYuanDenseV1Config, NO_PAD | {"head_dim": 32}, HEAD),
    "exaone4": (Exaone4Config, NO_PAD | {"num_hidden_layers": 5, "sliding_window": 16}, WINDOW),
    "cohere2": (
        Cohere2Config,
        NO_PAD | {"num_hidden_layers": 5, "sliding_window": 16, "logit_scale": 0.3},
        COHERE_FILE,
    ),
    "olmoe": (OlmoeConfig, NO_PAD | {"num_experts": 4, "num_experts_per_tok": 3}, OLMOE_FILE),
    "granitemoe": (GraniteMoeConfig, NO_PAD | GRANITE | MIXTRAL, GRANITE_FILE | MIXTRAL_FILE),
    "phi3": (Phi3Config, NO_PAD | {"sliding_window": 16}, WINDOW),
    "granite": (GraniteConfig, GRANITE, GRANITE_FILE | {"add_logit_scale": 0.7}),
    "olmo2": (Olmo2Config, NO_PAD, {}),
    "olmo3": (Olmo3Config, NO_PAD | OLMO_3, YARN | WINDOW),
    "gemma": (GemmaConfig, {"head_dim": 32}, HEAD),
    "gemma2": (Gemma2Config, GEMMA_2 | CAPS, HEAD | WINDOW | {f"add_{key}": value for key, value in CAPS.items()}),
    "gemma3": (Gemma3TextConfig, GEMMA_2 | {"rope_parameters": GEMMA_3_ROPE}, HEAD | LINEAR | WINDOW),
}
DELTA = {"head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
DELTA |= {"linear_value_head_dim": 32, "num_hidden_layers": 4}
DELTA_FILE = HEAD | {
    "add_rope_dimension_count": 8,
    "add_ssm_conv_kernel": 4,
    "add_ssm_state_size": 16,
    "add_ssm_group_count": 2,
    "add_ssm_time_step_rank": 4,
    "add_ssm_inner_size": 128,
}
DELTA_EXPERTS, DELTA_EXPERTS_FILE = DELTA | EXPERTS | SHARED, DELTA_FILE | EXPERTS_FILE | SHARED_FILE
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
LATENT |= NO_PAD | {"q_lora_rank": 32, "v_head_dim": 32}
LATENT_FILE = {
    "add_key_length": 40,
    "add_value_length": 32,
    "add_key_length_mla": 24,
    "add_value_length_mla": 32,
    "add_kv_lora_rank": 32,
    "add_q_lora_rank": 32,
    "add_rope_dimension_count": 8,
    "add_expert_shared_count": 0,
}
LATENT_EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 2}
LATENT_EXPERTS |= LATENT | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1}
LATENT_EXPERTS_FILE = LATENT_FILE | {
    "add_expert_count": 8,
    "add_expert_used_count": 3,
    "add_expert_feed_forward_length": 32,
    "add_expert_shared_count": 2,
    "add_expert_group_count": 4,
    "add_expert_group_used_count": 2,
    "add_expert_weights_scale": 1.5,
    "add_leading_dense_block_count": 1,
}
OF_GLM = {key: value for key, value in LATENT_EXPERTS.items() if key not in LATENT or key == "pad_token_id"}
OF_GLM_FILE = {key: value for key, value in LATENT_EXPERTS_FILE.items() if key not in LATENT_FILE}
OF_GLM_FILE |= {"add_expert_shared_count": 2, "add_expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID}
GROWING = {"mscale": 0.7, "mscale_all_dim": 0.7}
WITH_GATES = {"add_expert_weights_norm": True, "add_expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID}
WITH_GATES |= YARN | {"add_rope_scaling_yarn_beta_fast": 1.0, "add_rope_scaling_yarn_log_mul": 0.07}
IN_TWO = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
SHORT_CONVS = NO_PAD | {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "conv"]}
SHORT_CONVS_FILE = {"add_shortconv_l_cache": 3, "add_head_count_kv": [0, 2, 0, 0]}
SHORT_CONV_EXPERTS_FILE = SHORT_CONVS_FILE | EXPERTS_FILE | {"add_leading_dense_block_count": 1}
SHORT_CONV_EXPERTS_FILE |= {"add_expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID}
FAMILIES |= {
    "lfm2": (Lfm2Config, SHORT_CONVS | {"block_auto_adjust_ff_dim": False}, SHORT_CONVS_FILE),
    "lfm2moe": (Lfm2MoeConfig, SHORT_CONVS | EXPERTS | {"num_dense_layers": 1}, SHORT_CONV_EXPERTS_FILE),
    "qwen3next": (Qwen3NextConfig, NO_PAD | DELTA_EXPERTS | {"norm_topk_prob": True}, DELTA_EXPERTS_FILE),
    "qwen35": (Qwen3_5TextConfig, NO_PAD | DELTA, DELTA_FILE),
    "qwen35, in two layers": (
        Qwen3_5TextConfig,
        NO_PAD | DELTA | IN_TWO,
        DELTA_FILE | {"add_full_attention_interval": 2},
    ),
    "qwen35moe": (Qwen3_5MoeTextConfig, NO_PAD | DELTA_EXPERTS, DELTA_EXPERTS_FILE),
    "deepseek_v2": (DeepseekV2Config, LATENT_EXPERTS | {"topk_method": "group_limited_greedy"}, LATENT_EXPERTS_FILE),
    "deepseek_v3": (
        DeepseekV3Config,
        LATENT_EXPERTS | {"rope_parameters": YARN_ROPE | GROWING | {"beta_fast": 1.0}},
        LATENT_EXPERTS_FILE | WITH_GATES,
    ),
    "youtu": (YoutuConfig, LATENT, LATENT_FILE),
    "glm4moe": (
        Glm4MoeConfig,
        OF_GLM | {"head_dim": 16, "attention_bias": True, "use_qk_norm": True},
        OF_GLM_FILE | {"add_expert_weights_norm": True, "add_rope_dimension_count": 8},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_other_families(family, tmp_path):
    config, extra, fields = FAMILIES[family]
    theirs, kind = tiny(config(**{**SIZES, **extra})), Type.Q4_0 if "num_experts" in extra else Type.F32
    assert_same_logits(write_gguf(tmp_path / "m.gguf", theirs, kind, fields), theirs)


GEMMA_4 = {"num_hidden_layers": 6, "layer_types": 2 * ["sliding_attention", "sliding_attention", "full_attention"]}
GEMMA_4 |= {"head_dim": 32, "global_head_dim": 64, "sliding_window": 16, "vocab_size_per_layer_input": 96}
GEMMA_4 |= {"final_logit_softcapping": 3.0, "hidden_size_per_layer_input": 0}
GEMMA_4_FILE = WINDOW | {
    "add_sliding_window_pattern": 2 * [True, True, False],
    "add_key_length": 64,
    "add_value_length": 64,
    "add_key_length_swa": 32,
    "add_value_length_swa": 32,
    "add_rope_dimension_count": 64,
    "add_rope_dimension_count_swa": 32,
    "add_rope_freq_base_swa": 10000.0,
    "add_final_logit_softcapping": 3.0,
}
OF_LAYERS = {"num_kv_shared_layers": 3, "hidden_size_per_layer_input": 32, "use_double_wide_mlp": True}
OF_LAYERS_FILE = {"add_shared_kv_layers": 3, "add_embedding_length_per_layer_input": 32}
OF_LAYERS_FILE |= {"add_feed_forward_length": 3 * [96] + 3 * [192]}
BESIDE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 3, "moe_intermediate_size": 32}
BESIDE |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
BESIDE_FILE = EXPERTS_FILE | {"add_shared_kv_layers": 0, "add_head_count_kv": 2 * [2, 2, 1]}


@pytest.mark.parametrize(
    "extra, fields, kind",
    [(OF_LAYERS, OF_LAYERS_FILE, Type.F32), (BESIDE, BESIDE_FILE, Type.Q4_0)],
    ids=["inputs of layers", "experts"],
)
def test_gemma_4(extra, fields, kind, tmp_path):
    """The angles of full layers stand still from the 9th pair on: a quarter of 32 pairs turns."""
    theirs = tiny(Gemma4TextConfig(**{**SIZES, **GEMMA_4, **extra}))
    factors = np.array(8 * [1.0] + 24 * [1e30], dtype=np.float32)
    path, fields = tmp_path / "m.gguf", GEMMA_4_FILE | fields
    assert_same_logits(write_gguf(path, theirs, kind, fields, {"rope_freqs.weight": factors}), theirs)


def test_the_layer_of_guesses_is_left_out_and_read_apart(tmp_path):
    """A file says how many of its blocks come after the model's own; norms are 1 + weight there too."""
    config, extra, fields = FAMILIES["qwen35"]
    theirs = tiny(config(**{**SIZES, **extra}))
    of_layer = theirs.model.layers[3].state_dict()  # another layer with attention, in the place of its block
    more = {f"blk.4.nextn.{name}.weight": np.full(64, 1.5, dtype=np.float32) for name in ("enorm", "hnorm")}
    more["blk.4.nextn.shared_head_norm.weight"] = np.full(64, 3.0, dtype=np.float32)
    more["blk.4.nextn.eh_proj.weight"] = np.arange(64 * 128, dtype=np.float32).reshape(64, 128)
    for name, weight in of_layer.items():
        for part, ours in (NAMES | POST_NORMS).items():
            name = name.replace(part, ours)
        more[f"blk.4.{name}"] = weight.numpy() + float("norm" in name)
    fields = fields | {"add_block_count": 5, "add_nextn_predict_layers": 1}
    path = write_gguf(tmp_path / "m.gguf", theirs, fields=fields, tensors=more)
    model = assert_same_logits(path, theirs)
    layer = load_guesses(path, model)
    assert torch.equal(layer.joined.weight, torch.arange(64.0 * 128).view(64, 128))
    assert layer.norm.weight.eq(2).all() and layer.hidden_norm.weight.eq(0.5).all()
    for name, tensor in model.layers[3].state_dict().items():
        torch.testing.assert_close(layer.layers[0].state_dict()[name], tensor, atol=1e-6, rtol=0)


def test_linear_rope_scaling(tmp_path):
    theirs = tiny(LlamaConfig(**SIZES, rope_parameters=LINEAR_ROPE))
    assert_same_logits(write_gguf(tmp_path / "m.gguf", theirs, fields=LINEAR), theirs)


def test_rope_frequency_factors_of_llama3(tmp_path):
    theirs = tiny(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE))
    head_dim = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    plain = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    factors = (plain / theirs.model.rotary_emb.inv_freq).numpy()
    assert factors.max() == pytest.approx(4.0) and factors.min() == 1.0
    assert_same_logits(write_gguf(tmp_path / "m.gguf", theirs, tensors={"rope_freqs.weight": factors}), theirs)


def test_longrope_of_a_part_of_each_head(tmp_path):
    short, long = np.linspace(1, 1.5, 4, dtype=np.float32), np.linspace(1, 4, 4, dtype=np.float32)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    rope |= {"short_factor": short.tolist(), "long_factor": long.tolist()}
    theirs = tiny(Phi3Config(**SIZES, **NO_PAD, rope_parameters=rope, original_max_position_embeddings=32))
    growth = theirs.model.rotary_emb.attention_scaling
    fields = {"add_rope_dimension_count": 8, "add_rope_scaling_orig_ctx_len": 32}
    fields |= {"add_rope_scaling_attn_factors": growth}
    tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    assert_same_logits(write_gguf(tmp_path / "m.gguf", theirs, fields=fields, tensors=tensors), theirs)


def test_head_dim_of_its_own(tmp_path):
    theirs = tiny(LlamaConfig(**SIZES, head_dim=24))
    fields = {"add_key_length": 24, "add_value_length": 24, "add_rope_dimension_count": 24}
    assert_same_logits(write_gguf(tmp_path / "m.gguf", theirs, fields=fields), theirs)


def test_default_model_reads_as_the_package_reads_it(default_gguf):
    ours, theirs = GGUFFile(default_gguf), gguf.GGUFReader(default_gguf)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        if tensor.name.startswith(("blk.0.", "blk.29.", "output")):
            assert torch.equal(
                ours.tensors[tensor.name].read(), torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            )
    assert ours.tensors["token_embd.weight"].shape == (49152, 576)
    for key in ("general.architecture", "llama.block_count", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.tokens"):
        assert ours.metadata[key] == theirs.get_field(key).contents()


# ---------------------------------------------------------------- codes that are kept

INT4, INT8, ZEROS = "int4.g32", "int8.g32", "int8.zeros.g32"


def fetch(path, dequantize=False):
    """What convert_hf_checkpoint.py puts into a file: the source, which has the table, and the tensors."""
    source = open_model(path, dequantize=dequantize)
    return source, read_tensors(source, torch.device("cpu"), torch.float32, "")


def assert_kept(path, theirs, monkeypatch):
    """The kept conversion has the weights of the plain one and the logits of `theirs`. Returns its table."""
    source, tensors = fetch(path)
    assert_same_weights(source, tensors, fetch(path, dequantize=True)[1])
    save_checkpoint(path.with_suffix(".pth"), source.args, tensors, source.table)
    monkeypatch.setattr("weights.checkpoint.pack_", lambda *_: None)  # operators that round activations too
    assert_same_logits(path.with_suffix(".pth"), theirs)
    assert source.layout.bytes(torch.float32) == sum(tensor.nbytes for tensor in tensors.values())
    return {name: str(spec) for name, spec in source.table.items()}


def assert_same_weights(source, tensors, plain):
    floats = dict(tensors)
    for name, spec in source.table.items():
        own = {leaf: floats.pop(f"{name}.{leaf}") for leaf in spec.leaves}
        assert own["scales"].dtype in (torch.float16, torch.float32)  # as the file's, or of Q4_1 as the zeros need
        scales_and_zeros = [own[leaf] for leaf in spec.leaves[1:]]
        assert all(str(tensor.dtype) == f"torch.{spec.scale_dtype}" for tensor in scales_and_zeros)
        floats[f"{name}.weight"] = spec.layer(**own).dequantize()
    plain.setdefault("output.weight", plain["tok_embeddings.weight"])  # a tied head may have codes of its own
    floats.setdefault("output.weight", plain["output.weight"])
    assert floats.keys() == plain.keys()
    for name, weight in floats.items():  # one more rounding in Q4_1: of m + 8 d
        torch.testing.assert_close(weight, plain[name], rtol=0, atol=2**-22 * float(weight.abs().max()))


def in_layers(part, spec):
    return {f"layers.{i}.{part}": spec for i in range(SIZES["num_hidden_layers"])}


def whole_table(spec):
    parts = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")
    return {name: spec for part in parts for name in in_layers(part, spec)} | {"output": spec}


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0])
def test_every_layer_of_experts_is_kept(kind, tmp_path, monkeypatch):
    config, extra, fields = FAMILIES["qwen2moe"]
    theirs = tiny(config(**{**SIZES, **extra}))
    table = assert_kept(write_gguf(tmp_path / "m.gguf", theirs, kind, fields), theirs, monkeypatch)
    spec = str(KEPT[kind.name].spec)
    shared = in_layers("feed_forward.shared.w13", spec) | in_layers("feed_forward.shared.w2", spec)
    assert table == whole_table(spec) | shared


@pytest.mark.parametrize("family", ["qwen3next", "qwen35", "deepseek_v3"])
def test_codes_of_reordered_rows_and_columns_are_kept(family, tmp_path, monkeypatch):
    """All but what latents become, whose groups lie across, and gates, which are floats in every format."""
    config, extra, fields = FAMILIES[family]
    theirs, floats = tiny(config(**{**SIZES, **extra})), {"kv_b_proj": Type.F32, "in_proj_b": Type.F32}
    floats["in_proj_a"] = Type.F32
    table = assert_kept(write_gguf(tmp_path / "m.gguf", theirs, Type.Q8_0, fields, kinds=floats), theirs, monkeypatch)
    assert set(table.values()) == {INT8}
    parts = {name.split(".", 2)[-1] for name in table}
    layers = {"attention.wkv_a", "attention.wq_b"} if family == "deepseek_v3" else {"attention.wqkvz", "attention.out"}
    assert layers | {"attention.wo", "feed_forward.w13", "feed_forward.w2", "output"} <= parts
    assert "attention.wkv_b" not in parts


@pytest.mark.parametrize(
    "config, tied, kind",
    [(LlamaConfig, False, Type.Q4_0), (LlamaConfig, True, Type.Q8_0), (LlamaConfig, False, Type.Q4_1)]
    + [(Qwen2Config, True, Type.Q4_0), (Qwen2Config, False, Type.Q8_0), (Qwen2Config, True, Type.Q4_1)],
)
def test_every_layer_is_kept(config, tied, kind, tmp_path, monkeypatch):
    theirs = tiny(config(**SIZES, tie_word_embeddings=tied))
    table = assert_kept(write_gguf(tmp_path / "m.gguf", theirs, kind), theirs, monkeypatch)
    assert table == whole_table(INT8 if kind == Type.Q8_0 else INT4)


@pytest.mark.parametrize(
    "tied, kinds, differing",
    [
        (False, {"k_proj": Type.F16}, in_layers("attention.wqkv", None)),
        (False, {"v_proj": Type.Q8_0}, in_layers("attention.wqkv", INT8)),
        (False, {"q_proj": Type.Q4_1, "up_proj": Type.Q4_1}, {}),
        (False, {"q_proj": Type.Q4_1, "v_proj": Type.Q5_0}, in_layers("attention.wqkv", ZEROS)),
        (False, {"layers.0.mlp.up_proj": Type.Q5_1}, {"layers.0.feed_forward.w13": ZEROS}),
        (False, {"o_proj": Type.Q8_0, "lm_head": Type.F16}, in_layers("attention.wo", INT8) | {"output": None}),
        (False, {"embed_tokens": Type.F16, "lm_head": Type.Q8_0}, {"output": INT8}),
        (True, {"embed_tokens": Type.Q8_0}, {"output": INT8}),
        (True, {"embed_tokens": Type.F16}, {"output": None}),
    ],
    ids=str,
)
def test_mixed_types(tied, kinds, differing, tmp_path, monkeypatch):
    theirs = tiny(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    table = assert_kept(write_gguf(tmp_path / "m.gguf", theirs, Type.Q4_0, kinds=kinds), theirs, monkeypatch)
    assert table == {name: spec for name, spec in (whole_table(INT4) | differing).items() if spec}


def test_damaged_codes_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny(LlamaConfig(**SIZES)), Type.Q4_1)
    whole, file = path.read_bytes(), GGUFFile(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="does not fit into the file"):
        open_gguf(path)
    begin = file.tensors["blk.1.ffn_down.weight"].rows.ctypes.data - file.data.ctypes.data
    for place, value, key in ((0, np.inf, "scales"), (0, np.nan, "scales"), (2, np.nan, "zeros")):
        path.write_bytes(whole[: begin + place] + struct.pack("<e", value) + whole[begin + place + 2 :])
        with pytest.raises(ValueError, match=f"layers.1.feed_forward.w2.{key} holds NaN or infinite"):
            fetch(path)


def test_sizes_that_lie_are_refused_at_once(tmp_path):
    fields = {"add_embedding_length": 1 << 20, "add_feed_forward_length": 1 << 20, "add_key_length": 16}
    path = write_gguf(tmp_path / "m.gguf", tiny(LlamaConfig(**SIZES)), Type.Q4_0, fields=fields)
    began = time.process_time()
    with pytest.raises(ValueError, match="has shape"):
        fetch(path)
    assert time.process_time() - began < 1


def test_nothing_to_keep(tmp_path):
    theirs = tiny(LlamaConfig(**SIZES))
    write_gguf(tmp_path / "m.gguf", theirs, Type.F16)
    for asked, words in ((False, "no layer whose codes can be kept; convert it without"), (True, "give one")):
        with pytest.raises(ValueError, match=words):
            convert(checkpoint_dir=tmp_path, dtype="float32", dequantize=asked, keep_quantized=True)
    assert not list(tmp_path.glob("*.pth"))


@torch.inference_mode()
def test_default_model_kept(default_gguf, call, capsys, tmp_path, monkeypatch):
    os.symlink(default_gguf, tmp_path / default_gguf.name)
    path = tmp_path / "model_quantized.pth"
    convert(checkpoint_dir=tmp_path, dtype="float32", dequantize=False, keep_quantized=True)
    assert "121 layers kept: 120 int4.g32, 1 int8.g32" in capsys.readouterr().err
    assert not (tmp_path / "model.pth").exists()
    options = ["--temperature", 0, "--max_new_tokens", 4, "--num_samples", 1]
    printed = call("generate.py", "--checkpoint_path", path, "--prompt", "The capital of France is", *options)
    assert printed.out.startswith(" Paris.")
    monkeypatch.setattr("weights.checkpoint.pack_", lambda *_: None)  # operators that round activations too
    tokens, logits = torch.tensor([[504, 3575, 282, 4649, 314]]), []
    for file in (path, default_gguf):
        model = load_model(file, dtype=torch.float32)
        logits.append(model(tokens, torch.arange(5)[None]))
    # the same weights to the bit, so all that may differ is the order of float32 sums of up to 1536 terms
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-5)


# ---------------------------------------------------------------- files that are cut short or lie


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    return write_gguf(
        path, tiny(LlamaConfig(**SIZES)), fields={"add_tokenizer_model": "llama", "add_token_list": ["a"]}
    )


def assert_refused(path, *words):
    """load_model raises a ValueError with these words, within a second of work."""
    began = time.process_time()
    with pytest.raises(ValueError) as error:
        load_model(path, dtype=torch.float32)
    assert time.process_time() - began < 1
    assert all(word in str(error.value) for word in (path.name, *words)), error.value


def test_cut_at_any_length(good, tmp_path):
    whole, path = good.read_bytes(), tmp_path / "cut.gguf"
    header = GGUFFile(good).start
    lengths = {*range(0, header, 61), *range(header - 40, header + 40), *range(header, len(whole), 9973)}
    for length in sorted({*lengths, 1, 2, 3, 4, 5, len(whole) - 1}):
        path.write_bytes(whole[:length])
        assert_refused(path)


def test_flipped_header_bytes_are_errors_or_harmless(good, tmp_path):
    whole, path = bytearray(good.read_bytes()), tmp_path / "flipped.gguf"
    generator = np.random.default_rng(0)
    for position in generator.choice(GGUFFile(good).start, 150, replace=False):
        flipped = whole.copy()
        flipped[position] ^= 1 << generator.integers(8)
        path.write_bytes(flipped)
        try:
            load_model(path, dtype=torch.float32)
        except ValueError as error:
            assert str(error)


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value)


def text(value):
    return u64(len(value)) + value.encode()


def header(n_tensor=0, n_field=0, version=3):
    return b"GGUF" + u32(version) + u64(n_tensor) + u64(n_field)


def one_tensor(dims, kind=0, offset=0, n_dim=None):
    return (
        header(1)
        + text("t")
        + u32(len(dims) if n_dim is None else n_dim)
        + b"".join(map(u64, dims))
        + u32(kind)
        + u64(offset)
    )


def nested(depth):
    """Arrays in arrays: each says that it holds one array."""
    return header(0, 1) + text("k") + u32(9) + (u32(9) + u64(1)) * depth


HUGE = 2**64 - 1
LIES = {
    "tensor count": (header(HUGE), "count"),
    "field count": (header(0, HUGE), "count"),
    "both counts": (header(2**63, 2**63), "count"),
    "string length": (header(0, 1) + u64(HUGE), "count"),
    "value length": (header(0, 1) + text("k") + u32(8) + u64(2**62), "count"),
    "array length": (header(0, 1) + text("k") + u32(9) + u32(4) + u64(2**61), "count"),
    "array of strings": (header(0, 1) + text("k") + u32(9) + u32(8) + u64(HUGE), "count"),
    "array in array": (nested(1), "array"),
    "arrays in arrays": (nested(200_000), "array"),
    "unknown value type": (header(0, 1) + text("k") + u32(77), "77"),
    "no dimensions": (one_tensor([]), "0 dimensions"),
    "too many dimensions": (one_tensor([1] * 9), "9 dimensions"),
    "absurd number of dimensions": (one_tensor([1], n_dim=2**32 - 1), "dimensions"),
    "dimensions that overflow": (one_tensor([2**32, 2**32]), "does not fit"),
    "dimension of 0": (one_tensor([0, HUGE]), "dimension of 0"),
    "offset": (one_tensor([4], offset=2**63), "does not fit"),
    "tensor type": (one_tensor([4], kind=999), "type 999"),
    "half a block": (one_tensor([5], kind=int(Type.Q8_0)), "does not fit"),
    "alignment 0": (header(0, 1) + text("general.alignment") + u32(4) + u32(0), "alignment"),
    "alignment huge": (header(0, 1) + text("general.alignment") + u32(4) + u32(2**31), "alignment"),
    "alignment in words": (header(0, 1) + text("general.alignment") + u32(8) + text("x"), "alignment"),
    "version 1": (header(version=1), "version 1"),
    "version of the other byte order": (header(version=3 << 24), "version"),
    "nothing in it": (header(), "architecture None"),
    "architecture is an array": (
        header(0, 1) + text("general.architecture") + u32(9) + u32(8) + u64(1) + text("llama"),
        "architecture",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_at_once(lie, tmp_path):
    content, word = LIES[lie]
    path = tmp_path / "lie.gguf"
    path.write_bytes(content + bytes(64))
    assert_refused(path, word)


def test_architectures_not_supported(good, tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(good.read_bytes().replace(b"llama", b"mamba"))
    assert_refused(path, "'mamba'", "llama, qwen2")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"add_expert_count": 8}, ["expert_used_count"]),
        ({"add_rope_dimension_count": 8}, ["partial_rotary_factor 0.5"]),
        ({"add_rope_scaling_type": gguf.RopeScalingType.LONGROPE}, ["'longrope'", "none, linear, yarn"]),
        ({"add_rope_scaling_type": gguf.RopeScalingType.LINEAR}, ["llama.rope.scaling.factor"]),
        ({"add_rope_freq_base": float("nan")}, ["llama.rope.freq_base"]),
        ({"add_head_count_kv": [2, 2]}, ["llama.attention.head_count_kv"]),
        ({"add_block_count": 2**31}, ["llama.block_count"]),
        ({"add_block_count": 3}, ["blk.2."]),
        ({"add_block_count": 1}, ["blk.1."]),
        ({"add_feed_forward_length": 2**31}, ["llama.feed_forward_length"]),
        ({"add_context_length": 0}, ["llama.context_length"]),
        ({"add_embedding_length": 2}, ["llama.attention.key_length"]),
    ],
    ids=str,
)
def test_metadata_of_no_model_is_refused(fields, words, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny(LlamaConfig(**SIZES)), fields=fields)
    with pytest.raises(ValueError) as error:
        load_model(path)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("factors", [[1.0] * 7, [0.0] * 8, [float("nan")] * 8, [[1.0] * 8]], ids=str)
def test_rope_factors_of_no_model_are_refused(factors, tmp_path):
    tensors = {"rope_freqs.weight": np.array(factors, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tiny(LlamaConfig(**SIZES)), tensors=tensors)
    with pytest.raises(ValueError, match="factors"):
        load_model(path)


def test_types_that_cannot_be_dequantised(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", np.zeros((2, 32), dtype=np.int8))
    finish(writer)
    assert read_gguf_metadata(path)["general.architecture"] == "llama"
    with pytest.raises(ValueError, match="t is of type I8"):
        GGUFFile(path).tensors["t"].read()
