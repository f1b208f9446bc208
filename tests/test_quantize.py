"""quantize.py: its files against the dequantised model, what it prints, its memory, bad input, Ctrl-C, a full disk."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import generate
import quantize as program
from compress.calibration import calibration_windows
from compress.gptq import gptq_
from engine.engine import Engine
from layers.quantized import LAYERS, QuantSpec, quantize_weight
from measure.perplexity import perplexity
from quantize import build_parser, main, relative_error
from tests.tiny import DIFFERING, HALF_GB, ROOT, hf_names, ids_of, make_tiny_checkpoint, needs_proc
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model, open_model, save_checkpoint
from weights.families.table import args_from_config
from weights.files import Config, dropping_page_cache
from weights.layout import Layout

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = ("int8", "int4", "int4-gptq")
TEXT = "The cat sat on the mat. The dog, who had seen all of it, went out into the garden and slept in the sun. " * 20


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The tiny model with a head of its own ("untied"), without ("tied"), with experts; tests write into copies."""
    tied = make_tiny_checkpoint(tmp_path_factory.mktemp("tied")).parent
    untied = shutil.copytree(tied, tmp_path_factory.mktemp("untied"), dirs_exist_ok=True)
    source = open_model(tied)
    args = replace(source.args, tie_embeddings=False)
    tensors = {name: read() for name, read in source.tensors.items()}
    save_checkpoint(untied / "model.pth", args, tensors | {"output.weight": torch.randn(args.vocab_size, args.dim)})
    experts = make_tiny_checkpoint(tmp_path_factory.mktemp("experts"), n_expert=4, n_expert_used=2).parent
    return {"tied": tied, "untied": untied, "experts": experts}


@pytest.fixture
def folder(sources, tmp_path):
    return shutil.copytree(sources["tied"], tmp_path / "tiny")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def quantise(path, *flags):
    """Run the command here; what --output_json says."""
    out = Path(path).parent / "facts.json"
    flags = ["--checkpoint_path", path, "--output_json", out, *flags]
    main(**vars(build_parser().parse_args([str(flag) for flag in flags])))
    facts = json.loads(out.read_text())
    out.unlink()
    return facts


def calibrated(mode, text):
    return ["--calibration_file", text, "--calibration_seq_length", 32, "--seed", 7] if mode == "int4-gptq" else []


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def weights(path):
    """The linear layers of a file, dequantised where need be, in float32."""
    source = open_model(path)
    layers = {}
    for name, spec in source.table.items():
        leaves = ("weight", "scales", "zeros")[: 2 if spec.bits == 8 else 3]
        layers[name] = LAYERS[spec.bits](*(source.tensors[f"{name}.{leaf}"]() for leaf in leaves)).dequantize()
    return layers


def dequantised(path, target):
    """The float model in `path` with the layers of the quantised `target` put back as floats."""
    source, layers = open_model(path), weights(target)
    args = replace(source.args, tie_embeddings=source.args.tie_embeddings and "output" not in layers)
    tensors = {name: read() for name, read in source.tensors.items()}
    tensors |= {f"{name}.weight": weight for name, weight in layers.items()}
    save_checkpoint(path.parent / "dequantised.pth", args, tensors)
    return path.parent / "dequantised.pth"


@torch.inference_mode()
def logits(path):
    return load_model(path, dtype=torch.float32)(torch.arange(40, 72)[None], torch.arange(32)[None])


def greedy(path):
    """The ids that a prompt is continued with."""
    prompt = load_tokenizer(path).encode("the cat sat on")
    return ids_of(load_model(path, dtype=torch.float32), [prompt], 24)


