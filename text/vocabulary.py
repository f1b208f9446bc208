"""A vocabulary of either library, `tokenizers` or `sentencepiece`, with the same methods."""

import re
from pathlib import Path


class HuggingFaceVocabulary:
    """A vocabulary of the `tokenizers` library."""

    def __init__(self, tokenizer):
        tokenizer.no_truncation()  # some files carry the limits of training
        tokenizer.no_padding()
        self.tokenizer, self.names = tokenizer, {}
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        added = tokenizer.get_added_tokens_decoder()
        self.added = {token.content: i for i, token in added.items()}
        self.special = {i: token.content for i, token in added.items() if token.special}
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


class SentencePieceVocabulary:
    """A vocabulary of the `sentencepiece` library; control pieces in the text are parsed, which it does not do."""

    def __init__(self, model):
        self.model = model
        self.vocab_size = model.get_piece_size()
        pieces = [model.id_to_piece(i) for i in range(self.vocab_size)]
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.bytes = {i: int(piece[1:-1], 16) for i, piece in enumerate(pieces) if model.is_byte(i)}
        self.special = {i: piece for i, piece in enumerate(pieces) if model.is_control(i)}
        self.control = re.compile("(" + ("|".join(map(re.escape, self.special.values())) or "(?!)") + ")")
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


def id_list(value) -> list[int]:
    """Configurations write one id, a list of ids or null."""
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def read_tokenizer_json(path: Path) -> HuggingFaceVocabulary:
    from tokenizers import Tokenizer as Library

    try:
        return HuggingFaceVocabulary(Library.from_file(str(path)))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is not a tokenizer of the tokenizers library: {error}") from None


def read_sentencepiece(path: Path) -> SentencePieceVocabulary:
    from sentencepiece import SentencePieceProcessor

    data = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        raise ValueError(f"{path} is a tiktoken rank file, not sentencepiece; put the model's tokenizer.json beside it")
    try:
        if not data:
            raise RuntimeError("it is empty")
        return SentencePieceVocabulary(SentencePieceProcessor(model_proto=data))
    except (RuntimeError, ValueError):
        raise ValueError(f"{path} is not a sentencepiece model; fetch it again, or put tokenizer.json there") from None
