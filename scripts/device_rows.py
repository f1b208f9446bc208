"""What `scripts/check_device.py` measures, in order of importance, and how it is told in Markdown."""

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch

from model import ModelArgs
from scripts.bench.peers.protocol import Case
from scripts.bench.report import markdown
from scripts.bench.sides import PRECISIONS
from scripts.bench.speed import COMPILED_PEER
from weights.files import GB
from weights.layout import Layout

NEW_TOKENS = 100  # of each row
BATCHES, PROMPTS, POSITIONS = (1, 8, 32, 128), (512, 2048), (8192, 32768)
STEP, PREFILL, GUESSES = "compiled step", "compiled prefill", "compiled step, ngram guesses"
INT8_CACHE, TASKS = "compiled step, int8 cache", "tasks that come and go"
ALL = "int4, head too"
PDL = (("GPT_FASTER_PDL", "1"),)


@dataclass(frozen=True)
class Row:
    """A case that a side of `scripts/bench/sides.py` runs. case None: a profile of one step."""

    side: str
    precision: str
    case: Case | None
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        what = f"batch {self.case.batch}, prompt {self.case.prompt}" if self.case else "profile"
        return ", ".join([self.side, self.precision, what, *map("=".join, self.environment)])

    def missing(self, args: ModelArgs) -> str | None:
        """What it needs and is not there."""
        if self.case and self.case.length > args.max_seq_length:
            return f"needs {self.case.length} positions, and the model has {args.max_seq_length}"
        if self.side == COMPILED_PEER and find_spec("transformers") is None:
            return "transformers is not installed"
        if self.environment == PDL and not has_dependent_launch():
            return "a GPU of compute capability 9.0 or more is not there"
        return None


def has_dependent_launch() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def step(precision: str, batch: int = 1, position: int = 8, side: str = STEP) -> Row:
    return Row(side, precision, Case(batch, position, NEW_TOKENS))


def prefill(precision: str, prompt: int) -> Row:
    return Row(PREFILL, precision, Case(1, prompt, 2))


def task_rows() -> list[Row]:
    return [step(precision, 32, 512, TASKS) for precision in ("bf16", "int4")]


def waterfall() -> dict[str, Row]:
    """Decoding of one row, one technique after the other."""
    short = step("bf16").case
    return {
        "eager, bf16": Row("eager", "bf16", short),
        "compiled, bf16": step("bf16"),
        "compiled, int8": step("int8"),
        "compiled, int8, 4 guesses a round": Row(GUESSES, "int8", short),
        "compiled, int4": step("int4"),
        "compiled, int4, kernels that begin early": replace(step("int4"), environment=PDL),
        "all: compiled, int4 with its head, 4 guesses a round": Row(GUESSES, ALL, short),
        f"peer: {COMPILED_PEER}, bf16": Row(COMPILED_PEER, "bf16", short),
    }


def rows_in_order() -> list[Row]:
    """The most important first; neighbours of one side and precision share a process."""
    rows = []
    for precision in PRECISIONS:
        rows += [step(precision), Row(STEP, precision, None), step(precision, 32)]
    rows += [row for row in waterfall().values() if row not in rows]
    rows += [Row(COMPILED_PEER, "bf16", step("bf16", 32).case)]
    rows += task_rows()
    rows += [prefill(precision, prompt) for precision in PRECISIONS if precision != ALL for prompt in PROMPTS]
    for precision in PRECISIONS:
        rows += [step(precision, 1, position) for position in POSITIONS]
        rows += [step(precision, batch) for batch in BATCHES]
    rows += [step(precision, 1, position, INT8_CACHE) for precision in PRECISIONS for position in POSITIONS]
    return list(dict.fromkeys(rows))


def document(result: dict, args: ModelArgs) -> str:
    """All that is known so far."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    parts = [f"`{result['command']}`: {machine}", checks(result["checks"])]
    if limits := result["limits"]:
        parts.append(f"Copies move {limits['gb_s']:.0f} GB/s; matrices multiply at {limits['tflop_s']:.1f} TFLOP/s.")
    tables = (decode_table, waterfall_table, prompt_table, position_table, peer_table, task_table, kernel_tables)
    parts += [table(Found(result, args)) for table in tables]
    if result["left_out"]:
        parts.append("Left out:\n\n" + "\n".join(f"- {name}: {why}" for name, why in result["left_out"].items()))
    return "\n\n".join(part for part in parts if part)


def checks(found: dict[str, str]) -> str:
    """How many cases passed, and each that did not."""
    others = [f"- {verdict}: {name}" for name, verdict in found.items() if verdict != "passed"]
    return "\n".join([f"{len(found) - len(others)} of {len(found)} checks passed.", *([""] if others else []), *others])


@dataclass(frozen=True)
class Found:
    """Cells of tables: what a row's runs gave, or - where there are none."""

    result: dict
    args: ModelArgs

    def row(self, row: Row) -> dict | None:
        return self.result["rows"].get(row.name)

    def rate(self, row: Row, figure: str = "decode_tok_s") -> str:
        found = self.row(row)
        return f"{found['median'][figure]:.1f}" if found else "-"

    def share(self, row: Row) -> str:
        """Of the memory's rate: weights and, to the middle of the new tokens, keys and values of each row."""
        found = self.row(row)
        if not found or not found.get("measured_bandwidth_gb_s"):
            return "-"
        case, rate = row.case, found["median"]["decode_tok_s"] / row.case.batch
        positions = case.batch * (case.prompt + case.new_tokens / 2)
        read = found["weight_bytes_per_token"] + positions * found["kv_bytes_per_position"]
        return f"{rate * read / GB / found['measured_bandwidth_gb_s']:.0%}"

    def matrix_share(self, row: Row) -> str:
        """Of the rate of large products."""
        found, limits = self.row(row), self.result["limits"]
        if not found or not limits:
            return "-"
        return f"{found['median']['prefill_tok_s'] * operations(self.args) / limits['tflop_s'] / 1e12:.0%}"