def generated(capsys, path, *flags):
    """The text that generate.py prints, run in this process."""
    capsys.readouterr()
    flags = ["--checkpoint_path", path, "--num_samples", 1, *flags]
    generate.main(**vars(generate.build_parser().parse_args([str(flag) for flag in flags])))
    return capsys.readouterr().out


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    "model, mode, flags, name",
    [
        ("tied", "int8", [], "model_int8.pth"),
        ("experts", "int8", ["--groupsize", 32], "model_int8.g32.pth"),
        ("untied", "int4", [], "model_int4.g32.pth"),
        ("experts", "int4", ["--head", "int4"], "model_int4.g32.pth"),
        ("tied", "int4", ["--head", "float"], "model_int4.g32.pth"),
        ("tied", "int4-gptq", [], "model_int4-gptq.g32.pth"),
        ("experts", "int4-gptq", [], "model_int4-gptq.g32.pth"),
        ("untied", "int4-gptq", ["--head", "float", "--no-act_order"], "model_int4-gptq.g32.pth"),
    ],
)
def test_text_is_that_of_the_dequantised_model(model, mode, flags, name, sources, tmp_path, monkeypatch):
    folder = shutil.copytree(sources[model], tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(TEXT)
    path, before = folder / "model.pth", (folder / "model.pth").read_bytes()
    facts = quantise(path, "--mode", mode, "--dtype", "float32", *flags, *calibrated(mode, tmp_path / "text.txt"))
    target = folder / name
    assert facts["target"] == str(target) and names(folder) == sorted({*names(sources[model]), name})
    assert path.read_bytes() == before

    table = open_model(target).table
    linears = ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")
    body = QuantSpec(8, 32 if "--groupsize" in flags else None) if mode == "int8" else QuantSpec(4, 32)
    head = {"int4": QuantSpec(4, 32), "float": None}.get(flags[1] if "--head" in flags else "", QuantSpec(8))
    assert table.pop("output", None) == head
    assert table == {f"layers.{i}.{name}": body for i in range(2) for name in linears}

    monkeypatch.setattr("weights.checkpoint.pack_", lambda *_: None)  # the plain path: no rounded activations
    floats = dequantised(path, target)
    assert greedy(target) == greedy(floats)
    torch.testing.assert_close(logits(target), logits(floats), atol=1e-4, rtol=1e-4)
    assert (logits(target) - logits(path)).abs().max() > 1e-3


def test_codes_are_those_of_the_original_weights_and_gptq_those_of_gptq(folder, text):
    path = folder / "model.pth"
    original = {name: read().clone() for name, read in open_model(path).tensors.items()}
    for mode, spec in (("int8", QuantSpec(8)), ("int4", QuantSpec(4, 32))):
        source = open_model(quantise(path, "--mode", mode)["target"])
        for layer in source.table:
            rounding = QuantSpec(8) if layer == "output" else spec
            weight = original["tok_embeddings.weight" if layer == "output" else f"{layer}.weight"]
            for key, value in quantize_weight(weight, rounding).items():
                assert torch.equal(source.tensors[f"{layer}.{key}"](), value), (mode, layer, key)
        assert torch.equal(source.tensors["norm.weight"](), original["norm.weight"].bfloat16())

    flags = ["--percdamp", 0.1, "--blocksize", 16, "--act_order", "--calibration_limit", 4]
    source = open_model(quantise(path, "--mode", "int4-gptq", *calibrated("int4-gptq", text), *flags)["target"])
    windows = calibration_windows(load_tokenizer(path).encode(TEXT), limit=4, seq_length=32, needed=96, seed=7)
    expected = gptq_(load_model(path), windows, source.table, percdamp=0.1, blocksize=16, act_order=True)
    assert expected.keys() <= source.tensors.keys()
    for name, value in expected.items():
        assert torch.equal(source.tensors[name](), value), name


@pytest.mark.parametrize("model, mode", [("tied", "int8"), ("experts", "int4"), ("tied", "int4-gptq")])
def test_generate_reads_every_mode(model, mode, sources, tmp_path, text, capsys):
    folder = shutil.copytree(sources[model], tmp_path / "tiny")
    target = quantise(folder / "model.pth", "--mode", mode, *calibrated(mode, text))["target"]
    assert generated(capsys, target, "--max_new_tokens", 8).strip()


def test_compiled_experts_write_the_same_text(sources, capsys):
    """Quantised on the way, and with guesses checked several at a time."""
    flags = ["--dtype", "float32", "--quantize", "int4", "--temperature", 0, "--prompt", "the cat sat on"]
    plain, compiled = (
        generated(capsys, sources["experts"] / "model.pth", *flags, "--max_new_tokens", 40, *more)
        for more in ([], ["--compile", "--speculate", "ngram", "--speculate_k", 2])
    )
    assert plain.strip() and plain == compiled


def test_label_and_folder(folder):
    quantise(folder / "model.pth", "--label", "mine")
    facts = quantise(folder, "--label", "mine", "--mode", "int4", "--groupsize", 32)
    assert facts["target"] == str(folder / "model_mine_int4.g32.pth")
    (folder / "model.pth").rename(folder / "other.v2.pth")
    quantise(folder / "other.v2.pth")
    assert {"model_mine_int8.pth", "model_mine_int4.g32.pth", "other.v2_int8.pth"} <= {*names(folder)}


def test_hugging_face_folder(tmp_path):
    config = LlamaConfig(**HALF_GB | {"num_hidden_layers": 1, "hidden_size": 128, "vocab_size": 64, "head_dim": 8})
    args = args_from_config(Config(config.to_dict()))
    tensors = {name: torch.randn(meta.shape) for name, meta in Layout(args).tensors.items()}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(config.to_dict()))
    save_file(hf_names(tensors, args), tmp_path / "hf/model.safetensors")
    for path in (tmp_path / "hf", tmp_path / "hf/model.safetensors"):
        facts = quantise(path)
        target = Path(facts["target"])
        assert target == tmp_path / "hf/model_int8.pth"
        assert facts["file_before"] == (tmp_path / "hf/model.safetensors").stat().st_size
        for name, weight in weights(target).items():
            torch.testing.assert_close(weight, tensors[f"{name}.weight"], atol=0.02, rtol=0.01)
        target.unlink()


