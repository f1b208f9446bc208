"""GGUF files written by the package `gguf` from tiny transformers models; and files that lie about themselves."""

import struct
import time

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from transformers import LlamaConfig, Qwen2Config

from checkpoint import load_model
from gguf_file import GGUFFile, read_gguf_metadata

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
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def tiny(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.3)
    return model


def interleaved(weight, n_head):
    """q and k rows as llama.cpp's converter orders them for the llama architecture: rope pairs are neighbours."""
    return weight.reshape(n_head, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, kind=Type.F32, fields=None, tensors=None):
    """`model` of transformers as a GGUF file; matrices become what `kind` leaves of them, in the model too."""
    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for add, value in (fields or {}).items():
        getattr(writer, add)(value)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.named_parameters():  # a tied head is not among them
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        codes = weight.detach().numpy()
        if weight.ndim == 2:
            codes = quantize(codes, kind)
            weight.data = torch.tensor(dequantize(codes, kind))
        for part, n_head in heads.items():
            if family == "llama" and part in name:
                codes = interleaved(codes, n_head)
        writer.add_tensor(name, np.ascontiguousarray(codes), raw_dtype=kind if weight.ndim == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.inference_mode()
def assert_same_logits(path, theirs):
    ours = load_model(path, dtype=torch.float32)
    ours.setup_caches(1, 128)
    tokens = torch.randint(SIZES["vocab_size"], (1, 100), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(tokens, torch.arange(100)[None]), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    return ours


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1])
@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Qwen2Config(**SIZES)], ids=["llama", "qwen2"])
def test_logits_equal_those_of_transformers(config, kind, tmp_path):
    theirs = tiny(config)
    assert_same_logits(write_gguf(tmp_path / "m.gguf", theirs, kind), theirs)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tied_heads(config, tied, tmp_path):
    theirs = tiny(config(**SIZES, tie_word_embeddings=tied))
    ours = assert_same_logits(write_gguf(tmp_path / "m.gguf", theirs), theirs)
    assert (ours.output.weight is ours.tok_embeddings.weight) == tied


def test_linear_rope_scaling(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
    fields = {"add_rope_scaling_type": gguf.RopeScalingType.LINEAR, "add_rope_scaling_factor": 2.5}
    theirs = tiny(LlamaConfig(**SIZES, rope_parameters=rope))
    assert_same_logits(write_gguf(tmp_path / "m.gguf", theirs, fields=fields), theirs)


def test_rope_frequency_factors_of_llama3(tmp_path):
    theirs = tiny(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE))
    head_dim = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    plain = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    factors = (plain / theirs.model.rotary_emb.inv_freq).numpy()
    assert factors.max() == pytest.approx(4.0) and factors.min() == 1.0
    assert_same_logits(write_gguf(tmp_path / "m.gguf", theirs, tensors={"rope_freqs.weight": factors}), theirs)


def test_head_dim_of_its_own(tmp_path):
    theirs = tiny(LlamaConfig(**SIZES, head_dim=24))
    fields = {"add_key_length": 24, "add_value_length": 24, "add_rope_dimension_count": 24}
    assert_same_logits(write_gguf(tmp_path / "m.gguf", theirs, fields=fields), theirs)


def test_default_model_reads_as_the_package_reads_it(default_gguf):
    ours, theirs = GGUFFile(default_gguf), gguf.GGUFReader(default_gguf)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        if tensor.name.startswith(("blk.0.", "blk.29.", "output")):
            assert torch.equal(ours.read(tensor.name), torch.tensor(dequantize(tensor.data, tensor.tensor_type)))
    assert ours.tensors["token_embd.weight"][1] == (49152, 576)
    for key in ("general.architecture", "llama.block_count", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.tokens"):
        assert ours.metadata[key] == theirs.get_field(key).contents()


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
            load_model(path, dtype=torch.float32).setup_caches(1, 8)
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
    path.write_bytes(good.read_bytes().replace(b"llama", b"gemma"))
    assert_refused(path, "'gemma'", "llama, qwen2")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"add_expert_count": 8}, ["experts"]),
        ({"add_rope_dimension_count": 8}, ["partial rope"]),
        ({"add_rope_scaling_type": gguf.RopeScalingType.YARN}, ["'yarn'", "none, linear"]),
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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_gguf_metadata(path)["general.architecture"] == "llama"
    with pytest.raises(ValueError, match="t is of type I8"):
        GGUFFile(path).read("t")
