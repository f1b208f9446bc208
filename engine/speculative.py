"""Speculative decoding: a draft model, or the text itself, proposes tokens, and one pass of the model verifies them.

The text is distributed exactly as without (Leviathan et al. 2023; Chen et al. 2023). Shapes: B rows, k tokens proposed
a row, V vocabulary."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.decode import forward_chunk, prefill, used_slots
from engine.guess_length import LENGTHS, AdaptiveLength, Costs, FixedLength, check_length
from engine.sampling import Sampling, logits_to_probs, sample
from model import Transformer
from ranks import from_first, shared
from tp import full_logits

LONGEST_MATCH = 3  # tokens that prompt lookup compares, and from there down to 1


def accept(logits: Tensor, draft: Tensor, draft_probs: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """New tokens [B, k + 1] and how many hold, count [B, 1]: the draft tokens accepted and one of the model's own.

    logits [B, k + 1, V]: of the place before each draft token and after the last. draft [B, k]; draft_probs [B, k, V'],
    V' <= V, the distributions it was drawn from, None: it was certain. A token is accepted with the chance p / q, and
    the first that is not is drawn again from what p has more than q.
    """
    k, vocab_size = draft.shape[1], logits.shape[-1]
    if sampling.temperature == 0:  # p and q are 1 or 0: accepted is what the model would have said
        new = logits.argmax(-1)
        return new, 1 + (new[:, :k] == draft).long().cumprod(1).sum(1, keepdim=True)
    p = logits_to_probs(logits, sampling)  # [B, k + 1, V]
    if draft_probs is None:
        q = F.one_hot(draft, vocab_size).float()
    else:
        q = F.pad(draft_probs, (0, vocab_size - draft_probs.shape[-1]))
    p_draft, q_draft = (x[:, :k].gather(2, draft[..., None])[..., 0] for x in (p, q))  # [B, k]
    agreed = torch.rand_like(p_draft) * q_draft < p_draft  # never where p is 0, always where it is q
    accepted = agreed.long().cumprod(1).sum(1, keepdim=True)  # [B, 1]
    more = torch.cat(((p[:, :k] - q).clamp(min=0), p[:, k:]), 1)  # after the last draft token, p itself
    here = accepted[..., None].expand(-1, 1, vocab_size)
    more, p = more.gather(1, here)[:, 0], p.gather(1, here)[:, 0]  # [B, V]
    own = sample(torch.where(more.sum(-1, keepdim=True) > 0, more, p))[:, None]  # where p is q, rounding left nothing
    return torch.cat((draft, own), 1).scatter(1, accepted, own), 1 + accepted


def verify(
    model: Transformer,
    tokens: Tensor,
    pos: Tensor,
    slots: Tensor,
    limit: Tensor,
    draft_probs: Tensor | None,
    sampling: Sampling,
    accept: Callable = accept,
) -> tuple[Tensor, Tensor, Tensor]:
    """One round: run the model over the draft and accept what it agrees with.

    tokens [B, k + 2]: the last two of the text and the draft; pos [B, 1]: the position of the last of the text, up to
    limit [B, 1]. Returns [B, k + 2], the new tokens and in the last column how many of them hold (together, for one
    transfer to the host), and the last two tokens [B, 2] and pos [B, 1] of the text after the round.
    """
    recent, draft = tokens[:, :2], tokens[:, 2:]
    places = pos + torch.arange(draft.shape[1] + 1, device=pos.device)
    logits = full_logits(model, model(tokens[:, 1:], places, slots=slots), sampling.candidates)
    new, count = accept(logits, draft, draft_probs, sampling)
    if sampling.temperature > 0:  # what is likeliest is so on every rank
        new, count = from_first(model.ranks, torch.cat((new, count), 1)).tensor_split((-1,), 1)
    count = torch.minimum(count, limit - pos)
    recent = torch.cat((recent, new), 1).gather(1, count + torch.arange(2, device=pos.device))
    return torch.cat((new, count), 1), recent, pos + count


class Source:
    """What proposes. The methods are called for every text in this order: begin, then each round kinds, propose or
    skip, extend."""

    model: Transformer | None = None
    may_be_silent = False  # there are rounds in which it has nothing to propose
    behind = 0  # tokens of each row that it has yet to read before it can propose

    def begin(self, model: Transformer, prompts: list[list[int]], start: int = 0) -> None:
        """A new text: all ids of its prompts, of which `start` stand in the cache of `model`, the one that verifies."""
        raise NotImplementedError

    def kinds(self) -> list[int]:
        """What each row's proposal rests on, for telling good from bad; 0: it has none."""
        raise NotImplementedError

    def propose(
        self, recent: Tensor, pos: Tensor, filled: int, k: int, sampling: Sampling
    ) -> tuple[Tensor, Tensor | None]:
        """Draft [B, k] after the last two tokens [B, 2] of the text, the last at pos [B, 1]; and its distributions
        [B, k, V], None if it is certain. filled: the longest row's tokens."""
        raise NotImplementedError

    def skip(self, recent: Tensor) -> None:
        """Nothing was proposed after `recent`."""

    def extend(self, rows: list[list[int]]) -> None:
        """The new tokens of each row."""

    def seconds_behind(self, pos: Tensor, filled: int) -> float:
        """What reading a few tokens costs that it is behind. Uses the slots after pos."""
        return 0.0


class PromptLookup(Source):
    """Proposes what followed the latest earlier occurrence of the last 3, 2 or 1 tokens in prompt and output.

    As Saxena 2023, prompt-lookup-decoding.
    """

    may_be_silent = True

    def begin(self, model: Transformer, prompts: list[list[int]], start: int = 0) -> None:
        self.rows = [_History(prompt) for prompt in prompts]

    def extend(self, rows: list[list[int]]) -> None:
        for row, ids in zip(self.rows, rows, strict=True):
            row.extend(ids)

    def kinds(self) -> list[int]:
        """The number of tokens that match."""
        return [row.match()[0] for row in self.rows]

    def propose(self, recent: Tensor, pos: Tensor, filled: int, k: int, sampling: Sampling) -> tuple[Tensor, None]:
        """A row without a match, which is computed in any case, guesses that its last token goes on."""
        draft = [row.continuation(k) for row in self.rows]
        return torch.tensor(draft, dtype=torch.long, device=recent.device).view(len(self.rows), k), None


class _History:
    """One row's tokens, and where what follows each run of 1 to 3 of them last began."""

    def __init__(self, ids: list[int]):
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        self.extend(ids)

    def extend(self, ids: list[int]) -> None:
        for token in ids:
            at = len(self.ids)
            for n in range(1, min(LONGEST_MATCH, at) + 1):
                self.after[tuple(self.ids[at - n :])] = at
            self.ids.append(token)

    def match(self) -> tuple[int, int]:
        """How many of the last tokens match, and the place after the match; (0, the last place) if none do."""
        for n in range(min(LONGEST_MATCH, len(self.ids)), 0, -1):
            at = self.after.get(tuple(self.ids[-n:]))
            if at is not None:
                return n, at
        return 0, len(self.ids) - 1

    def continuation(self, k: int) -> list[int]:
        """The k tokens after the match; where they reach the end of the text, they go on with themselves."""
        _, at = self.match()
        ids = self.ids[at : at + k]
        while len(ids) < k:
            ids.append(ids[len(ids) - (len(self.ids) - at)])
        return ids


def draft_one_token(
    model: Transformer, tokens: Tensor, pos: Tensor, slots: Tensor, barred: Tensor | None, sampling: Sampling
) -> tuple[Tensor, Tensor | None]:
    """The token [B, 1] after tokens [B, n] at pos [B, n], and its distribution [B, V], None if it is certain.

    barred [V], bool: tokens that are not drawn.
    """
    last = torch.full_like(tokens[:, :1], tokens.shape[1] - 1)
    logits = model(tokens, pos, rows=last, slots=slots)[:, 0]
    if barred is not None:
        logits = logits.masked_fill(barred, float("-inf"))
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True), None
    probs = logits_to_probs(logits, sampling)
    return sample(probs)[:, None], probs


