"""Text to token ids and back: vocabularies of two libraries, and the files they come from."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from cli import listed, say
from text.chat import render
from text.files import read_utf8, require_utf8
from text.settings import id_list, named_templates, read_settings, token_text
from text.vocabularies.gguf import gguf_settings, gguf_vocabulary, has_ordinary_tokens, read_gguf_fields
from text.vocabularies.libraries import library_errors, read_sentencepiece, read_tokenizer_json
from text.vocabularies.tiktoken import is_tiktoken, read_tiktoken
from weights.files import atomic_path
from weights.gguf_file import gguf_models, is_gguf

# tokens that end a text, whether or not the model's files say so
END_MARKERS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end|>", "<end_of_turn>")
END_MARKERS += ("<|end_of_text|>", "<|endoftext|>")
END_OF_MESSAGES = "<|return|>"  # where a vocabulary has it, <|end|> ends only a message of several
END_OR_HTML = "</s>"  # ends a text where it is special; Gemma's vocabulary has it as the end of struck-out text
# what a tokenizer is read from
FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json")
FILES += ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")


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
        begin, end = (backend.token_id(self._names.get(f"{role}_token", "")) for role in ("bos", "eos"))
        # the ids stand in other files than the vocabulary, which may have fewer tokens
        known = {key: [i for i in id_list(value) if i < backend.vocab_size] for key, value in ids.items()}
        self.bos_id: int | None = next(iter(known["bos_token_id"]), None) if begin is None else begin
        self.eos_id: int | None = next(iter(known["eos_token_id"]), None) if end is None else end
        has_messages = backend.marker_id(END_OF_MESSAGES) is not None
        endings = [each for each in END_MARKERS if each != "<|end|>"] if has_messages else END_MARKERS
        markers = [backend.marker_id(marker) for marker in endings]
        markers += [token for token, text in backend.special.items() if text == END_OR_HTML]
        self.declared_eos_ids: frozenset[int] = frozenset({*ids["eos_token_id"], end} - {None})
        self.eos_ids: frozenset[int] = self.declared_eos_ids | frozenset(markers) - {None}
        self.templates: dict[str, str] = named_templates(config.get("chat_template"))
        self.chat_template: str | None = self.templates.get("default")
        self.template_vars: dict = {}  # for every chat, such as enable_thinking
        with library_errors("the tokenizer cannot encode text"):
            bare, whole = (backend.encode("a", special) for special in (False, True))
        self._adds_bos = whole[:1] == [self.bos_id] and bare[:1] != [self.bos_id]  # the backend, not yet the model
        wants_bos = config.get("add_bos_token")
        self._wants_bos = self.bos_id is not None and (wants_bos if isinstance(wants_bos, bool) else self._adds_bos)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens written out in the text become their ids. BOS if the model wants it, and once."""
        require_utf8(text, "the text")
        with library_errors("the tokenizer cannot encode text"):
            ids = self.backend.encode(text, add_special_tokens)
        if not add_special_tokens:
            return ids
        own = ids[1:] if self._adds_bos else ids
        return [self.bos_id, *own] if self._wants_bos and own[:1] != [self.bos_id] else own

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens skipped."""
        with library_errors("the tokenizer cannot decode the tokens"):
            return self.backend.decode(ids)

    def skips(self, token: int) -> bool:
        """Whether `decode` drops the token before it looks at its neighbours."""
        return self.backend.skips(token)

    @property
    def special_tokens(self) -> dict[int, str]:
        """Those that a vocabulary spells and `decode` leaves out."""
        return self.backend.special

    def token_bytes(self, token: int) -> bytes:
        """What the token adds to a text, a special one too; it may be a part of a character."""
        return self.backend.token_bytes(token)

    def byte(self, token: int) -> int | None:
        """The value of a byte-fallback token, None for every other."""
        return self.backend.bytes.get(token)

    def vocabulary(self) -> dict[int, str]:
        """Every token as the vocabulary spells it."""
        return self.backend.vocabulary()

    def choose_template(self, name: str) -> None:
        """Use another of the model's chat templates, or that in a file."""
        if name in self.templates:
            self.chat_template = self.templates[name]
        elif Path(name).exists():
            self.chat_template = read_utf8(name, "the chat template")
        else:
            known = f"; the model has {listed(sorted(self.templates))}" if self.templates else ""
            raise ValueError(f"there is no chat template {name}, neither of the model nor as a file{known}")

    def require_template(self) -> str:
        """The chat template in use."""
        if self.chat_template is None and self.templates:
            names = listed(sorted(self.templates))
            raise ValueError(f"the model has several chat templates; choose one with --chat_template: {names}")
        if self.chat_template is None:
            raise ValueError("the model has no chat template; choose a file that has one, or give it plain text")
        return self.chat_template

    def render_chat(
        self,
        messages: list[dict],
        add_generation_prompt: bool = True,
        tools: list[dict] | None = None,
        settings: dict | None = None,
    ) -> str:
        """The conversation as the model's template writes it; settings: variables that only some templates have.

        They win over `template_vars`.
        """
        template, settings = self.require_template(), self.template_vars | (settings or {})
        fixed = {**self._names, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        if taken := sorted(settings.keys() & {*fixed, "messages"}):
            raise ValueError(f"{listed(taken)} cannot be set for the chat template; leave it out")
        if wants_parts(template, frozenset(fixed.items())):
            messages = [{**message, "content": as_parts(message["content"])} for message in messages]
        return render(template, {**settings, **fixed, "tools": tools, "messages": messages})

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Ids of the rendered conversation; templates write BOS themselves."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)


def as_parts(text: str) -> list[dict]:
    """A message as templates of models that read pictures too want it."""
    return [{"type": "text", "text": text}]


@cache
def wants_parts(template: str, fixed: frozenset) -> bool:
    """Whether the template drops or refuses a message that is a string, and writes it as parts.

    fixed: its variables but for the messages, as items.
    """
    text = "WRITE-THIS-MESSAGE"

    def writes(content) -> bool:
        messages = [{"role": "user", "content": content}]
        try:
            return text in render(template, {**dict(fixed), "messages": messages})
        except ValueError:
            return False

    return not writes(text) and writes(as_parts(text))


def require_same_vocabulary(tokenizer: Tokenizer, draft: Tokenizer, role: str = "draft") -> None:
    """Refuse a draft's tokenizer that differs from the model's, with the first token in which the two differ.

    Tokens that one of the two does not use may differ.
    """
    ours, theirs = tokenizer.vocabulary(), draft.vocabulary()
    for token in sorted((ours.keys() | theirs.keys()) - tokenizer.backend.unused - draft.backend.unused):
        if ours.get(token) != theirs.get(token):
            was, fits = (repr(v[token]) if token in v else "missing" for v in (theirs, ours))
            raise ValueError(
                f"the {role} has another tokenizer: its token {token} is {was}, the model's is {fits}; "
                f"use a {role} of the model's own family"
            )


def load_tokenizer(
    path: str | Path, vocab_size: int | None = None, template: str | None = None, template_vars: dict | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint file or folder; vocab_size: that of its model; template: as `choose_template`."""
    tokenizer = find_tokenizer(Path(path))
    tokenizer.template_vars = template_vars or {}
    if template is not None:
        tokenizer.choose_template(template)
    if vocab_size is not None:  # some tokenizers have more tokens than the model has rows
        tokenizer.vocab_size = min(tokenizer.vocab_size, vocab_size)
    return tokenizer


def find_tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a checkpoint file or folder")
    if path.is_file() and is_gguf(path):
        return read_gguf_tokenizer(path)
    folder = path if path.is_dir() else path.parent
    for name, read in (("tokenizer.json", read_tokenizer_json), ("tokenizer.model", read_tokenizer_model)):
        if (folder / name).exists():
            config, ids = read_settings(folder)
            return Tokenizer(read(folder / name, config), config, ids)
    ggufs = [file for file in gguf_models(folder) if is_gguf(file)]
    if len(ggufs) == 1:
        return read_gguf_tokenizer(ggufs[0])
    raise ValueError(
        f"{folder} has no tokenizer: it takes tokenizer.json, tokenizer.model or exactly one .gguf "
        f"file ({len(ggufs)} found); copy tokenizer.json there from where the model came from"
    )


def read_tokenizer_model(path: Path, config: dict):
    """The vocabulary in tokenizer.model, of sentencepiece or of tiktoken."""
    return read_tiktoken(path) if is_tiktoken(path) else read_sentencepiece(path, config)


def read_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file; or tokenizer.json beside it, which says more, if it has the same tokens."""
    fields, beside = read_gguf_fields(path), path.with_name("tokenizer.json")
    own, own_ids = gguf_settings(fields)
    if beside.exists():
        config, ids = read_settings(path.parent)
        vocabulary = read_tokenizer_json(beside, config)
        if has_ordinary_tokens(vocabulary, fields):
            if "add_bos_token" not in fields:  # the guess for a file that is silent
                own.pop("add_bos_token")
            config = own | {key: value for key, value in config.items() if value is not None}
            ids = own_ids | {key: value for key, value in ids.items() if value not in (None, [])}
            return Tokenizer(vocabulary, config, ids)
    return Tokenizer(gguf_vocabulary(fields), own, own_ids)


@contextmanager
def tokenizer_saved(gguf_path: Path | None, folder: Path, source: Path | None = None) -> Iterator[None]:
    """Write the tokenizer of a GGUF file, if there is one, as Hugging Face files, in place once the block succeeds.

    source: another folder, whose tokenizer's files are copied where there is no GGUF file. What the folder has already
    is kept, and said if it differs.
    """
    kept = set()
    with ExitStack() as stack:
        for name, data in tokenizer_files(gguf_path, source).items():
            own = next((path for path in (folder / "tokenizer.model", folder / name) if path.exists()), None)
            if own is None:
                stack.enter_context(atomic_path(folder / name)).write_bytes(data)
            elif own.read_bytes() != data:
                kept.add(own)
        for own in sorted(kept):
            say(f"{own} is kept; move it away to have the tokenizer of {(gguf_path or source).name}")
        yield


def tokenizer_files(gguf_path: Path | None, source: Path | None) -> dict[str, bytes]:
    """A GGUF file's tokenizer as Hugging Face files, by name; without one, those in the folder `source`."""
    if gguf_path is None:
        paths = [] if source is None else [source / name for name in FILES if (source / name).exists()]
        return {path.name: path.read_bytes() for path in paths}
    fields = read_gguf_fields(gguf_path)
    backend, (config, ids) = gguf_vocabulary(fields), gguf_settings(fields)
    others = Tokenizer(backend, config, ids).eos_ids.difference(ids["eos_token_id"][:1])
    ids = {**ids, "eos_token_id": [*ids["eos_token_id"][:1], *sorted(others)]}  # the main one stays first
    texts = {
        "tokenizer.json": backend.tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
        "generation_config.json": json.dumps(ids, indent=2),
    }
    return {name: text.encode() for name, text in texts.items()}
