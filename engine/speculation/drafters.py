"""Who guesses ahead: a smaller model, or the text itself.

Shapes: B rows, k tokens proposed a row, V vocabulary.
"""

import time
from bisect import bisect
from collections.abc import Callable

import torch
from torch import Tensor

from engine.cache import allocate, prefix_length, shared_prefix
from engine.decode import forward_chunk, prefill
from engine.sampling import NO_TOKEN, Sampling, argmax, logits_to_probs, require_finite, sample, valid
from engine.speculation.guess_length import LENGTHS
from mixers.layer_kinds import state_layers
from model import CacheView, KVCache, Transformer
from ranks import from_first

PLACES = (1, 1, 64)  # of the latest places after the last 1, 2 and 3 tokens, so many are compared further back
GRADES = (0, 1, 2, 3, 8, 16, 32)  # a match has the largest of these that it reaches; no more tokens are compared


class Drafter:
    """Who proposes tokens. For every text: begin, then in each round grades, propose or skip, extend."""

    model: Transformer | None = None
    may_be_silent = False  # there are rounds in which it has nothing to propose
    behind = 0  # tokens of each row that it has yet to read before it can propose

    def require_context(self, length: int) -> None:
        """Refuse texts of `length` tokens if it was not made for them."""

    def reserve(self, n_rows: int, n_slots: int) -> None:
        """Allocate what it needs for texts of n_slots tokens, n_rows at a time."""

    def begin(self, model: Transformer, prompts: list[list[int]], start: int = 0) -> None:
        """A new text: all ids of its prompts, of which `start` stand in the cache of `model`, the one that verifies."""
        raise NotImplementedError

    def grades(self) -> list[int]:
        """What each row's proposal rests on, in grades whose rates of acceptance differ; 0: it has none."""
        raise NotImplementedError

    def propose(
        self, recent: Tensor, pos: Tensor, filled: int, k: int, sampling: Sampling
    ) -> tuple[Tensor, Tensor | None]:
        """Draft [B, k] after the last two tokens [B, 2] of the text, the last at pos [B, 1]; and its distributions
        [B, k, V], None if it is certain. filled: the longest row's tokens."""
        raise NotImplementedError

    def skip(self, recent: Tensor) -> None:
        """Nothing is proposed after `recent`, as `propose` takes it."""

    def following(self, forward: Callable) -> Callable:
        """What reads the chunks of a prompt as `forward` does, and may keep what the model makes of them."""
        return forward

    def verified(self, hidden: Tensor, tokens: Tensor, pos: Tensor, filled: int) -> None:
        """What the model's blocks made [B, n, dim] of the tokens from pos [B, 1] on, and the n tokens that follow each.

        Those beyond what was accepted are none of the text. filled: tokens of the longest row, with them.
        """

    def extend(self, rows: list[list[int]]) -> None:
        """The new tokens of each row."""

    def seconds_behind(self, pos: Tensor, filled: int) -> float:
        """What reading a few tokens costs that it is behind. Uses the slots after pos."""
        return 0.0


class PromptLookup(Drafter):
    """Proposes what followed where the last tokens, at most 32, have the longest match in prompt and output.

    As Saxena 2023, prompt-lookup-decoding.
    """

    may_be_silent = True

    def __init__(self):
        self.rows: list[_History] = []

    def begin(self, model: Transformer, prompts: list[list[int]], start: int = 0) -> None:
        if len(self.rows) != len(prompts):
            self.rows = [_History() for _ in prompts]
        for row, prompt in zip(self.rows, prompts, strict=True):  # the next turn of a conversation adds a message
            kept = shared_prefix(row.ids, prompt)
            row.cut(kept)
            row.extend(prompt[kept:])

    def extend(self, rows: list[list[int]]) -> None:
        for row, ids in zip(self.rows, rows, strict=True):
            row.extend(ids)

    def grades(self) -> list[int]:
        """The number of tokens that match, rounded down to one of GRADES."""
        return [GRADES[bisect(GRADES, row.matched) - 1] for row in self.rows]

    def propose(self, recent: Tensor, pos: Tensor, filled: int, k: int, sampling: Sampling) -> tuple[Tensor, None]:
        """A row without a match, which is computed in any case, guesses that its last token goes on."""
        draft = [row.continuation(k) for row in self.rows]
        return torch.tensor(draft, dtype=torch.long, device=recent.device).view(len(self.rows), k), None


