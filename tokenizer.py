"""Text to token ids and back: vocabularies of three formats, chat templates, the end-of-text set, streamed text."""

import codecs
import ctypes
import json
import re
import threading
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from checkpoint import atomic_path, read_json
from gguf_file import is_gguf, read_gguf_metadata

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not UTF-8 (yet)
END_MARKERS = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "</s>",
]


class Tokenizer:
    """One vocabulary behind one of two libraries; `config` and `ids` hold what the model's files say beside it.

    `config` is laid out as tokenizer_config.json, `ids` is {"bos_token_id": int | None, "eos_token_id": [int, ...]}.
    """

    def __init__(self, backend, config: dict, ids: dict):
        texts = {key: _token_text(value) for key, value in config.items() if key.endswith("_token")}
        self._backend = backend
        self._names = {**backend.names, **{key: text for key, text in texts.items() if text is not None}}
        self.vocab_size: int = backend.vocab_size
        bos_id = backend.token_id(self._names.get("bos_token", ""))
        self.bos_id: int | None = ids["bos_token_id"] if bos_id is None else bos_id
        end = backend.token_id(self._names.get("eos_token", ""))
        self.eos_id: int | None = next(iter(ids["eos_token_id"]), None) if end is None else end
        markers = [backend.marker_id(marker) for marker in END_MARKERS]
        self.declared_eos_ids: frozenset[int] = frozenset({*ids["eos_token_id"], end} - {None})
        self.eos_ids: frozenset[int] = self.declared_eos_ids | frozenset(markers) - {None}
        self.chat_template: str | None = _default_template(config.get("chat_template"))
        adds_bos = backend.encode("", True)[:1] == [self.bos_id]
        wants_bos = config.get("add_bos_token")
        self._prepend_bos = wants_bos is True and not adds_bos and self.bos_id is not None
        self._strip_bos = wants_bos is False and adds_bos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens written out in the text become their ids. BOS only if the model wants it."""
        ids = self._backend.encode(text, add_special_tokens)
        if add_special_tokens and self._prepend_bos:
            return [self.bos_id, *ids]
        return ids[1:] if add_special_tokens and self._strip_bos else ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens skipped."""
        return self._backend.decode(ids)

    def skips(self, token: int) -> bool:
        """Whether `decode` drops the token before it looks at its neighbours."""
        return self._backend.skips(token)

    def byte(self, token: int) -> int | None:
        """The value of a byte-fallback token, None for every other."""
        return self._backend.bytes.get(token)

    def vocabulary(self) -> dict[int, str]:
        """Every token as the vocabulary spells it."""
        return self._backend.vocabulary()

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it. Raises ValueError: no template, or it failed."""
        if self.chat_template is None:
            raise ValueError("the model has no chat template; leave out --chat and write the prompt as plain text")
        variables = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return _render(self.chat_template, {**self._names, **variables, "messages": messages})

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Ids of the rendered conversation; templates write BOS themselves. Raises ValueError as `render_chat` does."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)


def _token_text(value) -> str | None:
    """tokenizer_config.json writes a token as a string or as {"content": string}."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _default_template(value) -> str | None:
    """tokenizer_config.json writes one template, or a list of named ones."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


# ---------------------------------------------------------------- the two libraries


class _HuggingFace:
    """A vocabulary of the `tokenizers` library."""

    def __init__(self, tokenizer):
        tokenizer.no_truncation()  # some files carry the limits of training
        tokenizer.no_padding()
        self.tokenizer, self.names = tokenizer, {}
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        added = tokenizer.get_added_tokens_decoder()
        self.added = {token.content: i for i, token in added.items()}
        self.special = {i for i, token in added.items() if token.special}
        self.token_id, self.marker_id = tokenizer.token_to_id, self.added.get
        bytes_ = {tokenizer.token_to_id(f"<0x{value:02X}>"): value for value in range(256)}
        # only a decoder with byte fallback turns them into bytes; to others they are text
        known = [i for i in bytes_ if i is not None and bytes_[i] == ord("A")]
        self.bytes = bytes_ if tokenizer.decode(known) == "A" else {}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def vocabulary(self) -> dict[int, str]:
        return {i: token for token, i in self.tokenizer.get_vocab(with_added_tokens=True).items()}

    def skips(self, token: int) -> bool:
        return token in self.special or self.tokenizer.id_to_token(token) is None


class _SentencePiece:
    """A vocabulary of the `sentencepiece` library; control pieces in the text are parsed, which it does not do."""

    def __init__(self, model):
        self.model = model
        self.vocab_size = model.get_piece_size()
        pieces = [model.id_to_piece(i) for i in range(self.vocab_size)]
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.bytes = {i: int(piece[1:-1], 16) for i, piece in enumerate(pieces) if model.is_byte(i)}
        controls = [piece for i, piece in enumerate(pieces) if model.is_control(i)]
        self.control = re.compile("(" + ("|".join(map(re.escape, controls)) or "(?!)") + ")")
        named = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        self.names = {key: pieces[i] for key, i in named.items() if i >= 0}
        self.token_id = self.marker_id = self.ids.get

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = [self.model.bos_id()] if add_special_tokens and self.model.bos_id() >= 0 else []
        for i, part in enumerate(self.control.split(text)):  # text and control pieces in turn
            ids += [self.ids[part]] if i % 2 else self.model.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([token for token in ids if not self.skips(token)])

    def vocabulary(self) -> dict[int, str]:
        return {i: piece for piece, i in self.ids.items()}

    def skips(self, token: int) -> bool:
        return not 0 <= token < self.vocab_size  # models may have more rows than the vocabulary has pieces


def require_same_vocabulary(tokenizer: Tokenizer, draft: Tokenizer) -> None:
    """Raise ValueError that shows the first token in which the two differ."""
    ours, theirs = tokenizer.vocabulary(), draft.vocabulary()
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            was, fits = (repr(v[token]) if token in v else "missing" for v in (theirs, ours))
            raise ValueError(
                f"the draft has another tokenizer: its token {token} is {was}, the model's is {fits}; "
                "use a draft of the model's own family"
            )


# ---------------------------------------------------------------- files


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint file or folder; vocab_size: that of its model.

    Raises ValueError if none is there or it cannot be read.
    """
    tokenizer = _find_tokenizer(Path(path))
    if vocab_size is not None:  # some name tokens that were never trained; a text that has one is refused
        tokenizer.vocab_size = min(tokenizer.vocab_size, vocab_size)
    return tokenizer


