"""The processes that torchrun starts: how they meet, exchange values, and notice that one of them is gone."""

import contextlib
import math
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from cli import in_words, listed

MEET_S = 60  # within which all ranks must reach each other
SILENT_S = 15  # after which a rank without a sign of life is dead
GRACE_S = 3  # for the ranks to agree on what is wrong before they end
TICK_S = 0.2  # between two signs of life
MOST_ON_THE_WAY = 16  # messages to the next stage: a stage that is far ahead waits
FOREVER = timedelta(days=365)  # a person may take hours to type the next line, and the watch notices dead ranks


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process and the others that hold parts of its model; all must call the methods in the same order.

    group: these ranks, where they are not all. n_stage: the pipeline stages in which the ranks stand, neighbours
    together; beside: those of this rank's stage, who share its blocks, or None for all.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    watch: "Watch"
    group: dist.ProcessGroup | None = None
    n_stage: int = 1
    beside: "Ranks | None" = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def stage(self) -> int:
        """The pipeline stage of this rank, from 0."""
        return self.rank // (self.size // self.n_stage)

    @property
    def of_stage(self) -> "Ranks":
        """The ranks that share the blocks of this one's stage."""
        return self.beside or self

    def in_stages(self, n_stage: int) -> "Ranks":
        """The same ranks, standing in so many pipeline stages."""
        if n_stage < 1 or self.size % n_stage:
            fits = [n for n in range(1, self.size + 1) if self.size % n == 0]
            raise ValueError(
                f"{n_stage} pipeline stages cannot share {self.size} ranks; use --pipeline_stages {listed(fits)}"
            )
        if n_stage == 1:
            return self
        size = self.size // n_stage
        members = [list(range(first, first + size)) for first in range(0, self.size, size)]
        groups = [dist.new_group(each, timeout=FOREVER) for each in members]  # every rank must make each of them
        stage, rank = divmod(self.rank, size)
        beside = replace(self, rank=rank, size=size, group=groups[stage])
        return replace(self, n_stage=n_stage, beside=beside)

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, which alone calls it; a ValueError there is raised on every rank."""
        value = [None, None]
        if self.is_first:
            try:
                value[0] = make()
            except ValueError as error:
                value[1] = str(error)
        dist.broadcast_object_list(value, src=0, device=torch.device("cpu"))
        if value[1] is not None:
            raise ValueError(value[1])
        return value[0]

    def sum(self, x: Tensor) -> Tensor:
        return x if self.size == 1 else ready(collectives.all_reduce(x, "sum", self.group or dist.group.WORLD))

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """The values of rank `source`."""
        return ready(collectives.broadcast(x, source, self.group or dist.group.WORLD))

    def gather(self, x: Tensor) -> Tensor:  # [...] -> [ranks, ...]
        if self.size == 1:
            return x[None]
        parts = collectives.all_gather_single(x.contiguous(), 0, self.group or dist.group.WORLD)
        return ready(parts).view(self.size, *x.shape)

    def from_last_stage(self, x: Tensor) -> Tensor:
        """The values of the last stage, which alone has logits."""
        return x if self.n_stage == 1 else self.broadcast(x.contiguous(), self.size - self.of_stage.size)

    def receive(self, like: Tensor) -> Tensor:
        """What this rank's peer of the stage before has handed on, a tensor like this one."""
        return torch.ops.gpt_faster_ranks.receive(like, self.rank - self.of_stage.size)

    def hand_on(self, x: Tensor) -> Tensor:
        """Give x to this rank's peer of the next stage, without waiting until it takes it.

        Returns zeros of its shape: what depends on them, as later collectives must, comes after it when compiled too.
        """
        return torch.ops.gpt_faster_ranks.hand_on(x, self.rank + self.of_stage.size).expand(x.shape)

    def place(self, kind: str) -> torch.device:
        """The device of this rank, connected to those of the others."""
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


_on_the_way: deque[tuple[dist.Work, Tensor]] = deque()  # to the next stage


