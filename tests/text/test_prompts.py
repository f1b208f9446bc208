"""Prompt files and prompts."""

import pytest

from text.prompts import IdTokenizer, encode_prompt, read_prompt_file


@pytest.mark.parametrize(
    "data, prompts",
    [
        (b"one\ntwo\n", {1: "one", 2: "two"}),
        (b"one\r\ntwo", {1: "one", 2: "two"}),
        (b"\xef\xbb\xbfone\n", {1: "one"}),
        (b"\n\n  \none\n\t\n two \n\n", {4: "one", 6: " two "}),
        ("a\u2028b\x0bc\x85d\ne".encode(), {1: "a\u2028b\x0bc\x85d", 2: "e"}),
        (b"a\rb\n", {1: "a\rb"}),
        (b"42\n", {1: "42"}),
        ("Grüße 😀\n日本".encode(), {1: "Grüße 😀", 2: "日本"}),
        (b'{"prompt": "one"}\n\n{"id": 7, "prompt": "two\\nlines"}\n', {1: "one", 3: "two\nlines"}),
        ('\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "\\ud83d\\ude00"}'.encode(), {1: "a\u2028b", 2: "😀"}),
        (b'say {"prompt": 1}\n{"prompt": "x"}', {1: 'say {"prompt": 1}', 2: '{"prompt": "x"}'}),
        (b'["one", "two\\nlines"]', {1: "one", 2: "two\nlines"}),
        (b'\xef\xbb\xbf[\n  {"id": 7, "prompt": "one"},\n  "two"\n]\n', {1: "one", 2: "two"}),
        (b"[INST] one\n[2, 3]\n", {1: "[INST] one", 2: "[2, 3]"}),
    ],
)
def test_prompt_file(tmp_path, data, prompts):
    path = tmp_path / "prompts"
    path.write_bytes(data)
    assert read_prompt_file(str(path)) == prompts


@pytest.mark.parametrize(
    "data, message",
    [
        (b"good\nbad \xff\n", "is not UTF-8: byte 9 is 0xff"),
        ("text".encode("utf-16"), "is not UTF-8: byte 0 is 0xff"),
        (b"", "has no prompt in it"),
        (b" \n\r\n", "has no prompt in it"),
        (b'{"prompt": "a"}\nplain\n', "line 2 is not valid JSON"),
        (b'{"prompt": "a"\n', "line 1 is not valid JSON"),
        (b'{"text": "a"}\n', 'line 1 has no "prompt" field'),
        (b'{"prompt": "a"}\n[1]\n', 'line 2 has no "prompt" field'),
        (b'{"prompt": 5}\n', 'line 1: "prompt" must be a text'),
        (b'{"prompt": ""}\n', 'line 1: "prompt" must be a text that is not empty'),
        (b"[ ]", "has no prompt in it"),
        (b'["a",\n"b",]', 'a JSON array, is not valid JSON: .*; each entry must be a text, or like {"prompt": '),
        (b'["a"]\n["b"]', "a JSON array, is not valid JSON: Extra data"),
        (b'["a", 5]', 'entry 2 has no "prompt" field; each entry must be a text'),
        (b'["a", ""]', 'entry 2: "prompt" must be a text that is not empty'),
        (b'["a", {"prompt": "\\ud800"}]', "entry 2: .* surrogate"),
        (b'{"prompt": ' + b"[" * 100_000, "line 1 is not valid JSON"),
    ],
)
def test_prompt_file_that_cannot_be_read(tmp_path, data, message):
    path = tmp_path / "prompts"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_prompt_file(str(path))


def test_prompt_file_that_is_not_there(tmp_path):
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"cannot read the prompt file {path}: {reason}"):
            read_prompt_file(str(path))


@pytest.mark.parametrize("prompt, message", [("", "the prompt is empty"), ("\udcff", "not valid UTF-8")])
def test_prompt_that_cannot_be_encoded(prompt, message):
    with pytest.raises(ValueError, match=message):
        encode_prompt(IdTokenizer(256), prompt)
