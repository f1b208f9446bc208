"""Clients of a server in OpenAI's interface, each with one request at a time, or requests that come by chance."""

import asyncio
import json
import time
from collections.abc import Callable

import httpx

from scripts.bench.peers.load import LONGEST, Answer, Load, figures


def measure(url: str, body: Callable[[list[int], int], dict], load: Load, vocab_size: int, seed: str) -> dict:
    """Figures of one run. body: of (prompt, tokens of the answer), what is posted.

    Raises ValueError if an answer is not whole, or does not come in time.
    """
    began = time.perf_counter()
    try:
        answers = asyncio.run(ask_all(url, body, load, vocab_size, seed))
    except TimeoutError:
        raise ValueError(f"{load.requests} requests were not answered in {LONGEST} s") from None
    except httpx.HTTPError as error:
        raise ValueError(f"the connection failed: {error or type(error).__name__}") from None
    return figures(answers, time.perf_counter() - began)


async def ask_all(url: str, body: Callable, load: Load, vocab_size: int, seed: str) -> list[Answer]:
    requests, began = load.asked(vocab_size, seed), time.perf_counter()  # one iterator: who is free takes the next

    async def in_turn() -> list[Answer]:
        answers = []
        for due, prompt, tokens in requests:
            await asyncio.sleep(began + due - time.perf_counter())
            answers.append(await ask(http, body(prompt, tokens), Answer(tokens)))
        return answers

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # an idle one may end while it is taken
    async with asyncio.timeout(LONGEST), httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
        found = await asyncio.gather(*(in_turn() for _ in range(load.most)))
    return [answer for each in found for answer in each]


async def ask(http: httpx.AsyncClient, body: dict, answer: Answer) -> Answer:
    """Send one request, and note in `answer` what comes of its stream. Raises ValueError if the answer is not whole."""
    reason = None
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"the server answered {response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                [choice] = json.loads(line.removeprefix("data: ")).get("choices") or [{}]
                reason = choice.get("finish_reason") or reason
                if choice.get("text"):
                    answer.pieces.append(time.perf_counter())
    if reason != "length" or not answer.pieces:
        raise ValueError(f"an answer of {answer.tokens} tokens ended early: {reason}")
    return answer