@torch.library.custom_op("gpt_faster_ranks::receive", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def _receive(like: Tensor, source: int) -> Tensor:
    x = torch.empty_like(like, memory_format=torch.contiguous_format)
    dist.recv(x, source)
    return x


@torch.library.custom_op("gpt_faster_ranks::hand_on", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def _hand_on(x: Tensor, target: int) -> Tensor:
    x = x.contiguous()
    _on_the_way.append((dist.isend(x, target), x))
    while _on_the_way and (_on_the_way[0][0].is_completed() or len(_on_the_way) > MOST_ON_THE_WAY):
        _on_the_way.popleft()[0].wait()
    return x.new_zeros(1)


_receive.register_fake(lambda like, source: torch.empty_like(like, memory_format=torch.contiguous_format))
_hand_on.register_fake(lambda x, target: x.new_empty(1))
for _op in (_receive, _hand_on):
    _op.register_effect(torch.library.EffectType.ORDERED)  # the compiler must neither leave one out nor move it


def ready(x: Tensor) -> Tensor:
    """The result of a collective, which outside a compiled graph returns before it is done."""
    return x.wait() if isinstance(x, collectives.AsyncCollectiveTensor) else x


def shared(ranks: Ranks | None, make: Callable[[], Any]) -> Any:
    """What `make` returns; with several ranks, what it returns on rank 0."""
    return make() if ranks is None else ranks.share(make)


def speaks(ranks: Ranks | None) -> bool:
    """Whether this process is the one that prints and writes files."""
    return ranks is None or ranks.is_first


def from_first(ranks: Ranks | None, x: Tensor) -> Tensor:
    """x; with several ranks, rank 0's x."""
    return x if ranks is None else ranks.broadcast(x)


def require_one_process(what: str) -> None:
    """Refuse torchrun, on one of its processes for all."""
    with init_tp() as ranks:
        if ranks is not None:
            raise ValueError(f"{what} without torchrun, in one process: the file serves any number of ranks")


@contextlib.contextmanager
def init_tp(n_stage: int | None = None) -> Iterator[Ranks | None]:
    """The ranks that torchrun started, for the length of a `with` block; None where this process is alone.

    n_stage: the pipeline stages in which they stand (None: one).

    An error in the block ends every rank, with one message, from rank 0: a person's mistake with exit code 2, another
    error with 1. A rank that dies ends the others too.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        if n_stage is not None:
            start = f"torchrun --standalone --nproc_per_node {max(n_stage, 2)} generate.py --pipeline_stages ..."
            raise ValueError(f"--pipeline_stages {n_stage} needs processes that torchrun starts, such as: {start}")
        yield None
        return
    rank = int(os.environ["RANK"])
    watch = Watch(rank, size)
    try:
        store = watch.meet()
        with watch.deadline("GLOO_SOCKET_IFNAME can name the network interface"):
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=FOREVER)
        local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
        ranks = Ranks(rank, size, *local, watch)
        yield ranks if n_stage is None else ranks.in_stages(n_stage)
        dist.barrier()
    except Exception as error:
        if "Connection closed by peer" in str(error) or isinstance(error, dist.DistNetworkError):
            watch.join(SILENT_S + GRACE_S)  # the watch finds which rank is gone, and ends this process
        words = in_words(error)
        if words is None:
            traceback.print_exc(file=sys.__stderr__)
        watch.fail(words or f"{type(error).__name__}: {error}", 2 if words else 1)
    dist.destroy_process_group()
    watch.finish()


class Watch(threading.Thread):
    """A thread of each rank that notices when another rank fails, dies or hangs, and then ends the process.

    Every rank writes its state to the store every TICK_S: "alive" with the time, "failed" with exit code and message,
    "ended" once it has seen a failure, "done" at a normal end. It is a thread because the main thread may be waiting
    in a collective for the dead rank, and it ends the process because destroying the process group would wait too.
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
        """The store for the process group, once every rank has come there; the watch has begun."""
        self.store, store = self.connect(), self.connect()  # a wait on one connection would block the watch
        self.store.set(self.keys[self.rank], "alive")
        until = time.monotonic() + MEET_S
        while missing := [rank for rank, key in enumerate(self.keys) if not self.store.check([key])]:
            if time.monotonic() > until:
                raise ValueError(f"of {self.size} ranks, {listed(missing)} did not come within {MEET_S} seconds")
            time.sleep(TICK_S)
        self.start()
        return dist.PrefixStore("gpt-faster/group", store)

    @contextlib.contextmanager
    def deadline(self, advice: str) -> Iterator[None]:
        """End all ranks, with this advice, unless the block is through in MEET_S."""
        self.until, self.advice = time.monotonic() + MEET_S, advice
        yield
        self.until = math.inf

    def fail(self, message: str, code: int) -> None:
        """End all ranks with this message, or with rank 0's own. Does not return."""
        if self.is_alive():
            self.state = f"failed {code} {message}"
            self.join()
        self.leave(code, message)

    def finish(self) -> None:
        """Stop watching, when every rank is at its normal end."""
        self.finished.set()
        self.join()
        with contextlib.suppress(RuntimeError):
            self.store.set(self.keys[self.rank], "done")
            if self.rank == 0:  # it may serve the store that the others still read
                self.wait_for_all("done")

    def run(self) -> None:
        states, changed, noticed = self.keys, [0.0] * self.size, math.inf
        try:
            while not self.finished.wait(TICK_S):
                now = time.monotonic()
                if now > self.until:
                    late = f"the ranks cannot connect to each other within {MEET_S} seconds"
                    self.state = f"failed 2 {late}; {self.advice}"
                self.store.set(self.keys[self.rank], f"alive {now}" if self.state == "alive" else self.state)
                before, states = states, self.states()
                changed = [at if a == b else now for at, a, b in zip(changed, before, states, strict=True)]
                silent = [r for r in range(self.size) if states[r].startswith("alive") and now - changed[r] > SILENT_S]
                failed = [r for r in range(self.size) if states[r].startswith(("failed", "ended"))]
                if silent or failed:
                    noticed = min(noticed, now)
                    everyone = len(silent) + len(failed) == self.size
                    if 0 in failed or everyone or now - noticed > GRACE_S:  # rank 0 may be about to fail with a message
                        self.end(states, failed, silent)
        except RuntimeError:  # nobody reaches the store, so the first rank of each machine speaks
            if not self.finished.is_set():
                gone = "has lost the store of the ranks: rank 0's machine, or its launcher, is gone"
                self.leave(1, f"rank {self.rank} {gone}")

    def states(self) -> list[str]:
        return [state.decode() for state in self.store.multi_get(self.keys)]

    def end(self, states: list[str], failed: list[int], silent: list[int]) -> None:
        """Say on one rank what is wrong. Leave when all ranks know it: torchrun stops the others when one leaves."""
        if failed:
            state, code, message = states[failed[0]].split(" ", 2)
            if state == "failed" and failed[0] != 0:  # the message of one that has "ended" names a rank already
                message = f"rank {failed[0]}: {message}"
        else:
            code, message = "1", f"rank {listed(silent)} gave no sign of life for {SILENT_S} seconds"
        speaker = min(set(range(self.size)) - set(silent))
        if self.rank == speaker:
            self.say(message)
        with contextlib.suppress(RuntimeError):  # rank 0 may serve the store, and have left
            self.store.set(self.keys[self.rank], f"ended {code} {message}")
            self.wait_for_all("ended", silent)
            time.sleep(TICK_S if self.rank == 0 else 0)  # for the others to read that all have ended
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
