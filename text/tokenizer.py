"""Text to token ids and back: vocabularies of two libraries, and the files they come from."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cli import say
from text.chat import render
from text.gguf_vocabulary import read_gguf_vocabulary
from text.vocabulary import id_list, read_sentencepiece, read_tokenizer_json
from weights.files import atomic_path, read_json
from weights.gguf_file import is_gguf

# tokens that end a text, whether or not the model's files say so
END_MARKERS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end|>", "<end_of_turn>")
END_MARKERS += ("<|end_of_text|>", "<|endoftext|>", "</s>")


class Tokenizer:
    """A vocabulary with the model's special tokens and chat template.

    backend: the vocabulary. config: laid out as tokenizer_config.json. ids: {"bos_token_id": int | None,
    "eos_token_id": [int, ...]}.
    """

    def __init__(self, backend, config: dict, ids: dict):
        texts = {key: token_text(value) for key, value in config.items() if key.endswith("_token")}
        self.backend = backend
        self._names = {**backend.names, **{key: text for key, text in texts.items() if text is not None}}
        self.vocab_size: int = backend.vocab_size
        bos_id = backend.token_id(self._names.get("bos_token", ""))
        self.bos_id: int | None = ids["bos_token_id"] if bos_id is None else bos_id
        end = backend.token_id(self._names.get("eos_token", ""))
        self.eos_id: int | None = next(iter(ids["eos_token_id"]), None) if end is None else end
        markers = [backend.marker_id(marker) for marker in END_MARKERS]
        self.declared_eos_ids: frozenset[int] = frozenset({*ids["eos_token_id"], end} - {None})
        self.eos_ids: frozenset[int] = self.declared_eos_ids | frozenset(markers) - {None}
        self.chat_template: str | None = default_template(config.get("chat_template"))
        adds_bos = backend.encode("", True)[:1] == [self.bos_id]
        wants_bos = config.get("add_bos_token")
        self._prepend_bos = wants_bos is True and not adds_bos and self.bos_id is not None
        self._strip_bos = wants_bos is False and adds_bos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens written out in the text become their ids. BOS only if the model wants it."""
        ids = self.backend.encode(text, add_special_tokens)
        if add_special_tokens and self._prepend_bos:
            return [self.bos_id, *ids]
        return ids[1:] if add_special_tokens and self._strip_bos else ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens skipped."""
        return self.backend.decode(ids)

    def skips(self, token: int) -> bool:
        """Whether `decode` drops the token before it looks at its neighbours."""
        return self.backend.skips(token)

    def byte(self, token: int) -> int | None:
        """The value of a byte-fallback token, None for every other."""
        return self.backend.bytes.get(token)

    def vocabulary(self) -> dict[int, str]:
        """Every token as the vocabulary spells it."""
        return self.backend.vocabulary()

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it."""
        if self.chat_template is None:
            raise ValueError("the model has no chat template; give it plain text instead of a chat")
        variables = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return render(self.chat_template, {**self._names, **variables, "messages": messages})

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Ids of the rendered conversation; templates write BOS themselves."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)


def token_text(value) -> str | None:
    """tokenizer_config.json writes a token as a string or as {"content": string}."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def default_template(value) -> str | None:
    """tokenizer_config.json writes one template, or a list of named ones."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def require_same_vocabulary(tokenizer: Tokenizer, draft: Tokenizer) -> None:
    """Refuse a draft's tokenizer that differs from the model's, with the first token in which the two differ."""
    ours, theirs = tokenizer.vocabulary(), draft.vocabulary()
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            was, fits = (repr(v[token]) if token in v else "missing" for v in (theirs, ours))
            raise ValueError(
                f"the draft has another tokenizer: its token {token} is {was}, the model's is {fits}; "
                "use a draft of the model's own family"
            )


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint file or folder; vocab_size: that of its model."""
    tokenizer = find_tokenizer(Path(path))
    if vocab_size is not None:  # some tokenizers have more tokens than the model has rows
        tokenizer.vocab_size = min(tokenizer.vocab_size, vocab_size)
    return tokenizer


def find_tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a checkpoint file or folder")
    if path.is_file() and is_gguf(path):
        return Tokenizer(*read_gguf_vocabulary(path))
    folder = path if path.is_dir() else path.parent
    for name, read in (("tokenizer.json", read_tokenizer_json), ("tokenizer.model", read_sentencepiece)):
        if (folder / name).exists():
            return Tokenizer(read(folder / name), *read_settings(folder))
    ggufs = [file for file in sorted(folder.glob("*.gguf")) if is_gguf(file)]
    if len(ggufs) == 1:
        return Tokenizer(*read_gguf_vocabulary(ggufs[0]))
    raise ValueError(
        f"{folder} has no tokenizer: it takes tokenizer.json, tokenizer.model (sentencepiece) or exactly one .gguf "
        f"file ({len(ggufs)} found); copy tokenizer.json there from where the model came from"
    )


@contextmanager
def tokenizer_saved(gguf_path: Path | None, folder: Path) -> Iterator[None]:
    """Write the tokenizer of a GGUF file, if there is one, as Hugging Face files, in place once the block succeeds.

    What the folder has already is kept, and said if it differs.
    """
    kept = set()
    with ExitStack() as stack:
        for name, data in ({} if gguf_path is None else tokenizer_files(gguf_path)).items():
            own = next((path for path in (folder / "tokenizer.model", folder / name) if path.exists()), None)
            if own is None:
                stack.enter_context(atomic_path(folder / name)).write_bytes(data)
            elif own.read_bytes() != data:
                kept.add(own)
        for own in sorted(kept):
            say(f"{own} is kept; move it away to have the tokenizer of {gguf_path.name}")
        yield


def tokenizer_files(gguf_path: Path) -> dict[str, bytes]:
    """A GGUF file's tokenizer as Hugging Face files, by name."""
    backend, config, ids = read_gguf_vocabulary(gguf_path)
    others = Tokenizer(backend, config, ids).eos_ids.difference(ids["eos_token_id"][:1])
    ids = {**ids, "eos_token_id": [*ids["eos_token_id"][:1], *sorted(others)]}  # the main one stays first
    texts = {
        "tokenizer.json": backend.tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
        "generation_config.json": json.dumps(ids, indent=2),
    }
    return {name: text.encode() for name, text in texts.items()}


def read_settings(folder: Path) -> tuple[dict, dict]:
    """What the JSON files beside a vocabulary say about special tokens and the chat template."""
    names = ("tokenizer_config.json", "generation_config.json", "config.json")
    config, generation, model = (read_json(folder / name) if (folder / name).exists() else {} for name in names)
    if (folder / "chat_template.jinja").exists():
        config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    eos = [*id_list(generation.get("eos_token_id")), *id_list(model.get("eos_token_id"))]
    bos = [*id_list(generation.get("bos_token_id")), *id_list(model.get("bos_token_id")), None]
    return config, {"bos_token_id": bos[0], "eos_token_id": eos}
