"""The vocabulary of a GGUF file as a tokenizer of the `tokenizers` library."""

from pathlib import Path
from typing import NamedTuple

from text.settings import id_list
from text.vocabularies.libraries import HuggingFaceVocabulary, library_errors
from weights.gguf_file import read_gguf_metadata

ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# a capital after a small letter begins a word: httpServer is http, Server; HTTPServer is one word
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED_WORDS = [r"[^\r\n\p{L}\p{N}]?" + word for word in (f"{UPPER}*{LOWER}+", f"{UPPER}+{LOWER}*")]
CASED_OTHERS = OTHERS.replace(r"[\r\n]*", r"[\r\n/]*", 1)


class PreTokenizer(NamedTuple):
    """How a byte-level vocabulary wants its text prepared, as the model's own tokenizer.json has it."""

    split: str | None = None  # a pattern: first each match becomes a part of its own
    gpt2_split: bool = True  # whether GPT-2's own pattern then splits the parts
    whole_words: bool = False  # a word that is a token skips the merges
    compose: bool = False  # to NFC: e and an accent become one letter, é
    adds_bos: bool = False  # where the file is silent


DIGITS = PreTokenizer(r"\p{N}")
LLAMA_3 = PreTokenizer(WORDS + r"\p{N}{1,3}" + OTHERS, gpt2_split=False, whole_words=True, adds_bos=True)
QWEN_2 = PreTokenizer(WORDS + r"\p{N}" + OTHERS, gpt2_split=False, compose=True)
TEKKEN = LLAMA_3._replace(split="|".join(CASED_WORDS) + r"|\p{N}" + CASED_OTHERS)
GPT_4O = "|".join(word + ENDINGS + "?" for word in CASED_WORDS) + r"|\p{N}{1,3}" + CASED_OTHERS
PRE_TOKENIZERS = {
    "default": PreTokenizer(),
    "gpt-2": PreTokenizer(),
    "olmo": PreTokenizer(compose=True),
    "smollm": DIGITS,
    "refact": DIGITS,  # Granite
    "llama-bpe": LLAMA_3,
    "llama3": LLAMA_3,
    "llama-v3": LLAMA_3,
    "lfm2": LLAMA_3,
    "dbrx": LLAMA_3._replace(whole_words=False, adds_bos=False),  # Phi-4, OLMo 2
    "qwen2": QWEN_2,
    "deepseek-r1-qwen": QWEN_2,
    "tekken": TEKKEN,  # Mistral Nemo
    "gpt-4o": PreTokenizer(GPT_4O, gpt2_split=False),  # Phi-4-mini
}
GGUF_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # token types of the format
TEMPLATE = "tokenizer.chat_template"


def read_gguf_fields(path: Path) -> dict:
    """What a GGUF file says about its tokenizer, with a type for every token."""
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in read_gguf_metadata(path).items()}
    kind, tokens, types = (fields.get(key) for key in ("model", "tokens", "token_type"))
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise ValueError(f"{path} has a tokenizer of type {kind!r}; supported: gpt2, llama (with a token list)")
    return fields | {"path": path, "token_type": types if isinstance(types, list) else [NORMAL] * len(tokens)}


def gguf_settings(fields: dict) -> tuple[dict, dict]:
    """The special tokens and templates, as `read_settings` has those of a folder."""
    tokens = fields["tokens"]
    named = {key: fields.get(f"{name}_token_id") for key, name in GGUF_NAMES.items()}
    named = {key: i for key, i in named.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    config = {key: tokens[i] for key, i in named.items()}
    # where the file is silent, as the format's reference reader does
    default = fields["model"] == "llama" or PRE_TOKENIZERS.get(str(fields.get("pre")), PreTokenizer()).adds_bos
    config["add_bos_token"] = bool(fields.get("add_bos_token", default))
    templates = {"default" if key == TEMPLATE else key.removeprefix(f"{TEMPLATE}."): key for key in fields}
    templates = {name: fields[key] for name, key in templates.items() if key.startswith(TEMPLATE)}
    config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    eos = id_list([named.get("eos_token"), fields.get("eot_token_id")])
    return config, {"bos_token_id": named.get("bos_token"), "eos_token_id": eos}


def gguf_vocabulary(fields: dict) -> HuggingFaceVocabulary:
    config, ids = gguf_settings(fields)
    with library_errors(f"the tokenizer in {fields['path']} cannot be rebuilt"):
        is_byte_level = fields["model"] == "gpt2"
        tokenizer = byte_level_bpe(fields) if is_byte_level else sentencepiece_bpe(fields, config.get("unk_token"))
        add_tokens(tokenizer, fields, {ids["bos_token_id"], *ids["eos_token_id"]})
        if config["add_bos_token"] and "bos_token" in config:
            add_bos(tokenizer, config["bos_token"], ids["bos_token_id"])
        vocabulary = HuggingFaceVocabulary(tokenizer)
    vocabulary.unused |= {i for i, kind in enumerate(fields["token_type"]) if kind == UNUSED}
    return vocabulary


def has_ordinary_tokens(vocabulary: HuggingFaceVocabulary, fields: dict) -> bool:
    """Whether a vocabulary has the tokens of ordinary text that the file has."""
    known, typed = vocabulary.vocabulary(), enumerate(zip(fields["tokens"], fields["token_type"], strict=False))
    return all(known.get(i) == token for i, (token, kind) in typed if kind == NORMAL)


def pre_tokenizer(fields: dict) -> PreTokenizer:
    name = fields.get("pre", "default")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"pre-tokenizer {name!r} is not supported; put tokenizer.json beside it (supported: {known})")
    return PRE_TOKENIZERS[name]


def byte_level_bpe(fields: dict):
    """GPT-2's kind: bytes spelt as letters, merges in the file."""
    vocab = {token: i for i, token in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    return pre_tokenized_bpe(vocab, merges, pre_tokenizer(fields))


def pre_tokenized_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], pre: PreTokenizer):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(pre.split), "isolated")] if pre.split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.gpt2_split))
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
    pieces = {piece for piece, i in vocab.items() if fields["token_type"][i] == NORMAL}
    lengths = {len(piece) for piece in pieces}  # the halves of a long piece are made only where they can be pieces
    merges = [
        (piece[:k], piece[k:])
        for piece in pieces
        for k in range(1, len(piece))
        if {k, len(piece) - k} <= lengths and piece[:k] in pieces and piece[k:] in pieces
    ]
    scores = fields["scores"]
    return sorted(merges, key=lambda pair: (-scores[vocab["".join(pair)]], *(-len(part) for part in pair)))


def add_tokens(tokenizer, fields: dict, ends: set[int]) -> None:
    """Mark the tokens that the text is searched for first, of whatever type. ends: those that begin or end a text."""
    from tokenizers import AddedToken

    typed = list(enumerate(zip(fields["tokens"], fields["token_type"], strict=False)))
    types = {UNKNOWN, CONTROL}
    special = [token for i, (token, kind) in typed if kind in types or kind == NORMAL and (i in ends or is_mark(token))]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    whole = [token for _, (token, kind) in typed if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole])


def is_mark(token: str) -> bool:
    """Whether a token marks turns, such as <|im_end|>: some converters type it as ordinary text."""
    return token.startswith("<|") and token.endswith("|>") or token in ("<start_of_turn>", "<end_of_turn>")


def add_bos(tokenizer, name: str, token: int) -> None:
    from tokenizers.processors import TemplateProcessing

    single = {"single": [name, "$A"], "pair": [name, "$A", "$B:1"]}
    tokenizer.post_processor = TemplateProcessing(**single, special_tokens=[(name, token)])
