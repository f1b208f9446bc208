"""What is fuzzed: for each kind of input, how damaged ones are drawn, and what reads them.

A case is drawn in the process that has hypothesis, and run in a child (`forks.py`) in an empty folder of its own.
"""

import argparse
import contextlib
import io
import json
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval.evaluator  # all that a task imports, before the children are forked
import lm_eval.tasks
import torch
import transformers
from hypothesis import strategies as st

import eval as evaluate
import generate
import quantize
from tests.fuzz.shapes import changed, damaged, gguf_bytes, values, words
from tests.tiny import SIZES, make_tiny_checkpoint, save_tiny
from text.chat import render
from text.prompts import encode_prompt, read_prompt_file
from text.stream import TextStream
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model

TEXTS = ["the cat sat", "<|im_start|>é🍕", "\ud800", "", "a\x00b\n"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat"}]


class Kind(NamedTuple):
    draw: Callable[[Path], st.SearchStrategy]  # from the folder of valid files
    run: Callable[[Path, Path, Any], None]  # the valid files, an empty folder and a case


def run_model(path: Path) -> None:
    model = load_model(path, dtype=torch.float32)
    with torch.inference_mode():
        model(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 2]]))


def use_tokenizer(path: Path, text: str) -> None:
    tokenizer = load_tokenizer(path)
    stream = TextStream(tokenizer, ["stop"])
    stream.push(encode_prompt(tokenizer, text))
    stream.finish()
    if tokenizer.chat_template is not None:
        tokenizer.encode_chat([*MESSAGES, {"role": "user", "content": text}])


def link(source: Path, folder: Path, *without: str) -> None:
    """The files of `source`, but for some."""
    for path in source.iterdir():
        if path.name not in without:
            (folder / path.name).symlink_to(path)


def text_of(tree) -> str:
    return json.dumps(tree, default=lambda value: None)


# ---------------------------------------------------------------- the valid files

FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4),
}
ROPE = ["rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", "head_dim", "sliding_window"]
CONFIG = [*ROPE, "text_config", "layer_types", "quantization_config", "model_type", "tie_word_embeddings", "hidden_act"]


def write_valid(folder: Path) -> Path:
    for name, config in FAMILIES.items():
        save_tiny(config, folder / name)
    model = transformers.LlamaForCausalLM(FAMILIES["llama"])
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    make_tiny_checkpoint(folder / "ours")
    return folder


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- weights


def draw_config(valid: Path):
    trees = {name: read_json(valid / name / "config.json") for name in FAMILIES}
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


ODD_TENSORS = [torch.zeros(()), torch.ones(3, 3).to_sparse(), torch.zeros(2, dtype=torch.complex64)]
ODD_TENSORS += [torch.zeros(0, 4), torch.full((320, 64), float("nan")), torch.zeros(64, dtype=torch.float64)]
ODD_TENSORS += [torch.zeros(1).expand(320, 64), torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)]
ODD_TENSORS += [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), torch.empty(320, 64, device="meta")]


def saved(tree) -> bytes:
    data = io.BytesIO()
    torch.save(tree, data)
    return data.getvalue()


def draw_pth(valid: Path):
    path = valid / "ours" / "model.pth"
    tree, data = torch.load(path), path.read_bytes()
    names = sorted(tree["model"])

    def with_tensor(draw) -> bytes:
        name, tensor = draw
        return saved({**tree, "model": {**tree["model"], name: tensor}})

    odd = st.tuples(st.sampled_from([*names, "extra"]), st.sampled_from(range(len(ODD_TENSORS))))
    odd = odd.map(lambda pair: with_tensor((pair[0], ODD_TENSORS[pair[1]])))
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


# ---------------------------------------------------------------- text


