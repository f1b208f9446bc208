"""Text files: UTF-8, plain or as JSON Lines. Every ValueError says which file, which line and what is wrong there."""

import json
import sys
import threading
from pathlib import Path

from cli import say

PATIENCE = 2  # seconds in which a person does not wonder what is waited for


def read_utf8(path: str | Path, what: str, stdin: bool = False) -> str:
    """The text of a file, maybe empty; `what` names the file in errors. stdin: whether `-` means standard input."""
    stdin = stdin and path == "-"
    name = f"{what} from standard input" if stdin else f"{what} {path}"
    try:
        data = read_to_end(name) if stdin else Path(path).read_bytes()
        return data.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{name} is not UTF-8: byte {error.start} is {byte:#x}") from None


def read_to_end(name: str) -> bytes:
    """All of standard input; a person who waits long for its end is told so."""
    hint = threading.Timer(PATIENCE, say, [f"Waiting for the end of {name} (Ctrl-D at a terminal) ..."])
    hint.daemon = True
    hint.start()
    try:
        return sys.stdin.buffer.read()
    finally:
        hint.cancel()


def read_text(path: str | Path) -> str:
    """A text to calibrate with or to score, which has at least one character."""
    text = read_utf8(path, "the text")
    if not text:
        raise ValueError(f"the text {path} is empty")
    return text


def numbered_lines(text: str) -> dict[int, str]:
    """The lines that are not blank, by number from 1. Only \\n and \\r\\n end a line: JSON strings may hold U+2028."""
    lines = enumerate(text.split("\n"), 1)
    return {number: line.removesuffix("\r") for number, line in lines if line.strip()}


def is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def text_fields(lines: dict[int, str], path: str | Path, field: str, allow_empty: bool = False) -> dict[int, str]:
    """The text that each of `numbered_lines`, a JSON object, has as `field`; path: the file, for errors."""
    advice = f'; each line must be like {{"{field}": "some words"}}'
    texts = {}
    for number, line in lines.items():
        where = f"{path}, line {number}"
        texts[number] = text_field(parse_json(line, where, advice), where, field, allow_empty, advice)
    return texts


def array_texts(text: str, path: str | Path, field: str) -> dict[int, str]:
    """The entries of a JSON array by number from 1: texts, or objects that have a text as `field`."""
    advice = f'; each entry must be a text, or like {{"{field}": "some words"}}'
    entries = {}
    for number, entry in enumerate(parse_json(text, f"{path}, a JSON array,", advice), 1):
        entry = {field: entry} if isinstance(entry, str) else entry
        entries[number] = text_field(entry, f"{path}, entry {number}", field, False, advice)
    return entries


def parse_json(text: str, where: str, advice: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}{advice}") from None


def text_field(value, where: str, field: str, allow_empty: bool, advice: str) -> str:
    if not isinstance(value, dict) or field not in value:
        raise ValueError(f'{where} has no "{field}" field{advice}')
    text = value[field]
    if not isinstance(text, str) or not (text or allow_empty):
        raise ValueError(f'{where}: "{field}" must be a text{"" if allow_empty else " that is not empty"}')
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise ValueError(f'{where}: "{field}" holds half of a surrogate pair, which UTF-8 cannot hold') from None
    return text
