"""The rank files of tiktoken, which hold neither the pattern that splits a text nor the special tokens."""

import base64
import re
from pathlib import Path

from text.vocabularies.gguf import LLAMA_3, add_bos, pre_tokenized_bpe
from text.vocabularies.libraries import BYTE_LEVEL, HuggingFaceVocabulary, library_errors

LLAMA_3_RANKS = 128_000
# of Llama 3.1 and later; earlier ones have reserved tokens where no text of theirs has any
LLAMA_3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
LLAMA_3_SPECIAL += ["<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>"]
LLAMA_3_SPECIAL += ["<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
LLAMA_3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(2, 247)]


def is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read(4096)) is not None


def read_tiktoken(path: Path) -> HuggingFaceVocabulary:
    """Llama 3's original tokenizer.model, known by its number of tokens."""
    from tokenizers import AddedToken

    with library_errors(f"{path} is not a tiktoken rank file"):
        pairs = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if sorted(ranks.values()) != list(range(LLAMA_3_RANKS)):
        raise ValueError(
            f"{path} is a tiktoken rank file of {len(ranks)} tokens, and only that of Llama 3, with {LLAMA_3_RANKS}, "
            "is known; put the model's tokenizer.json beside it"
        )
    spell = {byte: letter for letter, byte in BYTE_LEVEL.items()}
    with library_errors(f"{path} is not the tiktoken rank file of Llama 3"):
        vocab = {"".join(map(spell.get, token)): rank for token, rank in ranks.items()}
        tokenizer = pre_tokenized_bpe(vocab, merges_of(vocab), LLAMA_3)
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in LLAMA_3_SPECIAL])
        add_bos(tokenizer, LLAMA_3_SPECIAL[0], LLAMA_3_RANKS)
        vocabulary = HuggingFaceVocabulary(tokenizer)
    vocabulary.names = {"bos_token": LLAMA_3_SPECIAL[0], "eos_token": LLAMA_3_SPECIAL[1]}
    return vocabulary


def merges_of(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that together are a token, by the rank of what they become: tiktoken joins in this order."""
    merges = []
    for token, rank in vocab.items():
        halves = ((token[:k], token[k:]) for k in range(1, len(token)))
        pairs = [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
        merges += ((rank, vocab[first], vocab[second], first, second) for first, second in pairs)
    return [(first, second) for *_, first, second in sorted(merges)]