def test_gguf_brings_its_tokenizer_and_is_what_the_file_is_compared_with(default_gguf, tmp_path, capsys):
    os.symlink(default_gguf, tmp_path / "some.gguf")
    facts = quantise(tmp_path / "some.gguf", "--dequantize")
    tokenizer = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert names(tmp_path) == sorted(["some.gguf", "some_int8.pth", *tokenizer])
    assert facts["bytes_before"] == 2 * 134_515_008  # parameters in bfloat16, whatever the file has
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("file"))
    assert re.fullmatch(r"file +98.4 MB +191\.\d MB +1.95 x larger", line)  # it was Q4_1
    assert all(0.005 < layer["relative_error"] < 0.02 for layer in facts["layers"])
    (tmp_path / "some.gguf").unlink()
    assert load_tokenizer(tmp_path / "some_int8.pth").encode(TEXT) == load_tokenizer(default_gguf).encode(TEXT)


def test_codes_become_floats_on_request(folder, text, call, capsys):
    """Commands compute the same in float32 either way, and what would round codes again names the flag."""
    quantise(folder / "model.pth", "--mode", "int4")
    path, exact = folder / "model_int4.g32.pth", ("--dtype", "float32")
    capsys.readouterr()
    for name, flags in {
        "generate.py": ("--prompt", "the cat", "--temperature", 0, "--max_new_tokens", 8, "--num_samples", 1),
        "eval.py": ("--perplexity", text),
    }.items():
        command = (name, "--checkpoint_path", path, *exact, *flags)
        printed = [call(*command, *more).out.splitlines()[0] for more in ((), ("--dequantize",))]
        assert printed[0] == printed[1]
    kept, floats = open_model(path), open_model(path, dequantize=True)
    assert not floats.table and floats.layout.bytes(torch.float32) > 2 * kept.layout.bytes(torch.float32)
    with pytest.raises(ValueError, match="quantised already .*or give --dequantize"):
        call("generate.py", "--checkpoint_path", path, "--prompt", "a", "--quantize", "int8")
    assert quantise(path, "--dequantize")["layers"]


