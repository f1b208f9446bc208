"""The thread that runs the scheduler. The event loop hands it jobs, and gets their answers back a piece at a time."""

import asyncio
import contextlib
import itertools
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch

from cli import in_words
from ranks import Ranks, shared, speaks
from serving.interface.fields import RequestError
from serving.interface.jobs import Job, Served, task_of
from serving.metrics import Metrics
from serving.scheduler import Scheduler, Task

INTERVAL = 1 / 60  # seconds, as of a screen: each piece that is sent wakes the event loop and a client


def failure(error: Exception) -> RequestError:
    """What a client is told of an error while its answer is made: nothing of how the server is made."""
    if isinstance(error, RequestError):
        return error
    traceback.print_exception(error)
    words = in_words(error) or f"an error of the kind {type(error).__name__}"
    return RequestError(f"the server failed: {words}", status=500)


@dataclass(frozen=True)
class Piece:
    """What one step, or some, brought for an answer."""

    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple = ()  # one a token of `ids`, if asked for
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of those of the prompt
    error: RequestError | None = None
    time: float = 0.0  # at which it was made

    @property
    def ends(self) -> bool:
        return self.finish_reason is not None or self.error is not None


def joined(pieces: list[Piece]) -> Piece:
    """Pieces of an answer, one after another, as one."""
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        ids=tuple(token for piece in pieces for token in piece.ids),
        logprobs=tuple(each for piece in pieces for each in piece.logprobs),
    )


@dataclass
class Place:
    """Where an answer is waited for. since: the time of its last token, before the first that of its order."""

    arrived: asyncio.Queue
    since: float
    has_begun: bool = False


