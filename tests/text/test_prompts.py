"""Prompt files and prompts."""

import pytest

from text.prompts import IdTokenizer, encode_prompt, read_prompt_file


@pytest.mark.parametrize(
    "data, prompts",
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo", ["one", "two"]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        (b"\n\n  \none\n\t\n two \n\n", ["one", " two "]),
        ("a\u2028b\x0bc\x85d\ne".encode(), ["a\u2028b\x0bc\x85d", "e"]),
        (b"a\rb\n", ["a\rb"]),
        (b"42\n", ["42"]),
        ("Grüße 😀\n日本".encode(), ["Grüße 😀", "日本"]),
        (b'{"prompt": "one"}\n\n{"id": 7, "prompt": "two\\nlines"}\n', ["one", "two\nlines"]),
        ('\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "\\ud83d\\ude00"}'.encode(), ["a\u2028b", "😀"]),
        (b'say {"prompt": 1}\n{"prompt": "x"}', ['say {"prompt": 1}', '{"prompt": "x"}']),
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