def test_an_existing_file_is_replaced(folder):
    target = folder / "model_int8.pth"
    target.write_bytes(b"old")
    with target.open("rb") as old:  # who has it open keeps it
        quantise(folder / "model.pth")
        assert old.read() == b"old" and open_model(target).table


# ---------------------------------------------------------------- what is reported


def test_facts_and_report(folder, text, capsys):
    path = folder / "model.pth"
    capsys.readouterr()
    facts = quantise(path, "--mode", "int4", "--check", text)
    out, err = capsys.readouterr()
    source, target = open_model(path), Path(facts["target"])
    assert facts["args"]["mode"] == "int4" and facts["args"]["checkpoint_path"] == str(path)
    assert facts["bytes_before"] == sum(2 * read().numel() for read in source.tensors.values())
    assert facts["bytes_after"] == sum(read().nbytes for read in open_model(target).tensors.values())
    assert facts["bytes_after"] == open_model(target).layout.bytes(torch.bfloat16)
    assert facts["seconds"] > 0 and 0.1 < facts["peak_memory_gb"] < 8

    rounded = weights(target)
    assert [layer["name"] for layer in facts["layers"]] == [*rounded]
    for layer in facts["layers"]:
        is_head = layer["name"] == "output"
        weight = source.tensors["tok_embeddings.weight" if is_head else f"{layer['name']}.weight"]()
        expected = (rounded[layer["name"]] - weight).norm() / weight.norm()
        assert layer["relative_error"] == pytest.approx(expected.item(), rel=1e-4)
        assert (layer["bits"], layer["groupsize"]) == ((8, None) if is_head else (4, 32))

    ids = load_tokenizer(path).encode(TEXT)
    for when, file in (("before", path), ("after", target)):
        assert facts[f"perplexity_{when}"] == pytest.approx(
            perplexity(Engine(load_model(file)), ids, window=512).perplexity
        )

    lines = out.splitlines()
    before, after = facts["perplexity_before"], facts["perplexity_after"]
    assert (facts["file_before"], facts["file_after"]) == (path.stat().st_size, target.stat().st_size)
    for line, what, kind in ((lines[1], "weights", "bytes"), (lines[2], "file", "file")):
        old, new = facts[f"{kind}_before"], facts[f"{kind}_after"]
        assert line.split() == f"{what} {old / 1e3:.1f} kB {new / 1e3:.1f} kB {old / new:.2f} x smaller".split()
    assert lines[3].split() == [
        "perplexity",
        f"{before:.4f}",
        f"{after:.4f}",
        f"{100 * (after / before - 1):+.2f}",
        "%",
    ]
    worst = sorted(facts["layers"], key=lambda layer: -layer["relative_error"])[:5]
    assert [line.split()[0] for line in lines if line.startswith("  ")][1:] == [layer["name"] for layer in worst]
    assert lines[-1].startswith(f"{facts['seconds']:.1f} seconds, peak memory ")
    assert err.splitlines()[0] == "Using device=cpu"
    assert err.splitlines()[1].startswith(f"Wrote {target}: {facts['file_after'] / 1e3:.1f} kB")


def test_without_a_check_there_is_no_perplexity(folder, capsys):
    facts = quantise(folder / "model.pth")
    assert facts["perplexity_before"] is facts["perplexity_after"] is None
    assert "perplexity" not in capsys.readouterr().out


def test_relative_error_by_hand():
    weight, rounded = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3, 5], [0, 0]], dtype=torch.int8)
    assert relative_error(weight, [rounded, torch.ones(2, 1)], 8) == pytest.approx(1 / 5)
    assert relative_error(torch.zeros(2, 2), [torch.zeros(2, 2, dtype=torch.int8), torch.ones(2, 1)], 8) == 0


