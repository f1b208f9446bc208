"""Tokenizers, chat templates and prompts: how damaged ones are drawn, and what reads them."""

from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.shapes import changed, damaged, link, read_json, text_of, values, words
from text.chat import render
from text.prompts import encode_prompt, read_prompt_file
from text.stream import TextStream
from text.tokenizer import load_tokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat"}]


def use_tokenizer(path: Path, text: str) -> None:
    tokenizer = load_tokenizer(path)
    stream = TextStream(tokenizer, ["stop"])
    stream.push(encode_prompt(tokenizer, text))
    stream.finish()
    if tokenizer.chat_template is not None:
        tokenizer.encode_chat([*MESSAGES, {"role": "user", "content": text}])


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


def draw_template(_: Path):
    return templates


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
