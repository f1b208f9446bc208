"""Pipeline stages against one process: what they find, what each holds, and what is refused."""

import functools
from dataclasses import replace

import pytest
import torch

from layers.quantized import QuantSpec
from model import ModelArgs
from stages import Stage, n_micro_batch
from tests.test_tp import alone, folder  # noqa: F401  a fixture
from tests.tiny import ran
from tests.tp_cases import ARGS, CAPPED, DELTA, DELTAS, EXPERTS, TIED, score, staged_cases
from weights.layout import Layout

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found(folder):  # noqa: F811
    """found(N): what N ranks found in two stages."""

    @functools.cache
    def found(n_rank):
        ran(n_rank, "tests/tp_cases.py", "stages", folder)
        return torch.load(folder / f"stages{n_rank}.pt")

    return found


@pytest.mark.parametrize("n_rank, case", [(n, case) for n in (2, 4) for case in staged_cases(n)], ids=str)
def test_stages_find_what_one_process_finds(found, folder, n_rank, case):  # noqa: F811
    ranks, truth = found(n_rank)[str(case)], alone(case, folder)
    for rank in ranks[1:]:
        assert torch.equal(rank["logits"], ranks[0]["logits"])
        assert (rank["greedy"], rank["drawn"]) == (ranks[0]["greedy"], ranks[0]["drawn"])
    torch.testing.assert_close(ranks[0]["logits"], truth["logits"], rtol=1e-4, atol=1e-4)
    assert ranks[0]["greedy"] == truth["greedy"]


@pytest.mark.parametrize("n_rank", [2, 4])
def test_what_a_stage_holds(found, folder, n_rank):  # noqa: F811
    """Its blocks, with the embedding in the first stage and the head in the last, shared by the stage's ranks."""
    whole = {name: tensor.numel() * 4 for name, tensor in Layout(ARGS).tensors.items()}
    norm, n_beside = whole["norm.weight"], n_rank // 2
    for rank, own in enumerate(found(n_rank)["weights"]):
        stage = rank // n_beside
        end = "tok_embeddings" if stage == 0 else "output"
        share = sum(size for name, size in whole.items() if name.startswith((f"layers.{stage}.", end)))
        assert share // n_beside <= own <= 1.1 * share / n_beside + norm
    keys = 3 * (ARGS.n_kv_head // n_beside) * 64 * ARGS.head_dim * 4
    assert found(n_rank)["cache"] == [2 * keys] * n_rank  # of one layer
    assert found(n_rank)["perplexity"] == pytest.approx(score(folder), rel=1e-4)


def test_bytes_of_a_token(found):
    """A hidden row of bfloat16 from stage to stage; the last tells its best candidates, each a logit and its id."""
    row, drawn = ARGS.dim * 2, 8
    assert found(2)["bytes"] == {
        "greedy": {"to the next stage": row, "broadcast": 8},
        "top-k": {"to the next stage": row, "broadcast": 20 * 8 + drawn},
        "all": {"to the next stage": row, "broadcast": 2 * ARGS.vocab_size + drawn},
    }


def test_layers_are_dealt_out_in_order():
    assert [Stage(replace(ARGS, n_layer=8), i, 3).layers for i in range(3)] == [range(0, 3), range(3, 6), range(6, 8)]


@pytest.mark.parametrize(
    "args", [ARGS, TIED, CAPPED, EXPERTS, DELTAS, replace(EXPERTS, dense_layers=(0,), dense_size=64)]
)
def test_stages_together_are_the_model(args):
    """Each layer stands in one stage, of the same shapes there; the names map one to one."""
    whole, names = Layout(args, {"layers.1.feed_forward.w2": QuantSpec(8)} if not args.n_expert else {}), []
    for number in range(2):
        stage = Stage(args, number, 2)
        own = Layout(stage.own_args(), stage.own(whole.table), stage.meta_model(stage.own_args()))
        for name, tensor in whole.tensors.items():
            if here := stage.own_name(name):
                assert own.tensors[here].shape == tensor.shape
                names.append(name)
    ends = [] if args.tie_embeddings else ["output.weight"]
    assert sorted(names) == sorted([*(set(whole.tensors) - {"norm.weight"}), "norm.weight", "norm.weight"]), ends


def test_micro_batches():
    """By hand: at most two a stage, none with fewer tokens than asked for, or than one row."""
    assert n_micro_batch(4, 512, 2, 16) == 4
    assert n_micro_batch(64, 1, 2, 16) == 4
    assert n_micro_batch(32, 1, 2, 16) == 2
    assert n_micro_batch(8, 1, 2, 16) == 1
    assert n_micro_batch(1, 512, 2, 16) == 1


SIZES = dict(dim=64, n_layer=4, n_head=4, n_kv_head=4, head_dim=16, intermediate_size=96, vocab_size=99)
REUSING = ModelArgs(**SIZES, max_seq_length=64, n_reusing_layer=2, sliding_window=8, full_layers=(1, 3))


@pytest.mark.parametrize(
    "args, count, message",
    [(ARGS, 3, "more than the model's 2 layers"), (REUSING, 2, "keys of earlier"), (DELTA, 2, "leave one without")],
)
def test_what_stages_refuse(args, count, message):
    with pytest.raises(ValueError, match=message):
        Stage(args, 0, count)
