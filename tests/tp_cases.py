"""What test_tp.py compares: the same work, in one process and, run by torchrun, on several ranks.

    torchrun --standalone --nproc_per_node 2 tests/tp_cases.py WORK FOLDER [MODEL]

WORK names a function in WORKS. What it returns on rank 0 is saved in FOLDER/WORK<N>.pt.
"""

import contextlib
import importlib
import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

import stages
from engine.compile import compile_step
from engine.engine import Engine, build_engine, generate
from engine.sampling import Sampling
from engine.speculation.drafters import DraftModel, PromptLookup, draft_one_token
from engine.speculation.guess_length import Costs
from engine.speculation.speculative import Speculation, verify
from measure.perplexity import perplexity
from mixers.recurrent.delta_net import DeltaSizes
from mixers.recurrent.short_conv import ConvSizes
from model import ModelArgs
from ranks import init_tp
from scripts.bench.tensor_parallel import CountingRanks, bytes_of_a_step
from tp import full_logits
from weights.checkpoint import load_model

CPU = torch.device("cpu")
# heads, FFN and groups of 64 divide over 2 and 4 ranks; 4 have fewer key heads than ranks; the vocabulary is padded
ARGS = ModelArgs(
    dim=128,
    n_layer=2,
    n_head=8,
    n_kv_head=2,
    head_dim=32,
    intermediate_size=512,
    vocab_size=203,
    max_seq_length=512,
    qkv_bias=True,
    qk_norm=True,
)
TIED = {"dim": 96, "n_layer": 2, "n_head": 4, "n_kv_head": 4, "head_dim": 16, "intermediate_size": 256}
TIED = ModelArgs(**TIED, vocab_size=50, max_seq_length=256, sliding_window=20, tie_embeddings=True)
JOINT = replace(ARGS, qk_norm=False, joint_qk_norm=True, pre_norm=False, post_norm=True)
CAPPED = replace(
    ARGS,
    sliding_window=5,
    full_layers=(1,),
    window_rope_base=100.0,
    attention_softcap=5.0,
    logit_softcap=9.0,
    norm_offset=True,
    post_norm=True,
    residual_scale=0.7,
)
EXPERTS = replace(ARGS, intermediate_size=256, n_expert=4, n_expert_used=2, shared_size=128)
LATENT = replace(ARGS, qk_norm=False, n_kv_head=8, kv_latent=64, q_latent=32, value_dim=16, rope_dim=16)
DELTA = replace(ARGS, attention_gate=True, delta=DeltaSizes((0,), 4, 8, key_dim=16, value_dim=16, n_tap=4))
MODELS = {"float": ARGS, "tied": TIED, "joint": JOINT, "capped": CAPPED, "experts": EXPERTS}
DELTAS = replace(DELTA, n_layer=4, delta=replace(DELTA.delta, layers=(0, 2)))
CONVS = replace(ARGS, n_layer=4, short_conv=ConvSizes((0, 1, 3), width=128, n_tap=4, bias=True))
MODELS |= {"latent": LATENT, "delta": DELTA, "deltas": DELTAS, "convs": CONVS}
PROMPTS = [[5, 9, 5, 9, 5, 9, 7, 5, 9], [3], [11, 202, 13, 17, 11, 202]]
NEW_TOKENS = 12


class Case(NamedTuple):
    """One combination; together they have every pair of values that matters."""

    file: str
    dtype: str
    rows: int
    compile: bool = False
    speculate: str | None = None
    k: int | str = 3
    cache_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        how = f"{self.speculate}-{self.k}" if self.speculate else "plain"
        how += ", int8 cache" if self.cache_dtype else ""
        return f"{self.file}, {self.dtype}, {self.rows} rows, {'compiled' if self.compile else 'eager'}, {how}"


