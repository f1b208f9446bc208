"""Each family against `transformers`: a tiny random model, saved, loaded by us, the same logits and the same tokens."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Cohere2Config,
    DeepseekV2Config,
    DeepseekV3Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    HunYuanDenseV1Config,
    Lfm2Config,
    Lfm2MoeConfig,
    LlamaConfig,
    MiniCPM3Config,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    OPTConfig,
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

import tests.tp_cases as tp_cases
from layers.quantized import LAYERS, QuantSpec, quantize_weight
from tests.tiny import CPU, ROOT, SIZES, continuation, ran, random_prompts, save_tiny
from weights.architectures.table import ARCHITECTURES
from weights.checkpoint import build, load_model, new_table, open_model, read_tensors, save_checkpoint
from weights.families.table import FAMILIES as ROWS
from weights.families.table import args_from_config
from weights.files import Config
from weights.layout import Layout
from weights.registry import args_from_name

pytestmark = pytest.mark.usefixtures("one_thread")
N_NEW = 32
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}
FAMILY_PROMPTS = [[token % SIZES["vocab_size"] for token in ids] for ids in tp_cases.PROMPTS]
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 32}
GRANITE = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 0.7}
BIASES = {"attention_bias": True, "mlp_bias": True}
NTK_ROPE = {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1000.0, "partial_rotary_factor": 0.75}
LONG_ROPE |= {"short_factor": [1.0, 1.1, 1.5], "long_factor": [1.2, 2.0, 4.0]}  # of 6 numbers in 8
IN_TURN = {"num_hidden_layers": 4, "sliding_window": 16}
GLM_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "num_hidden_layers": 3,
}
GEMMA_4 = {
    "num_hidden_layers": 6,
    "layer_types": 2 * ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 16,
    "head_dim": 16,
    "global_head_dim": 24,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.6, "rope_theta": 1000.0},
        "sliding_attention": {"rope_theta": 100.0},
    },
    "final_logit_softcapping": 9.0,
    "vocab_size_per_layer_input": SIZES["vocab_size"],
    "hidden_size_per_layer_input": 0,
}
GEMMA_4_SMALL = {"num_kv_shared_layers": 3, "hidden_size_per_layer_input": 32, "use_double_wide_mlp": True}
GEMMA_4_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 32,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "use_bidirectional_attention": "vision",
}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32}
LATENT |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24}
WIDE_LATENT = LATENT | {"kv_lora_rank": 128, "qk_rope_head_dim": 32}  # of a size that operators take
LATENT_EXPERTS = GLM_EXPERTS | {"first_k_dense_replace": 1}
LATENT_YARN = YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 0.9}
SLIDING = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
DELTA = {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
DELTA |= {"linear_value_head_dim": 16, "num_hidden_layers": 4}
DELTA_EXPERTS = DELTA | EXPERTS | {"num_experts_per_tok": 3, "shared_expert_intermediate_size": 64}
OPT = {"num_key_value_heads": 4, "ffn_dim": 64, "init_std": 0.3}
IN_TWO = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
SHORT_CONVS = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "conv"]}
SHORT_CONV_EXPERTS = EXPERTS | {"num_experts_per_tok": 3, "num_dense_layers": 1, "routed_scaling_factor": 1.5}

FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama, multi-head": (LlamaConfig, {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama, llama3 rope": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama, linear rope": (LlamaConfig, {"rope_parameters": LINEAR_ROPE}),
    "llama, yarn rope": (LlamaConfig, {"rope_parameters": YARN_ROPE}),
    "llama, yarn rope, not truncated": (LlamaConfig, {"rope_parameters": {**YARN_ROPE, "truncate": False}}),
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama, head_dim": (LlamaConfig, {"head_dim": 12}),
    "llama, biases": (LlamaConfig, BIASES),
    "smollm3": (SmolLM3Config, {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "attention_bias": True}),
    "smollm3, every so many": (SmolLM3Config, {"num_hidden_layers": 3, "no_rope_layer_interval": 2}),
    "ministral3": (
        Ministral3Config,
        {"head_dim": 16, "rope_parameters": YARN_ROPE | {"llama_4_scaling_beta": 0.3, "mscale": 1.0}},
    ),
    "mistral, window": (MistralConfig, {"sliding_window": 16, "rope_parameters": {"rope_theta": 1e6}}),
    "mistral, no window": (MistralConfig, {"sliding_window": None}),
    "mistral, head_dim": (MistralConfig, {"head_dim": 12, "sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen2, tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2, window off": (Qwen2Config, {"use_sliding_window": False, "sliding_window": 16}),
    "qwen2, window in all layers": (Qwen2Config, SLIDING),
    "qwen2, window in one layer": (Qwen2Config, {**SLIDING, "max_window_layers": 1}),
    "qwen2, window in no layer": (Qwen2Config, {**SLIDING, "max_window_layers": 2}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3, tied": (Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, window": (MixtralConfig, {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 16}),
    "qwen2_moe": (Qwen2MoeConfig, {**EXPERTS, "num_experts_per_tok": 3, "shared_expert_intermediate_size": 96}),
    "qwen3_moe": (Qwen3MoeConfig, {**EXPERTS, "head_dim": 16, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "qwen3_moe, in some layers": (
        Qwen3MoeConfig,
        {**EXPERTS, "num_experts_per_tok": 2, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "qwen3_next": (Qwen3NextConfig, DELTA_EXPERTS | {"attention_bias": True, "mlp_only_layers": [1]}),
    "qwen3_5": (Qwen3_5TextConfig, DELTA | {"tie_word_embeddings": True}),
    "qwen3_5, in two layers": (Qwen3_5TextConfig, DELTA | IN_TWO | {"linear_num_key_heads": 4}),
    "qwen3_5_moe": (Qwen3_5MoeTextConfig, DELTA_EXPERTS | IN_TWO),
    "lfm2": (Lfm2Config, SHORT_CONVS | {"conv_bias": True, "block_multiple_of": 32}),
    "lfm2, width as it is": (
        Lfm2Config,
        SHORT_CONVS | {"block_auto_adjust_ff_dim": False, "conv_L_cache": 5, "tie_word_embeddings": False},
    ),
    "lfm2, attention alone": (Lfm2Config, {"block_ffn_dim_multiplier": 1.3, "block_multiple_of": 8}),
    "lfm2_moe": (Lfm2MoeConfig, SHORT_CONVS | SHORT_CONV_EXPERTS),
    "phi3": (Phi3Config, {"sliding_window": 16}),
    "phi3, longrope": (
        Phi3Config,
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 24, "tie_word_embeddings": True},
    ),
    "glm4": (Glm4Config, {"head_dim": 16}),
    "glm4_moe": (Glm4MoeConfig, GLM_EXPERTS | {"use_qk_norm": True, "attention_bias": True}),
    "glm4_moe, all layers": (Glm4MoeConfig, GLM_EXPERTS | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
    "deepseek_v2": (DeepseekV2Config, LATENT | LATENT_EXPERTS | {"q_lora_rank": None, "attention_bias": True}),
    "deepseek_v2, groups": (
        DeepseekV2Config,
        LATENT | LATENT_EXPERTS | {"topk_method": "group_limited_greedy", "rope_parameters": LATENT_YARN},
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        WIDE_LATENT | LATENT_EXPERTS | {"attention_bias": True, "rope_parameters": LATENT_YARN | {"beta_fast": 1.0}},
    ),
    "deepseek_v3, halves turned": (
        DeepseekV3Config,
        LATENT | LATENT_EXPERTS | {"rope_interleave": False, "q_lora_rank": None, "first_k_dense_replace": 0},
    ),
    "glm4_moe_lite": (
        Glm4MoeLiteConfig,
        LATENT | GLM_EXPERTS | {"mlp_layer_types": ["dense", "sparse", "sparse"], "rms_norm_eps": 1e-2},
    ),
    "youtu": (YoutuConfig, LATENT),
    "minicpm3": (MiniCPM3Config, LATENT | {"scale_emb": 3.0, "scale_depth": 0.9, "dim_model_base": 16}),
    "gpt_oss": (GptOssConfig, IN_TURN | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss, heads that operators take": (
        GptOssConfig,
        IN_TURN | {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "seed_oss": (SeedOssConfig, {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True}),
    "granitemoe": (GraniteMoeConfig, GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "hunyuan": (
        HunYuanDenseV1Config,
        {"head_dim": 16, "rope_parameters": NTK_ROPE},
    ),
    "exaone4": (Exaone4Config, IN_TURN),
    "exaone4, no window": (Exaone4Config, {"sliding_window": None, "layer_types": 2 * ["full_attention"]}),
    "cohere2": (Cohere2Config, IN_TURN | {"logit_scale": 0.3, "attention_bias": True}),
    "olmoe": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite": (GraniteConfig, GRANITE),
    "olmo2": (Olmo2Config, {}),
    "olmo3": (
        Olmo3Config,
        {
            "num_hidden_layers": 4,
            "sliding_window": 16,
            "rope_parameters": {"full_attention": YARN_ROPE, "sliding_attention": {"rope_theta": 1000.0}},
        },
    ),
    "nemotron": (NemotronConfig, {"head_dim": 16}),
    "nemotron, biases": (NemotronConfig, BIASES | {"norm_eps": 1e-2, "num_key_value_heads": 4}),
    "opt": (OPTConfig, OPT),
    "opt, no biases": (OPTConfig, OPT | {"enable_bias": False, "tie_word_embeddings": False}),
    "gemma": (GemmaConfig, {"head_dim": 12, "hidden_act": "gelu"}),
    "gemma2": (
        Gemma2Config,
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "sliding_window": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "layer_types": 2 * ["sliding_attention"] + ["full_attention"],
            "sliding_window": 16,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {"full_attention": LINEAR_ROPE, "sliding_attention": {"rope_theta": 100.0}},
        },
    ),
    "gemma4": (Gemma4TextConfig, GEMMA_4 | GEMMA_4_SMALL),
    "gemma4 with experts": (Gemma4TextConfig, GEMMA_4 | GEMMA_4_EXPERTS),
    "gemma4, no window": (Gemma4TextConfig, GEMMA_4 | {"layer_types": 6 * ["full_attention"]}),
}


def greedy(model, prompts):
    """N_NEW tokens after each prompt, in one batch."""
    return continuation(model, model.new_cache(len(prompts), 256), prompts, N_NEW).tolist()


def edit_json(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_family_equals_transformers(family, tmp_path):
    kind, extra = FAMILIES[family]
    theirs = save_tiny(kind(**{**SIZES, **extra}), tmp_path)
    ours = load_model(tmp_path, dtype=torch.float32)
    prompts = random_prompts(40, 7, 23)  # the first is longer than any window here

    for prompt in prompts:
        pos = torch.arange(len(prompt))[None]
        expected = theirs(torch.tensor([prompt])).logits
        torch.testing.assert_close(ours(torch.tensor([prompt]), pos), expected, atol=1e-4, rtol=1e-4)

    source = open_model(tmp_path)
    save_checkpoint(tmp_path / "ours.pth", source.args, read_tensors(source, CPU, torch.float32, ""))
    again = load_model(tmp_path / "ours.pth", dtype=torch.float32)
    assert torch.equal(*(logits_of(model, prompts[1:2])[0] for model in (ours, again)))

    answers = [greedy(ours, [prompt])[0] for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):  # after each part of an answer, their likeliest token
        assert theirs(torch.tensor([prompt + answer])).logits[0, -N_NEW - 1 : -1].argmax(-1).tolist() == answer
    assert greedy(ours, prompts) == answers


@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_the_language_part_of_a_vision_language_model(tied, tmp_path):
    kind, extra = FAMILIES["gemma3"]
    text = kind(**{**SIZES, **extra, "vocab_size": 300})
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    config = Gemma3Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    torch.manual_seed(0)
    theirs = Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", without_tied_text)
    prompt = random_prompts(40)
    expected = theirs(torch.tensor(prompt), token_type_ids=torch.zeros(1, 40, dtype=torch.long)).logits[0]
    for old_names in (False, True):
        if old_names:
            tensors = load_file(tmp_path / "model.safetensors")
            tensors = {re.sub(r"^model\.language_model", "language_model.model", n): t for n, t in tensors.items()}
            save_file(tensors, tmp_path / "model.safetensors")
        ours = load_model(tmp_path, dtype=torch.float32)
        torch.testing.assert_close(logits_of(ours, prompt)[0], expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_gemma_4_as_shipped(tmp_path):
    """Beside towers for other input, and with projections to keys and values that nothing uses."""
    kind, extra = FAMILIES["gemma4"]
    theirs, prompt = save_tiny(kind(**{**SIZES, **extra}), tmp_path), random_prompts(40)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {re.sub(r"^model\.", "model.language_model.", name): tensor for name, tensor in tensors.items()}
    names = [f"model.language_model.layers.5.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")]
    names += [f"model.{name}.x" for name in ("vision_tower", "audio_tower", "embed_vision", "embed_audio")]
    save_file(tensors | {name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    edit_json(tmp_path / "config.json", lambda config: {"model_type": "gemma4", "text_config": config})
    (found,) = logits_of(load_model(tmp_path, dtype=torch.float32), prompt)
    torch.testing.assert_close(found, theirs(torch.tensor(prompt)).logits[0], atol=1e-4, rtol=1e-4)


GEMMA_4_SIZES = {"model_type": "gemma4_text", "vocab_size": 262144, "head_dim": 256, "global_head_dim": 512}
GEMMA_4_E2B = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_attention_heads": 8}
GEMMA_4_E2B |= {"num_key_value_heads": 1, "num_kv_shared_layers": 20, "use_double_wide_mlp": True}
GEMMA_4_E2B |= {"layer_types": 7 * (4 * ["sliding_attention"] + ["full_attention"])}
GEMMA_4_26B = {"hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30, "num_attention_heads": 16}
GEMMA_4_26B |= {"num_key_value_heads": 8, "num_global_key_value_heads": 2, "attention_k_eq_v": True}
GEMMA_4_26B |= {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704, "enable_moe_block": True}
GEMMA_4_26B |= {"hidden_size_per_layer_input": 0}


@pytest.mark.parametrize("config, billions", [(GEMMA_4_E2B, 2.3), (GEMMA_4_26B, 25.2)], ids=["E2B", "26B-A4B"])
def test_published_sizes_of_gemma_4(config, billions):
    """Those of its model card, which does not count the embeddings of layers."""
    tensors = Layout(args_from_config(Config(GEMMA_4_SIZES | config))).tensors
    tensors.pop("layer_inputs.embeddings.weight", None)
    assert round(sum(tensor.numel() for tensor in tensors.values()) / 1e9, 1) == billions


def without_tied_text(config):
    """Whether the head is tied stands beside the text's config, as in Gemma 3's files."""
    del config["text_config"]["tie_word_embeddings"]
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_left_out_means_what_transformers_takes_it_for(family):
    kind, extra = FAMILIES[family]
    whole = kind(**{**SIZES, **extra}).to_dict()
    model_type = whole.pop("model_type")
    for key in whole:
        given = {name: value for name, value in whole.items() if name != key}
        try:
            args = args_from_config(Config(given | {"model_type": model_type}))
            completed = AutoConfig.for_model(model_type, **copy.deepcopy(given)).to_dict()
        except (ValueError, ZeroDivisionError):  # refused: sizes that tell one model of a family from another
            continue
        assert args == args_from_config(Config(completed)), key


def test_what_gemma_3_4b_leaves_out_of_its_config():
    """Its text_config has these keys only; the sum is that of Gemma 3's report, 3209 million beside the embedding."""
    config = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    args = args_from_config(
        Config(config | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024})
    )
    assert (args.n_head, args.n_kv_head, args.head_dim, args.vocab_size) == (8, 4, 256, 262208)
    assert args.full_layers == (5, 11, 17, 23, 29) and args.sliding_window == 1024
    assert (args.rope_base, args.window_rope_base, args.rope_scaling.factor) == (1e6, 1e4, 8.0)
    assert args.tie_embeddings and args.norm_offset and args.activation == "gelu_tanh"
    tensors = Layout(args).tensors
    del tensors["tok_embeddings.weight"]
    assert round(sum(tensor.numel() for tensor in tensors.values()) / 1e6) == 3209


