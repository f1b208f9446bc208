"""Two pipeline stages, one process and one core each: batches cut into micro-batches, against the same uncut.

torchrun starts this file, as `-m scripts.bench.pipeline MODEL ROUNDS --output_json PATH`.
"""

import sys
import time
from functools import partial

import torch

from engine.cache import allocate
from engine.decode import decode, prefill
from engine.sampling import Sampling
from ranks import init_tp
from scripts.bench.report import Report, markdown, run_command, shared_flags, take_turns
from scripts.bench.tensor_parallel import launch
from stages import LEAST_TOKENS
from weights.checkpoint import load_model, random_model
from weights.files import write_json
from weights.registry import REGISTRY

PARTS, SAME = ("found",), ("model",)
GREEDY, STEPS, WHOLE = Sampling(temperature=0), 32, 1 << 20
SIDES = {  # rows, tokens of each prompt, least tokens of a micro-batch
    "prompts of 4 x 512, uncut": (4, 512, WHOLE),
    "prompts of 4 x 512, in micro-batches": (4, 512, LEAST_TOKENS),
    "steps of 4 rows, uncut": (4, 8, WHOLE),
    "steps of 8 rows, in micro-batches of 4": (8, 8, 4),
    "steps of 8 rows, uncut": (8, 8, WHOLE),
}


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/pipeline.json", rounds=5, model="a checkpoint or a registry name")


def fill(report: Report, *, model: str, rounds: int, **others) -> None:
    command = [*launch(2), "-m", "scripts.bench.pipeline", model, str(rounds)]
    report.once(report.result["found"], "two stages", partial(run_command, command))


@torch.inference_mode()
def tokens_per_second(model, cache, n_row: int, length: int, least_tokens: int) -> dict[str, float]:
    """Of prompts where they are long, else of the steps after them."""
    model.layers.least_tokens = least_tokens
    prompts = [[(7 * row + i) % 1000 for i in range(length)] for row in range(n_row)]
    began, is_prefill = time.perf_counter(), length > STEPS
    token, pos = prefill(model, cache, prompts, GREEDY)
    if not is_prefill:
        began = time.perf_counter()
        for _ in decode(model, cache, token, pos, STEPS, GREEDY):
            pass
    return {"tok_s": n_row * (length if is_prefill else STEPS) / (time.perf_counter() - began)}


def table(result: dict) -> str:
    found = {side: facts["median"]["tok_s"] for side, facts in result["found"]["two stages"].items()}
    compared = dict(zip(list(SIDES)[1::2], list(SIDES)[::2], strict=False))
    rows = []
    for side, rate in found.items():
        other = compared.get(side)
        rows.append([side, f"{rate:.0f} tok/s", f"x{rate / found[other]:.2f}" if other else ""])
    return markdown([f"{result['model']}, bf16, two stages of one core", "rate", "to the line above"], rows)


def measure(model: str, rounds: str, output: str) -> None:
    torch.set_num_threads(1)
    with init_tp(2) as ranks:
        load = random_model if model in REGISTRY else load_model
        loaded = load(model, ranks.place("cpu"), ranks=ranks)
        cache = allocate(loaded, 8, 1024)
        found = take_turns(
            int(rounds), {side: partial(tokens_per_second, loaded, cache, *SIDES[side]) for side in SIDES}
        )
        if ranks.is_first:
            write_json(output, found)


if __name__ == "__main__":
    measure(*sys.argv[1:3], sys.argv[4])
