"""Prompts answered in batches: printed in their order, kept for the report, and written as JSON Lines as they end."""

from contextlib import closing
from dataclasses import dataclass

from tqdm import tqdm

from cli import progress, write
from engine.conversation import Limits
from engine.engine import Engine
from engine.request import Request, Timing, run_batch
from engine.sampling import Sampling
from measure.scoring import evenly
from ranks import speaks
from text.results import Results
from text.tokenizer import Tokenizer
from weights.files import write_json


@dataclass(frozen=True)
class Row:
    """One sequence to continue. number: of the prompt's line in its file, or of the copy of a single prompt."""

    number: int
    prompt: str | int  # a number of random tokens
    ids: list[int]


def batches_of(rows: list[Row], n_rows: int) -> list[list[Row]]:
    """Batches of at most n_rows, of rows of like length; those that need the most memory come first."""
    return list(evenly(sorted(rows, key=lambda row: -len(row.ids)), n_rows))


class Answers:
    """What is asked, in batches, and the answers to it, once for each sample."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        limits: Limits,
        sampling: Sampling,
        batches: list[list[Row]],
        results: Results | None = None,
    ):
        self.engine, self.tokenizer, self.limits, self.sampling = engine, tokenizer, limits, sampling
        self.batches, self.results = batches, results
        self.numbers = sorted(row.number for batch in batches for row in batch)
        self.streams = len(self.numbers) == 1
        self.timings: list[Timing] = []
        self.ended: list[dict[int, dict]] = []  # of each sample, rows as the report has them, by number

    def sample(self) -> None:
        """Answer everything once; a single row streams, of several each is printed whole once those before it are."""
        limits = self.limits
        self.timings.append(Timing())
        self.ended.append({})
        self.unprinted, self.texts = list(self.numbers), {}
        with progress(total=len(self.numbers), desc="Answering", unit="prompt", disable=self.streams) as bar:
            for batch in self.batches:
                how = (self.tokenizer, limits.max_new_tokens, limits.stop, limits.ignore_eos)
                rows = {Request(row.ids, *how): row for row in batch}
                with closing(run_batch(self.engine, list(rows), self.sampling, self.timings[-1])) as pieces:
                    for request, text in pieces:
                        if self.streams:
                            write(text)
                        if request.finish_reason:
                            self.end(rows[request], request)
                            bar.update()

    def end(self, row: Row, request: Request) -> None:
        """Keep, write and print the answer to one row."""
        made = request.to_json()
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
