"""Each family against `transformers`: a tiny random model, saved, loaded by us, the same logits and the same tokens."""

import json

import pytest
import torch
import transformers
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from checkpoint import args_from_hf, load_model
from decoding import Sampling, decode, prefill

GREEDY = Sampling(temperature=0)
pytestmark = pytest.mark.usefixtures("one_thread")
N_NEW = 32
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large, so that logits are far apart and every path matters
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}
SLIDING = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}

FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama, multi-head": (LlamaConfig, {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama, llama3 rope": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama, linear rope": (LlamaConfig, {"rope_parameters": LINEAR_ROPE}),
    "llama, tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama, head_dim": (LlamaConfig, {"head_dim": 12}),
    "mistral, window": (MistralConfig, {"sliding_window": 16, "rope_parameters": {"rope_theta": 1e6}}),
    "mistral, no window": (MistralConfig, {"sliding_window": None}),
    "mistral, head_dim": (MistralConfig, {"head_dim": 12, "sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen2, tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2, window off": (Qwen2Config, {"use_sliding_window": False, "sliding_window": 16}),
    "qwen2, window in all layers": (Qwen2Config, SLIDING),
    "qwen2, window in no layer": (Qwen2Config, {**SLIDING, "max_window_layers": 2}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3, tied": (Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}),
}


def save_tiny(config, folder):
    """A tiny random model of transformers, saved to `folder`. Biases and norms are random too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_(torch.randn_like(weight) * 0.3 + (0 if name.endswith("bias") else 1))
    model.save_pretrained(folder)
    return model


def random_prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(SIZES["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def greedy(model, prompts):
    """N_NEW tokens after each prompt, in one batch."""
    model.setup_caches(len(prompts), 256)
    token, pos = prefill(model, prompts, GREEDY)
    tokens, stream = [token], decode(model, token, pos, GREEDY)
    tokens += [next(stream)[0] for _ in range(N_NEW - 1)]
    return torch.cat(tokens, dim=1).tolist()


def greedy_of_transformers(model, prompt):
    out = model.generate(torch.tensor([prompt]), max_new_tokens=N_NEW, min_new_tokens=N_NEW, do_sample=False)
    return out[0, len(prompt) :].tolist()


def edit_json(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_family_equals_transformers(family, tmp_path):
    kind, extra = FAMILIES[family]
    theirs = save_tiny(kind(**{**SIZES, **extra}), tmp_path)
    ours = load_model(tmp_path, dtype=torch.float32)
    prompts = random_prompts(40, 7, 23)  # the first is longer than any window here

    ours.setup_caches(1, 256)
    for prompt in prompts:
        pos = torch.arange(len(prompt))[None]
        expected = theirs(torch.tensor([prompt])).logits
        torch.testing.assert_close(ours(torch.tensor([prompt]), pos), expected, atol=1e-4, rtol=1e-4)

    expected = [greedy_of_transformers(theirs, prompt) for prompt in prompts]
    assert [greedy(ours, [prompt])[0] for prompt in prompts] == expected
    assert greedy(ours, prompts) == expected


def as_rope_theta(config):
    """config.json as transformers 4 wrote it."""
    parameters = config.pop("rope_parameters")
    return config | {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}


def as_type(config):
    """... and before it, when the kind was called type."""
    config = as_rope_theta(config)
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    return config


def as_rope_parameters(config):
    assert "rope_theta" not in config
    return config


@pytest.mark.parametrize("form", [as_rope_theta, as_type, as_rope_parameters])
@pytest.mark.parametrize("rope", [LLAMA3_ROPE, LINEAR_ROPE], ids=["llama3", "linear"])
@torch.inference_mode()
def test_both_ways_of_writing_rope_settings(form, rope, tmp_path):
    theirs = save_tiny(LlamaConfig(**SIZES, rope_parameters=rope), tmp_path)
    edit_json(tmp_path / "config.json", form)
    ours = load_model(tmp_path, dtype=torch.float32)
    ours.setup_caches(1, 256)
    tokens = torch.tensor(random_prompts(60))
    torch.testing.assert_close(ours(tokens, torch.arange(60)[None]), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_null_rope_scaling_means_none():
    config = LlamaConfig(**SIZES).to_dict()
    del config["rope_parameters"]
    args = args_from_hf(config | {"rope_theta": 500000.0, "rope_scaling": None})
    assert (args.rope_base, args.rope_scaling) == (500000.0, None)


MIXED = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "gpt2"}, ["'gpt2'", "llama", "mistral", "qwen2", "qwen3"]),
        ({"model_type": None, "architectures": ["FooForCausalLM"]}, ["FooForCausalLM", "llama"]),
        ({"model_type": ["llama"]}, ["llama, mistral"]),
        ({"hidden_act": "gelu"}, ["'gelu'", "silu"]),
        ({"hidden_act": ["silu"]}, ["activation", "silu"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["'yarn'", "linear, llama3"]),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ["'dynamic'", "linear, llama3"],
        ),
        ({"rope_parameters": "linear"}, ["rope settings"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["factor"]),
        ({"attention_bias": True}, ["attention_bias", "q, k and v"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"sliding_window": 16, "layer_types": MIXED}, ["sliding_window", "some layers"]),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, ["sliding_window", "some layers"]),
        ({"num_attention_heads": 3}, ["n_head 3"]),
        ({"head_dim": 7}, ["head_dim 7"]),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named_with_what_is(change, named):
    config = LlamaConfig(**SIZES).to_dict() | change
    with pytest.raises(ValueError) as error:
        args_from_hf(config)
    assert all(word in str(error.value) for word in named), error.value