def _find_tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a checkpoint file or folder")
    if path.is_file() and is_gguf(path):
        return Tokenizer(*_read_gguf(path))
    folder = path if path.is_dir() else path.parent
    if (folder / "tokenizer.json").exists():
        return Tokenizer(_read_tokenizer_json(folder / "tokenizer.json"), *_read_settings(folder))
    if (folder / "tokenizer.model").exists():
        return Tokenizer(_read_sentencepiece(folder / "tokenizer.model"), *_read_settings(folder))
    ggufs = [file for file in sorted(folder.glob("*.gguf")) if is_gguf(file)]
    if len(ggufs) == 1:
        return Tokenizer(*_read_gguf(ggufs[0]))
    raise ValueError(
        f"{folder} has no tokenizer: it takes tokenizer.json, tokenizer.model (sentencepiece) or exactly one .gguf "
        f"file ({len(ggufs)} found); copy tokenizer.json there from where the model came from"
    )


def save_tokenizer(gguf_path: str | Path, folder: str | Path) -> None:
    """Write a GGUF file's tokenizer as Hugging Face files. Raises ValueError if it cannot be read or written."""
    backend, config, ids = _read_gguf(Path(gguf_path))
    others = Tokenizer(backend, config, ids).eos_ids.difference(ids["eos_token_id"][:1])
    ids = {**ids, "eos_token_id": [*ids["eos_token_id"][:1], *sorted(others)]}  # the main one stays first
    files = {
        "tokenizer.json": backend.tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
        "generation_config.json": json.dumps(ids, indent=2),
    }
    for name, text in files.items():
        with atomic_path(Path(folder) / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _read_settings(folder: Path) -> tuple[dict, dict]:
    """What the JSON files beside a vocabulary say about special tokens and the chat template."""
    names = ("tokenizer_config.json", "generation_config.json", "config.json")
    config, generation, model = (read_json(folder / name) if (folder / name).exists() else {} for name in names)
    if (folder / "chat_template.jinja").exists():
        config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    eos = [*_id_list(generation.get("eos_token_id")), *_id_list(model.get("eos_token_id"))]
    bos = [*_id_list(generation.get("bos_token_id")), *_id_list(model.get("bos_token_id")), None]
    return config, {"bos_token_id": bos[0], "eos_token_id": eos}


def _id_list(value) -> list[int]:
    """Configurations write one id, a list of ids or null."""
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def _read_tokenizer_json(path: Path) -> _HuggingFace:
    from tokenizers import Tokenizer as Library

    try:
        return _HuggingFace(Library.from_file(str(path)))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is not a tokenizer of the tokenizers library: {error}") from None


def _read_sentencepiece(path: Path) -> _SentencePiece:
    from sentencepiece import SentencePieceProcessor

    data = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        raise ValueError(f"{path} is a tiktoken rank file, not sentencepiece; put the model's tokenizer.json beside it")
    try:
        if not data:
            raise RuntimeError("it is empty")
        return _SentencePiece(SentencePieceProcessor(model_proto=data))
    except (RuntimeError, ValueError):
        raise ValueError(f"{path} is not a sentencepiece model; fetch it again, or put tokenizer.json there") from None


# ---------------------------------------------------------------- GGUF metadata -> tokenizers

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class _PreTokenizer(NamedTuple):
    """How a byte-level vocabulary wants its text prepared, as the model's own tokenizer.json has it."""

    split: str | None = None  # a pattern whose matches are cut out first
    gpt2_split: bool = True  # whether GPT-2's own pattern then splits the parts
    whole_words: bool = False  # a word that is a token is not built by merges
    compose: bool = False  # é is one letter, never e and an accent (NFC)
    adds_bos: bool = False  # if the file does not say


_LLAMA_3 = _PreTokenizer(_WORDS + r"\p{N}{1,3}" + _OTHERS, gpt2_split=False, whole_words=True, adds_bos=True)
_PRE_TOKENIZERS = {
    "default": _PreTokenizer(),
    "gpt-2": _PreTokenizer(),
    "smollm": _PreTokenizer(r"\p{N}"),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "qwen2": _PreTokenizer(_WORDS + r"\p{N}" + _OTHERS, gpt2_split=False, compose=True),
}
_GGUF_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types of the format


def _read_gguf(path: Path) -> tuple[_HuggingFace, dict, dict]:
    """The vocabulary of a GGUF file, and what it says beside it in the layout of the Hugging Face files."""
    metadata = read_gguf_metadata(path)
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, tokens = fields.get("model"), fields.get("tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise ValueError(f"{path} has a tokenizer of type {kind!r}; supported: gpt2, llama (with a token list)")
    named = {key: fields.get(f"{name}_token_id") for key, name in _GGUF_NAMES.items()}
    named = {key: i for key, i in named.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    config = {key: tokens[i] for key, i in named.items()}
    config["chat_template"] = metadata.get("tokenizer.chat_template")
    ids = {"bos_token_id": named.get("bos_token")}
    ids["eos_token_id"] = _id_list([named.get("eos_token"), fields.get("eot_token_id")])
    try:
        # a file that does not say means what the format's reference reader assumes
        default = kind == "llama" or _pre_tokenizer(fields).adds_bos
        config["add_bos_token"] = bool(fields.get("add_bos_token", default))
        tokenizer = _byte_level_bpe(fields) if kind == "gpt2" else _sentencepiece_bpe(fields, config.get("unk_token"))
        _add_tokens(tokenizer, fields)
        if config["add_bos_token"] and "bos_token" in config:
            _add_bos(tokenizer, config["bos_token"], named["bos_token"])
        return _HuggingFace(tokenizer), config, ids
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"the tokenizer in {path} cannot be rebuilt: {error}") from None


def _pre_tokenizer(fields: dict) -> _PreTokenizer:
    name = fields.get("pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise ValueError(f"pre-tokenizer {name!r} is not supported; supported: {', '.join(_PRE_TOKENIZERS)}")
    return _PRE_TOKENIZERS[name]


def _byte_level_bpe(fields: dict):
    """GPT-2's kind: bytes spelt as letters, merges in the file."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _pre_tokenizer(fields)
    steps = [pre_tokenizers.Split(Regex(pre.split), "isolated")] if pre.split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.gpt2_split))
    vocab = {token: i for i, token in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.whole_words))
    if pre.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(fields: dict, unknown: str | None):
    """Sentencepiece's kind: spaces spelt as ▁, unknown letters as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]] if "merges" in fields else _merges(vocab, fields)
    prefix = fields.get("add_space_prefix", True)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] * prefix)]
    )
    return tokenizer


