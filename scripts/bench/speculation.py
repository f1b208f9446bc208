"""Speculative decoding against plain decoding, in one process.

Greedy, batch 1, everything compiled. Every run of a way follows a plain one (A B A C A B A C ...), because the speed of
a shared machine drifts; the median of the ratios of these pairs counts.
"""

import statistics
from functools import partial
from pathlib import Path

from engine.compile import compile_step
from engine.engine import Engine, build_engine
from engine.request import Request, Timing, run_batch
from engine.speculation.drafters import Drafter, DraftModel, PromptLookup, draft_one_token
from engine.speculation.speculative import Speculation, verify
from layers.quantized import quant_spec
from measure.speed import acceptance
from scripts.bench.report import Report, markdown, shared_flags, take_turns
from scripts.bench.sides import GREEDY
from text.tokenizer import Tokenizer, load_tokenizer
from weights.checkpoint import load_model, random_model
from weights.files import read_json

TEXTS = read_json(Path(__file__).with_name("prompts.json"))
WAYS = ["ngram 4", "ngram auto", "int4 2", "int4 auto", "useless auto"]
DRAFTERS, PRECISIONS = ("ngram", "useless"), ("bf16", "int8", "int4")
PARTS, SAME = ("texts",), ("threads", "model", "new_tokens", "ways")


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/speculation.json", rounds=5)
    kinds = "a drafter and its k: ngram, a precision of the same weights, a precision and a checkpoint (int4:PATH), or "
    kinds += "useless, which is random weights of that size"
    parser.add_argument("--ways", nargs="+", default=WAYS, metavar="WAY", help=f"{kinds} (default: {WAYS})")
    parser.add_argument("--new_tokens", type=int, default=128, help="of an answer at most (default: %(default)s)")


def parse_way(way: str) -> tuple[str, int | str]:
    """The drafter and its k."""
    name, _, k = way.rpartition(" ")
    is_known = name in DRAFTERS or name.partition(":")[0] in PRECISIONS
    if not is_known or (k != "auto" and not (k.isdecimal() and int(k))):
        drafters = f"{', '.join((*DRAFTERS, *PRECISIONS))} or int4:PATH"
        raise ValueError(f"--ways has {way!r}; give a drafter ({drafters}) and its k, such as 'ngram 4' or 'int4 auto'")
    return name, k if k == "auto" else int(k)


def fill(report: Report, *, model: str, ways: list[str], new_tokens: int, rounds: int, threads: int) -> None:
    for way in ways:
        parse_way(way)
    plain, tokenizer = build_engine(load_model(model), compile=True), load_tokenizer(Path(model))
    engines = {"plain": plain} | make_engines(plain, model, ways)
    for name, text in TEXTS.items():
        ids = tokenizer.encode_chat([{"role": "user", "content": text}])
        runs = {way: partial(answer, engine, ids, tokenizer, new_tokens) for way, engine in engines.items()}
        report.once(report.result["texts"], name, partial(measure, runs, rounds))


def make_engines(plain: Engine, model: str, ways: list[str]) -> dict[str, Engine]:
    """An engine for each way, all with one model."""
    # one for all: a second compiled form of the same function would make each call look through both
    check, drafters, engines = compile_step(verify, plain.model.device), {}, {}
    for way in ways:
        name, k = parse_way(way)
        if name not in drafters:
            drafters[name] = make_drafter(name, plain, model)
        speculation = Speculation(drafters[name], k, check, device=plain.model.device)
        engines[way] = Engine(plain.model, plain.step, plain.forward, speculation)
    return engines


def make_drafter(name: str, plain: Engine, model: str) -> Drafter:
    if name == "ngram":
        return PromptLookup()
    if name == "useless":
        draft = random_model(plain.model.args, quantize=quant_spec("int4", None))
    else:
        precision, _, path = name.partition(":")
        mode = None if precision == "bf16" else precision
        draft = load_model(path or model, quantize=quant_spec(mode, None))
    return DraftModel(draft, compile_step(draft_one_token, draft.device))


def answer(engine: Engine, ids: list[int], tokenizer: Tokenizer, new_tokens: int) -> Timing:
    timing = Timing()
    list(run_batch(engine, [Request(ids, tokenizer, new_tokens, [], False)], GREEDY, timing))
    return timing


def measure(runs: dict, rounds: int) -> dict:
    """For each way: tokens/s, its ratio to plain, what was accepted, the first token that differs."""
    once = {way: run() for way, run in runs.items()}  # compiles
    texts = {way: timing.requests[0].token_ids for way, timing in once.items()}

    def pair(way: str) -> dict[str, float]:
        slow, fast = (runs[each]().decode_tok_s for each in ("plain", way))
        return {"ratio": fast / slow, "tok_s": fast, "plain_tok_s": slow}

    found = take_turns(rounds, {way: partial(pair, way) for way in runs if way != "plain"}, warm_up=False)
    for way, facts in found.items():
        both = enumerate(zip(texts[way], texts["plain"], strict=False))
        facts |= acceptance([once[way]])
        facts |= {"new_tokens": len(texts[way]), "differs_at": next((i for i, (a, b) in both if a != b), None)}
    return found


def table(result: dict) -> str:
    rows = []
    for name, found in result["texts"].items():
        plain = statistics.median(facts["median"]["plain_tok_s"] for facts in found.values())
        cells = [f"x{facts['median']['ratio']:.2f} ({facts['mean_accepted']:.1f})" for facts in found.values()]
        rows.append([name, f"{plain:.0f} tok/s", *cells])
    header = f"{result['model']}, bf16, {result['threads']} CPU threads, greedy"
    return markdown([header, "plain", *map(shown, found)], rows)


def shown(way: str) -> str:
    """A way without the folders of its checkpoint."""
    drafter, k = parse_way(way)
    name, _, path = drafter.partition(":")
    return f"{name} {Path(path).stem} {k}" if path else way