class Worker(threading.Thread):
    """Steps the scheduler as long as there is work. With ranks, one on each: they obey the orders of rank 0 together.

    prepare: loads the model. All that computes runs in this thread alone: compiled functions and CUDA graphs belong to
    a thread, and once two threads have computed, the threads of OpenMP, too many then, no longer wait awake.
    """

    def __init__(self, prepare: Callable[[], tuple[Scheduler, Served]], max_queue: int, ranks: Ranks | None = None):
        super().__init__(daemon=True, name="scheduler")
        self.prepare, self.max_queue, self.ranks = prepare, max_queue, ranks
        self.ready: Future[None] = Future()  # from then on there are a scheduler and what it serves
        self.orders: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        # of the event loop
        self.metrics = Metrics()
        self.count = itertools.count()
        self.places: dict[int, Place] = {}
        # of the thread
        self.tasks: dict[int, Task] = {}
        self.numbers: dict[Task, int] = {}
        self.n_made: dict[int, int] = {}  # tokens that pieces hold
        self.made: dict[int, list[Piece]] = {}  # that are not sent yet
        self.sent = 0.0  # when pieces were, the last time

    # ------------------------------------------------------------ in the event loop

    def submit(self, jobs: list[Job]) -> "Answers":
        """Queue the jobs; a refusal if there is no room in the queue."""
        most = self.n_rows + self.max_queue
        if len(jobs) > most:
            raise RequestError(f"{len(jobs)} answers are asked for; this server takes at most {most}", "n")
        if len(self.places) + len(jobs) > most:
            message = f"the queue is full: {len(self.places)} answers of at most {most} are in the making"
            raise RequestError(message, code="queue_full", status=503, Retry_After="1")
        self.loop = asyncio.get_running_loop()
        numbers, arrived = list(itertools.islice(self.count, len(jobs))), asyncio.Queue()
        for number, job in zip(numbers, jobs, strict=True):
            self.places[number] = Place(arrived, time.perf_counter())
            self.orders.put(("submit", number, job))
        return Answers(self, numbers, arrived)

    def cancel(self, number: int) -> None:
        if self.places.pop(number, None) is not None:
            self.orders.put(("cancel", number, None))

    def cut(self) -> None:
        """End every answer where it is, because the server ends."""
        pieces = [(number, Piece(error=RequestError("the server ends", status=503))) for number in self.places]
        for number in self.places:
            self.orders.put(("cancel", number, None))
        self.hand_out(pieces)

    def stop(self) -> None:
        """End the thread."""
        self.orders.put(("stop", 0, None))
        self.join()

    def read_metrics(self) -> bytes:
        running = len(self.scheduler.running)
        self.metrics.rows.set(self.n_rows)
        self.metrics.running.set(running)
        self.metrics.waiting.set(max(len(self.places) - running, 0))
        return self.metrics.text()

    def hand_out(self, pieces: list[tuple[int, Piece]]) -> None:
        for number, piece in pieces:
            place = self.places.get(number)
            if place is not None:  # nobody waits for one that has been cancelled
                self.note(piece, place)
                place.arrived.put_nowait((number, piece))
                if piece.ends:
                    del self.places[number]

    def note(self, piece: Piece, place: Place) -> None:
        """Count what the piece brings."""
        metrics = self.metrics
        if piece.ids:
            seconds = piece.time - place.since
            (metrics.between if place.has_begun else metrics.first).observe(seconds / len(piece.ids))
            metrics.new_tokens.inc(len(piece.ids))
            place.since, place.has_begun = piece.time, True
        if piece.finish_reason:
            metrics.prompt_tokens.inc(piece.prompt_tokens)
            metrics.cached_tokens.inc(piece.cached_tokens)

    # ------------------------------------------------------------ in the thread

    def run(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP keeps the number for each thread apart
        try:
            self.load()
        except BaseException as error:
            self.ready.set_exception(error)
        else:
            self.ready.set_result(None)
            self.follow()

    def load(self) -> None:
        self.scheduler, self.served = self.prepare()
        self.n_rows = len(self.scheduler.held)
        self.scheduler.warm_up()

    def follow(self) -> None:
        """Do what is ordered, until that is to stop."""
        while self.obey(shared(self.ranks, self.next_orders)):
            if self.scheduler.has_work:
                self.keep(self.step())

    def next_orders(self) -> list[tuple]:
        """The orders that have come; one is waited for if nothing else is to be done."""
        orders = [] if self.scheduler.has_work else [self.orders.get()]
        while not self.orders.empty():
            orders.append(self.orders.get())
        return orders

    def obey(self, orders: list[tuple]) -> bool:
        """Submit and cancel as ordered; whether to go on."""
        for order, number, job in orders:
            if order == "stop":
                return False
            if order == "submit":
                self.begin(number, job)
            elif number in self.tasks:  # it may just have ended
                self.scheduler.cancel(self.forget(number))
        return True

    def begin(self, number: int, job: Job) -> None:
        try:
            task = task_of(job, self.served)
            self.scheduler.submit(task)
        except Exception as error:  # which ends this answer alone
            self.send([(number, Piece(error=failure(error)))])
        else:
            self.tasks[number], self.numbers[task], self.n_made[number] = task, number, 0

    def forget(self, number: int) -> Task:
        task = self.tasks.pop(number)
        del self.numbers[task], self.n_made[number]
        return task

    def step(self) -> list[tuple[int, Piece]]:
        """The pieces of one step. An error of the model ends every answer that has begun, and not the server."""
        try:
            moved = self.scheduler.step()
        except Exception as error:
            error = failure(error)
            numbers = list(self.tasks)
            for number in numbers:
                self.scheduler.cancel(self.forget(number))
            return [(number, Piece(error=error)) for number in numbers]
        return [self.piece(task, text) for task, text in moved]

    def piece(self, task: Task, text: str) -> tuple[int, Piece]:
        """A copy of what is new, because the thread goes on with the task."""
        number, request = self.numbers[task], task.request
        new = slice(self.n_made[number], len(request.token_ids))
        logprobs = () if task.n_logprobs is None else tuple(task.logprobs[new])
        ids, now = tuple(request.token_ids[new]), time.perf_counter()
        error = task.error and failure(task.error)
        prompt = len(request.prompt), task.cached_tokens
        piece = Piece(text, ids, logprobs, request.finish_reason, *prompt, error, now)
        self.n_made[number] = new.stop
        if piece.ends:
            self.forget(number)
        return number, piece

    def keep(self, pieces: list[tuple[int, Piece]]) -> None:
        """Send the pieces together with later ones, soon; at once if an answer begins or ends."""
        is_urgent = False
        for number, piece in pieces:
            is_urgent |= piece.ends or self.n_made[number] == len(piece.ids)
            self.made.setdefault(number, []).append(piece)
        if is_urgent or time.perf_counter() > self.sent + INTERVAL:
            self.send([(number, joined(each)) for number, each in self.made.items()])
            self.made, self.sent = {}, time.perf_counter()

    def send(self, pieces: list[tuple[int, Piece]]) -> None:
        if pieces and speaks(self.ranks):
            with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody waits
                self.loop.call_soon_threadsafe(self.hand_out, pieces)


class Answers:
    """The pieces of several jobs, each with the place of its job, as they come; `close` ends what is left of them."""

    def __init__(self, worker: Worker, numbers: list[int], arrived: asyncio.Queue):
        self.worker, self.numbers, self.arrived = worker, numbers, arrived

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        left = set(self.numbers)
        while left:
            number, piece = await self.arrived.get()
            if piece.ends:
                left.remove(number)
            yield self.numbers.index(number), piece

    def close(self) -> None:
        for number in self.numbers:
            self.worker.cancel(number)
