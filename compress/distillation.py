"""Knowledge distillation (Hinton et al. 2015): a student learns to predict what its teacher predicts.

The loss is the forward KL divergence over the teacher's likeliest K tokens and, as one more class, all others: what the
student says of those counts too, and no V numbers a token need be kept. A student of some of the teacher's blocks first
learns to make the teacher's hidden rows (Romero et al. 2015), without a head, which is half of a small student's work:
each of its blocks makes those behind the teacher's blocks for which it stands, so that each has a target of its own.
Shapes: B windows of S tokens, V vocabulary, N blocks of the student.
"""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cli import postponed
from compress.training_data import batch_of
from model import Transformer
from ranks import Ranks, from_first

CLIP = 1.0  # the longest gradient that a step takes as it is
WARM_UP, LEAST_RATE = 0.05, 0.1  # parts: of the training, and of the learning rate, which ends where it began
BETAS = (0.9, 0.95)  # of AdamW, without decay: the weights that a student begins with are not to be forgotten
AT_ONCE = 1 << 20  # logits, of which the loss on a CPU is made: few enough for its cache
ROWS_UNTIL = 0.5  # the part of the training in which rows are learned
KEPT_BYTES = 1 << 30  # of what a teacher finds in windows that are read again


def class_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [..., K + 1], float32, of the tokens ids [..., K], K < V, and of all others together."""
    return classes_(logits.float() / temperature, ids)[0]


def classes_(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities of `class_logprobs`, from scores [..., V]; and a sum [..., 1].

    It is the sum of what the scores become: exponentials in proportion to the others' chances, 0 for the tokens ids.
    """
    top = scores.gather(-1, ids)
    peak = scores.scatter_(-1, ids, float("-inf")).amax(-1, keepdim=True)
    total = scores.sub_(peak).exp_().sum(-1, keepdim=True)
    return torch.cat((top, peak + total.log()), -1).log_softmax(-1), total


