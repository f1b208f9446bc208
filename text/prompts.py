"""Prompts: from files, flags and messages to token ids."""

import torch

from text.files import numbered_lines, read_utf8, text_fields
from text.tokenizer import Tokenizer


class IdTokenizer:
    """Stands in where random weights have no tokenizer: bytes go in as ids, ids come out as numbers."""

    bos_id, eos_ids, chat_template, special_tokens = None, frozenset(), None, {}

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [byte % self.vocab_size for byte in text.encode()]

    def encode_chat(self, messages: list[dict]) -> list[int]:
        raise ValueError("random weights have no chat template; leave out --chat")

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids)

    def skips(self, token: int) -> bool:
        return False

    def byte(self, token: int) -> int | None:
        return None


def read_prompt_file(path: str) -> list[str]:
    """The prompts in a file, `-` for standard input: JSON Lines if it begins with {, else one prompt a line."""
    lines = numbered_lines(read_utf8(path, "the prompt file", stdin=True))
    if not lines:
        raise ValueError(f"the prompt file {path} has no prompt in it")
    if next(iter(lines.values())).startswith("{"):
        return text_fields(lines, path, "prompt")
    return list(lines.values())


def encode_prompt(tokenizer: Tokenizer, prompt: str | int, chat: bool = False, system: str | None = None) -> list[int]:
    """Ids of one prompt; an integer N means N random ids. chat: put it and the system message into the template."""
    if isinstance(prompt, int):
        return torch.randint(tokenizer.vocab_size, (prompt,)).tolist()
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is not valid UTF-8") from None
    if not prompt:
        raise ValueError("the prompt is empty; give a text, or a number of random tokens")
    if not chat:
        return checked_ids(tokenizer.encode(prompt), tokenizer)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return checked_ids(tokenizer.encode_chat([*messages, {"role": "user", "content": prompt}]), tokenizer)


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
