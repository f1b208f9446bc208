"""Measure this machine and write the tables of the README, one sub-command a table.

    python scripts/bench/run.py speed --quick

Each writes a JSON file with all runs, --output. What the file holds is not measured again, unless --fresh is given.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import cli

    cli.begin()

import argparse
import sys
from importlib import import_module
from types import ModuleType

import torch

import cli
from flags import check_counts, check_threads
from scripts.bench.report import open_report

# A table is a module with PARTS, the dictionaries of its result; SAME, the flags that all of a result must share;
# add_flags(parser); fill(report, ...), which measures; and table(result), in Markdown.
TABLES = {
    "speed": "decoding and prefill, against llama.cpp and transformers on the same weights",
    "quality": "size, perplexity and time to make of each quantisation",
    "pruning": "perplexity without half of the weights, or without some blocks",
    "speculation": "speculative decoding against plain decoding",
    "serving": "serve.py under load, against other servers on the same weights",
    "waits": "what clients of serve.py wait for: prompts beside rows that run, the next turn",
    "experts": "a mixture of experts, against the memory's rate and a dense model",
    "families": "decoding of each kind of family, against the rate of one large matrix",
    "tasks": "multiple-choice questions, against lm-evaluation-harness's own HFLM",
    "tensor_parallel": "one model shared by several ranks, and the bytes they send",
    "sparse": "weights that decoding does not read: of inactive neurons, of small inputs",
    "placement": "experts on the disk within a budget of memory, against what the rates of both allow",
    "pipeline": "two pipeline stages, with batches cut and uncut",
    "long_context": "steps at late positions, with keys and values in bf16 and int8",
}


FOLDERS = {"serving": "serving.table", "waits": "serving.waits", "sparse": "skipping.table"}
FOLDERS |= {name: f"random_weights.{name}" for name in ("experts", "families", "placement")}
FOLDERS |= {name: f"compressed.{name}" for name in ("quality", "pruning")}


def module_of(table: str) -> ModuleType:
    return import_module(f"scripts.bench.{FOLDERS.get(table, table)}")


def main(*, table: str, output: str, fresh: bool, **flags) -> None:
    check_threads(flags["threads"])
    check_counts(flags, *({"rounds", "new_tokens"} & flags.keys()))
    torch.set_num_threads(flags["threads"])
    module = module_of(table)
    report = open_report(output, fresh, module.PARTS, {key: flags[key] for key in module.SAME})
    module.fill(report, **flags)
    report.publish(module.table(report.result))


def build_parser(asked: list[str]) -> argparse.ArgumentParser:
    """The parser of all tables; one that is not asked for has no flags, because importing all would take long."""
    words = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = cli.Parser(description=__doc__, **words)
    tables = parser.add_subparsers(dest="table", required=True, metavar="TABLE")
    for name, summary in TABLES.items():
        module = module_of(name) if name in asked else None
        own = tables.add_parser(name, help=summary, description=module and module.__doc__, **words)
        if module:
            module.add_flags(own)
    return parser


if __name__ == "__main__":
    cli.run(main, build_parser(sys.argv[1:]))
