"""What changes the logits of one answer before a token is drawn: penalties, biases, the grammar that it follows."""

import json
from dataclasses import dataclass, field

import torch
from torch import Tensor

from serving.interface.fields import RequestError
from text.tokenizer import Tokenizer

GUIDANCE = {"whitespace_pattern": r" |\n {0,16}"}  # between the parts of JSON; without a bound some write nothing else


@dataclass(frozen=True)
class Logits:
    """What changes them, in values that another process can read. grammar: as `Grammars` writes it."""

    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)  # by token
    grammar: str | None = None


class Grammars:
    """The vocabulary as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        from llguidance import LLTokenizer, TokenizerWrapper

        self.eos_id = min(tokenizer.eos_ids, default=None)
        if self.eos_id is None:
            raise ValueError("the model has no token that ends a text, so an answer in JSON cannot end")
        self.eos_token_id, self.bos_token_id = self.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted({*tokenizer.special_tokens, *tokenizer.eos_ids})
        self.encode = tokenizer.encode
        self.vocabulary = LLTokenizer(TokenizerWrapper(self), vocab_size, sorted(tokenizer.eos_ids))

    def __call__(self, text: str | bytes) -> list[int]:
        return self.encode(text.decode() if isinstance(text, bytes) else text, add_special_tokens=False)

    def of_schema(self, schema: dict) -> str:
        """The grammar of what a JSON schema describes; a ValueError if it describes nothing, or in unknown words."""
        from llguidance import LLMatcher

        return self.checked(LLMatcher.grammar_from_json_schema(schema, GUIDANCE))

    def checked(self, grammar: str) -> str:
        """A grammar in llguidance's dialect of Lark, or as `of_schema` makes it; a ValueError if nothing follows it."""
        from llguidance import LLMatcher

        if error := LLMatcher.validate_grammar(grammar, self.vocabulary):
            raise ValueError(error)
        return grammar


def json_rule(schema: dict) -> str:
    """The right side of a rule in Lark for what a JSON schema describes."""
    return f"%json {json.dumps(schema | {'x-guidance': GUIDANCE})}"


def processors_of(logits: Logits, prompt: list[int], grammars: Grammars | None) -> list:
    """The functions from logits [V] and the new ids to logits [V], in the order in which they are called."""
    found = []
    if (logits.repetition_penalty, logits.frequency_penalty, logits.presence_penalty) != (1, 0, 0):
        found.append(Penalties(logits, prompt))
    if logits.bias:
        found.append(Bias(logits.bias))
    if logits.grammar is not None:
        found.append(Mask(logits.grammar, grammars))
    return found


class Penalties:
    """Lower what has been written: a factor for tokens of prompt and answer, a term for those of the answer."""

    def __init__(self, logits: Logits, prompt: list[int]):
        self.factor, self.frequency, self.presence = (
            logits.repetition_penalty,
            logits.frequency_penalty,
            logits.presence_penalty,
        )
        self.prompt = torch.tensor(prompt).unique()

    def __call__(self, logits: Tensor, ids: list[int]) -> Tensor:
        new, counts = torch.tensor(ids, dtype=torch.long).unique(return_counts=True)
        if self.factor != 1:
            seen = torch.cat((self.prompt, new)).unique().to(logits.device)
            values = logits[seen]
            logits = logits.index_copy(0, seen, torch.where(values > 0, values / self.factor, values * self.factor))
        less = self.frequency * counts + self.presence
        return logits.index_add(0, new.to(logits.device), less.to(logits), alpha=-1)


class Bias:
    """Add to the logits of some tokens."""

    def __init__(self, bias: dict[int, float]):
        self.tokens, self.values = torch.tensor([*bias]), torch.tensor([*bias.values()])

    def __call__(self, logits: Tensor, ids: list[int]) -> Tensor:
        return logits.index_add(0, self.tokens.to(logits.device), self.values.to(logits))


class Mask:
    """Leave only the tokens with which the answer still fits a grammar."""

    def __init__(self, grammar: str, grammars: Grammars):
        from llguidance import LLMatcher

        self.matcher, self.n_read = LLMatcher(grammars.vocabulary, grammar, log_level=0), 0

    def __call__(self, logits: Tensor, ids: list[int]) -> Tensor:
        self.matcher.consume_tokens(ids[self.n_read :])
        self.n_read = len(ids)
        allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8)
        if self.matcher.is_error():  # its limits of memory or time are reached
            raise RequestError(f"the grammar of the answer is too much: {self.matcher.get_error()}")
        return logits.where(allowed.bool().to(logits.device), float("-inf"))
