"""Tensor parallelism: the ranks that torchrun started, how weights are split over them, and how the ranks talk.

Each block is split as in Megatron-LM (Shoeybi et al. 2019): heads and the inner width of the FFN are dealt out, so a
block needs two all-reduces. The embedding and the output head are split over the vocabulary.
"""

import contextlib
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import command_line
from model import HeadsNorm, MixtureOfExperts, ModelArgs, Transformer
from qlinear import GROUPSIZES, QuantSpec, replace_

MEET_S = 60  # in which all ranks must have reached each other
SILENT_S = 15  # without a sign of life: the rank is dead
GRACE_S = 3  # for other ranks to say what is wrong, or to hear it
TICK_S = 0.2


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Split:
    """How a layer's weight [out, in] is dealt out: which dimension, and the sizes of a model that divide it.

    dim -2, column-wise: each rank computes a share of the outputs. dim -1, row-wise: each takes a share of the inputs,
    and the results are summed. Several sizes: the weight is that many blocks of rows, in proportion, each dealt apart.
    """

    dim: int
    sizes: tuple[str, ...]


PLAN = {
    "tok_embeddings": Split(-2, ("vocab_size",)),
    "layers.#.attention.wqkv": Split(-2, ("n_head", "n_kv_head", "n_kv_head")),
    "layers.#.attention.wo": Split(-1, ("n_head",)),
    "layers.#.feed_forward.w13": Split(-2, ("intermediate_size", "intermediate_size")),
    "layers.#.feed_forward.w2": Split(-1, ("intermediate_size",)),
    "layers.#.feed_forward.shared.w13": Split(-2, ("shared_size", "shared_size")),
    "layers.#.feed_forward.shared.w2": Split(-1, ("shared_size",)),
    "output": Split(-2, ("vocab_size",)),
}


JOINT_NORMS = {  # of models whose norms of q and k are of all heads
    "layers.#.attention.q_norm": Split(-1, ("n_head",)),
    "layers.#.attention.k_norm": Split(-1, ("n_kv_head",)),
}


def split_of(module: str, args: ModelArgs) -> Split | None:
    """The plan's entry for a module; None: every rank has all of it."""
    plan = PLAN | JOINT_NORMS if args.joint_qk_norm else PLAN
    return plan.get(re.sub(r"(?<=layers\.)\d+", "#", module))


def share_of(args: ModelArgs, n_rank: int) -> ModelArgs:
    """The sizes of one rank's part: its heads, FFN width and rows of the vocabulary, the last rank's padded.

    Where there are fewer key heads than ranks, neighbouring ranks have the same one.
    """
    return replace(
        args,
        n_head=args.n_head // n_rank,
        n_kv_head=max(1, args.n_kv_head // n_rank),
        intermediate_size=args.intermediate_size // n_rank,
        shared_size=args.shared_size and args.shared_size // n_rank,
        vocab_size=math.ceil(args.vocab_size / n_rank),
    )


def shard(name: str, tensor: Tensor, args: ModelArgs, rank: int, n_rank: int) -> Tensor:
    """One rank's part of a tensor of the whole model, whose sizes are `args`; a view where that is possible.

    One rule for floats, codes, scales and zeros, because all are [..., out, in] up to a factor, or 1 where they say the
    same of a whole row.
    """
    module, _, leaf = name.rpartition(".")
    split = split_of(module, args)
    if split is None:
        return tensor
    dim = split.dim
    if leaf == "bias":  # [out]
        if dim == -1:
            return tensor if rank == 0 else torch.zeros_like(tensor)
        dim = -1
    if tensor.shape[dim] == 1:
        return tensor
    if split.sizes == ("vocab_size",):
        n_row = math.ceil(args.vocab_size / n_rank)
        part = tensor[rank * n_row : (rank + 1) * n_row]
        pad = n_row - len(part)
        return F.pad(part, (0, 0, 0, pad)) if pad else part
    counts = [getattr(args, size) for size in split.sizes]
    unit = Fraction(tensor.shape[dim], sum(counts))
    parts, begin = [], 0
    for count in counts:
        n_unit = max(1, count // n_rank)
        first = rank * count // n_rank
        parts.append(tensor.narrow(dim, int((begin + first) * unit), int(n_unit * unit)))
        begin += count
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def require_split(args: ModelArgs, table: dict[str, QuantSpec], n_rank: int) -> None:
    """Raise ValueError, with what would work, if `n_rank` ranks cannot share such a model.

    table: its quantised layers, of which a row-wise split must not cut a group.
    """
    if not divides(args, n_rank):
        fits = [n for n in range(1, args.n_head + 1) if divides(args, n)]
        raise ValueError(
            f"{n_rank} ranks cannot share this model's {args.n_head} heads ({args.n_kv_head} key heads) and FFN of "
            f"{args.intermediate_size}{f' and {args.shared_size}' if args.shared_size else ''}; use {_listed(fits)}"
        )
    widths = {"attention.wo": args.n_head * args.head_dim, "feed_forward.w2": args.intermediate_size}
    widths["shared.w2"] = args.shared_size
    for module, spec in table.items():
        width = next((width for name, width in widths.items() if module.endswith(name)), None)
        if width is not None and spec.groupsize and width // n_rank % spec.groupsize:
            fits = [size for size in GROUPSIZES if width // n_rank % size == 0]
            advice = f"quantise with --groupsize {_listed(fits)}" if fits else "use int8 without groups, or fewer ranks"
            raise ValueError(
                f"{n_rank} ranks split the {width} inputs of {module} into parts of {width // n_rank}, which would cut "
                f"groups of {spec.groupsize}; {advice}"
            )


def divides(args: ModelArgs, n_rank: int) -> bool:
    shared = args.n_kv_head % n_rank == 0 or n_rank % args.n_kv_head == 0
    widths = (args.n_head, args.intermediate_size, args.shared_size or n_rank)
    return shared and all(width % n_rank == 0 for width in widths)


def _listed(values: list[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, values[:-1])), str(values[-1]))))