CASES = [
    Case("float", "float32", 1),
    Case("float", "float32", 3),
    Case("float", "float32", 3, speculate="draft"),
    Case("float", "float32", 1, speculate="ngram", k="auto"),
    Case("float", "bfloat16", 3),
    Case("tied", "float32", 3, speculate="ngram"),
    Case("tied", "bfloat16", 1),
    Case("tied-int8", "float32", 3),
    Case("joint", "float32", 3),
    Case("joint", "bfloat16", 1),
    Case("capped", "float32", 1, speculate="ngram"),
    Case("experts", "float32", 3, compile=True, speculate="ngram"),
    Case("experts", "bfloat16", 3),  # rows enough for the errors of one choice to count little
    Case("experts-int4", "float32", 3),
    Case("experts-int4", "bfloat16", 3),
    Case("latent", "float32", 3, speculate="ngram"),
    Case("latent", "bfloat16", 3),
    Case("delta", "float32", 3, speculate="ngram"),
    Case("delta", "bfloat16", 3),
    Case("delta-int4", "float32", 3),
    Case("deltas", "float32", 3, speculate="ngram"),
    Case("convs", "float32", 3, speculate="ngram"),
    Case("convs", "bfloat16", 3),
    Case("convs-int4", "float32", 3),
    Case("int8", "float32", 3, speculate="ngram"),
    Case("int8", "bfloat16", 1),
    Case("int4.g32", "float32", 1, speculate="draft"),
    Case("int4.g32", "float32", 3, compile=True),
    Case("int4.g32", "bfloat16", 3),
    Case("int4.g64", "float32", 3, speculate="draft", k="auto"),
    Case("int4.g64", "bfloat16", 1),
    Case("int4.g64", "float32", 3, speculate="ngram", cache_dtype=torch.int8),
    Case("gptq", "float32", 1),
    Case("gptq", "bfloat16", 3),
]


def cases(n_rank: int) -> list[Case]:
    """What so many ranks run; only two compile, because four would for minutes on a small machine."""
    return [case for case in CASES if n_rank == 2 or not case.compile]


# ---------------------------------------------------------------- everything that knows the engine


def ready(path, dtype, n_row=1, ranks=None, speculation=None, compile=False, cache_dtype=None):
    """The engine of the model in a file, with a cache for so many rows."""
    engine = build_engine(load_model(path, dtype=dtype, ranks=ranks), compile, speculation=speculation)
    engine.model.cache_dtype = cache_dtype
    engine.reserve(n_row, 64)
    return engine


def speculation_of(case: Case, folder: Path) -> Speculation | None:
    if case.speculate is None:
        return None
    step, check = (compile_step(f, CPU) if case.compile else f for f in (draft_one_token, verify))
    source = PromptLookup()
    if case.speculate == "draft":
        source = DraftModel(load_model(folder / "draft.pth", dtype=torch.float32), step)
    costs = Costs({0: 1.0, 1: 1.1, 2: 1.2, 4: 1.4, 8: 1.8}) if case.speculate == "ngram" else None
    return Speculation(source, case.k, check, {case.rows: costs} if costs else {})  # else they are measured


def tokens_of(engine, prompts, sampling):
    rows = [[] for _ in prompts]
    for chunk in generate(engine, prompts, NEW_TOKENS, sampling):
        for row, ids in zip(rows, chunk, strict=True):
            row += ids
    return rows


@torch.inference_mode()
def logits_of(engine, prompts):
    """[B, V]: after each prompt."""
    length = max(map(len, prompts))
    tokens = torch.tensor([ids + [0] * (length - len(ids)) for ids in prompts])
    rows = torch.tensor([[len(ids) - 1] for ids in prompts])
    pos = torch.arange(length).repeat(len(prompts), 1)
    logits = engine.model(tokens, pos, engine.cache.view(length=length), rows)
    return full_logits(engine.model, logits).float()[:, 0]


def prompts_for(model, n_row=3):
    return [[token % model.args.vocab_size for token in prompt] for prompt in PROMPTS[:n_row]]


def run(case: Case, folder: Path, ranks=None) -> dict:
    """Logits, greedy tokens and drawn ones."""
    speculation = speculation_of(case, folder)
    path, dtype = folder / f"{case.file}.pth", getattr(torch, case.dtype)
    engine = ready(path, dtype, case.rows, ranks, speculation, case.compile, case.cache_dtype)
    prompts = prompts_for(engine.model, case.rows)
    found = {"logits": logits_of(engine, prompts)}
    found["greedy"] = tokens_of(engine, prompts, Sampling(0))
    torch.manual_seed(ranks.rank if ranks else 0)  # each rank another seed
    samplings = [Sampling(1.0, 5), Sampling(1.0, 0), Sampling(1.5, 150, 0.95, 0.01)][: 1 if case.compile else None]
    found["drawn"] = [tokens_of(engine, prompts, each) for each in samplings]
    return found


def score(folder: Path, ranks=None) -> float:
    model = load_model(folder / "float.pth", dtype=torch.float32, ranks=ranks)
    return perplexity(Engine(model), list(range(200)), window=40, stride=30, batch_size=3).perplexity


def bytes_sent(folder: Path, ranks) -> dict:
    """Of a step, by rank 0."""
    samplings = {"greedy": Sampling(0), "top-k": Sampling(1.0, 20), "all": Sampling(1.0, 0)}
    engine = ready(folder / "float.pth", torch.bfloat16, ranks=CountingRanks.of(ranks))
    return {name: bytes_of_a_step(engine.model, sampling) for name, sampling in samplings.items()}