class _History:
    """One row's tokens, the place that follows each run of 1 to 3 of them, and which earlier place the last ones match.

    A place is an index of ids. after: of each run, the latest place. before: for each place, what `after` held for the
    runs of 1, 2 and 3 tokens that end there.
    """

    def __init__(self):
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        self.before: list[tuple[int | None, ...]] = []
        self.matched, self.place = 0, 0

    def runs(self) -> list[tuple[int, ...]]:
        """The last token, the last two, the last three."""
        return [tuple(self.ids[-n:]) for n in range(1, min(len(PLACES), len(self.ids)) + 1)]

    def extend(self, ids: list[int]) -> None:
        for token in ids:
            runs = self.runs()
            self.before.append(tuple(map(self.after.get, runs)))
            self.after.update(dict.fromkeys(runs, len(self.ids)))
            self.ids.append(token)
        self.matched, self.place = self.match()

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        while len(self.ids) > length:
            self.ids.pop()
            for run, place in zip(self.runs(), self.before.pop(), strict=True):
                if place is None:
                    del self.after[run]
                else:
                    self.after[run] = place

    def match(self) -> tuple[int, int]:
        """How many of the last tokens match, and the place after the match; (0, the last place) if none do."""
        for n, run in reversed([*enumerate(self.runs())]):
            found, place = [], self.after.get(run)
            while place is not None and len(found) < PLACES[n]:
                found.append((self.common(place), place))
                place = self.before[place][n]
            if found:
                return max(found)  # of equals the latest
        return 0, len(self.ids) - 1

    def common(self, place: int) -> int:
        """How many tokens before the place equal the last ones, at most the last of GRADES."""
        most, n = min(GRADES[-1], place), 0
        while n < most and self.ids[place - 1 - n] == self.ids[-1 - n]:
            n += 1
        return n

    def continuation(self, k: int) -> list[int]:
        """The k tokens after the match; where they reach the end of the text, they go on with themselves."""
        ids = self.ids[self.place : self.place + k]
        while len(ids) < k:
            ids.append(ids[len(ids) - (len(self.ids) - self.place)])
        return ids


