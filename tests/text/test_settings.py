"""Files beside a vocabulary: added tokens, special tokens, chat templates, against transformers and sentencepiece."""

import json

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.text.test_tokenizer import train_byte_level, train_sentencepiece, write_folder
from text.tokenizer import load_tokenizer

SIZE = train_byte_level().get_vocab_size()
TEXTS = ["<|a|> the <|b|>\n dog <|b|>", "<|A|>the<|b|>", "x<|c|>x <|c|> the", "<s>the<|a|><|b|>", "</s> the</s>"]


def token(content, **flags):
    off = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    return {"content": content, **off, **flags}


ADDED = [token("<|a|>", special=True), token("<|b|>", rstrip=True, lstrip=True), token("<|c|>", single_word=True)]
IDS = {"<|a|>": SIZE, "<|b|>": SIZE + 1}
SPECIAL = {"eos_token": "<|a|>", "additional_special_tokens": ["<|b|>"]}


def write_files(folder, files):
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files = {"tokenizer_config": {}, **files}
    return write_folder(folder, **{**files, "tokenizer_config": {**config, **files["tokenizer_config"]}})


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": {str(SIZE + i): each for i, each in enumerate(ADDED)}}},
        {"added_tokens": IDS},
        {"added_tokens": IDS, "special_tokens_map": {"eos_token": "<|a|>"}},
        {"added_tokens": IDS, "special_tokens_map": {"eos_token": token("<|b|>")}, "tokenizer_config": SPECIAL},
        {"tokenizer_config": {"eos_token": "the", "bos_token": None}},  # a token of the vocabulary
        {"special_tokens_map": {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}}},
    ],
    ids=str,
)
def test_tokens_beside_tokenizer_json(tmp_path, files):
    ours, theirs = load_tokenizer(write_files(tmp_path, files)), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("form", ["added_tokens.json", "added_tokens_decoder"])
def test_tokens_beside_sentencepiece(tmp_path, form):
    model = train_sentencepiece(tmp_path)
    size, plain = model.get_piece_size(), load_tokenizer(tmp_path)
    if form == "added_tokens.json":
        (tmp_path / form).write_text(json.dumps({"<|a|>": size, "<|b|>": size + 1}))
        (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|a|>"}')
    else:
        added = {size: token("<|a|>", special=True), size + 1: token("<|b|>", rstrip=True)}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|a|>", form: added}))
    ours = load_tokenizer(tmp_path)
    first, then = model.encode("the"), model.encode(" dog" if form == "added_tokens.json" else "dog")
    ids = [1, size, *first, size + 1, *then, 2]
    assert ours.encode("<|a|>the<|b|> dog</s>") == ids
    assert ours.decode(ids) == "the<|b|>" + model.decode(first + then).removeprefix("the")
    assert (ours.eos_id, ours.vocab_size, plain.vocab_size) == (size, size + 2, size)
    assert [ours.skips(i) for i in (size, size + 1, size + 2)] == [True, False, True]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(
    "added", [{"<s>": SIZE}, {"<|a|>": 0}, {"<|a|>": -5}, {"<|a|>": "x"}, {"<|a|>": None}], ids=str
)
def test_added_tokens_that_cannot_be(tmp_path, name, added):
    train_sentencepiece(tmp_path) if name == "tokenizer.model" else write_folder(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ValueError, match=f"the tokens added to {tmp_path / name}: ") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- chat templates

NAMED = [{"name": "rag", "template": "rag"}, {"name": "tool_use", "template": "tools"}]
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content[0].text + '?' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [PARTS, EITHER, "{{ messages[0].content | lower }}", "{{ messages | length }}"])
def test_templates_that_want_parts(tmp_path, template):
    ours = load_tokenizer(write_folder(tmp_path, tokenizer_config={"chat_template": template}))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=template)
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": " Hi user"}]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert ours.render_chat(messages) == theirs.apply_chat_template(
        parts if template == PARTS else messages, tokenize=False
    )


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"chat_template.json": '{"chat_template": "legacy"}'}, "legacy"),
        ({"chat_template.json": '{"chat_template": "legacy"}', "chat_template.jinja": "file"}, "file"),
        ({"additional_chat_templates/rag.jinja": "rag", "chat_template.jinja": "file"}, "file"),
        ({"additional_chat_templates/rag.jinja": "rag"}, None),
        ({"tokenizer_config.json": json.dumps({"chat_template": NAMED})}, None),
    ],
)
def test_where_templates_stand(tmp_path, files, expected):
    write_folder(tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == expected
    if expected is None:
        with pytest.raises(ValueError, match="several chat templates; choose one with --chat_template: rag"):
            tokenizer.render_chat([])
    if expected != "legacy" and len(files) == 1:
        tokenizer.choose_template("rag")
        assert tokenizer.render_chat([]) == "rag"


def test_a_template_is_chosen_by_name_or_file(tmp_path):
    tokenizer = load_tokenizer(write_folder(tmp_path, tokenizer_config={"chat_template": NAMED}))
    (tmp_path / "mine.jinja").write_text("mine")
    for name, text in (("tool_use", "tools"), (str(tmp_path / "mine.jinja"), "mine")):
        tokenizer.choose_template(name)
        assert tokenizer.render_chat([]) == text
    with pytest.raises(ValueError, match="no chat template nowhere, .*; the model has rag or tool_use"):
        tokenizer.choose_template("nowhere")


# ---------------------------------------------------------------- errors of the libraries


def test_errors_of_the_libraries_are_one_line(tmp_path):
    state = json.loads(train_byte_level().to_str())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(state | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}))
    with pytest.raises(ValueError, match="is not a tokenizer of the tokenizers library: .*charsmap"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps(state | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}))
    with pytest.raises(ValueError, match="^the tokenizer cannot encode text: chunk size must be non-zero$"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps(state))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="^the text is not valid UTF-8: character 1 is half of a surrogate pair$"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match="^the tokenizer cannot decode the tokens: "):
        tokenizer.decode([-1])
