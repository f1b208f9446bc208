"""The log-likelihoods of a multiple-choice task: eval.py's adapter against lm-evaluation-harness's own HFLM.

200 questions with four choices, from Python's documentation: which words come next. The sides answer the same 800
requests from texts, on the same weights in bfloat16, in one process, in turn; medians count. HFLM runs at the batch
size that is fastest on a quarter of the questions. It needs requirements-bench.txt.
"""

import random
import time
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch

from engine.engine import build_engine
from scripts.bench.report import Report, markdown, shared_flags, take_turns
from scripts.bench.sides import Transformers
from text.tokenizer import load_tokenizer
from weights.checkpoint import load_model

CHOICES, WINDOW = 4, 1024
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
PARTS, SAME = ("batch_sizes", "sides"), ("threads", "model", "questions")


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/tasks.json", rounds=3)
    parser.add_argument("--questions", type=int, default=200, help=f"of {CHOICES} choices (default: %(default)s)")


def fill(report: Report, *, model: str, questions: int, rounds: int, threads: int) -> None:
    from lm_eval.models.huggingface import HFLM

    from measure.harness import Adapter

    path, requests, result = Path(model), make_requests(questions), report.result
    ours, tokenizer = load_model(path), load_tokenizer(path)
    theirs = Transformers(model, "bf16", threads).model
    hflm = HFLM(theirs, tokenizer=str(path.parent), max_length=WINDOW, batch_size=1, device="cpu")
    sides = {"HFLM": hflm}
    for compile in (False, True):
        engine = build_engine(ours, compile, compile)
        sides["gpt-faster" + " --compile" * compile] = Adapter(engine, tokenizer, "", WINDOW)
    report.once(result, "batch_sizes", partial(sweep, hflm, requests[: len(requests) // 4]))
    hflm.batch_size_per_gpu = int(max(result["batch_sizes"], key=result["batch_sizes"].get))
    runs = {name: partial(answer, side, requests) for name, side in sides.items()}
    report.once(result, "sides", partial(take_turns, rounds, runs))


def make_requests(questions: int) -> list:
    """Requests of lm-eval, the choices of a question in a row; the first of them is what the text says."""
    from lm_eval.api.instance import Instance

    words, draw = "\n".join(topics.values()).split(), random.Random(0)
    requests = []

    def some(least: int, most: int) -> tuple[int, int]:
        n_words = draw.randint(least, most)
        begin = draw.randrange(len(words) - 200)
        return begin, begin + n_words

    for number in range(questions):
        begin, end = some(15, 80)
        length = draw.randint(3, 25)
        choices = [words[end : end + length]] + [words[slice(*some(3, 25))] for _ in range(CHOICES - 1)]
        for choice in choices:
            arguments = (" ".join(words[begin:end]), " " + " ".join(choice))
            requests.append(Instance("loglikelihood", {}, arguments, number))
    return requests


def answer(side, requests: list) -> dict[str, float]:
    """Requests/s, and the share of the questions whose first choice is found the likeliest."""
    began = time.perf_counter()
    answers = side.loglikelihood(requests, disable_tqdm=True)
    rate = len(requests) / (time.perf_counter() - began)
    sums = torch.tensor([total for total, _ in answers]).view(-1, CHOICES)
    return {"requests_s": rate, "accuracy": (sums.argmax(1) == 0).float().mean().item()}


def sweep(hflm, requests: list) -> dict[str, float]:
    """Requests/s of HFLM at each batch size."""
    found = {}
    for size in BATCH_SIZES:
        hflm.batch_size_per_gpu = size
        found[str(size)] = answer(hflm, requests)["requests_s"]
    return found


def table(result: dict) -> str:
    speeds = {name: facts["median"]["requests_s"] for name, facts in result["sides"].items()}
    ratios = {name: f" (x{speed / speeds['HFLM']:.2f})" for name, speed in speeds.items() if name != "HFLM"}
    cells = [f"{speed:.1f} requests/s{ratios.get(name, '')}" for name, speed in speeds.items()]
    header = f"{result['model']}, bf16, {result['threads']} CPU threads"
    return markdown([header, *speeds], [[f"{result['questions']} questions of {CHOICES} choices", *cells]])
