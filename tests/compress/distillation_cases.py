"""What test_distillation.py trains, here and, run by torchrun with a file to write, on two ranks."""

import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from compress.distillation import Plan, Targets, Training
from compress.student import freeze_ends_, stood_for, student_of, trainable
from compress.training_data import full_windows
from model import ModelArgs
from ranks import init_tp
from weights.layout import Layout, ModelFile

CPU = torch.device("cpu")
ARGS = ModelArgs(
    dim=32, n_layer=3, n_head=2, n_kv_head=1, head_dim=16, intermediate_size=64, vocab_size=128, max_seq_length=64
)
PLAN = Plan(4, None, 4, 1, 1e-2, torch.float32, 7)


def opened(args=ARGS, seed=0):
    """The open file of a model with random weights."""
    torch.manual_seed(seed)
    tensors = {name: torch.randn(t.shape) * 0.2 for name, t in Layout(args).tensors.items()}
    return ModelFile(Layout(args), {name: lambda t=t: t for name, t in tensors.items()})


def training(n_layer=2, plan=PLAN, ranks=None, student=None, top_k=8, rows=False):
    """Of a student that learns rows for half of the steps, or none."""
    windows = full_windows(torch.randint(128, (200,), generator=torch.Generator().manual_seed(0)).tolist(), 16, 4)
    teacher = trainable(opened(), CPU)
    student = trainable(student_of(opened(), n_layer), CPU) if student is None else student
    if rows:
        freeze_ends_(student)
    blocks = stood_for(3, n_layer) if rows else None
    return Training(student, Targets(teacher, windows, top_k, 1.5, blocks), plan, ranks)


def on_ranks(path):
    with init_tp() as ranks:
        found = [trained(ranks, rows) for rows in (False, True)]
        if ranks.is_first:
            torch.save(found, path)


def trained(ranks, rows):
    """The first step's loss and gradients, and the weights in the end."""
    run = training(plan=replace(PLAN, micro_batch=2), ranks=ranks, rows=rows)
    loss = run.backward()
    gradients = {name: each.grad.clone() for name, each in run.parameters.items()}
    [*run.run()]
    return loss, gradients, run.state()["weights"]


if __name__ == "__main__":
    on_ranks(sys.argv[1])
