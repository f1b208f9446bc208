"""What servers are asked, and the figures of their answers; nothing here needs a package."""

import itertools
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

LONGEST = 300  # seconds of one run; a server that takes longer fails


@dataclass(frozen=True)
class Load:
    """What is asked of a server. Lengths are drawn from a range, in tokens.

    clients: each sends its next request when the last one is answered. rate: requests/s that come by chance, as Poisson
    has it, from as many clients as it takes; None: those clients.
    """

    clients: int
    requests: int
    prompt: tuple[int, int]
    answer: tuple[int, int]
    rate: float | None = None

    @property
    def most(self) -> int:
        """Requests that may be on their way at a time."""
        return self.clients if self.rate is None else self.requests

    def asked(self, vocab_size: int, seed: str) -> Iterator[tuple[float, list[int], int]]:
        """Each request: seconds after the beginning, before which it is not sent, its prompt, tokens of its answer.

        The same for each server, others for each seed: servers keep what they have read.
        """
        draw, gaps = random.Random(seed), random.Random(seed)
        pauses = (0.0 if self.rate is None else gaps.expovariate(self.rate) for _ in range(self.requests))
        for due in itertools.accumulate(pauses):
            prompt = [draw.randrange(vocab_size) for _ in range(draw.randint(*self.prompt))]
            yield due, prompt, draw.randint(*self.answer)


@dataclass
class Answer:
    """When an answer was asked for, and when each of its pieces came; seconds of one clock."""

    tokens: int
    asked: float = field(default_factory=time.perf_counter)
    pieces: list[float] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        return self.pieces[0] - self.asked

    @property
    def between_s(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.pieces)]


def figures(answers: list[Answer], seconds: float) -> dict[str, float]:
    """Rates and times of one run."""
    first, between = [each.first_s for each in answers], [gap for each in answers for gap in each.between_s]
    return {
        "output_tok_s": sum(each.tokens for each in answers) / seconds,
        "requests_s": len(answers) / seconds,
        "first_p50_s": statistics.median(first),
        "first_p99_s": percentile(first, 0.99),
        "between_p50_s": statistics.median(between),
        "between_p99_s": percentile(between, 0.99),
    }


def percentile(values: list[float], share: float) -> float:
    """The least value that this share of the values does not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]