def test_relative_error_does_not_depend_on_the_parts(monkeypatch):
    weight = torch.randn(50, 64)
    rounded = [*quantize_weight(weight, QuantSpec(4, 32)).values()]
    whole = relative_error(weight, rounded, 4)
    monkeypatch.setattr(program, "PART", 3 * 64)
    assert relative_error(weight, rounded, 4) == pytest.approx(whole, rel=1e-5)


# ---------------------------------------------------------------- memory and time

# In a process of its own, argv the flags: the growth of the peak beyond the imports, and the processor's seconds.
WATCH = """
import sys, time
import gguf.quants, safetensors, torch
from weights.device import pick_device
from measure.machine import peak_memory
from quantize import build_parser, main
flags, before = vars(build_parser().parse_args(sys.argv[1:])), peak_memory(pick_device("cpu"))
began = time.process_time()
main(**flags)
print(peak_memory(pick_device("cpu")) - before, time.process_time() - began)
"""


@needs_proc
@pytest.mark.parametrize("mode, form", [("int4", "default"), ("int8", "half a GB of safetensors")])
def test_memory_and_time(mode, form, default_model_dir, tmp_path):
    path = tmp_path / "model.pth"
    if form == "default":
        os.symlink(default_model_dir / "model.pth", path)
    else:
        config, path = LlamaConfig(**HALF_GB).to_dict(), tmp_path
        args = args_from_config(Config(config))
        (path / "config.json").write_text(json.dumps(config))
        zeros = {name: torch.zeros(meta.shape, dtype=torch.bfloat16) for name, meta in Layout(args).tensors.items()}
        save_file(hf_names(zeros, args), path / "model.safetensors")
        del zeros
    flags = ["--checkpoint_path", path, "--mode", mode, "--output_json", tmp_path / "facts.json"]
    done = subprocess.run([sys.executable, "-c", WATCH, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    facts, (grown, seconds) = json.loads((tmp_path / "facts.json").read_text()), done.stdout.splitlines()[-1].split()
    grown = int(grown)
    assert facts["bytes_before"] > 0.25e9 and float(seconds) < 20
    assert grown <= 1.6 * facts["bytes_before"], f"{grown / facts['bytes_before']:.2f} x the float model"


@needs_proc
def test_dropping_the_page_cache_reads_the_same_in_less_memory(default_model_dir):
    def resident():
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1]) * 1024

    path = default_model_dir / "model.pth"
    plain = open_model(path).tensors
    careful = dropping_page_cache(plain, [path])
    before = resident()
    sums = [read().float().sum() for read in careful.values()]
    assert resident() - before < 80e6  # of 269 MB: the last one read
    assert sums == [read().float().sum() for read in plain.values()]


# ---------------------------------------------------------------- bad input

