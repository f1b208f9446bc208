"""Text files: UTF-8, plain or as JSON Lines. Every ValueError says which file, which line and what is wrong there."""

import json
import sys
from pathlib import Path


def read_utf8(path: str | Path, what: str, stdin: bool = False) -> str:
    """The text of a file, maybe empty; `what` names the file in errors. stdin: whether `-` means standard input."""
    try:
        data = sys.stdin.buffer.read() if stdin and path == "-" else Path(path).read_bytes()
        return data.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise ValueError(f"cannot read {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{what} {path} is not UTF-8: byte {error.start} is {byte:#x}") from None


def require_utf8(text: str, what: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can spell and which stand for bytes of a command line."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid UTF-8: character {error.start} is half of a surrogate pair") from None


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


def text_fields(lines: dict[int, str], path: str | Path, field: str, allow_empty: bool = False) -> list[str]:
    """The text that each of `numbered_lines`, a JSON object, has as `field`; path: the file, for errors."""
    return [text_field(line, f"{path}, line {number}", field, allow_empty) for number, line in lines.items()]


def text_field(line: str, where: str, field: str, allow_empty: bool) -> str:
    advice = f'each line must be like {{"{field}": "some words"}}'
    try:
        text = json.loads(line)[field]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}; {advice}") from None
    except (KeyError, TypeError):
        raise ValueError(f'{where} has no "{field}" field; {advice}') from None
    if not isinstance(text, str) or not (text or allow_empty):
        raise ValueError(f'{where}: "{field}" must be a text{"" if allow_empty else " that is not empty"}')
    require_utf8(text, f'{where}: "{field}"')
    return text