# ---------------------------------------------------------------- what ranks work on


def all_cases(folder: Path, ranks) -> dict:
    found = {str(case): on_all(run(case, folder, ranks)) for case in cases(ranks.size)}
    return found | {"bytes": bytes_sent(folder, ranks), "perplexity": score(folder, ranks)}


STAGED = ("float", "tied", "tied-int8", "capped", "experts", "experts-int4", "latent", "deltas", "convs")
STAGED += ("int4.g32", "int4.g64")


def staged_cases(n_rank: int) -> list[Case]:
    """What two pipeline stages run; only stages of one rank compile."""
    return [case for case in cases(n_rank) if case.file in STAGED and case.dtype == "float32"]


def all_staged(folder: Path, ranks) -> dict:
    """The cases in two stages, whose micro-batches are single rows; bytes of a step; memory of a stage."""
    stages.LEAST_TOKENS = 1
    ranks = ranks.in_stages(2)
    found = {str(case): on_all(run(case, folder, ranks)) for case in staged_cases(ranks.size)}
    model = load_model(folder / "float.pth", dtype=torch.float32, ranks=ranks)
    weights = on_all(sum(tensor.nbytes for tensor in model.state_dict().values()))
    cache = on_all(sum(tensor.nbytes for tensor in model.new_cache(3, 64).layers.buffers()))
    sizes = {"weights": weights, "cache": cache, "bytes": bytes_sent(folder, ranks)}
    return found | sizes | {"perplexity": score(folder, ranks)}


def families(folder: Path, ranks) -> dict:
    """Logits after each prompt, of models of transformers that have folders in `folder`."""
    engines = {path.name: ready(path, torch.float32, len(PROMPTS), ranks) for path in sorted(folder.iterdir())}
    return {name: logits_of(engine, prompts_for(engine.model)) for name, engine in engines.items()}


def commands(folder: Path, ranks, model: Path) -> dict:
    """What loading a large model takes, and what commands print on rank 0 or refuse on each."""
    memory = on_all(memory_of_loading(model / "model.pth", ranks))
    outputs = [printed(ranks, *command) for command in commands_on(model, folder)]
    return {"memory": memory, "printed": outputs, "refused": [on_all(refusal(ranks, flags)) for flags in REFUSED]}


def memory_of_loading(path: Path, ranks) -> int:
    before = anonymous_bytes()
    model = load_model(path, dtype=torch.float32, ranks=ranks)
    grown = anonymous_bytes() - before
    del model
    return grown


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def commands_on(model: Path, folder: Path) -> list[tuple]:
    """(program, flags, standard input): a file of prompts, a conversation, perplexity."""
    prompts = ["The capital of France is", "One, two, three, four, one, two, three,"]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    where = ["--checkpoint_path", model]
    greedy = [*where, "--temperature", 0, "--dtype", "float32"]
    files = ["--prompt_file", folder / "prompts.txt", "--max_new_tokens", 12, "--output_json", "/dev/null"]
    talk = ["--interactive", "--max_new_tokens", 20]
    return [
        ("generate", [*greedy, *files, "--speculate", "ngram", "--speculate_k", 2], ""),
        ("generate", [*greedy, *talk], "What is the capital of France?\nAnd of Italy?\n"),
        ("eval", [*where, "--perplexity", "LICENSE", "--dtype", "float32"], ""),
    ]


REFUSED = [
    ["--random_weights", "Llama-2-7B"],  # its 32 heads do not divide over 3 ranks
    ["--random_weights", "stories15M", "--max_new_tokens", 500],
]


def printed(ranks, program: str, flags: list, input: str = "") -> str:
    """What a command prints on standard output."""
    command = importlib.import_module(program)
    command.init_tp = lambda n_stage: contextlib.nullcontext(ranks)  # these processes have met already
    sys.stdin = io.StringIO(input)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        command.main(**vars(command.build_parser().parse_args(list(map(str, flags)))))
    return out.getvalue()


def refusal(ranks, flags: list) -> str:
    try:
        return printed(ranks, "generate", flags)
    except ValueError as error:
        return str(error)


def on_all(value) -> list:
    """This value of each rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


WORKS = {"cases": all_cases, "stages": all_staged, "families": families, "commands": commands}


def main(work: str, folder: str, *others: str) -> None:
    with init_tp() as ranks:
        ranks.place("cpu")
        torch.set_num_threads(1)
        found = WORKS[work](Path(folder), ranks, *map(Path, others))
        if ranks.is_first:
            torch.save(found, Path(folder) / f"{work}{ranks.size}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