def draw_tokenizer(valid: Path):
    tree = read_json(valid / "ours" / "tokenizer.json")
    settings = read_json(valid / "ours" / "tokenizer_config.json")
    others = ["bos_token", "unk_token", "add_eos_token", "added_tokens_decoder", "additional_special_tokens"]
    ids = {"eos_token_id": [2, 0], "bos_token_id": 1}
    name = st.sampled_from(["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
    return st.one_of(
        st.tuples(st.just("tokenizer.json"), changed(tree).map(text_of), words),
        st.tuples(name, changed(settings, others).map(text_of), words),
        st.tuples(st.just("generation_config.json"), changed(ids).map(text_of), words),
        st.tuples(st.just("tokenizer.json"), damaged(text_of(tree).encode()), words),
    )


def run_tokenizer(valid: Path, folder: Path, case) -> None:
    name, content, text = case
    link(valid / "ours", folder, name, "model.pth")
    content = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    (folder / name).write_bytes(content)
    use_tokenizer(folder, text)


NAMES = [
    "messages",
    "messages[0].content",
    "bos_token",
    "missing",
    "x",
    "0",
    "-1",
    "99999999",
    "'a'",
    "[]",
    "{}",
    "none",
]
NAMES += [
    "range(99999)",
    "messages[0]['role']",
    "loop.index",
    "namespace(a=1)",
    "true",
    "cycler",
    "().__class__",
    "1e308",
]
FILTERS = ["length", "tojson", "tojson(indent=9999999)", "join('abc')", "trim", "upper", "list", "sort", "sum", "first"]
FILTERS += ["replace('', 'aaaaaaaa')", "format(1)", "center(99999999)", "batch(2)", "items", "string", "int", "round"]
CALLS = [".format(*[1] * 99)", ".ljust(999999999)", ".replace('a', 'b' * 99999)", "['__class__']", ".items()", ".a.b"]
expressions = st.recursive(
    st.sampled_from(NAMES),
    lambda some: st.one_of(
        st.tuples(some, st.sampled_from(["+", "*", "**", "~", "%", "in", "==", "//", "and"]), some).map(
            lambda parts: f"({' '.join(parts)})"
        ),
        st.tuples(some, st.sampled_from(FILTERS)).map(" | ".join).map("({})".format),
        st.tuples(some, st.sampled_from(CALLS)).map("".join),
        st.tuples(some, some).map(lambda pair: f"({pair[0]}, {pair[1]})"),
    ),
    max_leaves=6,
)
templates = st.recursive(
    st.one_of(expressions.map("{{{{ {} }}}}".format), words, st.sampled_from(["{%", "{{", "{% break %}", "{#"])),
    lambda some: st.one_of(
        st.tuples(some, some).map("".join),
        st.tuples(expressions, some).map(lambda pair: f"{{% for x in {pair[0]} %}}{pair[1]}{{% endfor %}}"),
        st.tuples(expressions, some).map(lambda pair: f"{{% if {pair[0]} %}}{pair[1]}{{% endif %}}"),
        st.tuples(expressions, some).map(lambda pair: f"{{% set x = {pair[0]} %}}{pair[1]}"),
        some.map("{{% macro m() %}}{}{{{{ m() }}}}{{% endmacro %}}{{{{ m() }}}}".format),
    ),
    max_leaves=8,
)


def run_template(valid: Path, folder: Path, template: str) -> None:
    assert isinstance(render(template, {"messages": MESSAGES, "bos_token": "<s>"}), str)


LINES = st.one_of(
    words,
    changed({"prompt": "the cat"}, ["text"]).map(text_of),
    st.lists(values, max_size=3).map(text_of),
    st.just('{"prompt": "a"}'),
)


def run_prompts(valid: Path, folder: Path, data: bytes) -> None:
    (folder / "prompts").write_bytes(data)
    tokenizer = load_tokenizer(valid / "ours")
    for prompt in list(read_prompt_file(str(folder / "prompts")).values())[:20]:
        encode_prompt(tokenizer, prompt)


def draw_prompts(_: Path):
    lines = st.lists(LINES, max_size=4).map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass"))
    return st.one_of(lines, lines.flatmap(damaged), st.binary(max_size=40))


TASK = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"validation": "data.json"}},
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{gold}}",
    "doc_to_choice": "{{a}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
    "num_fewshot": 0,
}
DATA = [{"q": "the cat", "a": [" sat", " on"], "gold": 1}, {"q": "he", "a": [" said", " ate"], "gold": 0}]
OPEN = TASK | {"output_type": "generate_until", "doc_to_target": "{{a[0]}}", "metric_list": [{"metric": "exact_match"}]}
OPEN |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 3}, "doc_to_choice": None}