def draw(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """A token [B, 1] of logits [B, V], and its distribution [B, V], None if it is certain."""
    if sampling.is_greedy:
        return valid(argmax(logits), logits)[:, None], None
    probs = logits_to_probs(logits, sampling)
    return valid(sample(probs), probs)[:, None], probs


def draft_one_token(
    model: Transformer, tokens: Tensor, pos: Tensor, cache: CacheView, barred: Tensor | None, sampling: Sampling
) -> tuple[Tensor, Tensor | None]:
    """The token [B, 1] after tokens [B, n] at pos [B, n], and its distribution [B, V], None if it is certain.

    barred [V], bool: tokens that are not drawn. NO_TOKEN is read as any token.
    """
    tokens = tokens.clamp(min=0)
    last = torch.full_like(tokens[:, :1], tokens.shape[1] - 1)
    logits = model(tokens, pos, cache, last)[:, 0]
    if barred is not None:
        logits = logits.masked_fill(barred, float("-inf"))
    return draw(logits, sampling)


class DraftModel(Drafter):
    """Proposes what a smaller model with the same tokenizer says."""

    def __init__(self, model: Transformer, step: Callable = draft_one_token, forward: Callable = forward_chunk):
        if state_layers(model.args):
            kinds = "gated DeltaNet or short convolutions"
            raise ValueError(f"a draft model with layers of {kinds} is not supported; use --speculate ngram")
        self.model, self.step, self.forward = model, step, forward
        self.ranks = None  # those that share the model that verifies
        self.cache: KVCache | None = None
        self.filled = 0  # slots of the cache that hold the text, in every row
        self.skipped: list[Tensor] = []  # tokens [B, 1] that it has not read
        self.drawn: Tensor | None = None  # the last draft [B, k]

    @property
    def behind(self) -> int:
        return len(self.skipped)

    def require_context(self, length: int) -> None:
        context = self.model.args.max_seq_length
        if length > context:
            raise ValueError(
                f"the draft's context of {context} is shorter than the {length} positions asked for; "
                "use a smaller --max_new_tokens or --max_seq_length, or another draft"
            )

    def reserve(self, n_rows: int, n_slots: int) -> None:
        if self.cache is None or self.cache.n_rows < n_rows or self.cache.n_slots < n_slots:
            self.cache = None  # the old one is freed before the new one is allocated
            self.cache, self.filled = allocate(self.model, n_rows, n_slots), 0

    @torch.inference_mode()
    def begin(self, model: Transformer, prompts: list[list[int]], start: int = 0) -> None:
        """Read the prompts, but for what its own cache still holds."""
        start = min(start, self.filled) if len(prompts) == 1 else 0  # rows that ended early may hold other tokens
        # one of the two may be padded to more tokens than the tokenizer has
        self.vocab_size, own = model.args.vocab_size, self.model.args.vocab_size
        self.barred = torch.arange(own, device=self.model.device) >= self.vocab_size if own > self.vocab_size else None
        self.ranks = model.ranks
        unread = [[min(token, own - 1) for token in prompt[start:]] for prompt in prompts]
        prefill(self.model, self.cache, unread, Sampling(temperature=0), start, self.forward)
        self.lengths, self.skipped, self.drawn = [len(prompt) for prompt in prompts], [], None
        self.filled = min(self.lengths)

    def extend(self, rows: list[list[int]]) -> None:
        # only now, because the host has just waited for the round
        require_finite(self.model, self.drawn is None or NO_TOKEN not in self.drawn, "draft model")
        self.lengths = [length + len(ids) for length, ids in zip(self.lengths, rows, strict=True)]

    def grades(self) -> list[int]:
        return [1] * len(self.lengths)

    def propose(
        self, recent: Tensor, pos: Tensor, filled: int, k: int, sampling: Sampling
    ) -> tuple[Tensor, Tensor | None]:
        device, pos = recent.device, pos.to(self.model.device)
        token = recent.to(self.model.device).clamp(max=self.model.args.vocab_size - 1)
        if self.skipped:
            self.catch_up(torch.cat((*self.skipped, token[:, :1]), 1), pos, filled)
            self.skipped = []
        # the first pass reads two tokens: the one before the last may be the draft's own, accepted but not yet read
        places = torch.cat((pos - 1, pos), 1)
        view = self.cache.view(length=prefix_length(self.cache, filled + k))
        draft, probs = [], []
        for _ in range(k):
            token, distribution = self.step(self.model, token, places, view, self.barred, sampling)
            draft.append(token)
            probs.append(distribution)
            places = places[:, -1:] + 1
        self.filled = min(self.lengths)
        self.drawn = from_first(self.ranks, torch.cat(draft, 1).to(device))
        certain = probs[0] is None
        probs = None if certain else torch.stack(probs, 1)[..., : self.vocab_size].to(device)
        return self.drawn.clamp(min=0), probs

    def skip(self, recent: Tensor) -> None:
        self.skipped.append(recent[:, :1].to(self.model.device).clamp(max=self.model.args.vocab_size - 1))

    def seconds_behind(self, pos: Tensor, filled: int) -> float:
        n = max(LENGTHS)
        pos = pos.to(self.model.device) + n + 1
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            self.catch_up(torch.zeros_like(pos).expand(-1, n), pos, filled + n).flatten()[0].item()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    def catch_up(self, tokens: Tensor, pos: Tensor, filled: int) -> Tensor:
        """Read tokens [B, n], which stand before pos [B, 1]; what the blocks make of them."""
        places = pos + torch.arange(-tokens.shape[1], 0, device=pos.device)
        places = places.clamp(min=0)  # a row that has ended stays at its position, and needs none of them
        view = self.cache.view(length=prefix_length(self.cache, filled))
        return self.forward(self.model, tokens, places, view)