# ---------------------------------------------------------------- the ranks


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process and those that share its model; every rank must call the methods in the same order."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    watch: "Watch"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, the only one to call it."""
        value = [make() if self.is_first else None]
        dist.broadcast_object_list(value, src=0, device=torch.device("cpu"))
        return value[0]

    def sum(self, x: Tensor) -> Tensor:
        return _ready(collectives.all_reduce(x, "sum", dist.group.WORLD))

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's values."""
        return _ready(collectives.broadcast(x, 0, dist.group.WORLD))

    def gather(self, x: Tensor) -> Tensor:  # [...] -> [ranks, ...]
        parts = collectives.all_gather_single(x.contiguous(), 0, dist.group.WORLD)
        return _ready(parts).view(self.size, *x.shape)

    def place(self, kind: str) -> torch.device:
        """The device of this rank, connected to those of the others. Raises ValueError if there is none."""
        if kind == "cuda":
            if self.local_size > torch.cuda.device_count():
                raise ValueError(
                    f"{self.local_size} ranks on one machine need as many GPUs, and it has "
                    f"{torch.cuda.device_count()}; use a smaller --nproc_per_node, or --device cpu"
                )
            torch.cuda.set_device(self.local_rank)
            kind = f"cuda:{self.local_rank}"
        elif kind != "cpu":
            raise ValueError(f"ranks cannot share a model on {kind!r}; use cuda, without a number, or cpu")
        device = torch.device(kind)
        with self.watch.deadline("GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME can name the network interface"):
            dist.all_reduce(torch.zeros(1, device=device))
        return device


def _ready(x: Tensor) -> Tensor:
    """Outside a graph a collective returns at once; its result must be waited for."""
    return x.wait() if isinstance(x, collectives.AsyncCollectiveTensor) else x


def shared(ranks: Ranks | None, make: Callable[[], Any]) -> Any:
    """What `make` returns, on rank 0 if there are several."""
    return make() if ranks is None else ranks.share(make)


def speaks(ranks: Ranks | None) -> bool:
    """Whether this process is the one that prints and writes files."""
    return ranks is None or ranks.is_first


def from_first(ranks: Ranks | None, x: Tensor) -> Tensor:
    """Rank 0's values, if there are several."""
    return x if ranks is None else ranks.broadcast(x)


def full_logits(model: Transformer, logits: Tensor, best: int | None = None) -> Tensor:
    """Logits of the whole vocabulary [..., V] from those that `model` returned, on each rank its part [..., V'].

    best: only so many of the largest are needed, others may be -inf; no more of each rank's are sent. None: all.
    """
    ranks, vocab_size = model.ranks, model.args.vocab_size
    if ranks is None:
        return logits
    n_row = logits.shape[-1]
    if ranks.size * n_row > vocab_size:  # padding
        ids = ranks.rank * n_row + torch.arange(n_row, device=logits.device)
        logits = logits.masked_fill(ids >= vocab_size, float("-inf"))
    if best is None or 2 * best >= n_row:
        return ranks.gather(logits).movedim(0, -2).flatten(-2)[..., :vocab_size]
    values, ids = logits.max(-1, keepdim=True) if best == 1 else logits.topk(best)  # topk: any of equal ones
    ids = ids + ranks.rank * n_row
    pairs = ranks.gather(torch.stack((values.float(), ids.float())))  # exact: no vocabulary has more than 2^24
    values, ids = (part.movedim(0, -2).flatten(-2) for part in pairs.unbind(1))  # [..., ranks * best]
    whole = logits.new_full((*logits.shape[:-1], ranks.size * n_row), float("-inf"))
    return whole.scatter(-1, ids.long(), values.to(logits.dtype))[..., :vocab_size]


