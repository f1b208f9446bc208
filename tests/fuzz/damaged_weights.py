"""Configs, weights and GGUF files: how damaged ones are drawn, and what reads them."""

import io
import json
import struct
import warnings
from pathlib import Path

import torch
from hypothesis import strategies as st

from tests.fuzz.damaged_text import use_tokenizer
from tests.fuzz.shapes import changed, damaged, gguf_bytes, link, read_json, text_of
from weights.checkpoint import load_model

ROPE = ["rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", "head_dim", "sliding_window"]
CONFIG = [*ROPE, "text_config", "layer_types", "quantization_config", "model_type", "tie_word_embeddings", "hidden_act"]


def run_model(path: Path) -> None:
    model = load_model(path, dtype=torch.float32)
    with torch.inference_mode():
        model(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 2]]))


def draw_config(valid: Path):
    trees = {path.parent.name: read_json(path) for path in sorted(valid.glob("*/config.json"))}
    return st.one_of([st.tuples(st.just(name), changed(tree, CONFIG)) for name, tree in trees.items()])


def run_config(valid: Path, folder: Path, case) -> None:
    family, tree = case
    link(valid / family, folder, "config.json")
    (folder / "config.json").write_text(text_of(tree))
    run_model(folder)


def draw_safetensors(valid: Path):
    data = (valid / "llama" / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]

    def with_header(tree) -> bytes:
        header = text_of(tree).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + size :]

    header = json.loads(data[8 : 8 + size])
    return st.one_of(changed(header, ["__metadata__", "lm_head.weight"]).map(with_header), damaged(data))


def run_safetensors(valid: Path, folder: Path, data: bytes) -> None:
    link(valid / "llama", folder, "model.safetensors")
    (folder / "model.safetensors").write_bytes(data)
    run_model(folder)


def draw_index(valid: Path):
    return changed(read_json(valid / "sharded" / "model.safetensors.index.json"))


def run_index(valid: Path, folder: Path, tree) -> None:
    link(valid / "sharded", folder, "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_text(text_of(tree))
    run_model(folder)


def odd_tensors() -> list[torch.Tensor]:
    with warnings.catch_warnings(action="ignore"):  # some kinds are deprecated, and files have them all the same
        quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    odd = [torch.zeros(()), torch.ones(3, 3).to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.zeros(0, 4)]
    odd += [torch.full((320, 64), float("nan")), torch.zeros(64, dtype=torch.float64), torch.zeros(1).expand(320, 64)]
    return [*odd, quantized, nested, torch.empty(320, 64, device="meta")]


def saved(tree) -> bytes:
    data = io.BytesIO()
    torch.save(tree, data)
    return data.getvalue()


def draw_pth(valid: Path):
    path = valid / "ours" / "model.pth"
    tree, data = torch.load(path), path.read_bytes()
    names = sorted(tree["model"])
    tensors = odd_tensors()
    places = st.tuples(st.sampled_from([*names, "extra"]), st.integers(0, len(tensors) - 1))
    odd = places.map(lambda place: saved({**tree, "model": {**tree["model"], place[0]: tensors[place[1]]}}))
    table = {name.removesuffix(".weight"): {"bits": 8, "groupsize": None} for name in names if "attention.w" in name}
    trees = changed({**tree, "quant": table}, ["args", "model_args"]) | changed(tree, ["quant"])
    return st.one_of(trees.map(saved), odd, damaged(data))


def run_pth(valid: Path, folder: Path, data: bytes) -> None:
    (folder / "model.pth").write_bytes(data)
    run_model(folder / "model.pth")


def gguf_parts() -> tuple[dict, dict, bytes]:
    """The metadata, tensors and data of a tiny Llama with a byte-level tokenizer."""
    tokens = ["<unk>", "<s>", "</s>", *"abcdefgh", "Ġ", "ab", "Ġa"]
    dim, vocab = 32, len(tokens)
    fields = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.embedding_length": dim,
        "llama.block_count": 1,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (vocab - 3)],
        "tokenizer.ggml.scores": [0.0] * vocab,
        "tokenizer.ggml.merges": ["a b", "Ġ a"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    sizes = {"attn_q": (dim, dim), "attn_k": (dim, 16), "attn_v": (dim, 16), "attn_output": (dim, dim)}
    sizes |= {"ffn_gate": (dim, 64), "ffn_up": (dim, 64), "ffn_down": (64, dim), "attn_norm": (dim,)}
    sizes = {f"blk.0.{name}.weight": size for name, size in (sizes | {"ffn_norm": (dim,)}).items()}
    sizes |= {"token_embd.weight": (dim, vocab), "output_norm.weight": (dim,)}
    tensors, offset = {}, 0
    for name, size in sizes.items():
        tensors[name] = [list(size), 0, offset]
        offset += 4 * torch.Size(size).numel()
    return fields, tensors, torch.full((offset // 4,), 0.1).numpy().tobytes()


def draw_gguf(_: Path):
    fields, tensors, data = gguf_parts()

    def valid_values(tree) -> dict:
        return {
            str(key): value if isinstance(value, bool | int | float | str | list) else 0 for key, value in tree.items()
        }

    def whole(tree) -> dict:
        """Only what the container can spell."""
        return {
            str(name): ([int(s) for s in shape], int(kind), int(offset) % (1 << 64))
            for name, (shape, kind, offset) in tree.items()
        }

    numbers = st.sampled_from([-1, 0, 1, 2, 8, 12, 31, 32, 39, 64, 1 << 20, 1 << 31, 1 << 40, 1 << 62])

    @st.composite
    def other_tensors(draw):
        tree = {name: [list(shape), kind, offset] for name, (shape, kind, offset) in tensors.items()}
        for _ in range(draw(st.integers(1, 3))):
            each = tree[draw(st.sampled_from(list(tree)))]
            place = draw(st.integers(0, 2))
            if place == 0:
                each[0] = draw(st.lists(numbers.map(lambda n: n % (1 << 64)), max_size=5))
            else:
                each[place] = draw(numbers) % (1 << (32 if place == 1 else 64))
        return gguf_bytes(fields, whole(tree), data)

    others = ["tokenizer.ggml.unknown_token_id", "split.count", "rope_freqs", "llama.expert_count"]
    other_fields = changed(fields, others).map(lambda tree: gguf_bytes(valid_values(tree), whole(tensors), data))
    return st.one_of(other_fields, other_tensors(), damaged(gguf_bytes(fields, whole(tensors), data)))


def run_gguf(valid: Path, folder: Path, data: bytes) -> None:
    path = folder / "model.gguf"
    path.write_bytes(data)
    refused = None
    for work in (lambda: run_model(path), lambda: use_tokenizer(path, "ab a")):
        try:
            work()
        except ValueError as error:
            refused = error
    if refused is not None:
        raise refused
