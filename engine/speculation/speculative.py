"""Speculative decoding: a draft model, or the text itself, proposes tokens, and one pass of the model verifies them.

The text is distributed exactly as without (Leviathan et al. 2023; Chen et al. 2023). Shapes: B rows, k tokens proposed
a row, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cache import prefix_length
from engine.compile import compile_step
from engine.decode import Chunk
from engine.sampling import Sampling, choose, logits_to_probs, sample, uniforms_at, valid
from engine.speculation.drafters import Drafter
from engine.speculation.guess_length import LENGTHS, AdaptiveLength, Costs, FixedLength, check_length, look_ahead
from layers.packed import FEW
from layers.sparse import SparseLinear, Thresholded
from model import CacheView, KVCache, Transformer
from ranks import from_first, shared
from tp import full_logits


def accept(
    logits: Tensor, draft: Tensor, draft_probs: Tensor | None, sampling: Sampling, uniforms: Tensor | None
) -> tuple[Tensor, Tensor]:
    """New tokens [B, k + 1] and how many hold, count [B, 1]: the draft tokens accepted and one of the model's own.

    logits [B, k + 1, V]: of the place before each draft token and after the last. draft [B, k]; draft_probs [B, k, V'],
    V' <= V, the distributions it was drawn from, None: it was certain. A certain token is accepted if it is what
    uniforms [B, k + 1] decide on, so the text is the same as without. Another is accepted with the chance p / q, and
    the first that is not is drawn again from what p has more than q.
    """
    k, vocab_size = draft.shape[1], logits.shape[-1]
    if draft_probs is None:
        new = choose(logits, sampling, uniforms)
        return new, 1 + (new[:, :k] == draft).long().cumprod(1).sum(1, keepdim=True)
    p = logits_to_probs(logits, sampling)  # [B, k + 1, V]
    q = F.pad(draft_probs, (0, vocab_size - draft_probs.shape[-1]))
    p_draft, q_draft = (x[:, :k].gather(2, draft[..., None])[..., 0] for x in (p, q))  # [B, k]
    agreed = torch.rand_like(p_draft) * q_draft < p_draft  # never where p is 0, always where it is q
    accepted = agreed.long().cumprod(1).sum(1, keepdim=True)  # [B, 1]
    more = torch.cat(((p[:, :k] - q).clamp(min=0), p[:, k:]), 1)  # after the last draft token, p itself
    here = accepted[..., None].expand(-1, 1, vocab_size)
    more, p = more.gather(1, here)[:, 0], p.gather(1, here)[:, 0]  # [B, V]
    own = sample(torch.where(more.sum(-1, keepdim=True) > 0, more, p))  # where p is q, rounding left nothing
    own = valid(own, p)[:, None]
    return torch.cat((draft, own), 1).scatter(1, accepted, own), 1 + accepted


def verify(
    model: Transformer,
    tokens: Tensor,
    pos: Tensor,
    cache: CacheView,
    limit: Tensor,
    draft_probs: Tensor | None,
    sampling: Sampling,
    accept: Callable = accept,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One round: run the model over the draft and accept what it agrees with.

    tokens [B, k + 2]: the last two of the text and the draft; pos [B, 1]: the position of the last of the text, up to
    limit [B, 1]. Returns [B, k + 2], the new tokens and in the last column how many of them hold (together, for one
    transfer to the host), the last two tokens [B, 2] and pos [B, 1] of the text after the round, and what the
    blocks made [B, k + 1, dim] of all tokens but the first.
    """
    recent, draft = tokens[:, :2], tokens[:, 2:]
    places = pos + torch.arange(draft.shape[1] + 1, device=pos.device)
    hidden = model.hidden(tokens[:, 1:], places, cache)
    logits = full_logits(model, model.logits(hidden), sampling.candidates)
    uniforms = None if sampling.is_greedy else uniforms_at(cache, places)
    new, count = accept(logits, draft, draft_probs, sampling, uniforms)
    if not sampling.is_greedy:  # what is likeliest is so on every rank
        new, count = from_first(model.ranks, torch.cat((new, count), 1)).tensor_split((-1,), 1)
    count = torch.minimum(count, limit - pos)
    recent = torch.cat((recent, new), 1).gather(1, count + torch.arange(2, device=pos.device))
    return torch.cat((new, count), 1), recent, pos + count, hidden


@dataclass
class Speculation:
    """Who proposes, how many tokens at a time ("auto": as many as pay), and the function that verifies them."""

    drafter: Drafter
    k: int | str = "auto"
    verify: Callable = verify
    costs: dict[int, Costs] = field(default_factory=dict)  # of each batch size, once measured
    device: torch.device = torch.device("cpu")  # of the model that verifies
    has_states: bool = False  # whether it has layers that keep a state for each token of a round
    most: int | None = None  # proposals that change nothing; None: any number

    def __post_init__(self):
        check_length(self.k, self.device)

    @property
    def adapts(self) -> bool:
        return self.k == "auto"

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of proposals that rounds are compiled for, or measured with, before the first token."""
        if self.adapts:
            return (0, *LENGTHS)
        return (0, self.k) if self.drafter.may_be_silent else (self.k,)

    @property
    def look_ahead(self) -> int:
        """See `guess_length.look_ahead`."""
        ahead = look_ahead(self.k, self.device, self.has_states)
        return ahead if self.most is None else min(ahead, self.most + 1)

    def chooser(
        self, model: Transformer, cache: KVCache, text: "Text", sampling: Sampling
    ) -> AdaptiveLength | FixedLength:
        """What chooses the number of proposals in each round of a text; the costs of rounds are measured first."""
        if not self.adapts:
            return FixedLength(self.k)
        if len(text.pos) not in self.costs:
            self.measure(model, cache, text, sampling)
        return AdaptiveLength(self.costs[len(text.pos)])

    def round(
        self, model: Transformer, cache: KVCache, text: "Text", k: int, sampling: Sampling
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Propose and verify; see `verify` for what comes back."""
        tokens, probs = text.recent, None
        if k:
            draft, probs = self.drafter.propose(text.recent, text.pos, text.filled, k, sampling)
            tokens = torch.cat((text.recent, draft), 1)
        view = cache.view(text.cache_rows, prefix_length(cache, text.filled + k))
        # a longer pass runs eagerly: it gains little by being compiled, for which the text would wait
        check = self.verify if k in self.lengths else verify
        return check(model, tokens, text.pos, view, text.limit, probs, sampling)

    def measure(self, model: Transformer, cache: KVCache, text: "Text", sampling: Sampling, times: int = 5) -> None:
        """Run rounds of every length, which compiles them, and note what each costs.

        The text stays as it is: the slots written lie beyond it.
        """
        seconds = {k: float("inf") for k in self.lengths}
        for _ in range(3):  # the first time each compiles, warms up and on CUDA is captured
            for k in self.lengths:
                for _ in range(times):  # one k at a time, as they run: a change costs a tenth of a step
                    began = time.perf_counter()
                    self.round(model, cache, text, k, sampling)[0].tolist()
                    seconds[k] = min(seconds[k], time.perf_counter() - began)  # a busy machine only adds
        behind = self.drafter.seconds_behind(text.pos, text.filled) if self.adapts else 0.0
        # ranks must choose alike, so theirs stay as they are
        costs = shared(model.ranks, lambda: Costs(seconds, behind, drift=model.ranks is None))
        if self.adapts and costs.drift:  # rounds will tell what longer ones cost
            costs = costs.with_longer(self.look_ahead - 1)
        if self.device.type == "cuda":  # Triton builds its kernels for them here, so that no text waits for that
            for k in costs.rounds.keys() - seconds.keys():
                self.round(model, cache, text, k, sampling)
        self.costs[len(text.pos)] = costs


def build_speculation(
    model: Transformer, drafter: Drafter, k: int | str | None = None, compile: bool = False
) -> Speculation:
    """Guesses for a model, k at a time (None: as many as pay), and what verifies them, compiled as asked."""
    check = compile_step(verify, model.device) if compile else verify
    skips = any(isinstance(layer, Thresholded | SparseLinear) for layer in model.modules())
    most = FEW - 1 if skips else None  # of more tokens at once no input is skipped
    if skips and isinstance(k, int) and k > most:
        raise ValueError(f"speculate_k is {k}; of a model that skips inputs at most {most} tokens can be guessed")
    return Speculation(
        drafter, k or "auto", check, device=model.device, has_states=model.args.delta is not None, most=most
    )


class Text(NamedTuple):
    """Where the rows of a batch stand between two rounds."""

    recent: Tensor  # [B, 2], the last two tokens
    pos: Tensor  # [B, 1], the position of the last
    limit: Tensor  # [B, 1], the position at which a row ends
    filled: int  # tokens of the longest row
    cache_rows: Tensor | None = None  # [B], see `KVCache.view`


@torch.inference_mode()
def speculate(
    model: Transformer,
    cache: KVCache,
    token: Tensor,
    pos: Tensor,
    n_new: int,
    sampling: Sampling,
    speculation: Speculation,
    before: list[int],
) -> Iterator[Chunk]:
    """Stream of chunks of up to k + 1 tokens a row, until every row has n_new; those that have them get no more.

    token, pos [B, 1]: each row's last token, which the cache does not hold yet, and its position; before: the id that
    stands before it. The drafter has begun with the prompts. The cache must hold `speculation.look_ahead` slots more
    than the text.
    """
    if n_new == 0:
        return
    (drafter := speculation.drafter).extend(token.tolist())
    recent = torch.cat((torch.tensor(before, device=token.device)[:, None], token), 1)
    places = pos.flatten().tolist()
    ends = [place + n_new for place in places]
    text = Text(recent, pos, pos + n_new, max(places) + 1)
    length = speculation.chooser(model, cache, text, sampling)
    while places != ends:
        began = time.perf_counter()
        grades, behind = drafter.grades(), drafter.behind
        k = length.choose(grades, behind, max(end - place for end, place in zip(ends, places, strict=True)))
        if k == 0:
            drafter.skip(text.recent)
        new, recent, pos, hidden = speculation.round(model, cache, text, k, sampling)
        drafter.verified(hidden, new[:, :-1], text.pos, text.filled + k)
        new = new.cpu()
        seconds = time.perf_counter() - began
        yield (chunk := Chunk(new[:, :-1], new[:, -1]))
        counts = chunk.counts.tolist()
        length.learn(grades, k, behind, counts, seconds)
        drafter.extend([ids[:n] for ids, n in zip(chunk.tokens.tolist(), counts, strict=True)])
        places = [place + n for place, n in zip(places, counts, strict=True)]
        text = Text(recent, pos, text.limit, max(places) + 1)
