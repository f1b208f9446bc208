"""The vocabulary of a GGUF file as a tokenizer of the `tokenizers` library."""

from pathlib import Path
from typing import NamedTuple

from text.settings import id_list
from text.vocabulary import HuggingFaceVocabulary
from weights.gguf_file import read_gguf_metadata

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class PreTokenizer(NamedTuple):
    """How a byte-level vocabulary wants its text prepared, as the model's own tokenizer.json has it."""

    split: str | None = None  # a pattern: first each match becomes a part of its own
    gpt2_split: bool = True  # whether GPT-2's own pattern then splits the parts
    whole_words: bool = False  # a word that is a token skips the merges
    compose: bool = False  # to NFC: e and an accent become one letter, é
    adds_bos: bool = False  # where the file is silent


LLAMA_3 = PreTokenizer(WORDS + r"\p{N}{1,3}" + OTHERS, gpt2_split=False, whole_words=True, adds_bos=True)
PRE_TOKENIZERS = {
    "default": PreTokenizer(),
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(r"\p{N}"),
    "llama-bpe": LLAMA_3,
    "llama3": LLAMA_3,
    "llama-v3": LLAMA_3,
    "qwen2": PreTokenizer(WORDS + r"\p{N}" + OTHERS, gpt2_split=False, compose=True),
}
GGUF_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types of the format


def read_gguf_vocabulary(path: Path) -> tuple[HuggingFaceVocabulary, dict, dict]:
    """The vocabulary of a GGUF file, and what it says beside it in the layout of the Hugging Face files."""
    metadata = read_gguf_metadata(path)
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, tokens = fields.get("model"), fields.get("tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise ValueError(f"{path} has a tokenizer of type {kind!r}; supported: gpt2, llama (with a token list)")
    named = {key: fields.get(f"{name}_token_id") for key, name in GGUF_NAMES.items()}
    named = {key: i for key, i in named.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    config = {key: tokens[i] for key, i in named.items()}
    config["chat_template"] = metadata.get("tokenizer.chat_template")
    ids = {"bos_token_id": named.get("bos_token")}
    ids["eos_token_id"] = id_list([named.get("eos_token"), fields.get("eot_token_id")])
    try:
        # where the file is silent, as the format's reference reader does
        default = kind == "llama" or pre_tokenizer(fields).adds_bos
        config["add_bos_token"] = bool(fields.get("add_bos_token", default))
        tokenizer = byte_level_bpe(fields) if kind == "gpt2" else sentencepiece_bpe(fields, config.get("unk_token"))
        add_tokens(tokenizer, fields)
        if config["add_bos_token"] and "bos_token" in config:
            add_bos(tokenizer, config["bos_token"], named["bos_token"])
        return HuggingFaceVocabulary(tokenizer), config, ids
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"the tokenizer in {path} cannot be rebuilt: {error}") from None


def pre_tokenizer(fields: dict) -> PreTokenizer:
    name = fields.get("pre", "default")
    if name not in PRE_TOKENIZERS:
        raise ValueError(f"pre-tokenizer {name!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[name]


def byte_level_bpe(fields: dict):
    """GPT-2's kind: bytes spelt as letters, merges in the file."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = pre_tokenizer(fields)
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


def sentencepiece_bpe(fields: dict, unknown: str | None):
    """Sentencepiece's kind: spaces spelt as ▁, unknown letters as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(fields["tokens"])}
    if "merges" in fields:
        merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    else:
        merges = merges_by_score(vocab, fields)
    steps = [normalizers.Replace(" ", "▁")]
    steps_back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        steps_back.append(decoders.Strip(" ", 1, 0))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(steps), decoders.Sequence(steps_back)
    return tokenizer


def merges_by_score(vocab: dict[str, int], fields: dict) -> list[tuple[str, str]]:
    """Every pair of pieces that together are a piece, best score first: sentencepiece joins them in this order."""
    types = fields.get("token_type") or [NORMAL] * len(vocab)
    pieces = {piece: i for piece, i in vocab.items() if types[i] == NORMAL}
    splits = [(piece[:k], piece[k:]) for piece in pieces for k in range(1, len(piece))]
    merges = [(left, right) for left, right in splits if left in pieces and right in pieces]
    scores = fields["scores"]
    return sorted(merges, key=lambda pair: (-scores[vocab["".join(pair)]], *(-len(part) for part in pair)))


def add_tokens(tokenizer, fields: dict) -> None:
    """Mark the tokens that the text is searched for first; unknown and control tokens are special."""
    from tokenizers import AddedToken

    typed = list(zip(fields["tokens"], fields.get("token_type") or (), strict=False))
    special = [token for token, kind in typed if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    whole = [token for token, kind in typed if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole])


def add_bos(tokenizer, name: str, token: int) -> None:
    from tokenizers.processors import TemplateProcessing

    single = {"single": [name, "$A"], "pair": [name, "$A", "$B:1"]}
    tokenizer.post_processor = TemplateProcessing(**single, special_tokens=[(name, token)])
