"""Time the log-likelihoods of a multiple-choice task: eval.py's adapter against lm-evaluation-harness's own HFLM.

    pip install -r requirements-bench.txt
    python scripts/tasks.py --output benchmarks/tasks.json

200 questions with four choices, from Python's documentation: which words come next. The sides answer the same 800
requests from texts, on the same weights in bfloat16, in one process, in turn (A B C A B C ...); medians count. HFLM
runs at the batch size that is fastest on a quarter of the questions; what compiles has been compiled before.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import cli

    cli.quit_on_interrupt()  # before the slow imports

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from engine.compile import choose_functions
from flags import check_threads
from measure.harness import Adapter
from scripts.reporting import machine, markdown, require_rounds, update_readme
from scripts.sides import Transformers
from text.tokenizer import load_tokenizer
from weights.checkpoint import DEFAULT_CHECKPOINT, load_model
from weights.files import require_writable, write_json

QUESTIONS, CHOICES, WINDOW = 200, 4, 1024
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


def make_requests() -> list[Instance]:
    """QUESTIONS * CHOICES requests, the choices of a question in a row; the first of them is what the text says."""
    words, draw = "\n".join(topics.values()).split(), random.Random(0)
    requests = []

    def some(least: int, most: int) -> tuple[int, int]:
        n_words = draw.randint(least, most)
        begin = draw.randrange(len(words) - 200)
        return begin, begin + n_words

    for number in range(QUESTIONS):
        begin, end = some(15, 80)
        length = draw.randint(3, 25)
        choices = [words[end : end + length]] + [words[slice(*some(3, 25))] for _ in range(CHOICES - 1)]
        for choice in choices:
            arguments = (" ".join(words[begin:end]), " " + " ".join(choice))
            requests.append(Instance("loglikelihood", {}, arguments, number))
    return requests


def timed(side: Callable[[list[Instance]], list], requests: list[Instance]) -> tuple[float, list[tuple[float, bool]]]:
    """Requests per second, and the answers."""
    began = time.perf_counter()
    answers = side(requests)
    return len(requests) / (time.perf_counter() - began), answers


def accuracy(answers: list[tuple[float, bool]]) -> float:
    sums = torch.tensor([total for total, _ in answers]).view(-1, CHOICES)
    return (sums.argmax(1) == 0).float().mean().item()


def best_batch_size(hflm: HFLM, requests: list[Instance]) -> dict[int, float]:
    """Requests per second of HFLM at each batch size."""
    found = {}
    for size in BATCH_SIZES:
        hflm.batch_size_per_gpu = size
        found[size] = timed(lambda some: hflm.loglikelihood(some, disable_tqdm=True), requests)[0]
        print(f"HFLM, batch size {size}: {found[size]:.1f} requests/s", file=sys.stderr, flush=True)
    return found


def table(result: dict) -> str:
    """The README's table."""
    median = result["median"]
    base = median["HFLM"]
    cells = [f"{speed:.1f} requests/s" + f" (x{speed / base:.2f})" * (speed != base) for speed in median.values()]
    header = [f"SmolLM2-135M-Instruct, bf16, {result['threads']} CPU threads", *median]
    return markdown(header, [[f"{QUESTIONS} questions of {CHOICES} choices", *cells]])


def main(*, checkpoint_path: str, rounds: int, threads: int, output: str) -> None:
    require_writable(output)
    require_rounds(rounds)
    check_threads(threads)
    torch.set_num_threads(threads)
    path = Path(checkpoint_path)
    model, tokenizer = load_model(path, torch.device("cpu"), torch.bfloat16), load_tokenizer(path)
    theirs = Transformers(checkpoint_path, "bf16", threads).model
    hflm = HFLM(theirs, tokenizer=str(path.parent), max_length=WINDOW, batch_size=1, device="cpu")
    requests = make_requests()
    sweep = best_batch_size(hflm, requests[: len(requests) // 4])
    hflm.batch_size_per_gpu = max(sweep, key=sweep.get)
    compiled = choose_functions(model.device, compile=True, compile_prefill=True)
    sides = {
        "HFLM": hflm,
        "gpt-faster": Adapter(model, tokenizer, "", WINDOW),
        "gpt-faster --compile": Adapter(model, tokenizer, "", WINDOW, **compiled),
    }
    began = time.perf_counter()
    sides["gpt-faster --compile"].loglikelihood(requests, disable_tqdm=True)
    first_s = time.perf_counter() - began
    speeds, accuracies = {side: [] for side in sides}, {}
    for number in range(1, rounds + 1):
        for side, lm in sides.items():
            speed, answers = timed(lambda some, lm=lm: lm.loglikelihood(some, disable_tqdm=True), requests)
            speeds[side].append(speed)
            accuracies[side] = accuracy(answers)
            print(f"round {number} of {rounds}, {side}: {speed:.1f} requests/s", file=sys.stderr, flush=True)
    result = {
        "command": f"python scripts/tasks.py --rounds {rounds} --threads {threads} --output {output}",
        "machine": machine(("torch", "transformers", "lm_eval")),
        "threads": threads,
        "median": {side: statistics.median(of) for side, of in speeds.items()},
        "batch_size": hflm.batch_size_per_gpu,
        "first_compiled_pass_s": first_s,
        "accuracy": accuracies,
        "batch_sizes": sweep,
        "runs": speeds,
    }
    write_json(output, result)
    update_readme(table(result), output)
    print(table(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time eval.py's tasks against lm-evaluation-harness's own HFLM.")
    parser.add_argument("--checkpoint_path", default=str(DEFAULT_CHECKPOINT), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="times each side runs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="benchmarks/tasks.json", help="result file (default: %(default)s)")
    cli.run(main, parser)
