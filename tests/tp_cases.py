"""What test_tp.py compares: the same work, in one process and, run by torchrun, on several ranks.

    torchrun --standalone --nproc_per_node 2 tests/tp_cases.py FOLDER

Rank 0 saves what it found in FOLDER/ranks<N>.pt, for each case by name.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

import tp
from engine.cache import setup_caches
from engine.compile import compile_step
from engine.decode import decode_one_token, forward_chunk, used_slots
from engine.guess_length import Costs
from engine.request import generate
from engine.sampling import Sampling
from engine.speculative import DraftModel, PromptLookup, Speculation, draft_one_token, verify
from measure.perplexity import perplexity
from measure.traffic import CountingRanks, bytes_of_a_step
from model import ModelArgs
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
MODELS = {"float": ARGS, "tied": TIED, "joint": JOINT, "capped": CAPPED, "experts": EXPERTS}
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

    def __str__(self) -> str:
        how = f"{self.speculate}-{self.k}" if self.speculate else "plain"
        return f"{self.file}, {self.dtype}, {self.rows} rows, {'compiled' if self.compile else 'eager'}, {how}"


CASES = [
    Case("float", "float32", 1),
    Case("float", "float32", 3, compile=True),
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
    Case("experts", "bfloat16", 1),
    Case("experts-int4", "float32", 3),
    Case("experts-int4", "bfloat16", 3),
    Case("int8", "float32", 3, speculate="ngram"),
    Case("int8", "bfloat16", 1),
    Case("int4.g32", "float32", 1, speculate="draft"),
    Case("int4.g32", "float32", 3, compile=True, speculate="ngram"),
    Case("int4.g32", "bfloat16", 3),
    Case("int4.g64", "float32", 3, speculate="draft", k="auto"),
    Case("int4.g64", "bfloat16", 1),
    Case("gptq", "float32", 1),
    Case("gptq", "bfloat16", 3),
]


def cases(n_rank: int) -> list[Case]:
    """What so many ranks run: four of them compile for minutes on a small machine."""
    return [case for case in CASES if n_rank == 2 or not case.compile]


def speculation_of(case: Case, folder: Path) -> Speculation | None:
    if case.speculate is None:
        return None
    step, check = (compile_step(f, CPU) if case.compile else f for f in (draft_one_token, verify))
    source = PromptLookup()
    if case.speculate == "draft":
        source = DraftModel(load_model(folder / "draft.pth", dtype=torch.float32), step)
    costs = Costs({0: 1.0, 1: 1.1, 2: 1.2, 4: 1.4, 8: 1.8}) if case.speculate == "ngram" else None
    return Speculation(source, case.k, check, {case.rows: costs} if costs else {})  # else they are measured


def tokens_of(model, prompts, sampling, count=NEW_TOKENS, **options):
    rows = [[] for _ in prompts]
    for chunk in generate(model, prompts, count, sampling, **options):
        for row, ids in zip(rows, chunk, strict=True):
            row += ids
    return rows


@torch.inference_mode()
def logits_of(model, prompts):
    """[B, V]: after each prompt."""
    length = max(map(len, prompts))
    tokens = torch.tensor([ids + [0] * (length - len(ids)) for ids in prompts])
    rows = torch.tensor([[len(ids) - 1] for ids in prompts])
    pos = torch.arange(length).repeat(len(prompts), 1)
    logits = forward_chunk(model, tokens, pos, used_slots(model, length), rows)
    return tp.full_logits(model, logits).float()


def run(case: Case, folder: Path, ranks=None) -> dict:
    """Logits, greedy tokens and drawn ones."""
    model = load_model(folder / f"{case.file}.pth", dtype=getattr(torch, case.dtype), ranks=ranks)
    vocabulary = model.args.vocab_size
    prompts = [[token % vocabulary for token in prompt] for prompt in PROMPTS[: case.rows]]
    speculation = speculation_of(case, folder)
    setup_caches(model, case.rows, 64, speculation)
    step = compile_step(decode_one_token, CPU) if case.compile else decode_one_token
    options = {"step": step, "speculation": speculation}
    found = {"logits": logits_of(model, prompts), "greedy": tokens_of(model, prompts, Sampling(0), **options)}
    torch.manual_seed(ranks.rank if ranks else 0)  # each rank another seed
    samplings = [Sampling(1.0, 5), Sampling(1.0, 0), Sampling(1.5, 150, 0.95, 0.01)]
    found["drawn"] = [tokens_of(model, prompts, each, **options) for each in samplings[: 1 if case.compile else None]]
    return found


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def memory_of_loading(path: Path, ranks=None) -> int:
    before = anonymous_bytes()
    model = load_model(path, dtype=torch.float32, ranks=ranks)
    grown = anonymous_bytes() - before
    del model
    return grown


def on_all(value) -> list:
    """This value of each rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def family_logits(path: Path, ranks) -> torch.Tensor:
    """[B, V]: after each prompt, of the model of transformers in `path`."""
    model = load_model(path, dtype=torch.float32, ranks=ranks)
    setup_caches(model, len(PROMPTS), 64)
    return logits_of(model, [[token % model.args.vocab_size for token in prompt] for prompt in PROMPTS])[:, 0]


def main(folder: Path, big: Path | None = None) -> None:
    """big: a large file, of which only the memory of loading is measured; `families`: `folder` holds models of
    transformers, each in a folder of its own."""
    with tp.init_tp() as ranks:
        ranks.place("cpu")
        torch.set_num_threads(1)
        found = {}
        if big == Path("families"):
            with torch.inference_mode():
                found = {path.name: family_logits(path, ranks) for path in sorted(folder.iterdir())}
        elif big is None:
            for case in cases(ranks.size):
                found[str(case)] = on_all(run(case, folder, ranks))
            samplings = {"greedy": Sampling(0), "top-k": Sampling(1.0, 20), "all": Sampling(1.0, 0)}
            model = load_model(folder / "float.pth", dtype=torch.bfloat16, ranks=CountingRanks.of(ranks))
            setup_caches(model, 1, 64)
            found["bytes"] = {name: bytes_of_a_step(model, sampling) for name, sampling in samplings.items()}
            model = load_model(folder / "float.pth", dtype=torch.float32, ranks=ranks)
            found["perplexity"] = perplexity(model, list(range(200)), window=40, stride=30, batch_size=3).perplexity
        else:
            found["memory"] = on_all(memory_of_loading(big, ranks))
        if ranks.is_first:
            torch.save(found, folder / f"ranks{ranks.size}.pt")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
