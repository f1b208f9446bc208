"""Time speculative decoding against plain decoding on the default model, in turn, in one process.

    python scripts/speculation.py --output benchmarks/speculation.json

Greedy, batch 1, everything compiled. Every run of a way follows a plain one (A B A C A B A C ...), because the speed of
a shared machine drifts; the median of the ratios of these pairs counts.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import cli

    cli.quit_on_interrupt()  # before the slow imports

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from engine.cache import setup_caches
from engine.compile import compile_step
from engine.decode import decode_one_token
from engine.request import Row, Timing, run_batch
from engine.sampling import Sampling
from engine.speculative import DraftModel, PromptLookup, Source, Speculation, draft_one_token, verify
from layers.quantized import quant_spec
from measure.speed import acceptance
from scripts.reporting import machine, markdown, update_readme
from text.tokenizer import load_tokenizer
from weights.checkpoint import DEFAULT_CHECKPOINT, load_model, random_model
from weights.files import require_writable, write_json


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


SWIFTS = """\
The common swift spends almost its whole life in the air. It eats, drinks, mates and even sleeps on the wing, and lands
only to nest. Young swifts that leave the nest may not touch the ground for two or three years. Each spring they return
from central Africa to the roofs of European towns, where they build their nests under tiles and in cracks of old walls.
Because old houses are being repaired and new ones have no gaps, the birds find fewer and fewer places to breed. In
several towns, people now hang nest boxes under the eaves and play recordings of their calls to show the birds where
they are."""
LIGHTHOUSE = """\
The lighthouse stood at the end of a long stone peir, and every evening the keeper climbed its ninety-two steps to light
the lamp. He had done so for thirty years, in storm and in calm, and he could not remeber a single night when the light
had failed. The fishermen of the village trusted him, and on Sundays they left a basket of fish at his door. When the
harbour master told him that the lamp would soon be lit by a machine, the keeper only smiled and went on polishing the
glass."""
CODE = """```python
def read_config(path):
    with open(path) as file:
        lines = file.read().splitlines()
    config = {}
    for line in lines:
        if not line or line.startswith('#'):
            continue
        key, value = line.split('=', 1)
        config[key.strip()] = value.strip()
    return config

def write_config(path, config):
    with open(path, 'w') as file:
        for key, value in sorted(config.items()):
            file.write(f'{key} = {value}\\n')

def merge_config(base, override):
    merged = dict(base)
    merged.update(override)
    return merged
```"""
EDIT = "Rewrite the following paragraph with the spelling mistakes corrected. Keep every other word as it is."
QUOTE = "Repeat this Python code exactly, and add a docstring to each function:"
SUMMARY = "Summarise this text with quotations: list its key sentences word for word."
TEXTS = {
    "edit a paragraph": f"{EDIT}\n\n{_one_line(LIGHTHOUSE)}",
    "quote code": f"{QUOTE}\n\n{CODE}",
    "summary with quotes": f"{SUMMARY}\n\n{_one_line(SWIFTS)}",
    "free prose: bread": "Describe how bread is baked, from grain to loaf.",
    "free prose: a letter": "Write a formal complaint about a delayed train.",
}
NEW_TOKENS = 128
REGISTRY_NAME = "SmolLM2-135M"


def run(model, ids: list[int], tokenizer, step, speculation: Speculation | None) -> tuple[float, dict]:
    """Tokens/s of decoding one answer, and what was accepted."""
    row, timing = Row(ids, tokenizer, NEW_TOKENS, [], False), Timing()
    options = {"step": step, "speculation": speculation}
    run_batch(model, [row], Sampling(temperature=0), timing, time.perf_counter(), lambda *_: None, **options)
    return timing.decode_tok_s, {"ids": row.token_ids, **acceptance([timing])}


def measure(target, tokenizer, ways: dict[str, Speculation | None], rounds: int) -> dict:
    """For each text and way: tokens/s, its median ratio to plain, what was accepted, the first token that differs."""
    step = compile_step(decode_one_token, target.device)
    prompts = {name: tokenizer.encode_chat([{"role": "user", "content": text}]) for name, text in TEXTS.items()}
    result = {}
    for name, ids in prompts.items():
        answers = {way: run(target, ids, tokenizer, step, speculation) for way, speculation in ways.items()}  # compiles
        pairs = {way: [] for way in ways if way != "plain"}
        for _ in range(rounds):
            for way in pairs:
                pairs[way].append([run(target, ids, tokenizer, step, ways[each])[0] for each in ("plain", way)])
        plain = answers["plain"][1]["ids"]
        result[name] = {
            way: {
                "tok_s": statistics.median(fast for _, fast in pairs[way]),
                "ratio": statistics.median(fast / slow for slow, fast in pairs[way]),
                "pairs": pairs[way],
                "mean_accepted": facts["mean_accepted"],
                "acceptance_rate": facts["acceptance_rate"],
                "new_tokens": len(facts["ids"]),
                "differs_at": next(
                    (i for i, (a, b) in enumerate(zip(facts["ids"], plain, strict=False)) if a != b), None
                ),
            }
            for way, (_, facts) in answers.items()
            if way != "plain"
        }
        print(name, {way: round(facts["ratio"], 2) for way, facts in result[name].items()}, file=sys.stderr, flush=True)
        result[name]["plain"] = {"tok_s": statistics.median(slow for runs in pairs.values() for slow, _ in runs)}
    return result


def make_ways(target, device: torch.device, draft_path: Path, which: list[str]) -> dict[str, Speculation | None]:
    """Plain decoding and every kind of speculation in `which`."""
    ways: dict[str, Speculation | None] = {"plain": None}
    # one for all: a second compiled form of the same function would make each call look through both
    check, sources = compile_step(verify, device), {}
    for way in which:
        name, _, k = way.partition(" ")
        if name not in sources:
            sources[name] = make_source(name, device, target.dtype, draft_path)
        ways[way] = Speculation(sources[name], k if k == "auto" else int(k), check)
    return ways


def make_source(name: str, device: torch.device, dtype: torch.dtype, draft_path: Path) -> Source:
    if name == "ngram":
        return PromptLookup()
    if name == "useless":
        draft = random_model(REGISTRY_NAME, device, dtype, quantize=quant_spec("int4", None))
    else:
        draft = load_model(draft_path, device, dtype, quantize=quant_spec(name, None))
    return DraftModel(draft, compile_step(draft_one_token, device))


def table(result: dict) -> str:
    """The README's table."""
    ways = [way for way in next(iter(result["texts"].values())) if way != "plain"]
    rows = []
    for name, facts in result["texts"].items():
        cells = [f"x{facts[way]['ratio']:.2f} ({facts[way]['mean_accepted']:.1f})" for way in ways]
        rows.append([name, f"{facts['plain']['tok_s']:.0f} tok/s", *cells])
    return markdown([f"SmolLM2-135M-Instruct, bf16, {result['threads']} CPU threads, greedy", "plain", *ways], rows)


def main(*, checkpoint_path: str, ways: list[str], rounds: int, threads: int, output: str) -> None:
    require_writable(output)
    torch.set_num_threads(threads)
    device, path = torch.device("cpu"), Path(checkpoint_path)
    target, tokenizer = load_model(path, device, torch.bfloat16), load_tokenizer(path)
    setup_caches(target, 1, 1024)
    texts = measure(target, tokenizer, make_ways(target, device, path, ways), rounds)
    command = f"python scripts/speculation.py --rounds {rounds} --threads {threads} --output {output}"
    facts = {"command": command, "machine": machine(("torch",)), "threads": threads, "new_tokens": NEW_TOKENS}
    result = facts | {"texts": texts}
    write_json(output, result)
    update_readme(table(result), output)
    print(table(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time speculative against plain decoding on the default model.")
    parser.add_argument("--checkpoint_path", default=str(DEFAULT_CHECKPOINT), help="default: %(default)s")
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["ngram 4", "ngram auto", "int4 2", "int4 auto", "useless auto"],
        help="a source (ngram, the precision of a draft of the same weights, or useless: random ones) and k "
        "(default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="times each way runs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="benchmarks/speculation.json", help="result file (default: %(default)s)")
    cli.run(main, parser)
