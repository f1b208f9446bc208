"""Prompts: from files, flags and messages to token ids."""

import os
import re
import stat
import sys
from pathlib import Path

import torch

from text.files import array_texts, numbered_lines, read_text, read_utf8, require_utf8, text_fields
from text.tokenizer import Tokenizer, load_tokenizer


class IdTokenizer:
    """Stands in where random weights have no tokenizer: bytes go in as ids, ids come out as numbers."""

    bos_id, eos_ids, chat_template = None, frozenset(), None
    templates, special_tokens = {}, {}

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [byte % self.vocab_size for byte in text.encode()]

    def require_template(self) -> str:
        raise ValueError("random weights have no chat template; leave out --chat and --system")

    def encode_chat(self, messages: list[dict]) -> list[int]:
        return self.encode(self.require_template())

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids)

    def skips(self, token: int) -> bool:
        return False

    def byte(self, token: int) -> int | None:
        return None


def read_prompt_file(path: str) -> dict[int, str]:
    """The prompts in a file, `-` for standard input, by the number of their line or entry, from 1.

    What begins with { is JSON Lines, with [ before a text or an object a JSON array; otherwise a line is a prompt.
    """
    text = read_utf8(path, "the prompt file", stdin=True)
    lines = numbered_lines(text)
    if re.match(r'\s*\[\s*["{\]]', text):
        prompts = array_texts(text, path, "prompt")
    elif lines and next(iter(lines.values())).startswith("{"):
        prompts = text_fields(lines, path, "prompt")
    else:
        prompts = lines
    if not prompts:
        raise ValueError(f"the prompt file {path} has no prompt in it")
    return prompts


def read_standard_input() -> str:
    """Standard input as one prompt, without the end of its last line."""
    return read_utf8("-", "the prompt", stdin=True).removesuffix("\n").removesuffix("\r")


def has_standard_input() -> bool:
    """Whether standard input is a pipe or a file, and so may hold a prompt."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except OSError:  # replaced by something without a file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def encode_prompt(tokenizer: Tokenizer, prompt: str | int, chat: bool = False, system: str | None = None) -> list[int]:
    """Ids of one prompt; an integer N means N random ids. chat: put it and the system message into the template."""
    if isinstance(prompt, int):
        return torch.randint(tokenizer.vocab_size, (prompt,)).tolist()
    require_utf8(prompt, "the prompt")
    if not prompt:
        raise ValueError("the prompt is empty; give a text")
    if not chat:
        return checked_ids(tokenizer.encode(prompt), tokenizer)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return checked_ids(tokenizer.encode_chat([*messages, {"role": "user", "content": prompt}]), tokenizer)


def ids_of(text: str, path: str | Path, vocab_size: int) -> list[int]:
    """The ids of a text with the tokenizer of the model at `path`."""
    tokenizer = load_tokenizer(path, vocab_size)
    return checked_ids(tokenizer.encode(text), tokenizer)


def ids_to_measure(file: str, path: str | Path, vocab_size: int) -> list[int]:
    """The ids of the text in a file, of which perplexity can be measured."""
    ids = ids_of(read_text(file), path, vocab_size)
    if len(ids) < 2:
        raise ValueError(f"the text {file} is one token long; perplexity needs 2 or more")
    return ids


def checked_ids(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The same ids, of which there must be one at least, and none that the model does not have."""
    if not ids:
        raise ValueError("the prompt encodes to no tokens; give a longer text")
    if max(ids) >= tokenizer.vocab_size:
        raise ValueError(
            f"the prompt encodes to token {max(ids)}, and the model has {tokenizer.vocab_size}; "
            "its tokenizer files belong to another model"
        )
    return ids
