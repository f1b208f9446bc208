"""Prompts and their answers: printed in order, kept for the report, and written as JSON Lines as they end."""

import argparse
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from cli import progress, write
from engine.conversation import Limits
from engine.engine import Engine
from engine.request import Request, Timing, run_batch
from engine.sampling import Sampling
from measure.scoring import evenly
from model import Transformer
from ranks import speaks
from serving.processors import Grammars, Logits, processors_of
from serving.scheduler import Processor, Scheduler, Task, run_tasks
from text.results import Results
from text.thinking import Thoughts, thinking_marks
from text.tokenizer import Tokenizer
from weights.files import read_json, write_json

# flags of generate.py that change logits or tell of them, which only tasks of a scheduler can do
OF_TASKS = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
OF_TASKS |= {"json_schema": None, "logprobs": None}


@dataclass(frozen=True)
class Row:
    """One sequence to continue. number: of the prompt's line in its file, or of the copy of a single prompt."""

    number: int
    prompt: str | int  # a number of random tokens
    ids: list[int]


def batches_of(rows: list[Row], n_rows: int) -> list[list[Row]]:
    """Batches of at most n_rows, of rows of like length; those that need the most memory come first."""
    return list(evenly(sorted(rows, key=lambda row: -len(row.ids)), n_rows))


def limits_of(args: argparse.Namespace, tokenizer: Tokenizer, context: int) -> Limits:
    """What ends an answer; one in JSON, or without a chat template, has no thoughts."""
    is_free = (args.chat or args.interactive) and args.json_schema is None
    marks = thinking_marks(tokenizer.chat_template or "") if is_free else None
    thoughts = Thoughts(marks, args.hide_thinking) if marks else None
    return Limits(context, args.max_new_tokens or context, tuple(args.stop), args.ignore_eos, thoughts)