# ---------------------------------------------------------------- the model


class SplitEmbedding(nn.Module):
    """An embedding of which this rank has some rows, weight [V', dim]."""

    def __init__(self, embedding: nn.Embedding, ranks: Ranks):
        super().__init__()
        self.weight, self.ranks = embedding.weight, ranks

    def forward(self, tokens: Tensor) -> Tensor:  # [...] -> [..., dim]
        rows = tokens - self.ranks.rank * len(self.weight)
        mine = (rows >= 0) & (rows < len(self.weight))
        x = F.embedding(rows.where(mine, 0), self.weight)
        return self.ranks.sum(x * mine[..., None])


class Summed(nn.Module):
    """A layer whose results on all ranks add up: a row-wise split linear one, or a mixture of experts."""

    def __init__(self, layer: nn.Module, ranks: Ranks):
        super().__init__()
        self.layer, self.ranks = layer, ranks

    def forward(self, x: Tensor) -> Tensor:  # [..., in'] -> [..., out]
        return self.ranks.sum(self.layer(x))


class SplitNorm(HeadsNorm):
    """The norm of all heads as one vector, of which each rank has some."""

    def __init__(self, norm: HeadsNorm, ranks: Ranks):
        nn.Module.__init__(self)
        self.weight, self.eps, self.offset, self.ranks = norm.weight, norm.eps, norm.offset, ranks

    def mean_square(self, h: Tensor) -> Tensor:  # [..., dim'] -> [..., 1]
        return self.ranks.sum(super().mean_square(h)) / self.ranks.size


def apply_tp(model: Transformer, args: ModelArgs, ranks: Ranks) -> None:
    """Join a model built around one rank's share of the weights with the others. args: of the whole model.

    Afterwards `model.args` has the heads and FFN width of this rank, and the vocabulary of the whole; the logits that
    the model returns are this rank's, see `full_logits`.
    """
    model.args = replace(share_of(args, ranks.size), vocab_size=args.vocab_size)
    model.ranks = ranks
    model.tok_embeddings = SplitEmbedding(model.tok_embeddings, ranks)
    for name, layer in list(model.named_modules()):
        split = split_of(name, args)
        of_experts = args.n_expert and ".feed_forward." in name  # which are summed together, once they are weighted
        if isinstance(layer, MixtureOfExperts) or (split is not None and split.dim == -1 and not of_experts):
            joined = SplitNorm if isinstance(layer, HeadsNorm) else Summed
            replace_(model, name, joined(layer, ranks))


# ---------------------------------------------------------------- beginning and end


