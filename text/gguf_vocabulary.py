"""The vocabulary of a GGUF file as a tokenizer of the `tokenizers` library."""

from pathlib import Path
from typing import NamedTuple

from text.vocabulary import HuggingFaceVocabulary, id_list
from weights.gguf_file import read_gguf_metadata

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


def read_gguf_vocabulary(path: Path) -> tuple[HuggingFaceVocabulary, dict, dict]:
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
    ids["eos_token_id"] = id_list([named.get("eos_token"), fields.get("eot_token_id")])
    try:
        # a file that does not say means what the format's reference reader assumes
        default = kind == "llama" or _pre_tokenizer(fields).adds_bos
        config["add_bos_token"] = bool(fields.get("add_bos_token", default))
        tokenizer = _byte_level_bpe(fields) if kind == "gpt2" else _sentencepiece_bpe(fields, config.get("unk_token"))
        _add_tokens(tokenizer, fields)
        if config["add_bos_token"] and "bos_token" in config:
            _add_bos(tokenizer, config["bos_token"], named["bos_token"])
        return HuggingFaceVocabulary(tokenizer), config, ids
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