class Answers:
    """What is asked, and the answers to it, once for each sample.

    The rows of a batch end together; with a scheduler one that ends makes room for the next. The n-th answer of a run
    is drawn with `seed` + n, from 0. processors, by the prompt, and n_logprobs: of the scheduler's tasks.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        limits: Limits,
        sampling: Sampling,
        batches: list[list[Row]],
        seed: int,
        scheduler: Scheduler | None = None,
        processors: Callable[[list[int]], list[Processor]] = lambda prompt: [],
        n_logprobs: int | None = None,
        results: Results | None = None,
    ):
        self.engine, self.tokenizer, self.limits, self.sampling = engine, tokenizer, limits, sampling
        self.batches, self.seed, self.scheduler, self.results = batches, seed, scheduler, results
        self.numbers = sorted(row.number for batch in batches for row in batch)
        self.streams = len(self.numbers) == 1
        self.processors, self.n_logprobs = processors, n_logprobs
        self.timings: list[Timing] = []
        self.ended: list[dict[int, dict]] = []  # of each sample, rows as the report has them, by number

    def warm_up(self) -> None:
        """Compile all that the answers need."""
        if self.scheduler is not None:
            return self.scheduler.warm_up()
        lengths = [[len(row.ids) for row in batch] for batch in self.batches]
        self.engine.warm_up(lengths, self.limits.max_new_tokens, self.sampling)

    def sample(self) -> None:
        """Answer everything once; a single row streams, of several each is printed whole once those before it are."""
        self.timings.append(Timing())
        self.ended.append({})
        self.unprinted, self.texts = list(self.numbers), {}
        with progress(total=len(self.numbers), desc="Answering", unit="prompt", disable=self.streams) as bar:
            limits, timing = self.limits, self.timings[-1]
            how = (self.tokenizer, limits.max_new_tokens, limits.stop, limits.ignore_eos, limits.thoughts)
            for batch in self.batches:
                rows = {Request(row.ids, *how): row for row in batch}
                seeds = [self.seed_of(row) for row in batch]
                if self.scheduler is None:
                    run = run_batch(self.engine, list(rows), self.sampling, timing, seeds=seeds)
                else:
                    tasks = [self.task(request, seed) for request, seed in zip(rows, seeds, strict=True)]
                    self.logprobs = {task.request: task.logprobs for task in tasks}
                    run = run_tasks(self.scheduler, tasks, timing)
                with closing(run) as pieces:
                    for request, text in pieces:
                        if self.streams:
                            write(text)
                        if request.finish_reason:
                            self.end(rows[request], request)
                            bar.update()

    def task(self, request: Request, seed: int) -> Task:
        return Task(request, self.sampling, seed, self.processors(request.prompt), self.n_logprobs)

    def seed_of(self, row: Row) -> int:
        """By the number of the row: a run that goes on where another was interrupted draws the same."""
        return self.seed + (len(self.timings) - 1) * len(self.numbers) + row.number - 1

    def end(self, row: Row, request: Request) -> None:
        """Keep, write and print the answer to one row."""
        made = request.to_json()
        if self.n_logprobs is not None:
            made["logprobs"] = [each._asdict() for each in self.logprobs[request]]
        prompt = row.prompt if isinstance(row.prompt, str) else None
        self.ended[-1][row.number] = {"row": row.number, "prompt": prompt} | made
        if self.results is not None:
            keys = ("text", "token_ids", "finish_reason")
            self.results.add(row.number, **{key: made[key] for key in keys})
        self.texts[row.number] = "\n" if self.streams else f"[row {row.number}]\n{made['text']}\n"
        with tqdm.external_write_mode():
            while self.unprinted and self.unprinted[0] in self.texts:
                write(self.texts.pop(self.unprinted.pop(0)))

    def write_report(self, path: str, facts: dict) -> None:
        """Write the facts of the run and the answers that there are."""
        if speaks(self.engine.model.ranks):
            write_json(path, facts | {"samples": self.to_json()})

    def to_json(self) -> list[dict]:
        """Every sample with the rows that have ended, in the order of their numbers."""
        return [
            timing.to_json() | {"sequences": [ended[number] for number in sorted(ended)]}
            for timing, ended in zip(self.timings, self.ended, strict=True)
        ]


# ---------------------------------------------------------------- flags that only a scheduler's tasks can follow


def logits_flags(group) -> None:
    text = "factor against what prompt and answer have: 1.1 makes it a little less likely (default: 1, off)"
    group.add_argument("--repetition_penalty", type=float, default=OF_TASKS["repetition_penalty"], help=text)
    text = "taken from a logit for each time that the answer has the token (default: 0, off)"
    group.add_argument("--frequency_penalty", type=float, default=OF_TASKS["frequency_penalty"], help=text)
    text = "taken from the logits of tokens that the answer has (default: 0, off)"
    group.add_argument("--presence_penalty", type=float, default=OF_TASKS["presence_penalty"], help=text)
    group.add_argument("--json_schema", metavar="FILE", help="answers are JSON that follows the schema in a file")
    text = "--output_json tells log p of each token, and of the N likeliest there"
    group.add_argument("--logprobs", type=int, metavar="N", help=text)


def needs_tasks(args: argparse.Namespace) -> list[str]:
    """The flags given that only tasks of a scheduler can follow."""
    return [name for name, off in OF_TASKS.items() if getattr(args, name) != off]


def check_logits(args: argparse.Namespace) -> None:
    """Refuse flags about logits that cannot work."""
    given = needs_tasks(args)
    if given and (args.interactive or args.draft_checkpoint_path is not None or args.speculate == "mtp"):
        others = "--interactive, --draft_checkpoint_path or --speculate mtp"
        raise ValueError(f"--{given[0]} does not go with {others}; leave one out")
    if not 0 < args.repetition_penalty < float("inf"):
        raise ValueError(f"--repetition_penalty is {args.repetition_penalty}; it must be above 0, and 1 is off")
    if args.logprobs is not None and (args.logprobs < 0 or args.output_json is None):
        raise ValueError(f"--logprobs is {args.logprobs}; it must be 0 or above, and needs --output_json")
    if args.json_schema is not None:
        read_json(args.json_schema)
        if args.ignore_eos:
            raise ValueError("--json_schema does not go with --ignore_eos; an answer ends where its JSON does")


def read_processors(args: argparse.Namespace, tokenizer: Tokenizer, model: Transformer) -> Callable[[list[int]], list]:
    """What changes the logits after a prompt, as the flags say."""
    penalties = {name: getattr(args, name) for name in OF_TASKS if name.endswith("_penalty")}
    if args.json_schema is None:
        return partial(processors_of, Logits(**penalties), grammars=None)
    grammars = Grammars(tokenizer, model.args.vocab_size)
    grammar = grammars.of_schema(read_json(args.json_schema))
    return partial(processors_of, Logits(**penalties, grammar=grammar), grammars=grammars)
