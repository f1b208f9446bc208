"""What clients of serve.py wait for: a long prompt beside rows that run, those rows, and the next turn of a chat.

A prompt of 512 tokens is read alone, then beside 15 answers that run, and have no such prompt beside them for most of
the time; a conversation begins with 1,000 tokens.
"""

import asyncio
import random
import statistics
from functools import partial

import httpx

from scripts.bench.peers.load import Answer, percentile
from scripts.bench.report import Report, markdown, shared_flags
from scripts.bench.serving.clients import ask
from scripts.bench.serving.servers import OUR_FLAGS, ROWS, Server, our_server

PARTS, SAME = ("found",), ("threads", "model")
PROMPT, FIRST_TURN, ANSWER, QUESTION = 512, 1000, 30, 20  # tokens
RUNNING = 1024  # tokens of the answers beside which prompts arrive
PAUSE = 1.5  # of the time to a prompt's answer, until the next prompt


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/waits.json", rounds=5)


def fill(report: Report, *, model: str, rounds: int, threads: int) -> None:
    for precision in OUR_FLAGS:
        report.once(report.result["found"], precision, partial(measure, model, precision, threads, rounds))


def measure(model: str, precision: str, threads: int, rounds: int) -> dict[str, float]:
    """Seconds, and how many prompts arrived."""
    with our_server(model, precision, threads) as server, server.running():
        return asyncio.run(all_waits(server, rounds))


async def all_waits(server: Server, rounds: int) -> dict[str, float]:
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(server.vocab_size) for _ in range(count)]

    async with httpx.AsyncClient(base_url=server.url, timeout=None) as http:

        async def asked(prompt: list[int], tokens: int, answer: Answer | None = None) -> Answer:
            return await ask(http, server.body(prompt, tokens), answer or Answer(tokens))

        await asyncio.gather(*(asked(ids(16), 8) for _ in range(ROWS)))  # warms up
        alone = [(await asked(ids(PROMPT), 4)).first_s for _ in range(rounds)]
        turns = [await two_turns(asked, ids) for _ in range(rounds)]
        answers = [Answer(RUNNING) for _ in range(ROWS - 1)]
        rows = [asyncio.create_task(asked(ids(16), RUNNING, answer)) for answer in answers]
        while not all(answer.pieces for answer in answers) and not any(row.done() for row in rows):  # done: it failed
            await asyncio.sleep(0.01)
        n_first, beside = [len(answer.between_s) for answer in answers], []
        while not any(row.done() for row in rows):
            beside.append((await asked(ids(PROMPT), 1)).first_s)
            await asyncio.sleep(PAUSE * beside[-1])
        await asyncio.gather(*rows)
        gaps = [gap for answer, n in zip(answers, n_first, strict=True) for gap in answer.between_s[n:]]
    first, second = (statistics.median(each) for each in zip(*turns, strict=True))
    found = {"alone_s": statistics.median(alone), "arrived": len(beside), "beside_p99_s": percentile(beside, 0.99)}
    found |= {"between_p50_s": statistics.median(gaps), "between_p99_s": percentile(gaps, 0.99)}
    return found | {"first_turn_s": first, "second_turn_s": second}


async def two_turns(asked, ids) -> tuple[float, float]:
    """Seconds to the first token of a conversation's first turn and of its second, which begins with the first."""
    prompt = ids(FIRST_TURN)
    first = await asked(prompt, ANSWER)
    second = await asked(prompt + ids(ANSWER + QUESTION), ANSWER)
    return first.first_s, second.first_s


def table(result: dict) -> str:
    rows = []
    for precision, found in result["found"].items():
        rows.append([precision])
        for name, other in (("beside_p99", "alone"), ("between_p99", "between_p50"), ("second_turn", "first_turn")):
            seconds, base = found[f"{name}_s"], found[f"{other}_s"]
            rows[-1].append(f"{1000 * seconds:.0f}, {1000 * base:.0f} ms (x{seconds / base:.2f})")
    heading = [f"{result['model']}, {result['threads']} CPU threads"]
    heading += [f"first token of {PROMPT}: beside 15 rows (p99), alone", "between tokens of those: p99, p50"]
    return markdown([*heading, "first token: turn 2, turn 1"], rows)
