"""Thoughts told apart from answers, however the text is cut into pieces."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from text.thinking import THINK, Splitter, ThinkingStream, Thoughts, thinking_marks
from text.tokenizer import Tokenizer
from text.vocabularies.libraries import HuggingFaceVocabulary

SPECIAL = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "[THINK]", "[/THINK]")
SPECIAL += ("<|channel>", "<channel|>")
ANALYSIS, SAID, FINAL = (f"<|channel|>{name}<|message|>" for name in ("analysis", "commentary", "final"))
NEXT = "<|end|><|start|>assistant"
CASES = [  # sign in the template, end of the prompt, answer, thoughts, content
    ("</think>", "", "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("</think>", "<think>\n", "Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("</think>", "<think>\n\n</think>\n\n", "Yes.", None, "Yes."),
    ("</think>", "", "<think>\n\n</think>\n\nYes.", None, "Yes."),
    ("</think>", "", "<think>Hm", "Hm", None),
    ("</think>", "", "1 <think 2", None, "1 <think 2"),
    ("[/THINK]", "", "[THINK]Hm.[/THINK]Yes.", "Hm.", "Yes."),
    ("</seed:think>", "", "<seed:think>Hm.</seed:think>Yes.", "Hm.", "Yes."),
    ("<channel|>", "", "<|channel>thought\nHm.<channel|>Yes.", "Hm.", "Yes."),
    ("<|channel|>", "", f"{ANALYSIS}Hm.{NEXT}{FINAL}Yes.", "Hm.", "Yes."),
    ("<|channel|>", "", f"{ANALYSIS}Hm.{NEXT}{ANALYSIS}So.{NEXT}{FINAL}Yes.", "Hm.\n\nSo.", "Yes."),
    (
        "<|channel|>",
        "",
        f"{ANALYSIS}Hm.{NEXT}<|channel|>commentary<|message|>Wait.{NEXT}{FINAL}Yes.",
        "Hm.",
        "Wait.\n\nYes.",
    ),
    ("<|channel|>", "", f"{FINAL}Yes.", None, "Yes."),
    ("<|channel|>", "", f"{ANALYSIS}Hm", "Hm", None),
    ("<|channel|>", "", "plain", None, "plain"),
]


@pytest.fixture(scope="module")
def tokenizer():
    """A token a byte, and those that mark the parts of answers."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(HuggingFaceVocabulary(backend), {}, {"bos_token_id": None, "eos_token_id": []})


@pytest.mark.parametrize("sign, prompt, answer, thoughts, content", CASES)
def test_thoughts_are_shown_or_hidden(tokenizer, sign, prompt, answer, thoughts, content):
    shown = f"<think>\n{thoughts}" if thoughts else ""
    shown += ("\n</think>\n\n" if thoughts and content else "") + (content or "")
    for hidden, expected in ((False, shown), (True, content or "")):
        how = Thoughts(thinking_marks(f"{{# {sign} #}}"), hidden)
        stream = ThinkingStream(tokenizer, [], how, tokenizer.encode(prompt))
        pieces = [stream.push([token]) for token in tokenizer.encode(answer)] + [stream.finish()]
        assert "".join(pieces) == stream.text == expected
        assert stream.content == (content or "")


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("sign, prompt, answer, thoughts, content", CASES)
def test_parts_of_an_answer_in_pieces(sign, prompt, answer, thoughts, content, size):
    marks, found = thinking_marks(sign), {}
    splitter = Splitter(marks, marks.are_open(prompt))
    for at in range(0, len(answer), size):
        for part, text in splitter.push(answer[at : at + size], ends=at + size >= len(answer)).items():
            found[part] = found.get(part, "") + text
    assert (found.get("reasoning_content"), found.get("content")) == (thoughts, content)


def test_the_mark_after_a_message_of_several_ends_no_text(tokenizer):
    """gpt-oss writes <|end|> after its thoughts, Phi after its answer."""
    assert tokenizer.special_tokens.keys() & tokenizer.eos_ids == set()
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    backend.add_special_tokens(["<|end|>"])
    phi = Tokenizer(HuggingFaceVocabulary(backend), {}, {"bos_token_id": None, "eos_token_id": []})
    assert phi.eos_ids == {1}


def test_what_thinks():
    assert thinking_marks("{{ messages }}") is None and thinking_marks("x.split('</think>')") is THINK