GPTQ = ["--mode", "int4-gptq"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--mode", "int4", "--groupsize", "64"],
            "groupsize 64 does not divide the 96 inputs of layers.0.feed_forward",
        ),
        (["--groupsize", "48"], "groupsize 48 is not supported; use one of 16, 32, 64, 128, 256"),
        (["--mode", "int3"], "invalid choice"),
        (["--head", "int4"], "--head int4 needs --mode int4"),
        (["--label", "a/b"], "--label is 'a/b'"),
        (["--adapter", "lora"], "--adapter needs --label"),
        (["--label", "\ud800"], "--label is not valid UTF-8"),
        (["--threads", "0"], "--threads is 0"),
        (["--model_name", "Llama-2-7B"], "is not Llama-2-7B"),
        (["--checkpoint_path", "/no/model.pth"], "there is no checkpoint at /no/model.pth"),
        (["--output_json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["--output_json", "model.pth"], "model.pth: this run reads it"),
        (["--output_json", "model_int8.pth"], "the quantised model goes there"),
        (["--check", "/no/file"], "cannot read the text /no/file"),
        (["--check", "one.txt"], "one.txt is one token long"),
        (["--percdamp", "0.5"], "--percdamp is for --mode int4-gptq; --mode int8 needs no calibration"),
        (["--mode", "int4", "--no-act_order"], "--act_order is for --mode int4-gptq"),
        (["--calibration_tasks", "wikitext"], "--calibration_tasks is for --mode int4-gptq"),
        ([*GPTQ, "--calibration_file", "/no/file"], "cannot read the text /no/file"),
        ([*GPTQ, "--calibration_file", "one.txt"], "the calibration text is too short"),
        ([*GPTQ, "--calibration_file", "one.txt", "--calibration_tasks", "x"], "both given"),
        ([*GPTQ, "--include_path", "/no/folder"], "there is no folder /no/folder; --include_path needs one"),
        (
            [*GPTQ, "--calibration_seq_length", "513"],
            "--calibration_seq_length 513 is more than the model's context of",
        ),
        ([*GPTQ, "--calibration_limit", "0"], "--calibration_limit is 0"),
        ([*GPTQ, "--blocksize", "0"], "--blocksize is 0"),
        ([*GPTQ, "--percdamp", "0"], "--percdamp is 0.0"),
        ([*GPTQ, "--percdamp", "nan"], "--percdamp is nan"),
        ([*GPTQ, "--seed", "-1"], "--seed is -1"),
    ],
)
def test_bad_input_is_an_error_that_says_what_to_do(flags, message, folder, capsys, monkeypatch):
    (folder / "one.txt").write_text("t")
    there = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError) as error:
        main(**vars(build_parser().parse_args(["--checkpoint_path", "model.pth", *flags])))
    printed = capsys.readouterr()
    assert message in str(error.value) and "\n" not in str(error.value), str(error.value)
    assert printed.out == "" and {path.name: path.read_bytes() for path in folder.iterdir()} == there


def refused(path, *words, flags=()):
    """The command raises a ValueError of one line with these words and leaves the folder as it was."""
    there = names(path.parent)
    with pytest.raises(ValueError) as error:
        main(**vars(build_parser().parse_args(["--checkpoint_path", str(path), *map(str, flags)])))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)
    assert names(path.parent) == there


def test_sources_that_cannot_be_quantised(folder, text):
    path = folder / "model.pth"
    quantise(path, "--label", "x")
    refused(folder / "model_x_int8.pth", "is quantised already (int8); start from the float file")

    torch.save(
        {"tok_embeddings.weight": torch.zeros(4, 4), "output.scales_and_zeros": torch.zeros(1)}, folder / "t.pth"
    )
    refused(folder / "t.pth", "int4 tiles", "quantise again from the float file")

    differing = make_tiny_checkpoint(folder / "differing", **DIFFERING)
    refused(differing, "int4-gptq is not supported for models with n_reusing_layer or layer_input_size", flags=GPTQ)

    source = open_model(path)
    tensors = {name: read().clone() for name, read in source.tensors.items()}
    tensors["layers.1.feed_forward.w2.weight"][3, 5] = math.nan
    save_checkpoint(folder / "nan.pth", source.args, tensors)
    for mode in MODES:
        flags = ["--mode", mode, *calibrated(mode, text)]
        refused(folder / "nan.pth", "layers.1.feed_forward.w2.weight holds NaN", flags=flags)


def test_places_that_cannot_be_written_are_found_before_the_work(folder, monkeypatch):
    monkeypatch.setattr(program, "read_tensors", lambda *_: pytest.fail("it has begun"))
    path, target = folder / "model.pth", folder / "model_int8.pth"
    target.mkdir()
    refused(path, f"cannot write {target}: it is a folder")
    target.rmdir()
    target.symlink_to("model.pth")
    refused(path, f"cannot write {target}: the model is read from it")
    refused(folder, f"cannot write {target}: the model is read from it")
    target.unlink()
    monkeypatch.setattr(os, "access", lambda file, how: how != os.W_OK)  # root may write anywhere
    refused(path, f"cannot write {target}: permission denied")


