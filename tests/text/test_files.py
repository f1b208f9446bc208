"""Text files and JSON Lines, by examples worked out by hand."""

import io
import sys
from types import SimpleNamespace

import pytest

from text.files import is_json_object, numbered_lines, read_text, read_utf8, text_fields


@pytest.mark.parametrize(
    "data, text",
    [
        (b"", ""),
        (b"\xef\xbb\xbfone\n", "one\n"),  # without its byte order mark
        (b"a\r\nb\rc\n", "a\r\nb\rc\n"),
        ("Grüße 😀\u2028日本".encode(), "Grüße 😀\u2028日本"),
    ],
)
def test_text_is_read_as_it_stands(tmp_path, monkeypatch, data, text):
    (tmp_path / "a").write_bytes(data)
    assert read_utf8(tmp_path / "a", "the text") == text
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert read_utf8("-", "the text", stdin=True) == text
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff")))
    with pytest.raises(ValueError, match="^the text from standard input is not UTF-8: byte 0 is 0xff"):
        read_utf8("-", "the text", stdin=True)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"good\nbad \xff\n", "the prompt file {} is not UTF-8: byte 9 is 0xff"),
        ("text".encode("utf-16"), "the prompt file {} is not UTF-8: byte 0 is 0xff"),
        (None, "cannot read the prompt file {}: No such file or directory"),
    ],
)
def test_what_cannot_be_read(tmp_path, data, message):
    path = tmp_path / "a"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_utf8(path, "the prompt file")
    assert str(error.value) == message.format(path)


def test_standard_input_only_where_it_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot read the text -: No such file"):
        read_text("-")


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf"])
def test_an_empty_text_is_refused(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match=f"^the text {tmp_path / 'a'} is empty$"):
        read_text(tmp_path / "a")


def test_lines_keep_their_numbers():
    assert numbered_lines("\none\r\n \t\n two \nt\u2028h\x0br\x85e\re\n") == {
        2: "one",
        4: " two ",
        5: "t\u2028h\x0br\x85e\re",
    }
    assert numbered_lines(" \n\r\n") == {}


@pytest.mark.parametrize("line, expected", [("{}", True), ("[1]", False), ("42", False), ("{", False)])
def test_json_objects(line, expected):
    assert is_json_object(line) == expected
    assert not is_json_object("[" * 100_000)


def test_fields_of_json_lines():
    lines = numbered_lines('{"text": "one"}\n\n{"id": 7, "text": "two\\nlines"}\r\n{"text": "\\ud83d\\ude00\u2028"}')
    assert text_fields(lines, "a.jsonl", "text") == {1: "one", 3: "two\nlines", 4: "😀\u2028"}
    assert text_fields({1: '{"prompt": ""}'}, "a.jsonl", "prompt", allow_empty=True) == {1: ""}


@pytest.mark.parametrize(
    "line, message",
    [
        ("plain", ' is not valid JSON: .*; each line must be like {"text": "some words"}'),
        ('{"text": "a"', " is not valid JSON: "),
        ("[" * 100_000, " is not valid JSON: "),
        ('{"words": "a"}', ' has no "text" field; each line must be like {"text": "some words"}'),
        ("[1]", ' has no "text" field'),
        ("42", ' has no "text" field'),
        ('{"text": 5}', ': "text" must be a text that is not empty'),
        ('{"text": ""}', ': "text" must be a text that is not empty'),
        ('{"text": "a\\ud800"}', ': "text" is not valid UTF-8: character 1 is half of a surrogate pair'),
    ],
)
def test_a_line_without_a_text_is_named(line, message):
    with pytest.raises(ValueError, match=f"^a.jsonl, line 3{message}") as error:
        text_fields({1: '{"text": "a"}', 3: line}, "a.jsonl", "text")
    assert "\n" not in str(error.value)
    if message.endswith("not empty") and '""' not in line:
        with pytest.raises(ValueError, match='line 3: "text" must be a text$'):
            text_fields({3: line}, "a.jsonl", "text", allow_empty=True)
