"""The default model in float32 against transformers reading the same GGUF itself: greedy tokens, one for one.

Prompt after prompt on the whole model; batches, guesses and compiled steps against that on its first layers.
"""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.engine import Engine, build_engine, generate
from engine.sampling import Sampling
from engine.speculation.drafters import DraftModel, PromptLookup
from engine.speculation.speculative import Speculation
from layers.quantized import QuantSpec
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model, open_model, save_checkpoint
from weights.layout import Layout

NEW_TOKENS = 24
LONG = (
    "The history of bread is as old as farming. People ground wild grain between two stones, mixed it with water and "
    "baked the paste on hot ashes long before anybody sowed a field. When yeast from the air first raised a forgotten "
    "dough nobody knows, but the bakers of Egypt used it on purpose four thousand years ago. "
)
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "Q: What is 17 + 25?\nA:",
    "3.14159265358979323846264338327950288",
    "1, 1, 2, 3, 5, 8, 13,",
    "def fibonacci(n):\n    ",
    "#include <stdio.h>\n\nint main(void)\n{\n\tfor (int i = 0;",
    "SELECT name, COUNT(*) FROM users WHERE",
    '{"name": "Alice", "age": 30, "tags": [',
    "<html>\n  <body>\n    <h1>",
    "Die Hauptstadt von Österreich heißt",
    "Le château est situé près de la forêt, où",
    "Столица России —",
    "日本の首都は",
    "中国最长的河流是",
    "عاصمة مصر هي",
    "नमस्ते, आप कैसे",
    "I love pizza 🍕 and cats 🐈‍⬛, but not 👩‍👩‍👧‍👦",
    "   leading spaces\tand\ttabs\n\n\n",
    "a",
    LONG * 5 + "\nIn short,",
    LONG.upper(),
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Is the sky blue? 🌤"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And grass?"},
    ],
]


@pytest.fixture(scope="module")
def model(default_gguf):
    return load_model(default_gguf, dtype=torch.float32, dequantize=True)  # model.pth is rounded to bfloat16


@pytest.fixture(scope="module")
def reference_model(default_gguf):
    return AutoModelForCausalLM.from_pretrained(
        default_gguf.parent, gguf_file=default_gguf.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def prompts(default_gguf):
    tokenizer = load_tokenizer(default_gguf)
    ids = [tokenizer.encode(p) if isinstance(p, str) else tokenizer.encode_chat(p) for p in PROMPTS]
    assert max(map(len, ids)) > 300 and min(map(len, ids)) == 1
    return ids


def ours(engine, prompts):
    rows = [[] for _ in prompts]
    for chunk in generate(engine, prompts, NEW_TOKENS, Sampling(temperature=0)):
        for row, ids in zip(rows, chunk, strict=True):
            row += ids
    return rows


def alone(model, prompts):
    """The answer to each prompt alone, end-of-text ignored."""
    engine = Engine(model)
    return [ours(engine, [ids])[0] for ids in prompts]


@pytest.fixture(scope="module")
def path(default_gguf, tmp_path_factory):
    """A file with the first four of the layers."""
    source, path = open_model(default_gguf, dequantize=True), tmp_path_factory.mktemp("first") / "model.pth"
    args = replace(source.args, n_layer=4)
    save_checkpoint(path, args, {name: source.tensors[name]() for name in Layout(args).tensors})
    return path


@pytest.fixture(scope="module")
def first_layers(path):
    return load_model(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(first_layers, prompts):
    answers = alone(first_layers, prompts)
    assert len({tuple(answer) for answer in answers}) > 20
    return answers


def test_weights_equal_those_transformers_reads(model, reference_model):
    state = reference_model.state_dict()
    assert torch.equal(model.tok_embeddings.weight, state["model.embed_tokens.weight"])
    for i, layer in enumerate(model.layers):
        qkv = [state[f"model.layers.{i}.self_attn.{x}_proj.weight"] for x in "qkv"]
        gate_up = [state[f"model.layers.{i}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        assert torch.equal(layer.attention.wqkv.weight, torch.cat(qkv))
        assert torch.equal(layer.feed_forward.w13.weight, torch.cat(gate_up))


@torch.inference_mode()
def test_each_prompt_alone(model, reference_model, prompts):
    """After each part of an answer the likeliest token of transformers is our next, so its greedy answer is ours."""
    for text, ids, answer in zip(PROMPTS, prompts, alone(model, prompts), strict=True):
        logits = reference_model(torch.tensor([ids + answer[:-1]]), logits_to_keep=NEW_TOKENS).logits
        assert logits[0].argmax(-1).tolist() == answer, text


def test_ragged_batches(first_layers, prompts, expected):
    engine = Engine(first_layers)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    for begin in range(0, len(order), 7):
        some = order[begin : begin + 7]
        assert ours(engine, [prompts[i] for i in some]) == [expected[i] for i in some]


@pytest.mark.parametrize("source", ["ngram", "draft"])
def test_speculation(path, first_layers, prompts, expected, source):
    """In batches, with the same weights in int4 as the draft; k = 4."""
    if source == "draft":
        source = DraftModel(load_model(path, dtype=torch.float32, quantize=QuantSpec(4, 32)))
    else:
        source = PromptLookup()
    engine = Engine(first_layers, speculation=Speculation(source, 4))
    for begin in range(0, len(prompts), 8):
        rows = slice(begin, begin + 8)
        assert ours(engine, prompts[rows]) == expected[rows]


@pytest.mark.parametrize("n_rows", [1, 6])
def test_compiled(first_layers, prompts, expected, n_rows):
    engine = build_engine(first_layers, compile=True, compile_prefill=True)
    engine.reserve(n_rows, max(map(len, prompts)) + NEW_TOKENS)  # one cache for all, so one form
    for begin in range(0, len(prompts), n_rows):
        rows = slice(begin, begin + n_rows)
        assert ours(engine, prompts[rows]) == expected[rows]
