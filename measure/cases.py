"""A case of a benchmark: so many rows, so many tokens; and its speed on an engine."""

import random
import time
from dataclasses import dataclass

from engine.cache import slots_for
from engine.engine import Engine, generate
from engine.sampling import Sampling

GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Case:
    """Rows in a batch, tokens of each row's prompt, and new ones after it."""

    batch: int
    prompt: int
    new_tokens: int

    @property
    def length(self) -> int:
        return self.prompt + self.new_tokens

    def prompts(self, vocab_size: int) -> list[list[int]]:
        draw = random.Random(0)
        return [[draw.randrange(vocab_size) for _ in range(self.prompt)] for _ in range(self.batch)]

    def rates(self, prefill_s: float, decode_s: float) -> dict[str, float]:
        """Tokens/s of all rows together. The first new token of each row belongs to the prefill."""
        return {
            "decode_tok_s": self.batch * (self.new_tokens - 1) / decode_s,
            "prefill_tok_s": self.batch * self.prompt / prefill_s,
            "time_to_first_token_s": prefill_s,
        }


def measure_case(engine: Engine, case: Case) -> dict[str, float]:
    """Greedy decoding of a case; the first time with an engine also compiles."""
    size = (case.batch, slots_for(engine.model.args, case.length))
    if engine.cache is None or (engine.cache.n_rows, engine.cache.n_slots) != size:
        engine.cache = None  # of another case, which may be larger than a run of this one alone would have
        engine.reserve(case.batch, case.length)
    prompts, times = case.prompts(engine.model.args.vocab_size), [time.perf_counter()]
    times += [time.perf_counter() for _ in generate(engine, prompts, case.new_tokens, GREEDY)]
    return case.rates(times[1] - times[0], times[-1] - times[1])
