"""The processes that torchrun starts: how they meet, exchange values, and notice that one of them is gone."""

import contextlib
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process and the others that hold parts of its model; all must call the methods in the same order."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    watch: "Watch"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

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
        return ready(collectives.all_reduce(x, "sum", dist.group.WORLD))

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's values."""
        return ready(collectives.broadcast(x, 0, dist.group.WORLD))

    def gather(self, x: Tensor) -> Tensor:  # [...] -> [ranks, ...]
        parts = collectives.all_gather_single(x.contiguous(), 0, dist.group.WORLD)
        return ready(parts).view(self.size, *x.shape)

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


@contextlib.contextmanager
def init_tp() -> Iterator[Ranks | None]:
    """The ranks that torchrun started, for the length of a `with` block; None where this process is alone.

    An error in the block ends every rank, with one message, from rank 0: a person's mistake with exit code 2, another
    error with 1. A rank that dies ends the others too.
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
            # no timeout: a person may take hours to type the next line, and the watch notices dead ranks
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(days=365))
        local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
        yield Ranks(rank, size, *local, watch)
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
