"""Clients of a server in OpenAI's interface, each with one request at a time, or requests that come by chance."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx

TIMEOUT = 600  # seconds without a byte


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

    def bodies(self, vocab_size: int, seed: int) -> Iterator[dict]:
        """The same for each server, others for each seed: servers keep what they have read."""
        draw = random.Random(seed)
        for _ in range(self.requests):
            prompt = [draw.randrange(vocab_size) for _ in range(draw.randint(*self.prompt))]
            how = {"temperature": 0, "ignore_eos": True, "stream": True}
            yield {"prompt": prompt, "max_tokens": draw.randint(*self.answer), **how}

    def pauses(self, seed: int) -> Iterator[float]:
        """Seconds between requests that come by chance."""
        draw = random.Random(seed)
        while True:
            yield draw.expovariate(self.rate)


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
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]


def measure(url: str, load: Load, vocab_size: int, seed: int) -> dict[str, float]:
    """Rates and times of one run."""
    began = time.perf_counter()
    answers = asyncio.run(ask_all(url, load, vocab_size, seed))
    seconds = time.perf_counter() - began
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


async def ask_all(url: str, load: Load, vocab_size: int, seed: int) -> list[Answer]:
    bodies = load.bodies(vocab_size, seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # an idle one may end while it is taken
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as http:
        if load.rate is None:  # one iterator for all: whoever is free takes the next
            found = await asyncio.gather(*(in_turn(http, bodies) for _ in range(load.clients)))
            return [answer for each in found for answer in each]
        asked = []
        for body, pause in zip(bodies, load.pauses(seed), strict=False):
            await asyncio.sleep(pause)
            asked.append(asyncio.create_task(ask(http, body)))
        return await asyncio.gather(*asked)


async def in_turn(http: httpx.AsyncClient, bodies: Iterator[dict]) -> list[Answer]:
    return [await ask(http, body) for body in bodies]


async def ask(http: httpx.AsyncClient, body: dict) -> Answer:
    """Send one request and read its stream. Raises ValueError if the answer is not whole."""
    answer, reason = Answer(body["max_tokens"]), None
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"the server answered {response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                [choice] = json.loads(line.removeprefix("data: "))["choices"] or [{}]
                reason = choice.get("finish_reason") or reason
                if choice.get("text"):
                    answer.pieces.append(time.perf_counter())
    if reason != "length" or not answer.pieces:
        raise ValueError(f"an answer of {body['max_tokens']} tokens ended early: {reason}")
    return answer
