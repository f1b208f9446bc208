"""A side in a process of its own, and both ends of its pipe; nothing here needs a package.

Each line of standard input is a JSON object: a case ({"batch": 4, "prompt": 512, "new_tokens": 200}) is measured once;
{"bandwidth": true} asks how fast the side reads memory, {"profile": PATH} for the kernels of one step, and a trace of
them in a file; {"load": {...}, "seed": "a"}, fields of a `Load`, has many requests answered. Each answer is a line of
output. The first, when the side has loaded, is what it says of itself.
"""

import json
import math
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scripts.bench.peers.load import Load
from scripts.bench.peers.process import MeasuredProcess


@dataclass(frozen=True)
class Case:
    """Rows in a batch, tokens of each row's prompt, and new ones after it."""

    batch: int
    prompt: int
    new_tokens: int

    @property
    def length(self) -> int:
        return self.prompt + self.new_tokens

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        draw = random.Random(seed)
        return [[draw.randrange(vocab_size) for _ in range(self.prompt)] for _ in range(self.batch)]

    def rates(self, prefill_s: float, decode_s: float) -> dict[str, float]:
        """Tokens/s of all rows together. The first new token of each row belongs to the prefill."""
        return {
            "decode_tok_s": self.batch * (self.new_tokens - 1) / decode_s,
            "prefill_tok_s": self.batch * self.prompt / prefill_s,
            "time_to_first_token_s": prefill_s,
        }


class SideProcess(MeasuredProcess):
    """A process that serves one side. facts: what it says of itself.

    deadline: of time.monotonic(), at which an answer is no longer waited for: TimeoutError.
    """

    def __init__(
        self, name: str, command: list[str], environment: dict[str, str] | None = None, deadline: float = math.inf
    ):
        super().__init__(command, environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.name, self.deadline = name, deadline

    def load(self) -> None:
        self.facts = self.answer()

    def ask(self, question: dict) -> dict:
        with self.running():
            if self.process.poll() is None:
                self.process.stdin.write(json.dumps(question) + "\n")
                self.process.stdin.flush()
            return self.answer()

    def answer(self) -> dict:
        """Its next answer. Raises ValueError with its last words if it ended."""
        if self.deadline < math.inf:
            seconds = max(0.0, self.deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], seconds)[0]:
                raise TimeoutError(f"{self.name} did not answer in time")
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            raise ValueError(f"{self.name} ended {how}; its last words: {self.last_words()}")
        return json.loads(line)


def serve(load: Callable[[], Any], peak_memory: Callable[[], int]) -> None:
    """Load a side and answer what comes on standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print, those in C too, is no answer
    engine = load()
    print(json.dumps(engine.facts()), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "profile" in asked:
            answer = engine.profile(asked["profile"])
        elif "bandwidth" in asked:
            answer = engine.bandwidth()
        elif "load" in asked:
            answer = engine.under_load(Load(**asked["load"]), asked["seed"])
        else:
            answer = engine.measure(Case(**asked))
        print(json.dumps(answer | {"peak_memory_gb": peak_memory() / 1e9}), file=answers, flush=True)