class Divergence(torch.autograd.Function):
    """KL(teacher || student) over K + 1 classes, in nats, mean of N tokens; times the square of the temperature.

    Its gradient is made in the same pass. A CPU takes a few tokens at a time, whose numbers stay in its cache; a
    GPU takes all, because each part would cost its launches.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """logits [N, V]; ids [N, K]; targets: `class_logprobs` [N, K + 1]."""
        gradient, loss = torch.empty_like(logits), torch.zeros((), device=logits.device)
        n_token, n_vocab = logits.shape
        size = min(n_token, max(1, AT_ONCE // n_vocab)) if logits.device.type == "cpu" else n_token
        room = logits.new_empty(size, n_vocab, dtype=torch.float32)
        parts = (each.split(size) for each in (logits, ids, targets, gradient))
        for part, top, target, part_gradient in zip(*parts, strict=True):
            scores = room[: len(part)].copy_(part).div_(temperature)
            logprobs, total = classes_(scores, top)
            loss += F.kl_div(logprobs, target, log_target=True, reduction="sum")
            too_likely = (logprobs.exp() - target.exp()) * (temperature / n_token)
            part_gradient.copy_(scores.mul_(too_likely[:, -1:] / total).scatter_(-1, top, too_likely[:, :-1]))
        ctx.save_for_backward(gradient)
        return loss * (temperature**2 / n_token)

    @staticmethod
    def backward(ctx, by: Tensor) -> tuple:
        return ctx.saved_tensors[0] * by, None, None, None


def distillation_loss(logits: Tensor, ids: Tensor, target: Tensor, temperature: float) -> Tensor:
    """`Divergence` of logits [..., V], with ids and target for each; the temperature keeps the size of gradients."""
    return Divergence.apply(*(each.flatten(0, -2) for each in (logits, ids, target)), temperature)


def row_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """How far rows [N, B, S, dim] are from others, in parts of these: |ours - theirs|^2 / |theirs|^2.

    The sum over N, mean of all tokens. A few rows are a hundred times as long as others, and count no more than they.
    """
    theirs = theirs.float()
    distance = (ours.float() - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=1e-12)
    return distance.sum(0).mean()


class Watched(nn.Module):
    """A model that shows what some of its blocks make, and what its head reads. DistributedDataParallel wraps it."""

    def __init__(self, model: Transformer, blocks: Sequence[int]):
        super().__init__()
        self.model, self.blocks = model, blocks

    def forward(self, tokens: Tensor, to_rows: bool) -> Tensor:
        """The rows [N, B, S, dim] after each of the blocks and, as the last, before the head; or logits [B, S, V]."""
        if not to_rows:
            return self.model(tokens, positions(tokens))
        found = []
        layers = [self.model.layers[i] for i in self.blocks]
        hooks = [layer.register_forward_hook(lambda *call: found.append(call[-1])) for layer in layers]
        try:
            last = self.model.norm(self.model.hidden(tokens, positions(tokens)))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([*found, last])


class Targets:
    """What the teacher finds in windows [n, S]: each is computed alone, so that its numbers are always the same.

    What was computed is kept, because most texts are read more than once, up to `room` bytes: of rows first the last of
    every window, of which predictions are made later. blocks: those of the teacher whose rows the student's N blocks
    learn; None: it learns none.
    """

    def __init__(
        self,
        teacher: Transformer,
        windows: Tensor,
        top_k: int,
        temperature: float,
        blocks: list[int] | None = None,
        room: int = KEPT_BYTES,
    ):
        self.windows, self.temperature, self.blocks, self.room = windows, temperature, blocks, room
        self.device = teacher.device
        self.teacher = Watched(teacher, (blocks or [])[:-1])
        self.top_k = min(top_k, teacher.args.vocab_size - 1)
        self.kept: dict[int, tuple[Tensor, ...]] = {}
        self.of_rows = False  # what is kept
        self.last: dict[int, Tensor] = {}  # rows [S, dim] that wait for the head

    @torch.no_grad()
    def predict(self, window: int) -> tuple[Tensor, ...]:
        """ids [S, K], int32, and their `class_logprobs` [S, K + 1]; or rows [N, S, dim]."""
        tokens = self.windows[window : window + 1].to(self.device).long()
        if self.of_rows:
            return (self.teacher(tokens, True)[:, 0],)
        last = self.last.pop(window, None)
        logits = self.teacher(tokens, False)[0] if last is None else self.teacher.model.head(last)
        ids = logits.topk(self.top_k).indices
        return ids.int(), class_logprobs(logits, ids, self.temperature)

    def of(self, windows: list[int], of_rows: bool) -> tuple[Tensor, ...]:
        """Tokens [B, S], ids [B, S, K] and log-probabilities [B, S, K + 1] of some windows; or tokens and rows."""
        if of_rows != self.of_rows:
            self.kept, self.of_rows = {}, of_rows
        found = [self.kept.get(window) or self.predict(window) for window in windows]
        for window, each in zip(windows, found, strict=True):
            self.keep(window, each)
        tokens = self.windows[windows].to(self.device).long()
        if of_rows:
            return tokens, torch.stack([rows for (rows,) in found], 1)
        ids, logprobs = (torch.stack(each) for each in zip(*found, strict=True))
        return tokens, ids.long(), logprobs

    def keep(self, window: int, found: tuple[Tensor, ...]) -> None:
        """Keep what there is room for."""
        if not self.of_rows:
            waiting = sum(each.nbytes for each in self.last.values())
        else:
            last = found[0][-1]
            if window not in self.last and (len(self.last) + 1) * last.nbytes <= self.room:
                self.last[window] = last.clone()
            waiting = len(self.windows) * last.nbytes
        if waiting + (len(self.kept) + 1) * sum(part.nbytes for part in found) <= self.room:
            self.kept[window] = found


def positions(tokens: Tensor) -> Tensor:  # [B, S] -> [B, S]
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


@dataclass(frozen=True)
class Plan:
    """How long, and how. A step takes batch_size windows, of which each rank computes micro_batch at a time."""

    steps: int | None  # or minutes
    minutes: float | None
    batch_size: int
    micro_batch: int
    learning_rate: float
    dtype: torch.dtype  # of the arithmetic; weights, gradients and moments are float32
    seed: int


@dataclass(frozen=True)
class Step:
    """One step that is done; loss: before it; progress: the part of the training that lies behind."""

    number: int  # from 1
    loss: float  # nats a token, or a `row_error`
    of_rows: bool
    tokens: int  # trained on so far
    seconds: float  # trained so far
    progress: float


class Training:
    """A student on its way. Between two steps `state` is all that there is to know of it."""

    def __init__(self, student: Transformer, targets: Targets, plan: Plan, ranks: Ranks | None = None):
        self.student, self.targets, self.plan, self.ranks = student, targets, plan, ranks
        self.parameters = {name: each for name, each in student.named_parameters() if each.requires_grad}
        self.optimizer = torch.optim.AdamW(self.groups(), plan.learning_rate, BETAS, weight_decay=0.0, fused=True)
        watched = Watched(student, range(student.args.n_layer - 1))
        self.parallel = watched if ranks is None else DistributedDataParallel(watched)
        self.step, self.seconds = 0, 0.0

    def groups(self) -> list[dict]:
        """Parameters with the unit of their learning rate: of scales and zeros, which are small, their mean size."""
        coded = [each for name, each in self.parameters.items() if name.endswith((".scales", ".zeros"))]
        groups = [{"params": [each], "unit": each.detach().abs().mean().item()} for each in coded]
        floats = [each for name, each in self.parameters.items() if not name.endswith((".scales", ".zeros"))]
        return [{"params": floats, "unit": 1.0}, *groups]

    def run(self) -> Iterator[Step]:
        """Train to the end; each step as it is done. Raises ValueError on a loss that is no number."""
        while self.progress() < 1:
            began, of_rows = time.perf_counter(), self.learns_rows()
            loss = self.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
            if not math.isfinite(loss) or not norm.isfinite():
                raise Diverged(f"the loss of step {self.step + 1} is {loss}, with a gradient of length {norm:g}")
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.learning_rate * group["unit"] * rate_at(self.progress())
            with postponed():
                self.optimizer.step()
                self.step, self.seconds = self.step + 1, self.seconds + time.perf_counter() - began
            tokens = self.step * self.plan.batch_size * self.targets.windows.shape[1]
            yield Step(self.step, loss, of_rows, tokens, self.seconds, self.progress())

    def progress(self) -> float:
        """The part of the training that is done, alike on all ranks."""
        if self.plan.steps is not None:
            return self.step / self.plan.steps
        done = torch.tensor(self.seconds / (60 * self.plan.minutes), dtype=torch.float64)
        return from_first(self.ranks, done).item()

    def learns_rows(self) -> bool:
        return self.targets.blocks is not None and self.progress() < ROWS_UNTIL

    def backward(self) -> float:
        """The gradient of one step's loss, and the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        rank, size = (0, 1) if self.ranks is None else (self.ranks.rank, self.ranks.size)
        plan, loss, of_rows = self.plan, torch.zeros(1), self.learns_rows()
        own = batch_of(self.step, plan.batch_size, len(self.targets.windows), plan.seed)[rank::size]
        parts = [own[i : i + plan.micro_batch] for i in range(0, len(own), plan.micro_batch)]
        for i, part in enumerate(parts, 1):
            is_last = self.ranks is None or i == len(parts)  # ranks add up their gradients once a step
            with nullcontext() if is_last else self.parallel.no_sync():
                share = self.loss(part, of_rows) * (len(part) / len(own))
                share.backward()
            loss += share.detach().cpu()
        return (loss if self.ranks is None else self.ranks.sum(loss)).item() / size

    def loss(self, windows: list[int], of_rows: bool) -> Tensor:
        tokens, *target = self.targets.of(windows, of_rows)
        dtype = self.plan.dtype
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            found = self.parallel(tokens, of_rows)
        return row_error(found, *target) if of_rows else distillation_loss(found, *target, self.targets.temperature)

    def state(self) -> dict:
        """Tensors and plain values, which the next step changes in place."""
        weights = {name: each.detach() for name, each in self.parameters.items()}
        optimizer = self.optimizer.state_dict()
        return {"step": self.step, "seconds": self.seconds, "weights": weights, "optimizer": optimizer}

    @torch.no_grad()
    def resume(self, state: dict) -> None:
        """Go on from a `state`."""
        for name, each in self.parameters.items():
            each.copy_(state["weights"][name])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.step, self.seconds = state["step"], state["seconds"]


class Diverged(ValueError):
    """The loss is no number any more, and what led there may be in the weights already."""


def rate_at(progress: float) -> float:
    """The part of the learning rate at some part of the training: up in a line, down with the cosine."""
    height = min(progress / WARM_UP, (1 + math.cos(math.pi * progress)) / 2)
    return LEAST_RATE + (1 - LEAST_RATE) * height