def test_too_little_memory_is_said_before_the_work(folder, monkeypatch):
    monkeypatch.setattr("weights.device.free_memory", lambda device: 100)
    refused(folder / "model.pth", "kB, but cpu has 0.1 kB free; use a smaller model")


def test_too_little_space_is_said_before_the_work(folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    refused(folder / "model.pth", "1.0 kB are free")


def test_a_full_disk_leaves_nothing_and_spares_what_was_there(folder):
    target = folder / "model_int8.pth"
    for before in (None, b"old"):
        if before:
            target.write_bytes(before)
        there = names(folder)
        command = f"ulimit -f 50; {sys.executable} quantize.py --checkpoint_path {folder} --dtype float32"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert f"error: cannot write {target}: the disk is full" in done.stderr.splitlines()[-1]
        assert names(folder) == there and (not before or target.read_bytes() == before)


# ---------------------------------------------------------------- Ctrl-C


MOMENTS = {  # mode, and what is waited for: a line on standard error, or a temporary file
    "importing": ("int8", " torch._C\n"),
    "rounding": ("int8", "Using device"),
    "rounding by GPTQ": ("int4-gptq", "Using device"),
    "writing": ("int4", None),
    "comparing": ("int4", "Wrote"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupt_while(moment, default_model_dir, text, tmp_path):
    """The process ends with 130 and says nothing of it; the file is there and whole, or not at all."""
    mode, line = MOMENTS[moment]
    folder = shutil.copytree(default_model_dir, tmp_path / "model", copy_function=os.symlink)
    there, target = names(folder), folder / f"model_{mode}{'' if mode == 'int8' else '.g32'}.pth"
    text.write_text(TEXT * 5)
    flags = ["--checkpoint_path", folder / "model.pth", "--mode", mode, *calibrated(mode, text)]
    python = [sys.executable, *(["-X", "importtime"] if moment == "importing" else [])]
    command = [*python, "quantize.py", *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    seen = ""
    while line and line not in seen:
        assert (read := process.stderr.readline()), seen
        seen += read
    while not line and not list(folder.glob(".*.tmp")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    errors = seen + errors
    assert not re.search("Traceback|KeyboardInterrupt", errors), errors
    if "Wrote" in errors:
        assert process.returncode in (0, 130)
        assert names(folder) == sorted([*there, target.name]) and open_model(target).table
    else:
        assert process.returncode == 130 and names(folder) == there


# ---------------------------------------------------------------- the other commands and scripts


def test_help_names_every_flag_and_its_default():
    text = build_parser().format_help()
    for action in build_parser()._actions:
        assert action.option_strings[-1] in text and action.help
        assert action.default in (None, False, "==SUPPRESS==") or "default" in action.help


def test_prepare_downloads_converts_and_quantises(tmp_path):
    stand_in, log = tmp_path / "python3", tmp_path / "log"
    stand_in.write_text(f'#!/bin/sh\necho "$*" >> {log}\n')
    stand_in.chmod(0o755)
    done = subprocess.run(["bash", ROOT / "scripts/prepare.sh", "a/b"], env=os.environ | {"PYTHON": str(stand_in)})
    assert done.returncode == 0
    assert log.read_text().splitlines() == [
        "scripts/download.py --repo_id a/b",
        "scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/a/b --dequantize",
        "quantize.py --checkpoint_path checkpoints/a/b/model.pth --mode int8",
    ]


def test_inputs_are_not_overwritten_by_the_report(folder):
    for kept, flags in (
        ("text.txt", ["--checkpoint_path", folder / "model.pth", "--check", folder / "text.txt"]),
        ("tokenizer.json", ["--checkpoint_path", folder]),
    ):
        (folder / "text.txt").write_text(TEXT)
        with pytest.raises(ValueError, match="this run reads it|a file of the model has that name"):
            main(**vars(build_parser().parse_args([*map(str, flags), "--output_json", str(folder / kept)])))