class DraftModel(Source):
    """Proposes what a smaller model with the same tokenizer says."""

    def __init__(self, model: Transformer, step: Callable = draft_one_token, forward: Callable = forward_chunk):
        self.model, self.step, self.forward = model, step, forward
        self.ranks = None  # those that share the model that verifies
        self.filled = 0  # slots of its cache that hold the text, in every row
        self.skipped: list[Tensor] = []  # tokens [B, 1] that it has not read

    @property
    def behind(self) -> int:
        return len(self.skipped)

    @torch.inference_mode()
    def begin(self, model: Transformer, prompts: list[list[int]], start: int = 0) -> None:
        """Read the prompts, but for what its own cache still holds."""
        cache, slots = self.model.layers[0].attention.kv_cache, len(model.slots)
        if cache is None or cache.k.shape[0] < len(prompts) or cache.k.shape[2] < slots:
            self.model.setup_caches(len(prompts), slots)
            self.filled = 0
        start = min(start, self.filled) if len(prompts) == 1 else 0  # rows that ended early may hold other tokens
        # one of the two may be padded to more tokens than the tokenizer has
        self.vocab_size, own = model.args.vocab_size, self.model.args.vocab_size
        self.barred = torch.arange(own, device=self.model.device) >= self.vocab_size if own > self.vocab_size else None
        self.ranks = model.ranks
        unread = [[min(token, own - 1) for token in prompt[start:]] for prompt in prompts]
        prefill(self.model, unread, Sampling(temperature=0), start, self.forward)
        self.lengths, self.skipped = [len(prompt) for prompt in prompts], []
        self.filled = min(self.lengths)

    def extend(self, rows: list[list[int]]) -> None:
        self.lengths = [length + len(ids) for length, ids in zip(self.lengths, rows, strict=True)]

    def kinds(self) -> list[int]:
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
        places, slots = torch.cat((pos - 1, pos), 1), used_slots(self.model, filled + k)
        draft, probs = [], []
        for _ in range(k):
            token, distribution = self.step(self.model, token, places, slots, self.barred, sampling)
            draft.append(token)
            probs.append(distribution)
            places = places[:, -1:] + 1
        self.filled = min(self.lengths)
        draft = from_first(self.ranks, torch.cat(draft, 1).to(device))
        return draft, None if probs[0] is None else torch.stack(probs, 1)[..., : self.vocab_size].to(device)

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
        """Read tokens [B, n], which stand before pos [B, 1]; logits [B, V] of the first."""
        places = pos + torch.arange(-tokens.shape[1], 0, device=pos.device)
        places = places.clamp(min=0)  # a row that has ended stays at its position, and needs none of them
        return self.forward(self.model, tokens, places, used_slots(self.model, filled), torch.zeros_like(pos))


