"""A vocabulary of either library, `tokenizers` or `sentencepiece`, with the same methods."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from text.settings import special_names
from weights.files import refuse_pointer

# appended to a serialised sentencepiece model, it sets normalizer_spec.add_dummy_prefix to false
NO_PREFIX = b"\x1a\x02\x18\x00"
SPACE = "\u2581"  # as sentencepiece spells it
# byte-level vocabularies spell a byte as itself where that is a visible character, and the others from U+0100 on
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_LEVEL = {chr(byte): byte for byte in VISIBLE}
BYTE_LEVEL |= {chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(VISIBLE)))}
PADDING = re.compile(r"\[PAD\d+\]|<dummy\d+>")  # with which converters fill a vocabulary up to the model's rows


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn whatever a library raises into a ValueError of one line that begins with `what`."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # a panic of Rust code
            raise
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ValueError(f"{what}: {' '.join(why.split())}") from None


class HuggingFaceVocabulary:
    """A vocabulary of the `tokenizers` library."""

    def __init__(self, tokenizer):
        tokenizer.no_truncation()  # some files carry the limits of training
        tokenizer.no_padding()
        self.tokenizer, self.names = tokenizer, {}
        vocabulary = self.vocabulary()
        self.vocab_size = 1 + max(vocabulary, default=-1)
        self.unused = {i for i, token in vocabulary.items() if PADDING.fullmatch(token)}
        added = tokenizer.get_added_tokens_decoder()
        self.added = {token.content: i for i, token in added.items()}
        self.special = {i: token.content for i, token in added.items() if token.special}
        self.token_id, self.marker_id = tokenizer.token_to_id, self.added.get
        bytes_ = {tokenizer.token_to_id(f"<0x{value:02X}>"): value for value in range(256)}
        # only a decoder with byte fallback turns them into bytes; to others they are text
        known = [i for i in bytes_ if i is not None and bytes_[i] == ord("A")]
        self.bytes = bytes_ if tokenizer.decode(known) == "A" else {}
        self.is_byte_level = tokenizer.decoder is not None and b'"ByteLevel"' in tokenizer.decoder.__getstate__()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def token_bytes(self, token: int) -> bytes:
        spelled = self.tokenizer.id_to_token(token) or ""
        if self.is_byte_level and spelled not in self.added:
            return bytes(BYTE_LEVEL.get(character, ord("?")) for character in spelled)
        return bytes_of(spelled, self.bytes.get(token))

    def vocabulary(self) -> dict[int, str]:
        return {i: token for token, i in self.tokenizer.get_vocab(with_added_tokens=True).items()}

    def skips(self, token: int) -> bool:
        return token in self.special or self.tokenizer.id_to_token(token) is None


class SentencePieceVocabulary:
    """A vocabulary of the `sentencepiece` library; the text is searched first for control pieces and added tokens.

    bare: the model without the space that it puts before a text. added: `AddedToken` of the `tokenizers` library, by
    id. config: see `read_settings`.
    """

    def __init__(self, model, bare, added: dict, config: dict):
        self.model, self.bare = model, bare
        self.prefixes_first = config.get("add_prefix_space") is not False
        self.prefixes_all = self.prefixes_first and config.get("legacy") is not False
        self.pieces = {i: model.id_to_piece(i) for i in range(model.get_piece_size())}
        self.ids = {piece: i for i, piece in self.pieces.items()}
        named = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        self.names = {key: self.pieces[i] for key, i in named.items() if i >= 0}
        self.bytes = {i: int(piece[1:-1], 16) for i, piece in self.pieces.items() if model.is_byte(i)}
        self.special = {i: piece for i, piece in self.pieces.items() if model.is_control(i)}
        patterns = {i: re.escape(piece) for i, piece in self.special.items()}
        for i, token in added.items():
            given, piece = self.ids.setdefault(token.content, i), self.pieces.setdefault(i, token.content)
            require_listed(token, i, given == i >= 0 and piece == token.content)
            patterns[i] = added_pattern(token)
        self.special |= {i: token.content for i, token in added.items() if token.special}
        self.unused = {i for i in range(model.get_piece_size()) if model.is_unused(i)}
        self.vocab_size = 1 + max(self.pieces, default=-1)
        self.token_id = self.marker_id = self.ids.get
        self.whole = sorted(patterns, key=lambda i: -len(self.pieces[i]))  # the longest of several is found
        self.pattern = re.compile("|".join(f"({patterns[i]})" for i in self.whole) or "(?!)")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = [self.model.bos_id()] if add_special_tokens and self.model.bos_id() >= 0 else []
        end = 0
        for match in self.pattern.finditer(text):
            ids += [*self.encode_part(text[end : match.start()], end), self.whole[match.lastindex - 1]]
            end = match.end()
        return ids + self.encode_part(text[end:], end)

    def encode_part(self, part: str, start: int) -> list[int]:
        """The ids of a part of the text, which begins at `start`, with the space before it that transformers puts."""
        is_prefixed = self.prefixes_all or (self.prefixes_first and start == 0 and not part.startswith((" ", "▁")))
        return (self.model if is_prefixed else self.bare).encode(part)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode_pieces([self.pieces[token] for token in ids if not self.skips(token)])

    def token_bytes(self, token: int) -> bytes:
        return bytes_of(self.pieces.get(token, ""), self.bytes.get(token))

    def vocabulary(self) -> dict[int, str]:
        return self.pieces

    def skips(self, token: int) -> bool:
        return token in self.special or token not in self.pieces  # models may have more rows than the vocabulary


def bytes_of(spelled: str, byte: int | None) -> bytes:
    return spelled.replace(SPACE, " ").encode() if byte is None else bytes([byte])


def added_pattern(token) -> str:
    """What the text is searched for, with the spaces that the token takes."""
    pattern = re.escape(token.content)
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return r"\s*" * token.lstrip + pattern + r"\s*" * token.rstrip


def read_tokenizer_json(path: Path, config: dict) -> HuggingFaceVocabulary:
    from tokenizers import AddedToken, Tokenizer

    refuse_pointer(path)
    with library_errors(f"{path} is not a tokenizer of the tokenizers library"):
        tokenizer = Tokenizer.from_file(str(path))
    with library_errors(f"the tokens added to {path}"):
        added = added_tokens(config)
        tokenizer.add_tokens([added[i] for i in sorted(added)])  # which get the ids after the vocabulary's
        for i, token in added.items():
            require_listed(token, i, tokenizer.token_to_id(token.content) == i)
        named = {name for name in special_names(config) if tokenizer.token_to_id(name) is not None}
        named -= {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_special_tokens([AddedToken(name, special=True) for name in sorted(named)])
        return HuggingFaceVocabulary(tokenizer)


def read_sentencepiece(path: Path, config: dict) -> SentencePieceVocabulary:
    from sentencepiece import SentencePieceProcessor

    refuse_pointer(path)
    data = path.read_bytes()
    try:
        if not data:
            raise RuntimeError("it is empty")
        model, bare = (SentencePieceProcessor(model_proto=proto) for proto in (data, data + NO_PREFIX))
    except (RuntimeError, ValueError):
        raise ValueError(f"{path} is not a sentencepiece model; fetch it again, or put tokenizer.json there") from None
    with library_errors(f"the tokens added to {path}"):
        return SentencePieceVocabulary(model, bare, added_tokens(config), config)


def require_listed(token, i: int, is_possible: bool) -> None:
    if not is_possible:
        raise ValueError(f"{token.content!r} is listed with the id {i}, which the vocabulary cannot give it")


def added_tokens(config: dict) -> dict:
    """added_tokens_decoder as `AddedToken` of the `tokenizers` library, by id."""
    from tokenizers import AddedToken

    named = special_names(config)
    tokens = {int(i): AddedToken(**flags) for i, flags in config["added_tokens_decoder"].items()}
    for token in tokens.values():
        token.special = token.special or token.content in named
    return {i: token for i, token in tokens.items() if token.content}
