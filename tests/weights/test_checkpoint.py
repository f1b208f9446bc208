"""Checkpoints of every format against transformers' logits, and files that are cut short, damaged or hostile."""

import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MixtralConfig, Qwen2Config

from layers.quantized import QuantSpec
from model import ModelArgs, Transformer
from tests.tiny import HALF_GB, hf_names, needs_proc
from weights.checkpoint import load_model, new_table, open_model, random_model, read_tensors, save_checkpoint
from weights.families.table import args_from_config
from weights.files import Config, atomic_path, read_json
from weights.layout import Layout, weight_bytes
from weights.registry import args_from_name

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


def tiny(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def llama():
    return tiny(LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    """A Hugging Face folder of the tiny model; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("hf")
    llama.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "hf")


@torch.inference_mode()
def logits(model):
    return model(torch.arange(20)[None], torch.arange(20)[None])


@torch.inference_mode()
def assert_same_logits(path, theirs, **options):
    ours = load_model(path, dtype=torch.float32, **options)
    torch.testing.assert_close(logits(ours), theirs(torch.arange(20)[None]).logits, atol=1e-4, rtol=1e-4)


def assert_refused(path, *words, **options):
    """load_model raises a ValueError, of one line, with all these words."""
    with pytest.raises(ValueError) as error:
        load_model(path, **options)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


def convert(source, target, dtype=torch.float32):
    """What scripts/convert_hf_checkpoint.py does."""
    opened = open_model(source)
    save_checkpoint(target, opened.args, read_tensors(opened, CPU, dtype, ""))
    return target


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------- our own file


@pytest.mark.parametrize("dtype, tied", [(torch.float32, True), (torch.bfloat16, False)])
def test_our_file_brings_back_every_bit(dtype, tied, tmp_path):
    theirs = tiny(Qwen2Config(**SIZES, tie_word_embeddings=tied))
    theirs.save_pretrained(tmp_path)
    path = convert(tmp_path, tmp_path / "ours.pth", dtype)
    assert open_model(path).table == {} and open_model(path).args == open_model(tmp_path).args
    a, b = load_model(path, dtype=dtype), load_model(tmp_path, dtype=dtype)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(a.state_dict()[name], value) for name, value in b.state_dict().items())
    assert torch.equal(logits(a), logits(b))
    assert (a.output.weight is a.tok_embeddings.weight) == tied
    content = torch.load(path, weights_only=True)
    assert set(content) == {"args", "quant", "model"} and json.loads(json.dumps(content["args"])) == content["args"]
    assert set(content["model"]) == set(Layout(a.args).tensors)


def test_saved_tensors_own_their_storage(tmp_path):
    args = ModelArgs(256, 1, 4, 4, 64, 512, 1024, 64)
    big = torch.zeros(1 << 22)
    tensors = {name: big[: meta.numel()].view(meta.shape) for name, meta in Layout(args).tensors.items()}
    save_checkpoint(tmp_path / "m.pth", args, tensors)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size <= (tmp_path / "m.pth").stat().st_size < size * 1.01 + 20_000


def test_a_folder_prefers_the_converted_file(folder, llama):
    convert(folder, folder / "model.pth")
    (folder / "model.safetensors").write_bytes(b"no longer looked at")
    assert_same_logits(folder, llama)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dim": "32"}, ["dim", "'32'"]),
        ({"n_layer": -1}, ["n_layer", "-1"]),
        ({"n_layer": 10**9}, ["n_layer", "1000000000"]),
        ({"n_layer": 3}, ["m.pth", "layers.2."]),
        ({"n_layer": 1}, ["m.pth", "layers.1."]),
        ({"intermediate_size": 10**400}, ["intermediate_size"]),
        ({"vocab_size": 1 << 24, "dim": 1 << 24}, ["GB"]),
        ({"n_head": True}, ["n_head", "True"]),
        ({"n_kv_head": 3}, ["n_kv_head 3"]),
        ({"head_dim": 1 << 24}, ["head_dim"]),
        ({"norm_eps": math.nan}, ["norm_eps", "nan"]),
        ({"rope_base": "1e4"}, ["rope_base"]),
        ({"rope_scaling": [1]}, ["args"]),
        ({"rope_scaling": {"type": "llama3", "factor": "x"}}, ["factor", "'x'"]),
        ({"rope_scaling": {"type": "dynamic"}}, ["'dynamic'", "linear, llama3, yarn"]),
        ({"sliding_window": "all"}, ["sliding_window", "'all'"]),
        ({"tie_embeddings": "no"}, ["tie_embeddings", "'no'"]),
        ({"tie_embeddings": True, "dim": 31}, ["shape"]),
        ({"surprise": 1}, ["surprise"]),
        ({7: 1}, ["args"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_hostile_args_in_our_file(change, words, saved, tmp_path):
    path = convert(saved, tmp_path / "m.pth")
    content = torch.load(path, weights_only=True)
    torch.save(content | {"args": content["args"] | change}, path)
    began = time.process_time()
    assert_refused(path, *words)
    assert time.process_time() - began < 2


def nested(*sizes):
    with warnings.catch_warnings(action="ignore"):  # of a prototype
        return torch.nested.nested_tensor([torch.ones(size) for size in sizes])


@pytest.mark.parametrize(
    "value, word",
    [
        ([1.0, 2.0], "norm.weight"),
        (None, "norm.weight"),
        (torch.ones(33), "norm.weight has shape [33]"),
        (torch.ones(32, 1), "norm.weight has shape [32, 1]"),
        (torch.ones(()), "norm.weight has shape []"),
        (torch.ones(32, dtype=torch.int8), "norm.weight"),
        (torch.ones(32, dtype=torch.complex64), "norm.weight"),
        (torch.ones(32, device="meta"), "norm.weight"),
        (torch.ones(32).to_sparse(), "norm.weight is a sparse, nested or meta tensor"),
        (nested([32]), "norm.weight is a sparse, nested or meta tensor"),
        (torch.full((32,), math.nan), "norm.weight holds NaN or infinite"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_wrong_tensors_in_our_file(value, word, saved, tmp_path):
    path = convert(saved, tmp_path / "m.pth")
    content = torch.load(path, weights_only=True)
    content["model"]["norm.weight"] = value
    torch.save(content, path)
    assert_refused(path, word)


@pytest.mark.parametrize("form", ["hf", "ours", "rounded", "int8", "bare int8"])
def test_loading_makes_one_meta_model(form, saved, llama, bare, monkeypatch):
    path = saved
    if form == "ours":
        path = convert(saved, bare)
    elif form == "int8":
        opened = open_model(saved)
        table = new_table(opened, QuantSpec(8), saved)
        save_checkpoint(bare, opened.args, read_tensors(opened, CPU, torch.float32, "", table), table)
        path = bare
    elif form == "bare int8":
        torch.save(int8_state(gpt_fast_state(llama)), bare)
        path = bare
    made = []
    monkeypatch.setattr("weights.layout.Transformer", lambda args: made.append(args) or Transformer(args))
    model = load_model(path, quantize=QuantSpec(8) if form == "rounded" else None)
    assert made == [model.args]


# ---------------------------------------------------------------- Hugging Face folders


@pytest.mark.parametrize("form", ["single", "sharded", "bin", "sharded bin", "named otherwise", "the file itself"])
def test_forms_of_a_hugging_face_folder(form, llama, saved, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="20KB" if form == "sharded" else "5GB")
    path = tmp_path
    if "bin" in form:
        (tmp_path / "model.safetensors").unlink()
        state = {name: value.clone() for name, value in llama.state_dict().items()}
        parts = [dict(list(state.items())[i::2]) for i in range(2)] if "sharded" in form else [state]
        names = ["pytorch_model-1.bin", "pytorch_model-2.bin"] if "sharded" in form else ["pytorch_model.bin"]
        for name, part in zip(names, parts, strict=True):
            torch.save(part, tmp_path / name, _use_new_zipfile_serialization=form == "bin")  # and the legacy format
        if "sharded" in form:
            weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if form == "named otherwise":
        path = (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors").parent
    if form == "the file itself":
        path = tmp_path / "model.safetensors"
    assert len(list(tmp_path.glob("*.safetensors"))) != (1 if form == "sharded" else 2)
    assert_same_logits(path, llama)


def test_an_index_that_names_a_missing_file(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    assert_refused(tmp_path, gone.name, "download")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "", ".", "..", "a\0b"])
def test_an_index_that_names_a_path_outside(name, folder):
    outside = (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(outside), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(folder, str(folder), "index")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": ["x"]}}])
def test_an_index_of_the_wrong_form(index, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(folder, "model.safetensors.index.json", "weight_map")


def test_several_files_without_an_index(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    assert_refused(folder, str(folder), "several")


DOWN = "model.layers.1.mlp.down_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        ({DOWN: None}, ["lacks", DOWN]),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, ["model.layers.0.self_attn.q_proj.bias"]),
        ({"model.layers.2.mlp.down_proj.weight": torch.ones(32, 48)}, ["model.layers.2.mlp.down_proj.weight"]),
        ({DOWN: torch.ones(48, 32)}, ["layers.1.feed_forward.w2.weight", "[48, 32]", "[32, 48]"]),
        ({K: torch.ones(16, 33)}, ["layers.0.attention.wqkv.weight"]),
        ({K: torch.ones(17, 32)}, ["layers.0.attention.wqkv.weight", "65", "64"]),
        ({K: torch.ones(())}, ["layers.0.attention.wqkv.weight"]),
        ({DOWN: torch.ones(32, 48, dtype=torch.int8)}, ["layers.1.feed_forward.w2.weight", "int8"]),
        ({DOWN: torch.full((32, 48), math.nan)}, ["layers.1.feed_forward.w2.weight", "NaN"]),
        ({DOWN: torch.full((32, 48), -math.inf)}, ["layers.1.feed_forward.w2.weight", "infinite"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_tensors_missing_extra_misshapen_or_not_finite(change, words, folder):
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")
    assert_refused(folder, *words)


def test_float16_overflow_is_found_in_the_dtype_asked_for(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN][3, 4] = 70000.0
    save_file(tensors, folder / "model.safetensors")
    load_model(folder, dtype=torch.bfloat16)
    assert_refused(folder, "layers.1.feed_forward.w2.weight", "float16", dtype=torch.float16)


def test_leftovers_of_old_writers_are_dropped_by_name(tmp_path):
    theirs = tiny(LlamaConfig(**SIZES, tie_word_embeddings=True))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_logits(tmp_path, theirs)


# ---------------------------------------------------------------- gpt-fast and llama2.c files


def interleaved(weight, head_dim):
    """Rows of q or k as Meta orders them: the two of a rope pair are neighbours."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def meta_state(llama):
    """The state dict of Meta's own Llama files, which gpt-fast's and llama2.c's resemble."""
    state = llama.state_dict()
    head_dim = llama.config.head_dim
    out = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for i in range(llama.config.num_hidden_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        out[ours + "attention.wq.weight"] = interleaved(state[theirs + "self_attn.q_proj.weight"], head_dim)
        out[ours + "attention.wk.weight"] = interleaved(state[theirs + "self_attn.k_proj.weight"], head_dim)
        out[ours + "attention.wv.weight"] = state[theirs + "self_attn.v_proj.weight"]
        out[ours + "attention.wo.weight"] = state[theirs + "self_attn.o_proj.weight"]
        out[ours + "feed_forward.w1.weight"] = state[theirs + "mlp.gate_proj.weight"]
        out[ours + "feed_forward.w2.weight"] = state[theirs + "mlp.down_proj.weight"]
        out[ours + "feed_forward.w3.weight"] = state[theirs + "mlp.up_proj.weight"]
        out[ours + "attention_norm.weight"] = state[theirs + "input_layernorm.weight"]
        out[ours + "ffn_norm.weight"] = state[theirs + "post_attention_layernorm.weight"]
    return {name: value.clone() for name, value in out.items()}


def gpt_fast_mixtral(mixtral):
    """gpt-fast's own names of a mixture of experts, whose tensors are stacked."""
    state, config = mixtral.state_dict(), mixtral.config
    out = {}
    for i in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{i}.mlp.", f"layers.{i}.block_sparse_moe."
        out[ours + "gate.weight"] = state[theirs + "gate.weight"]
        out[ours + "cond_ffn.w1"], out[ours + "cond_ffn.w3"] = state[theirs + "experts.gate_up_proj"].chunk(2, dim=1)
        out[ours + "cond_ffn.w2"] = state[theirs + "experts.down_proj"]
        for name in ("gate_proj", "up_proj", "down_proj"):
            state[theirs + f"{name}.weight"] = state[theirs + "gate.weight"]  # dropped below
    dense = SimpleNamespace(state_dict=lambda: state, config=config)
    dense = {name: value for name, value in gpt_fast_state(dense).items() if "feed_forward" not in name}
    return dense | {name: value.clone() for name, value in out.items()}


def gpt_fast_state(llama):
    state = meta_state(llama)
    for i in range(llama.config.num_hidden_layers):
        names = [f"layers.{i}.attention.w{x}.weight" for x in "qkv"]
        state[f"layers.{i}.attention.wqkv.weight"] = torch.cat([state.pop(name) for name in names])
    return state


def int8_state(state):
    """gpt-fast's int8: every linear layer's rows times 127.5 / their maximum, the scales in bfloat16."""
    out = {}
    for name, weight in state.items():
        if weight.ndim == 1 or name.startswith("tok_embeddings") or name.endswith("gate.weight"):
            out[name] = weight
            continue
        scales = (weight.abs().amax(-1) / 127.5).bfloat16()
        out[name] = (weight / scales.float()[..., None]).round().clamp(-128, 127).to(torch.int8)
        out[scales_of(name)] = scales
    return out


def scales_of(name):
    return re.sub(r"cond_ffn.w(.)$", r"cond_ffn.scales\1", name.replace("weight", "scales"))


def with_scales(state):
    """The floats that an int8 state stands for."""
    floats = {}
    for name, value in state.items():
        if "scales" not in name:
            scales = state.get(scales_of(name), torch.ones(1))
            floats[name] = value.float() * (scales.float()[..., None] if value.dtype == torch.int8 else 1)
    return floats


@pytest.fixture
def bare(saved, tmp_path):
    """Where a bare file goes that finds its sizes in the config.json beside it."""
    shutil.copy(saved / "config.json", tmp_path / "config.json")
    return tmp_path / "model.pth"


FORMS = {
    "gpt-fast": gpt_fast_state,
    "meta": lambda llama: meta_state(llama) | {"rope.freqs": torch.ones(4)},
    "wrapped": lambda llama: {"model": gpt_fast_state(llama)},
    "compiled": lambda llama: {"_orig_mod." + name: value for name, value in gpt_fast_state(llama).items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_bare_state_dicts(form, bare, llama):
    torch.save(FORMS[form](llama), bare, _use_new_zipfile_serialization=form != "meta")
    assert_same_logits(bare, llama)


@torch.inference_mode()
def test_int8_of_gpt_fast_is_its_codes_times_its_scales(bare, llama):
    state = int8_state(gpt_fast_state(llama))
    torch.save(state, bare)
    got = logits(load_model(bare, dtype=torch.float32))
    torch.save(with_scales(state), bare)
    torch.testing.assert_close(got, logits(load_model(bare, dtype=torch.float32)), atol=1e-4, rtol=1e-4)
    expected = llama(torch.arange(20)[None]).logits
    torch.testing.assert_close(got, expected, atol=0.1 * expected.abs().max().item(), rtol=0)


def test_mixtral_of_gpt_fast(tmp_path):
    path = tmp_path / "model.pth"
    mixtral = tiny(MixtralConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2))
    mixtral.config.save_pretrained(tmp_path)
    state = gpt_fast_mixtral(mixtral)
    torch.save(state, path)
    assert_same_logits(path, mixtral)
    torch.save(int8_state(state), path)
    model = load_model(path, dtype=torch.float32)
    torch.save(with_scales(int8_state(state)), path)
    torch.testing.assert_close(logits(model), logits(load_model(path, dtype=torch.float32)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scales", [None, torch.ones(7), torch.ones(()), torch.ones(32, 1)], ids=str)
def test_int8_without_fitting_scales(scales, bare, llama):
    state = int8_state(gpt_fast_state(llama))
    name = "layers.0.attention.wo.scales"
    state = {k: v for k, v in state.items() if k != name} | ({} if scales is None else {name: scales})
    torch.save(state, bare)
    assert_refused(bare, "layers.0.attention.wo.scales")


def test_tiled_int4_is_refused_with_what_to_do(bare, llama):
    state = gpt_fast_state(llama)
    state["layers.0.attention.wo.weight"] = torch.zeros(4, 1, 32, 4, dtype=torch.int32)
    state["layers.0.attention.wo.scales_and_zeros"] = torch.zeros(1, 32, 2).bfloat16()
    torch.save(state, bare)
    assert_refused(bare, "model.pth", "int4", "quantise again")


def test_a_bare_file_that_does_not_say_what_it_is(bare, llama):
    torch.save(gpt_fast_state(llama), bare)
    assert_refused(bare, "Llama-2-7B", "dim 32 (not 4096)", model_name="Llama-2-7B")
    assert_refused(bare, "'llama'", "Llama-2-7B", model_name="llama")
    (bare.parent / "config.json").unlink()
    assert_refused(bare, "model.pth", "config.json", "--model_name")
    assert_refused(bare, "model.pth", "layers.2", model_name="stories15M")


def test_a_bare_file_of_a_registry_size(tmp_path):
    args = args_from_name("stories15M")
    state = {name: torch.zeros(meta.shape).bfloat16() for name, meta in Layout(args).tensors.items()}
    for i in range(args.n_layer):
        names = [f"layers.{i}.feed_forward.w{x}.weight" for x in "13"]
        state |= dict(zip(names, state.pop(f"layers.{i}.feed_forward.w13.weight").chunk(2), strict=True))
    torch.save(state, tmp_path / "model.pth")
    assert load_model(tmp_path / "model.pth", model_name="stories15M").args == args


def llama2c_file(theirs):
    config = theirs.config
    model_args = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": 16,
        "max_seq_len": 64,
        "dropout": 0.0,
    }
    state = meta_state(theirs) | {"freqs_cos": torch.ones(64, 4), "freqs_sin": torch.ones(64, 4)}
    state = {"_orig_mod." + name: value for name, value in state.items()}
    return {"model": state, "model_args": model_args, "iter_num": 1000, "optimizer": {"state": {}}}


def test_llama2c_file(tmp_path):
    theirs = tiny(LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5))
    torch.save(llama2c_file(theirs), tmp_path / "stories.pt")
    assert_same_logits(tmp_path / "stories.pt", theirs)
    assert load_model(tmp_path / "stories.pt").args.max_seq_length == 64


@pytest.mark.parametrize(
    "change",
    [{"dim": "32"}, {"n_heads": 0}, {"n_heads": None}, {"n_layers": 10**9}, {"vocab_size": -1}, {"max_seq_len": []}],
    ids=str,
)
def test_hostile_model_args_of_llama2c(change, tmp_path):
    content = llama2c_file(tiny(LlamaConfig(**SIZES, tie_word_embeddings=True)))
    content["model_args"] |= change
    torch.save(content, tmp_path / "stories.pt")
    assert_refused(tmp_path / "stories.pt")
    torch.save(content | {"model": {7: torch.ones(1)}}, tmp_path / "stories.pt")
    assert_refused(tmp_path / "stories.pt", "stories.pt")


# ---------------------------------------------------------------- what is no checkpoint

NO_CHECKPOINTS = {
    "empty": b"",
    "one byte": b"P",
    "text": b"Once upon a time\n" * 50,
    "random": random.Random(0).randbytes(5000),
    "zip magic": b"PK\x03\x04" + random.Random(1).randbytes(5000),
    "json list": b"[1, 2, 3]",
    "html": b"<!DOCTYPE html><html>404</html>",
    "pickled list": pickle.dumps([1, 2]),
    "pickled dictionary": pickle.dumps({"model": {"a": 1}}),
    "pickled and deep": b"\x80\x04" + b"(" * 100_000,
}


@pytest.mark.parametrize("content", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_files_that_are_no_checkpoint(content, folder, tmp_path):
    for name in ("model.pth", "model.gguf"):
        (tmp_path / name).write_bytes(content)
        assert_refused(tmp_path / name, name)
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        for path in folder.glob("*model*"):
            path.unlink()
        (folder / name).write_bytes(content)
        assert_refused(folder, name)


def test_missing_files_and_folders(folder, tmp_path):
    assert_refused(tmp_path / "nowhere.pth", "nowhere.pth", "OWNER/NAME")
    assert_refused("checkpoints/Some/Model/model.pth", "scripts/prepare.sh Some/Model")
    (tmp_path / "none").mkdir()
    assert_refused(tmp_path / "none", str(tmp_path / "none"), "holds no model")
    for name in ("model.pth", "model.safetensors"):
        (tmp_path / name).mkdir()
        assert_refused(tmp_path / name, name)
    assert_refused(tmp_path, str(tmp_path))
    assert_refused("/dev/null", "/dev/null")
    (folder / "config.json").unlink()
    assert_refused(folder, "config.json")


@pytest.mark.parametrize("name", ["layers.0.feed_forward.w1.weight", "layers.0.attention.wq.weight", "output.weight"])
def test_a_nested_tensor_in_a_file_of_llama2c(name, tmp_path):
    content = llama2c_file(tiny(LlamaConfig(**SIZES, tie_word_embeddings=True)))
    content["model"]["_orig_mod." + name] = nested([48, 32], [1, 32])
    torch.save(content, tmp_path / "stories.pt")
    assert_refused(tmp_path / "stories.pt", name, "nested")


@pytest.mark.parametrize("content", [7, "x", [1], {}, {"model": 3}, {"model": {}}, torch.ones(3), {"a": torch.ones(1)}])
def test_torch_files_of_something_else(content, tmp_path):
    torch.save(content, tmp_path / "m.pth")
    assert_refused(tmp_path / "m.pth", "m.pth")


class RunsCode:
    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize(
    "form, place",
    [("zip", "model.pth"), ("legacy", "in a dictionary"), ("plain pickle", "pytorch_model.bin")]
    + [("zip", "in a dictionary"), ("legacy", "pytorch_model.bin"), ("plain pickle", "model.pth")],
)
def test_a_pickle_that_would_run_code_is_refused_and_not_run(form, place, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    evil = RunsCode()
    evil.target = tmp_path / "ran"
    content = {"args": evil, "model": {"a": evil}} if place == "in a dictionary" else evil
    path = folder / ("pytorch_model.bin" if "bin" in place else "model.pth")
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert_refused(folder, path.name, "refused", "code")
    assert not evil.target.exists()


def truncations(path, n):
    """Lengths to cut a file at: the ends byte by byte, the rest in n steps."""
    size = path.stat().st_size
    return sorted({*range(1, 40), *range(40, size, max(1, size // n)), *range(size - 40, size)})


def saved_as(form, folder):
    """The model's only file, in one of three formats."""
    if form == "safetensors":
        return folder / "model.safetensors"
    path = convert(folder, folder / "model.pth")
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_cut_short_at_any_length(form, folder):
    path = saved_as(form, folder)
    whole = path.read_bytes()
    for length in truncations(path, 30):
        path.write_bytes(whole[:length])
        assert_refused(folder, path.name)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_are_errors_or_harmless(form, folder):
    """Only ValueError escapes, whatever byte is damaged; the header and the pickle are damaged most."""
    path = saved_as(form, folder)
    whole, generator = bytearray(path.read_bytes()), random.Random(0)
    for _ in range(200):
        flipped = whole.copy()
        for _ in range(generator.choice((1, 1, 4))):
            place = generator.choice((generator.randrange(3000), generator.randrange(len(whole))))
            if form == "zip" and generator.random() < 0.3:
                place = len(whole) - 1 - generator.randrange(3000)  # the directory of a zip file is at its end
            flipped[place] = generator.randrange(256)
        path.write_bytes(flipped)
        try:
            load_model(folder)
        except ValueError as error:
            assert str(error)


def safetensors_bytes(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
SAFETENSORS = {
    "length 2^63": struct.pack("<Q", 2**63) + b"{}",
    "length 2^64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "length above the file": struct.pack("<Q", 1000) + b"{}",
    "garbage header": safetensors_bytes(random.Random(0).randbytes(500)),
    "list header": safetensors_bytes(b"[]"),
    "deep header": safetensors_bytes(b"[" * 100_000 + b"]" * 100_000),
    "empty header": safetensors_bytes(b"{}"),
    "huge shape": safetensors_bytes({"a": ENTRY | {"shape": [2**62, 2**62]}}, bytes(16)),
    "negative shape": safetensors_bytes({"a": ENTRY | {"shape": [-4]}}, bytes(16)),
    "offsets outside": safetensors_bytes({"a": ENTRY | {"data_offsets": [0, 2**60]}}, bytes(16)),
    "offsets backwards": safetensors_bytes({"a": ENTRY | {"data_offsets": [16, 0]}}, bytes(16)),
    "overlapping": safetensors_bytes({"a": ENTRY, "b": ENTRY}, bytes(16)),
    "unknown dtype": safetensors_bytes({"a": ENTRY | {"dtype": "F31"}}, bytes(16)),
    "infinite offset": safetensors_bytes(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,1e999]}}', bytes(16)),
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_safetensors_that_lie(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    assert_refused(folder, str(folder))


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[1]", b"7", b"null", b'"x"', b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe\x00", b"{'a': 1}"]
    + [b'{"hidden_size": 1' + b"0" * 5000 + b"}"],
    ids=lambda text: str(text[:12]),
)
def test_a_broken_config(text, folder):
    (folder / "config.json").write_bytes(text)
    assert_refused(folder, "config.json")
    with pytest.raises(ValueError, match="config.json"):
        read_json(folder / "config.json")


WINDOW = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
NUMBERS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
NUMBERS += ["intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps"]


WRONG = ["1e999", "-1e999", "NaN", "-1", "0", '"abc"', "true", "1" + "0" * 400, "[1]", "{}"]


@pytest.mark.parametrize(
    "field, value",
    [("hidden_size", value) for value in WRONG]
    + [("rms_norm_eps", value) for value in WRONG]
    + [(field, WRONG[i]) for i, field in enumerate(NUMBERS)],
)
def test_numbers_of_a_config_that_are_none(field, value, folder):
    path = folder / "config.json"
    edit_json(path, **{field: "HERE"})
    path.write_text(path.read_text().replace('"HERE"', value))
    began = time.process_time()
    assert_refused(folder, "config.json", field)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1024},
        {"hidden_size": 10**9},
        {"hidden_size": 1 << 24, "intermediate_size": 1 << 24, "vocab_size": 1 << 24},
        {"num_attention_heads": 1 << 24, "head_dim": 1 << 24},
        {"vocab_size": 2**62},
        {"max_position_embeddings": 10**12},
        {"model_type": "mistral", "sliding_window": 10**12},
        {"model_type": "mistral", "sliding_window": "wide"},
        WINDOW | {"layer_types": 5},
        WINDOW | {"layer_types": [["sliding_attention"]]},
        WINDOW | {"max_window_layers": "x", "layer_types": None},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_theta": 0}},
        {"rope_parameters": {"rope_theta": 10**400}},
        {"rope_parameters": {"rope_type": "linear", "factor": -1}},
        {"rope_parameters": {"rope_type": ["linear"]}},
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
    ],
    ids=str,
)
def test_absurd_configs_are_refused_at_once(changes, folder):
    edit_json(folder / "config.json", **changes)
    began = time.process_time()
    assert_refused(folder)
    assert time.process_time() - began < 4


# ---------------------------------------------------------------- memory


def test_too_little_memory_is_said_with_the_sizes_before_anything_is_read(folder, tmp_path, monkeypatch):
    ours = convert(folder, tmp_path / "model.pth")
    monkeypatch.setattr("weights.device.free_memory", lambda device: 10_000)
    monkeypatch.setattr("weights.checkpoint.read_tensors", None)
    for path in (folder, ours):
        assert_refused(path, "kB, but cpu has 10.0 kB free")
    with pytest.raises(ValueError, match="Llama-3.1-405B need 811.7 GB, but cpu has 10.0 kB free"):
        random_model("Llama-3.1-405B")


# In a process of its own: loads argv[1] and prints by how much anonymous memory grew at most, and the weights' size.
WATCH = """
import re, sys, threading, time
from pathlib import Path
import torch
from weights.checkpoint import load_model
from kernels import cpu
cpu.available()  # loaded before the watch begins, like every import

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

import gguf.quants, safetensors, tqdm
done, before = False, anonymous()
peak = before
thread = threading.Thread(target=watch)
thread.start()
model = load_model(sys.argv[1], dequantize="dequantize" in sys.argv)
done = True
thread.join()
print(max(peak, anonymous()) - before, sum(tensor.nbytes for tensor in model.state_dict().values()))
"""


def peak_growth(*arguments):
    command = [sys.executable, "-c", WATCH, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return map(int, result.stdout.split())


@needs_proc
@pytest.mark.parametrize("form", ["safetensors", "model.pth", "float32 model.pth"])
def test_loading_needs_little_more_memory_than_the_weights(form, tmp_path):
    config = LlamaConfig(**HALF_GB).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = args_from_config(Config(config))
    dtype = torch.float32 if "float32" in form else torch.bfloat16
    weights = {name: torch.zeros(meta.shape, dtype=dtype) for name, meta in Layout(args).tensors.items()}
    if form == "safetensors":
        save_file(hf_names(weights, args), tmp_path / "model.safetensors")
    else:
        save_checkpoint(tmp_path / "model.pth", args, weights)
    del weights
    grown, size = peak_growth(tmp_path)
    assert size > 0.5e9
    assert size * 0.9 < grown <= size * 1.3, f"{grown / size:.2f} x the weights"


@needs_proc
@pytest.mark.parametrize("how, least", [("dequantize", 0.2e9), ("kept", 0.1e9)])
def test_loading_the_default_gguf_needs_350_mb_more_than_the_weights(default_gguf, how, least):
    grown, size = peak_growth(default_gguf, how)
    assert least < size
    # Memory that the imports freed is taken again: up to a tenth of the weights may lie in it.
    assert size * 0.9 < grown <= size + 350e6, f"{(grown - size) / 1e6:.0f} MB more than {size / 1e6:.0f} MB"


# ---------------------------------------------------------------- writing

# Saves to argv[1] under a limit on file sizes: some bytes, or (negative) some less than the whole file takes.
SAVE = """
import os, resource, sys, torch
from pathlib import Path
from weights.checkpoint import save_checkpoint
from weights.layout import Layout
from model import ModelArgs
path, args = Path(sys.argv[1]), ModelArgs(256, 2, 4, 4, 64, 512, 1024, 64)
tensors = {name: torch.zeros(meta.shape) for name, meta in Layout(args).tensors.items()}
save_checkpoint(path, args, tensors)
size = path.stat().st_size
path.unlink()
for limit in (0, 100, 300_000, 5_000_000, -1000, -1, None):
    for before in (None, b"old"):
        if before:
            path.write_bytes(before)
        soft = resource.RLIM_INFINITY if limit is None else limit % size
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
        try:
            save_checkpoint(path, args, tensors)
        except ValueError as error:
            print(f"{error}")
            assert os.listdir(path.parent) == ([path.name] if before else []), os.listdir(path.parent)
            assert not before or path.read_bytes() == before
        else:
            assert limit is None and path.stat().st_size == size, limit
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        path.unlink(missing_ok=True)
"""


def test_a_write_that_fails_leaves_nothing_and_spares_what_was_there(tmp_path):
    path = tmp_path / "folder" / "model.pth"
    path.parent.mkdir()
    command = [sys.executable, "-c", SAVE, str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")  # no abort of C++ either
    lines = result.stdout.splitlines()
    assert len(lines) == 12 and all(line.startswith(f"cannot write {path}: the disk is full") for line in lines)


def test_writing_where_it_cannot_be(saved, tmp_path, monkeypatch):
    source = open_model(saved)
    tensors = read_tensors(source, CPU, torch.float32, "")
    with pytest.raises(ValueError, match="cannot write .*nowhere"):
        save_checkpoint(tmp_path / "nowhere" / "m.pth", source.args, tensors)
    (tmp_path / "m.pth").mkdir()
    with pytest.raises(ValueError, match="cannot write .*m.pth"):
        save_checkpoint(tmp_path / "m.pth", source.args, tensors)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ValueError, match=r"needs \d+\.\d kB, and 0.0 kB are free"):
        save_checkpoint(tmp_path / "n.pth", source.args, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    for error in (KeyboardInterrupt, MemoryError):
        with pytest.raises(error), atomic_path(tmp_path / "m.pth") as temporary:
            temporary.write_bytes(b"half")
            raise error
    assert not list(tmp_path.iterdir())


def test_a_link_stays_a_link(saved, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "model.pth").symlink_to(tmp_path / "real" / "m.pth")
    convert(saved, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").is_symlink() and (tmp_path / "real" / "m.pth").is_file()


# ---------------------------------------------------------------- random weights, bytes read


def test_random_model_is_finite_seeded_and_runs():
    a, b, c = (random_model("stories15M", dtype=torch.float32, seed=seed) for seed in (1, 1, 2))
    assert a.args == args_from_name("stories15M")
    assert torch.equal(logits(a), logits(b)) and not torch.equal(logits(a), logits(c))
    assert logits(a).isfinite().all() and logits(a).std() > 0.01
    with pytest.raises(ValueError, match="'Llama', .*|no model is named 'Llama'"):
        random_model("Llama")


def test_weight_bytes_of_experts_by_hand(tmp_path):
    config = MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2)
    tiny(config).save_pretrained(tmp_path)
    expert, gate = 3 * 32 * 48, 8 * 32
    rest = 2 * (32 * (32 + 2 * 16) + 32 * 32 + 2 * 32 + gate) + 32 + 96 * 32
    for model in (load_model(tmp_path), load_model(tmp_path, dtype=torch.float32)):
        size = model.dtype.itemsize
        assert weight_bytes(model) == size * (rest + 2 * 2 * expert)  # in each of two blocks two of eight
        assert weight_bytes(model, tokens=2) == size * (rest + 2 * 3.5 * expert)  # two, and six times a quarter
        assert weight_bytes(model, tokens=1000) == size * (rest + 2 * 8 * expert)


def test_weight_bytes_by_hand(saved):
    model = load_model(saved, dtype=torch.bfloat16)
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32  # wqkv, wo, w1 w3 w2, two norms
    assert weight_bytes(model) == 2 * (2 * layer + 32 + 96 * 32)  # the last norm, the output head; not the embedding