@dataclass
class Speculation:
    """A source of proposals, how many to ask it for ("auto": as many as pay), and the function that verifies them."""

    source: PromptLookup | DraftModel
    k: int | str = "auto"
    verify: Callable = verify
    costs: dict[int, Costs] = field(default_factory=dict)  # of each batch size, once measured

    def __post_init__(self):
        check_length(self.k)

    @property
    def adapts(self) -> bool:
        return self.k == "auto"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Every number of proposals that a round may have."""
        if self.adapts:
            return (0, *LENGTHS)
        return (0, self.k) if self.source.may_be_silent else (self.k,)

    @property
    def look_ahead(self) -> int:
        """Cache slots that a round may use beyond the text's last."""
        return max(self.lengths) + 1

    def round(self, model, recent, pos, limit, filled: int, k: int, sampling) -> tuple[Tensor, Tensor, Tensor]:
        """Propose and verify; see `verify` for what comes back."""
        tokens, probs = recent, None
        if k:
            draft, probs = self.source.propose(recent, pos, filled, k, sampling)
            tokens = torch.cat((recent, draft), 1)
        return self.verify(model, tokens, pos, used_slots(model, filled + k), limit, probs, sampling)

    def measure(self, model, recent, pos, limit, filled: int, sampling, times: int = 5) -> None:
        """Run rounds of every length, which compiles them, and note what each costs.

        The text stays as it is: the slots written lie beyond it.
        """
        seconds = {k: float("inf") for k in self.lengths}
        for _ in range(3):  # the first time each compiles, warms up and on CUDA is captured
            for k in self.lengths:
                for _ in range(times):  # one k at a time, as they run: a change costs a tenth of a step
                    began = time.perf_counter()
                    self.round(model, recent, pos, limit, filled, k, sampling)[0].tolist()
                    seconds[k] = min(seconds[k], time.perf_counter() - began)  # a busy machine only adds
        behind = self.source.seconds_behind(pos, filled) if self.adapts else 0.0
        # ranks must choose alike, so theirs stay as they are
        self.costs[len(recent)] = shared(model.ranks, lambda: Costs(seconds, behind, drift=model.ranks is None))


@torch.inference_mode()
def speculate(
    model: Transformer,
    prompts: list[list[int]],
    token: Tensor,
    pos: Tensor,
    budget: int,
    sampling: Sampling,
    speculation: Speculation,
) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Stream of tokens [B][k + 1] and counts [B], the first counts[b] of row b being new.

    token, pos [B, 1]: each row's first token after its prompt, and its position. It ends when every row has `budget`
    tokens more; a row that has them gets none while others go on. The source has begun with these prompts. The caches
    must hold `speculation.look_ahead` slots more than the text.
    """
    if budget == 0:
        return
    source, limit = speculation.source, pos + budget
    source.extend(token.tolist())
    recent = torch.cat((torch.tensor([[ids[-1]] for ids in prompts], device=token.device), token), 1)
    places, last = pos.flatten().tolist(), limit.flatten().tolist()
    if speculation.adapts and len(prompts) not in speculation.costs:
        speculation.measure(model, recent, pos, limit, max(places) + 1, sampling)
    length = AdaptiveLength(speculation.costs[len(prompts)]) if speculation.adapts else FixedLength(speculation.k)
    while places != last:
        began = time.perf_counter()
        kinds, behind = source.kinds(), source.behind
        k = length.choose(kinds, behind)
        if k == 0:
            source.skip(recent)
        new, recent, pos = speculation.round(model, recent, pos, limit, max(places) + 1, k, sampling)
        rows = new.tolist()
        seconds = time.perf_counter() - began
        tokens, counts = [row[:-1] for row in rows], [row[-1] for row in rows]
        yield tokens, counts
        length.learn(kinds, k, behind, counts, seconds)
        source.extend([ids[:n] for ids, n in zip(tokens, counts, strict=True)])
        places = [place + n for place, n in zip(places, counts, strict=True)]