@cache
def operations(args: ModelArgs) -> float:
    """For one token of a prompt: two for each weight of the blocks that acts on it."""
    layers = {key: each for key, each in Layout(args).tensors.items() if key.startswith("layers.")}
    used = (args.n_expert_used or 1) / (args.n_expert or 1)
    return 2 * sum(each.numel() * (used if each.ndim == 3 else 1) for each in layers.values())


def filled(header: list[str], rows: list[list[str]]) -> str:
    """A table, or nothing if no row has a figure."""
    return markdown(header, rows) if any(set(cells[1:]) - {"-", ""} for cells in rows) else ""


def decode_table(found: Found) -> str:
    header = [f"decode, {found.result['model']}, tok/s of all rows", *(f"batch {batch}" for batch in BATCHES)]
    rows = []
    for precision in PRECISIONS:
        one = found.row(step(precision)) or {"median": {}}
        first, memory = one.get("first_call_s"), one["median"].get("peak_memory_gb")
        facts = [f"{first:.0f} s" if first else "-", f"{memory:.1f} GB" if memory else "-"]
        rates = [found.rate(step(precision, batch)) for batch in BATCHES]
        rows.append([precision, *rates, found.share(step(precision)), *facts])
    return filled([*header, "batch 1, of bandwidth", "first call", "memory"], rows)


def waterfall_table(found: Found) -> str:
    """A round's tokens stand beside its rate, because random weights say nothing of how much is accepted."""
    rows = []
    for name, row in waterfall().items():
        a_round = ((found.row(row) or {"median": {}})["median"]).get("tokens_a_round")
        rows.append([name, found.rate(row), f"{a_round:.1f}" if a_round else ""])
    return filled(["one technique after the other, batch 1", "tok/s", "tokens a round"], rows)


def prompt_table(found: Found) -> str:
    header = ["prompt, compiled, tok/s", *(f"{n} tokens" for n in PROMPTS), f"{PROMPTS[-1]}, of the matrix rate"]
    rows = []
    for precision in (each for each in PRECISIONS if each != ALL):
        rates = [found.rate(prefill(precision, prompt), "prefill_tok_s") for prompt in PROMPTS]
        rows.append([precision, *rates, found.matrix_share(prefill(precision, PROMPTS[-1]))])
    return filled(header, rows)


def position_table(found: Found) -> str:
    header = ["decode after a long prompt, batch 1, tok/s"]
    header += [name for n in POSITIONS for name in (f"position {n}", "of bandwidth")]
    rows = []
    for precision in PRECISIONS:
        for side, name in ((STEP, precision), (INT8_CACHE, f"{precision}, int8 cache")):
            cells = [step(precision, 1, position, side) for position in POSITIONS]
            rows.append([name, *(text for row in cells for text in (found.rate(row), found.share(row)))])
    return filled(header, rows)


def peer_table(found: Found) -> str:
    """In batches; one row alone is in the waterfall."""
    row = Row(COMPILED_PEER, "bf16", step("bf16", 32).case)
    cells = ["decode, tok/s", found.rate(step("bf16", 32)), found.rate(row)]
    return filled(["bf16, batch 32", "gpt-faster", COMPILED_PEER], [cells])


def task_table(found: Found) -> str:
    """Prompts of 512 tokens are read between the steps, which is part of the time."""
    rows = task_rows()
    header = ["32 tasks at a time, prompts of 512, new tok/s", *(row.precision for row in rows)]
    return filled(header, [["gpt-faster's scheduler", *map(found.rate, rows)]])


def kernel_tables(found: Found) -> str:
    """Of each profile the kernels that take longest."""
    tables = []
    for precision in PRECISIONS:
        if profile := found.row(Row(STEP, precision, None)):
            kernels = profile["kernels"]
            total = sum(each[-1] for each in kernels)
            rows = [[f"`{name[:90]}`", str(n), f"{us:.0f}", f"{us / total:.0%}"] for name, n, us in kernels[:15]]
            rows.append([f"all {len(kernels)} kinds", str(sum(n for _, n, _ in kernels)), f"{total:.0f}", ""])
            tables.append(markdown([f"kernels of one step, {precision}", "calls", "us", "share"], rows))
    return "\n\n".join(tables)