@contextlib.contextmanager
def init_tp() -> Iterator[Ranks | None]:
    """The ranks that torchrun started, for the length of a `with` block; None if it started one, or was not used.

    An error in the block ends every rank, with one message from rank 0: what is the person's to mend with exit code 2
    on all, anything else with 1. A rank that dies is noticed by the others.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield None
        return
    rank = int(os.environ["RANK"])
    watch = Watch(rank, size)
    try:
        store = watch.meet()
        with watch.deadline("GLOO_SOCKET_IFNAME can name the network interface"):
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            # no timeout: a person may take hours to type the next line, and dead ranks are noticed by the watch
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(days=365))
        local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
        yield Ranks(rank, size, *local, watch)
        dist.barrier()
    except Exception as error:
        if "Connection closed by peer" in str(error) or isinstance(error, dist.DistNetworkError):
            watch.join(SILENT_S + GRACE_S)  # it will find who is gone
        words = command_line.in_words(error)
        if words is None:
            traceback.print_exc(file=sys.__stderr__)
        watch.fail(words or f"{type(error).__name__}: {error}", 2 if words else 1)
    dist.destroy_process_group()
    watch.finish()


class Watch(threading.Thread):
    """Each rank's eye on the others, through the store that they share.

    Every rank writes there a sign of life every TICK_S, or what made it fail. A thread of its own reads them, so it
    sees a death also while the main thread waits for the dead, and ends the process: destroying the process group
    would wait too.
    """

    def __init__(self, rank: int, size: int):
        super().__init__(daemon=True)
        self.rank, self.size = rank, size
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives the processes
        self.keys = [f"gpt-faster/{attempt}/{rank}" for rank in range(size)]
        self.state = "alive"
        self.until, self.advice = math.inf, ""
        self.finished = threading.Event()

    def connect(self) -> dist.TCPStore:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun serves the store itself; without it rank 0 does
        server = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        timeout = timedelta(seconds=MEET_S)
        try:
            return dist.TCPStore(host, port, None, server, timeout, wait_for_workers=False, multi_tenant=True)
        except (dist.DistError, RuntimeError):
            raise ValueError(f"rank {self.rank} cannot reach rank 0's machine, {host}, at port {port}") from None

    def meet(self) -> dist.Store:
        """The store, once every rank has come there, and the watch begins. Raises ValueError if one has not come."""
        self.store, store = self.connect(), self.connect()  # waiting on one would hold up the other
        self.store.set(self.keys[self.rank], "alive")
        until = time.monotonic() + MEET_S
        while missing := [rank for rank, key in enumerate(self.keys) if not self.store.check([key])]:
            if time.monotonic() > until:
                raise ValueError(f"of {self.size} ranks, {_listed(missing)} did not come within {MEET_S} seconds")
            time.sleep(TICK_S)
        self.start()
        return dist.PrefixStore("gpt-faster/group", store)

    @contextlib.contextmanager
    def deadline(self, advice: str) -> Iterator[None]:
        """The block must be through in MEET_S."""
        self.until, self.advice = time.monotonic() + MEET_S, advice
        yield
        self.until = math.inf

    def fail(self, message: str, code: int) -> None:
        """End all ranks with this message, unless rank 0 has one of its own. Does not return."""
        if self.is_alive():
            self.state = f"failed {code} {message}"
            self.join()
        self.leave(code, message)

    def finish(self) -> None:
        """A normal end, all ranks being at theirs."""
        self.finished.set()
        self.join()
        with contextlib.suppress(RuntimeError):
            self.store.set(self.keys[self.rank], "done")
            if self.rank == 0:  # which may be the one that serves the store
                self.wait_for_all("done")

    def run(self) -> None:
        states, heard, noticed = self.keys, [0.0] * self.size, math.inf
        tick = 0
        try:
            while not self.finished.wait(TICK_S):
                tick, now = tick + 1, time.monotonic()
                if now > self.until:
                    self.state = (
                        f"failed 2 the ranks cannot connect to each other within {MEET_S} seconds; {self.advice}"
                    )
                self.store.set(self.keys[self.rank], f"{self.state} {tick}" if self.state == "alive" else self.state)
                before, states = states, self.states()
                heard = [t if a == b else now for t, a, b in zip(heard, before, states, strict=True)]
                silent = [r for r in range(self.size) if states[r].startswith("alive") and now - heard[r] > SILENT_S]
                failed = [r for r in range(self.size) if states[r].startswith(("failed", "ended"))]
                if silent or failed:
                    noticed = min(noticed, now)
                    everyone = len(silent) + len(failed) == self.size
                    if 0 in failed or everyone or now - noticed > GRACE_S:  # rank 0 may be about to say the same
                        self.end(states, failed, silent)
        except RuntimeError:  # no rank reaches it: each machine's first must say so
            if not self.finished.is_set():
                self.leave(
                    1, f"rank {self.rank} has lost the store of the ranks: rank 0's machine, or its launcher, is gone"
                )

    def states(self) -> list[str]:
        return [state.decode() for state in self.store.multi_get(self.keys)]

    def end(self, states: list[str], failed: list[int], silent: list[int]) -> None:
        """Say what is wrong, on one rank, and leave when all know: torchrun stops the others when the first leaves."""
        if failed:
            state, code, message = states[failed[0]].split(" ", 2)
            if state == "failed" and failed[0] != 0:  # where it has ended, it has named the one that failed
                message = f"rank {failed[0]}: {message}"
        else:
            code, message = "1", f"rank {_listed(silent)} gave no sign of life for {SILENT_S} seconds"
        speaker = min(set(range(self.size)) - set(silent))
        if self.rank == speaker:
            self.say(message)
        self.store.set(self.keys[self.rank], f"ended {code} {message}")
        self.wait_for_all("ended", silent)
        self.leave(int(code))

    def wait_for_all(self, state: str, but: list[int] = ()) -> None:
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until:
            if all(each.startswith(state) for rank, each in enumerate(self.states()) if rank not in but):
                return
            time.sleep(TICK_S / 4)

    def say(self, message: str) -> None:
        print(f"error: {message}", file=sys.__stderr__, flush=True)

    def leave(self, code: int, message: str | None = None) -> None:
        if message is not None:
            self.say(message)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)
