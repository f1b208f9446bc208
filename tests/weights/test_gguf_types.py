"""Every type of the package `gguf` against its own dequantize; those that are kept, code for code."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from transformers import LlamaConfig

from tests.weights.test_gguf import SIZES, assert_kept, finish, in_layers, random_blocks, tiny, write_gguf
from weights.checkpoint import open_model
from weights.gguf_file import GGUFFile
from weights.shipped.gguf_blocks import KEPT, common_spec, read_codes

pytestmark = pytest.mark.usefixtures("one_thread")
READABLE = [kind for kind in gguf.quants._type_traits if kind not in (Type.F32, Type.F16)]
ROUNDED_ONCE = {"Q4_1", "Q4_K"}  # whose zeros are not the file's: m + 8 d


def read_back(path, kind, blocks):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", blocks, raw_dtype=kind)
    finish(writer)
    return GGUFFile(path).tensors["t"]


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_type_is_read(kind, tmp_path):
    size, n_byte = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (3, 2 * n_byte), dtype=np.uint8)
    with np.errstate(all="ignore"):
        ours, theirs = read_back(tmp_path / "m.gguf", kind, blocks).read(), torch.tensor(dequantize(blocks, kind))
    assert ours.shape == (3, 2 * size)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("others", [[], ["Q5_1"], ["Q6_K"], ["Q6_K", "Q4_1"]], ids=str)
@pytest.mark.parametrize("name", KEPT)
def test_kept_codes_are_those_of_the_file(name, others, tmp_path, monkeypatch):
    """Alone, and in the formats of layers that have parts of other types."""
    monkeypatch.setattr("weights.shipped.gguf_blocks.PART", 1024)
    kind, spec = Type[name], common_spec({name, *others})
    blocks = random_blocks((7, 512), kind)
    tensor, theirs = read_back(tmp_path / "m.gguf", kind, blocks), torch.tensor(dequantize(blocks, kind))
    leaves = {leaf: read_codes(tensor, spec, leaf) for leaf in spec.leaves}
    ours = spec.layer(**leaves).dequantize()
    is_exact = spec.bits == 8 or name not in ROUNDED_ONCE
    assert ((ours - theirs).abs() <= (0 if is_exact else 2**-22 * theirs.abs().amax(1, keepdim=True))).all()
    assert leaves["weight"].numel() == 7 * 512 * spec.bits // 8


WIDE = SIZES | {"hidden_size": 256, "intermediate_size": 512}
INT4, ZEROS, HALVES, MIXED_HALVES = "int4.g32", "int8.zeros.g32", "int8.g16", "int8.zeros.g16"


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_of_k_quants_is_kept(tied, tmp_path, monkeypatch):
    """As Q4_K_M and Q5_K_M mix them: half of v and down in Q6_K, and the embedding, whose codes a tied head has too."""
    theirs = tiny(LlamaConfig(**WIDE, tie_word_embeddings=tied))
    kinds = {"layers.0.self_attn.v_proj": Type.Q6_K, "layers.0.mlp.down_proj": Type.Q6_K, "o_proj": Type.Q5_K}
    kinds |= {"embed_tokens": Type.Q6_K if tied else Type.Q3_K, "lm_head": Type.Q6_K}
    path = write_gguf(tmp_path / "m.gguf", theirs, Type.Q4_K, kinds=kinds)
    table = assert_kept(path, theirs, monkeypatch)
    assert table == in_layers("attention.wqkv", INT4) | in_layers("attention.wo", ZEROS) | in_layers(
        "feed_forward.w13", INT4
    ) | in_layers("feed_forward.w2", INT4) | {
        "layers.0.attention.wqkv": MIXED_HALVES,
        "layers.0.feed_forward.w2": HALVES,
        "output": HALVES,
    }


def test_a_part_that_is_not_kept_makes_the_layer_float(tmp_path):
    theirs = tiny(LlamaConfig(**WIDE))
    kinds = {"layers.0.self_attn.v_proj": Type.Q3_K, "layers.1.mlp.up_proj": Type.IQ2_XS}
    path = write_gguf(tmp_path / "m.gguf", theirs, Type.Q4_K, kinds=kinds)
    assert open_model(path).table.keys().isdisjoint({"layers.0.attention.wqkv", "layers.1.feed_forward.w13"})