GPT_OSS_20B = {"model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880}
GPT_OSS_20B |= {"num_hidden_layers": 24, "num_attention_heads": 64, "num_local_experts": 32, "num_experts_per_tok": 4}
GPT_OSS_20B |= {
    "experts_per_token": 4,
    "initial_context_length": 4096,
    "router_aux_loss_coef": 0.9,
    "swiglu_limit": 7.0,
}
DEEPSEEK = {"model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944}
DEEPSEEK |= {"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None}
DEEPSEEK |= {"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "n_group": 1}
DEEPSEEK |= {"first_k_dense_replace": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax"}
DEEPSEEK |= {"aux_loss_alpha": 0.001, "seq_aux": True, "moe_layer_freq": 1, "ep_size": 1, "pretraining_tp": 1}
DEEPSEEK |= {"rope_theta": 10000, "norm_topk_prob": False, "max_position_embeddings": 163840}
DEEPSEEK_ROPE = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707}
DEEPSEEK_ROPE |= {"mscale_all_dim": 0.707, "original_max_position_embeddings": 4096}
DEEPSEEK["rope_scaling"] = DEEPSEEK_ROPE
DEEPSEEK_V3 = DEEPSEEK | {"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "n_group": 8}
DEEPSEEK_V3 |= {"intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "topk_group": 4}
DEEPSEEK_V3 |= {"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "n_shared_experts": 1}
DEEPSEEK_V3 |= {"n_routed_experts": 256, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True}
DEEPSEEK_V3 |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 1}
COMMAND_R7B = {"model_type": "cohere2", "vocab_size": 256000, "hidden_size": 4096, "intermediate_size": 14336}
COMMAND_R7B |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "layer_switch": 4}
COMMAND_R7B |= {"order_of_interleaved_layers": "local_attn_first", "rotary_pct": 1.0, "use_parallel_block": True}

LFM_2 = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 65536}
LFM_2_1_2B = LFM_2 | {"model_type": "lfm2", "block_auto_adjust_ff_dim": True, "block_dim": 2048, "block_ff_dim": 12288}
LFM_2_1_2B |= {"block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256, "block_norm_eps": 1e-5, "conv_dim": 2048}
LFM_2_1_2B |= {"block_mlp_init_scale": 1.0, "block_use_swiglu": True, "block_use_xavier_init": True, "num_heads": 32}
LFM_2_1_2B |= {"conv_dim_out": 2048, "conv_use_xavier_init": True, "use_pos_enc": True, "num_hidden_layers": 16}
LFM_2_1_2B |= {"conv_L_cache": 3, "full_attn_idxs": [2, 5, 8, 10, 12, 14]}
LFM_2_8B = LFM_2 | {"model_type": "lfm2_moe", "num_hidden_layers": 24, "intermediate_size": 7168, "num_experts": 32}
LFM_2_8B |= {"moe_intermediate_size": 1792, "num_dense_layers": 2, "use_expert_bias": True, "num_experts_per_tok": 4}
LFM_2_8B["layer_types"] = ["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)]
SIZES_OF = [(GPT_OSS_20B, 20_915), (COMMAND_R7B, 8_028), (DEEPSEEK, 15_706), (DEEPSEEK_V3, 671_026)]
SIZES_OF += [(LFM_2_1_2B, 1_170), (LFM_2_8B, 8_340)]


@pytest.mark.parametrize("config, millions", SIZES_OF)
def test_published_sizes_of_models_whose_configs_hold_words_of_their_own(config, millions):
    tensors = Layout(args_from_config(Config(config))).tensors
    assert round(sum(tensor.numel() for tensor in tensors.values()) / 1e6) == millions


def test_layers_for_further_tokens_are_left_out(tmp_path):
    kind, extra = FAMILIES["deepseek_v3"]
    save_tiny(kind(**{**SIZES, **extra}), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.layers.3.eh_proj.weight": torch.ones(32, 64)}, tmp_path / "model.safetensors")
    edit_json(tmp_path / "config.json", lambda config: config | {"num_nextn_predict_layers": 1})
    assert open_model(tmp_path).layout.tensors.keys() == open_model(tmp_path).tensors.keys()


def test_deepseek_v2_lite_by_its_config_and_by_its_name():
    assert args_from_config(Config(DEEPSEEK)) == args_from_name("DeepSeek-V2-Lite")


def test_kimi_k2_is_a_deepseek_v3():
    args = [args_from_config(Config(DEEPSEEK_V3 | {"model_type": name})) for name in ("kimi_k2", "deepseek_v3")]
    assert args[0] == args[1]


def test_the_readme_lists_every_family_and_whether_gguf_files_of_it_are_read():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|")[2:4] for line in lines if re.match(r"\|[^|]*\| `\w+`[ `\w]*\|", line)]
    listed = {name: how for names, how in rows for name in re.findall(r"`(\w+)`", names)}
    in_gguf = {"mistral"}  # as a llama
    for each in ARCHITECTURES.values():
        in_gguf |= each.model_types
    assert listed.keys() - {"model_type"} == ROWS.keys()
    assert {name for name, how in listed.items() if "GGUF" in how} == in_gguf


def logits_of(model, prompts):
    """[S, V] of each prompt."""
    return [model(torch.tensor([ids]), torch.arange(len(ids))[None])[0] for ids in prompts]


# of settings that change no layer, one each
STRUCTURES = [name for name in FAMILIES if "," not in name] + ["llama, tied", "llama, head_dim"]


@pytest.mark.parametrize("family", STRUCTURES)
@torch.inference_mode()
def test_family_in_int4(family, tmp_path):
    """A quantised model is the float one with the weights that its codes stand for."""
    kind, extra = FAMILIES[family]
    save_tiny(kind(**{**SIZES, "hidden_size": 64, "intermediate_size": 64, **extra, "head_dim": 16}), tmp_path)
    spec = QuantSpec(4, 32)
    quantised = load_model(tmp_path, dtype=torch.float32, quantize=spec)
    source = open_model(tmp_path)
    table = new_table(source, spec, tmp_path)
    state = {name: read().float() for name, read in source.tensors.items()}
    for name, each in table.items():
        weight = state.get(f"{name}.weight", state["tok_embeddings.weight"])
        state[f"{name}.weight"] = dequantised(weight, each)
    plain = build(replace(source.args, tie_embeddings=False), state)
    for found, expected in zip(*(logits_of(model, random_prompts(40, 7)) for model in (quantised, plain)), strict=True):
        torch.testing.assert_close(found, expected, atol=5e-5 * expected.abs().max().item(), rtol=1e-4)
    n_shared = 2 * (source.args.n_layer - len(source.args.dense_layers)) if source.args.shared_size else 0
    n_input = 2 * source.args.n_layer + 1 if source.args.layer_input_size else 0
    n_attention = 2 if source.args.kv_latent is None else 5 if source.args.q_latent else 4
    assert len(table) == (n_attention + 2) * source.args.n_layer + n_shared + n_input + 1


def dequantised(weight, spec):
    return LAYERS[spec.bits](**quantize_weight(weight, spec)).dequantize()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """What two ranks find for each family, and what transformers does."""
    folder = tmp_path_factory.mktemp("families")
    expected = {}
    for family in STRUCTURES:
        kind, extra = FAMILIES[family]
        theirs = save_tiny(kind(**{**SIZES, **extra}), folder / family)
        with torch.inference_mode():
            expected[family] = [theirs(torch.tensor([ids])).logits[0, -1] for ids in FAMILY_PROMPTS]
    ran(2, "tests/tp_cases.py", "families", folder)
    return torch.load(folder / "families2.pt"), expected


@pytest.mark.parametrize("family", STRUCTURES)
def test_family_on_two_ranks(on_two_ranks, family):
    found, expected = (each[family] for each in on_two_ranks)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)


def as_rope_theta(config):
    """config.json as transformers 4 wrote it."""
    parameters = config.pop("rope_parameters")
    return config | {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}


def as_type(config):
    """... and before it, when the kind was called type."""
    config = as_rope_theta(config)
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    return config


@pytest.mark.parametrize("form, rope", [(as_rope_theta, LLAMA3_ROPE), (as_type, LINEAR_ROPE)])
@torch.inference_mode()
def test_older_ways_of_writing_rope_settings(form, rope, tmp_path):
    theirs = save_tiny(LlamaConfig(**SIZES, rope_parameters=rope), tmp_path)
    edit_json(tmp_path / "config.json", form)
    ours = load_model(tmp_path, dtype=torch.float32)
    tokens = torch.tensor(random_prompts(60))
    torch.testing.assert_close(ours(tokens, torch.arange(60)[None]), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_null_rope_scaling_means_none():
    config = LlamaConfig(**SIZES).to_dict()
    del config["rope_parameters"]
    args = args_from_config(Config(config | {"rope_theta": 500000.0, "rope_scaling": None}))
    assert (args.rope_base, args.rope_scaling) == (500000.0, None)


MIXED = ["full_attention", "sliding_attention"]
WINDOW = {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "gpt2"}, ["'gpt2'", "llama", "mistral", "qwen2", "qwen3"]),
        ({"model_type": None, "architectures": ["FooForCausalLM"]}, ["FooForCausalLM", "llama"]),
        ({"model_type": ["llama"]}, ["llama, smollm3"]),
        ({"hidden_act": "gelu"}, ["'gelu'", "silu"]),
        ({"hidden_act": ["silu"]}, ["activation", "silu"]),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, ["short_factor is None", "a list"]),
        (
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "linear"}}},
            ["'linear'", "windowed layers"],
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ["'dynamic'", "linear, llama3"],
        ),
        ({"rope_parameters": "linear"}, ["rope settings"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["factor"]),
        (
            {"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 8, "mlp_only_layers": [0, 1]}
            | {"num_experts_per_tok": 2},
            ["dense_layers (0, 1)", "other layers"],
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 9},
            ["n_expert_used is 9", "from 1 to n_expert, 8"],
        ),
        ({"model_type": "mistral", "attention_bias": True}, ["attention_bias", "mistral"]),
        ({"model_type": "qwen3", "mlp_bias": True}, ["mlp_bias"]),
        ({"use_polar_rope": True}, ["use_polar_rope is True", "take it out"]),
        ({"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 8.0}, ["clip_qkv is 8.0"]),
        (
            {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 5.0},
            ["swiglu_limit is 5.0", "7.0"],
        ),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        (DEEPSEEK | {"scoring_func": "sigmoid"}, ["scoring_func is 'sigmoid'", "only 'softmax'"]),
        (DEEPSEEK | {"norm_topk_prob": True}, ["norm_topk_prob is True"]),
        (DEEPSEEK | {"moe_layer_freq": 2}, ["moe_layer_freq is 2"]),
        (DEEPSEEK | {"num_key_value_heads": 4}, ["num_key_value_heads is 4", "num_attention_heads, 16"]),
        (DEEPSEEK_V3 | {"topk_method": "greedy"}, ["topk_method is 'greedy'", "'noaux_tc'"]),
        (
            DEEPSEEK_V3 | {"model_type": "glm4_moe_lite", "mlp_layer_types": ["dense"]},
            ["mlp_layer_types is ['dense']", "each layer"],
        ),
        (LFM_2_1_2B | {"conv_dim": 1024}, ["conv_dim is 1024", "2048"]),
        (LFM_2_1_2B | {"layer_types": 16 * ["mamba"]}, ["'mamba'", "16 of conv"]),
        (LFM_2_8B | {"use_expert_bias": False}, ["use_expert_bias is False"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        (WINDOW | {"layer_types": [*MIXED, *MIXED]}, ["layer_types", "2 of full_attention"]),
        (WINDOW | {"layer_types": ["full_attention", "chunked_attention"]}, ["chunked_attention"]),
        ({"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ({"model_type": "opt", "ffn_dim": 64, "do_layer_norm_before": False}, ["do_layer_norm_before is False"]),
        ({"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 16}, ["word_embed_proj_dim is 16", "32"]),
        ({"num_attention_heads": 3}, ["n_head 3"]),
        ({"head_dim": 7}, ["head_dim 7"]),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named_with_what_is(change, named):
    config = LlamaConfig(**SIZES).to_dict() | change
    with pytest.raises(ValueError) as error:
        args_from_config(Config(config))
    assert all(word in str(error.value) for word in named), error.value