def _merges(vocab: dict[str, int], fields: dict) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first: the order in which sentencepiece joins them."""
    types = fields.get("token_type") or [_NORMAL] * len(vocab)
    pieces = {piece: i for piece, i in vocab.items() if types[i] == _NORMAL}
    splits = [(piece[:k], piece[k:]) for piece in pieces for k in range(1, len(piece))]
    merges = [(left, right) for left, right in splits if left in pieces and right in pieces]
    scores = fields["scores"]
    return sorted(merges, key=lambda pair: (-scores[vocab["".join(pair)]], *(-len(part) for part in pair)))


def _add_tokens(tokenizer, fields: dict) -> None:
    """Mark the tokens that are matched whole in the text; those that are no text are special."""
    from tokenizers import AddedToken

    typed = list(zip(fields["tokens"], fields.get("token_type") or (), strict=False))
    special = [token for token, kind in typed if kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    whole = [token for token, kind in typed if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole])


def _add_bos(tokenizer, name: str, token: int) -> None:
    from tokenizers.processors import TemplateProcessing

    single = {"single": [name, "$A"], "pair": [name, "$A", "$B:1"]}
    tokenizer.post_processor = TemplateProcessing(**single, special_tokens=[(name, token)])


# ---------------------------------------------------------------- chat templates, which are programs of strangers

TEMPLATE_SECONDS = 2.0
TEMPLATE_SIZE = 1_000_000  # characters, items or bits of one value a template may compute


def _render(template: str, variables: dict) -> str:
    """Run a template in a sandbox and within a time limit. Raises ValueError, in one line, on whatever goes wrong."""
    outcome = {}

    def work():
        try:
            outcome["text"] = _environment().from_string(template).render(variables)
        except SystemExit:  # from below
            pass
        except Exception as error:  # a stranger's program can fail in every way there is
            outcome["error"] = " ".join((str(error) or type(error).__name__).split())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(TEMPLATE_SECONDS)
    if thread.is_alive():
        # the sandbox limits a range, not loops within loops; SystemExit is no Exception, so no handler stops it
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        thread.join(0.5)
    if "text" not in outcome:
        raise ValueError(f"chat template: {outcome.get('error', f'still running after {TEMPLATE_SECONDS:g} seconds')}")
    return outcome["text"]


def _environment():
    """Jinja as chat templates expect it: the settings and additions of transformers."""
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what training scores; here it is only its content."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**"))

        def call_binop(self, context, operator, left, right):
            if _result_size(operator, left, right) > TEMPLATE_SIZE:
                raise SecurityError(f"the result of {operator} is too large")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message):
        raise TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    sandbox.filters["tojson"] = to_json  # jinja's own escapes HTML
    sandbox.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    return sandbox


def _result_size(operator: str, left, right) -> int:
    """A bound on the result before it is computed: sequences count their items, numbers their bits."""
    sizes = [len(x) if hasattr(x, "__len__") else x.bit_length() if isinstance(x, int) else 1 for x in (left, right)]
    if operator == "**" and isinstance(right, int):
        return sizes[0] * right
    if operator == "*" and hasattr(left, "__len__") != hasattr(right, "__len__"):
        return sizes[0] * right if isinstance(right, int) else left * sizes[1]
    return sum(sizes)


# ---------------------------------------------------------------- text, as it comes


class TextStream:
    """Text of a growing list of ids, given out once no later id can change it. Raises ValueError on an empty stop.

    The pieces join to `tokenizer.decode` of all ids, or to what lies before the first stop string.
    """

    CONTEXT = 6  # ids before the new ones that are decoded with them; a character has at most 4 bytes

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self.stop:
            raise ValueError("a stop string is empty; leave it out or write at least one character")
        self.tokenizer, self.stopped = tokenizer, False
        self._longest = max(map(len, self.stop), default=0)
        self._pieces: list[str] = []
        self._ids: list[int] = []  # context, then the ids whose text is not settled
        self._done = 0  # characters of the text of `_ids` that are settled
        self._held = ""  # settled text that may begin a stop string
        self._run = None  # while byte-fallback tokens run on: the decoder of their bytes
        self._tail = ""  # the last text of the run that may begin a stop string

    @property
    def text(self) -> str:
        """Everything returned so far."""
        return "".join(self._pieces)

    def push(self, ids: list[int]) -> str:
        """The text that is settled now. Sets `stopped` at the id that completes a stop string and ignores the rest."""
        return "".join([self._push(token) for token in ids])

    def finish(self) -> str:
        """The rest of the text: what might have become a stop string, or a character with its next byte."""
        if self.stopped:
            return ""
        rest, self._ids, self._done = self.tokenizer.decode(self._ids)[self._done :], [], 0
        piece = self._release(rest)
        if not self.stopped:
            self._pieces.append(self._held)
            piece, self._held = piece + self._held, ""
        return piece

    def _push(self, token: int) -> str:
        if self.stopped or self.tokenizer.skips(token):
            return ""
        self._ids.append(token)
        byte = self.tokenizer.byte(token)
        if byte is not None and not self._run_stops(byte):
            return ""  # one invalid byte later may turn the whole run into replacement characters
        settled = self.tokenizer.decode(self._ids).removesuffix(REPLACEMENT)
        new, self._done, self._run = settled[self._done :], len(settled), None
        self._forget()
        return self._release(new)

    def _run_stops(self, byte: int) -> bool:
        """Whether a run of byte tokens has just completed a stop string."""
        if not self.stop:
            return False
        if self._run is None:
            self._run, self._tail = codecs.getincrementaldecoder("utf-8")("replace"), self._held
        self._tail += self._run.decode(bytes([byte]))
        hit = self._find(self._tail) is not None
        self._tail = self._tail[-self._longest :]
        # cheap so far; the library has the last word, as it may have turned the run into replacement characters
        return hit and self._find(self._held + self.tokenizer.decode(self._ids)[self._done :]) is not None

    def _forget(self) -> None:
        """Keep only a context that renders to text: after it, no decoder strips a leading space."""
        if len(self._ids) > 2 * self.CONTEXT:
            context = self._ids[-self.CONTEXT :]
            settled = self.tokenizer.decode(context).removesuffix(REPLACEMENT)
            if settled:
                self._ids, self._done = context, len(settled)

    def _find(self, text: str) -> int | None:
        """Where the earliest stop string begins."""
        return min((at for at in (text.find(stop) for stop in self.stop) if at >= 0), default=None)

    def _release(self, new: str) -> str:
        """Give out settled text up to a stop string, or up to what may begin one."""
        text = self._held + new
        at = self._find(text)
        self.stopped = at is not None
        if at is None:
            at = len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = "" if self.stopped else text[at:]
        self._pieces.append(text[:at])
        return text[:at]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
