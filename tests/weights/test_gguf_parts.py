"""GGUF models in several files, as the package `gguf` splits them."""

import re

import pytest
import torch
from transformers import LlamaConfig

from scripts.convert_hf_checkpoint import main as convert
from tests.weights.test_gguf import SIZES, assert_same_logits, tiny, write_gguf
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model, open_model
from weights.gguf_file import read_gguf_metadata

TOKENS = {"add_tokenizer_model": "llama", "add_token_list": [f"<{i}>" for i in range(96)]}
TOKENS |= {"add_token_scores": [0.0] * 96, "add_token_types": [3] * 96}


@pytest.fixture(scope="module")
def model():
    return tiny(LlamaConfig(**SIZES))


@pytest.fixture
def parts(model, tmp_path):
    """Three files; the first holds no tensor."""
    write_gguf(tmp_path / "m.gguf", model, fields=TOKENS, split_max_tensors=11, small_first_shard=True)
    found = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in found] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


@pytest.mark.parametrize("named", [0, 1, 2, "folder"])
def test_any_part_names_the_model(named, parts, model):
    path = parts[0].parent if named == "folder" else parts[named]
    assert_same_logits(path, model)
    opened = open_model(path)
    assert opened.gguf == parts[0] and opened.paths == tuple(parts)
    assert load_tokenizer(path).vocab_size == 96


def test_parts_are_converted_together(parts, model):
    convert(checkpoint_dir=parts[0].parent, dtype="float32", dequantize=False, keep_quantized=False)
    assert_same_logits(parts[0].parent / "model.pth", model)


@pytest.mark.parametrize("named, missing", [(0, 1), (1, 2), (2, 0), ("folder", 0)])
def test_a_missing_part_is_named(named, missing, parts):
    parts[missing].unlink()
    path = parts[0].parent if named == "folder" else parts[named]
    for read in (load_model, read_gguf_metadata) if named != "folder" else (load_model,):
        with pytest.raises(ValueError, match=f"lacks {parts[missing].name}, part {missing + 1} of 3"):
            read(path)


def rename_part(parts):
    return parts[0].rename(parts[0].with_name("renamed.gguf"))


def exchange(parts):
    parts[1].rename(parts[1].with_name("x"))
    parts[2].rename(parts[1]), parts[1].with_name("x").rename(parts[2])
    return parts[0]


def repeat(parts):
    parts[2].write_bytes(parts[1].read_bytes().replace(b"\x01\x00", b"\x02\x00", 1))
    return parts[0]


def other_count(parts):
    for path in parts:
        path.rename(path.with_name(path.name.replace("of-00003", "of-00002")))
    return parts[0].with_name("m-00001-of-00002.gguf")


@pytest.mark.parametrize(
    "change, words",
    [
        (rename_part, "renamed.gguf is a part of 3, which its name must tell"),
        (exchange, r"m-00002-of-00003.gguf: split.no .* are \[2, 3\]; \[1, 3\] are needed"),
        (repeat, "m-00003-of-00003.gguf holds .*, as another part does"),
        (other_count, "m-00001-of-00002.gguf is a part of 3, which its name must tell"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, words, parts):
    with pytest.raises(ValueError, match=words):
        load_model(change(parts))


def test_two_models_in_a_folder_are_named(parts, model):
    write_gguf(parts[0].with_name("other.gguf"), model)
    with pytest.raises(ValueError, match=re.escape(f"several models; give the path of one: {parts[0]}, ")):
        load_model(parts[0].parent)
    assert torch.equal(*(open_model(path).tensors["norm.weight"]() for path in (parts[2], parts[0])))
