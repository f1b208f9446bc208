"""LoRA adapters, laid out as peft does: the truth is transformers with W + s B A computed in float64."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file

from layers.low_rank import WithAdapter
from layers.quantized import QuantSpec
from model import Transformer
from ranks import Ranks
from tests.tiny import CPU, SIZES, save_tiny
from tp import shard
from weights.checkpoint import load_model, new_table, open_model, part_of, read_tensors, save_checkpoint
from weights.registry import args_from_name

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "base_model_name_or_path": "some/base"}
FAMILIES = {  # modules that have an adapter, in each layer
    "llama": (transformers.LlamaConfig(**SIZES), ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]),
    "qwen2": (transformers.Qwen2Config(**SIZES), ["self_attn.v_proj", "self_attn.k_proj", "self_attn.o_proj"]),
    "phi3": (transformers.Phi3Config(**SIZES), ["self_attn.qkv_proj", "mlp.gate_up_proj"]),
    "glm4": (
        transformers.Glm4Config(**SIZES, head_dim=8, partial_rotary_factor=0.5),  # which turns neighbours
        ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_up_proj"],
    ),
}


def write_adapter(folder, model, modules, extra=None, **config):
    """A random adapter of these modules of each layer, which are called as the model calls them; and its s B A."""
    folder.mkdir(exist_ok=True)
    config, tensors, added = CONFIG | config, {}, {}
    torch.manual_seed(1)
    for name, layer in model.named_modules():
        if name.endswith(tuple(modules)):
            n_out, n_in = layer.weight.shape
            a, b = torch.randn(config["r"], n_in) * 0.3, torch.randn(n_out, config["r"]) * 0.3
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
            added[name] = config["lora_alpha"] / root * b.double() @ a.double()
    save_file(tensors | (extra or {}), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


def logits_of(ours):
    return ours(torch.arange(1, 20)[None], torch.arange(19)[None])


def truth(model, added):
    with torch.no_grad():
        for name, delta in added.items():
            weight = model.get_submodule(name).weight
            weight.copy_(weight.double() + delta)
        return model(torch.arange(1, 20)[None]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_float_weights_take_an_adapter_in(tmp_path, family):
    config, modules = FAMILIES[family]
    model = save_tiny(config, tmp_path / "base")
    added = write_adapter(tmp_path / "adapter", model, modules, use_rslora=family == "qwen2")
    plain = logits_of(load_model(tmp_path / "base", dtype=torch.float32))
    ours = logits_of(load_model(tmp_path / "base", dtype=torch.float32, adapter=tmp_path / "adapter"))
    expected = truth(model, added)
    assert (plain - expected).abs().max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_beside_codes(tmp_path, bits):
    """The truth is the model of what the codes stand for, with the adapter in it; activations are rounded besides."""
    config = transformers.LlamaConfig(**SIZES | {"intermediate_size": 64})
    write_adapter(tmp_path / "adapter", save_tiny(config, tmp_path / "base"), FAMILIES["llama"][1])
    opened, file = open_model(tmp_path / "base"), tmp_path / "codes.pth"
    table = new_table(opened, QuantSpec(bits, 32), "base")
    save_checkpoint(file, opened.args, read_tensors(opened, CPU, torch.float32, "", table), table)
    how = {"dtype": torch.float32, "adapter": tmp_path / "adapter"}
    plain, beside = load_model(file, dtype=torch.float32), load_model(file, **how)
    assert isinstance(beside.layers[0].attention.wqkv, WithAdapter)
    expected = logits_of(load_model(file, dequantize=True, **how))
    error, without = ((logits_of(model) - expected).norm() / expected.norm() for model in (beside, plain))
    assert error < 0.05 and without > 0.3
    with pytest.raises(ValueError, match="quantised already"):
        load_model(file, quantize=QuantSpec(8), **how)


@pytest.mark.parametrize("module", ["attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2"])
def test_ranks_have_their_parts_of_an_adapter(module):
    """The product of a rank's matrices is its part of the whole product."""
    args = replace(args_from_name("stories15M"), n_head=4, n_kv_head=2, dim=32, head_dim=8, intermediate_size=48)
    name, layer = f"layers.0.{module}", Transformer(args).get_submodule(f"layers.0.{module}")
    a, b = torch.randn(3, layer.in_features), torch.randn(layer.out_features, 3)
    for rank in range(2):
        own_a, own_b = part_of(name, (a, b), args, Ranks(rank, 2, rank, 2, watch=None))
        torch.testing.assert_close(own_b @ own_a, shard(f"{name}.weight", b @ a, args, rank, 2))


Q, K = (f"base_model.model.model.layers.0.self_attn.{name}_proj.lora_A.weight" for name in "qk")
BAD = {  # changes of the config, further tensors, what is said
    "kind": ({"peft_type": "LOHA"}, {}, "adapter of the kind LOHA"),
    "DoRA": ({"use_dora": True}, {}, "use_dora: True"),
    "modules": ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
    "bias": ({"bias": "all"}, {}, "bias: all"),
    "start": ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights: pissa_niter_4"),
    "alpha": ({"lora_alpha": "x"}, {}, "lora_alpha is 'x'"),
    "layer": ({}, {Q.replace(".0.", ".7."): torch.ones(4, 32)}, "layers.7.*2 layers.*no place"),
    "head": ({}, {"base_model.model.lm_head.lora_embedding_A": torch.ones(4, 32)}, "lora_embedding_A.*no place"),
    "half": ({}, {K: torch.ones(4, 32)}, "lacks .*k_proj.lora_B"),
    "shape": ({}, {Q: torch.ones(4, 64)}, "of another model.*32 inputs"),
    "NaN": ({}, {Q: torch.full((4, 32), torch.nan)}, "q_proj holds NaN"),
}


@pytest.mark.parametrize("bad", BAD)
def test_adapters_that_do_not_fit_are_refused_by_name(tmp_path, bad):
    config, extra, message = BAD[bad]
    model = save_tiny(FAMILIES["llama"][0], tmp_path)
    write_adapter(tmp_path / "adapter", model, ["self_attn.q_proj"], extra)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, adapter=tmp_path / "adapter")


def test_an_adapter_of_a_tied_head_is_refused(tmp_path):
    model = save_tiny(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True), tmp_path)
    write_adapter(tmp_path / "adapter", model, ["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="adapts a head that shares the embedding's weight, which is not supported"):
        load_model(tmp_path, adapter=tmp_path / "adapter")


def test_what_is_no_adapter(tmp_path):
    save_tiny(FAMILIES["llama"][0], tmp_path)
    with pytest.raises(ValueError, match="there is no adapter at .*nowhere"):
        load_model(tmp_path, adapter=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no adapter_config.json; give the folder of an adapter"):
        load_model(tmp_path, adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        load_model(tmp_path, adapter=tmp_path)