def draw_task(_: Path):
    others = ["fewshot_split", "test_split", "filter_list", "repeats", "description", "doc_to_choice", "group"]
    data = st.one_of(st.just(DATA), changed(DATA))
    return st.tuples(st.one_of(changed(TASK, others), changed(OPEN, others)), data)


def run_task(valid: Path, folder: Path, case) -> None:
    tree, data = case
    (folder / "data.json").write_text("\n".join(map(text_of, data)))
    (folder / "mine.yaml").write_text(text_of(tree))
    flags = ["--checkpoint_path", valid / "ours" / "model.pth", "--include_path", ".", "--dtype", "float32"]
    with contextlib.chdir(folder):
        lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # which takes seconds
        parser = evaluate.build_parser()
        evaluate.main(**vars(parser.parse_args([*map(str, flags), "--tasks", "mine"])))


# ---------------------------------------------------------------- commands

COMMANDS = {"generate": generate, "eval": evaluate, "quantize": quantize}
PATHS = ["", ".", "model.pth", "missing", "no/such/folder/file", "text", "tokenizer.json", "out.json", "\n", "a" * 300]
SLOW = {"--compile", "--compile_prefill", "--help", "--version", "--tasks", "--calibration_tasks"}
SPECIFIC = {"--random_weights": ["stories15M", "", "nothing"], "--device": ["cpu", "mps", "cuda", "cuda:9", "x", ""]}
SPECIFIC |= {
    "--mode": ["int8", "int4", "x"],
    "--threads": ["0", "1", "-1", "9999999"],
    "--max_new_tokens": ["0", "1", "3", "-1", "600", "1e3"],
}
ARGUMENTS = [
    "0",
    "1",
    "2",
    "-1",
    "3.5",
    "1e-45",
    "1e400",
    "nan",
    "auto",
    "ngram",
    "int4",
    "float32",
    "the cat",
    "\ud800",
]
ARGUMENTS += [str(1 << 40), str(10**30), "", "é", *PATHS[:4]]


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [each for each in parser._actions if not set(each.option_strings) & SLOW]


@st.composite
def draw_flags(draw):
    command = draw(st.sampled_from(sorted(COMMANDS)))
    argv = ["--checkpoint_path", "model.pth"] if draw(st.integers(0, 5)) else []
    if command == "eval" and draw(st.integers(0, 3)):
        argv += ["--perplexity", "text"]
    if command == "generate" and draw(st.integers(0, 3)):
        argv += ["--max_new_tokens", "3", "--num_samples", "1"]
    options = options_of(COMMANDS[command].build_parser())
    for _ in range(draw(st.integers(0, 4))):
        option = draw(st.sampled_from(options))
        flag = draw(st.sampled_from(option.option_strings))
        takes_path = option.metavar in ("FILE", "PATH", "FOLDER") or "path" in flag or "file" in flag
        choices = SPECIFIC.get(flag) or list(option.choices or ()) or (PATHS if takes_path else ARGUMENTS)
        argv += [flag] if option.nargs == 0 else [flag, draw(st.sampled_from(choices))]
    return command, argv


def run_flags(valid: Path, folder: Path, case) -> None:
    name, argv = case
    for path in (valid / "ours").iterdir():
        shutil.copy(path, folder)
    (folder / "text").write_text("the cat sat on the mat and the dog ate the hat, he said\n" * 4)
    parser = COMMANDS[name].build_parser()
    with contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()):
        try:
            flags = vars(parser.parse_args(argv))
        except SystemExit as end:
            assert end.code == 2
            return
        try:
            COMMANDS[name].main(**flags)
        except OSError as error:  # the commands turn it into a line too
            assert error.strerror


KINDS = {
    "config": Kind(draw_config, run_config),
    "safetensors": Kind(draw_safetensors, run_safetensors),
    "index": Kind(draw_index, run_index),
    "pth": Kind(draw_pth, run_pth),
    "gguf": Kind(draw_gguf, run_gguf),
    "tokenizer": Kind(draw_tokenizer, run_tokenizer),
    "template": Kind(lambda _: templates, run_template),
    "task": Kind(draw_task, run_task),
    "prompts": Kind(draw_prompts, run_prompts),
    "flags": Kind(lambda _: draw_flags(), run_flags),
}
