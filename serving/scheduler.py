"""Continuous batching: the rows of one cache are shared by tasks that come and go while others run.

What a task draws depends on its own prompt, seed and settings alone. Each pass computes either the chunk of one prompt
or one step of rows that do not look at each other; chunks begin at fixed positions; and the operators for a CPU give a
row the same numbers whatever stands beside it, in bfloat16, int8 and int4.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from engine.cache import copy_prefix, holds, prefix_length, shared_prefix
from engine.compile import compile_step
from engine.decode import PREFILL_CHUNK, chunk_end, least_chunk
from engine.engine import Engine
from engine.request import Request, Timing
from engine.sampling import NO_TOKEN, Sampling, draw, next_token, require_finite, seed_row
from engine.speculation.drafters import PromptLookup
from engine.speculation.guess_length import AdaptiveLength, FixedLength
from engine.speculation.speculative import Speculation, Text
from kernels import cpu
from layers.fastest import rounds_each_row, widens_weights
from layers.packed import FEW
from model import CacheView, Transformer
from tp import full_logits

CHUNK = {"amx": 256, "avx512": 128, "cuda": 512}  # prompt tokens of a pass: about two steps of all rows
SMALL_CHUNK = 32  # of slower processors
PANEL_CHUNK = 48  # ... where each pass widens the weights of bfloat16, at a cost that its tokens share
GREEDY = Sampling(temperature=0)
GPU_ROWS = 64  # of a step: our kernels take no more; on a CPU FEW, because more are computed by other operators

Processor = Callable[[Tensor, list[int]], Tensor]  # logits [V] in float32, and the new ids so far -> logits


class TokenLogprobs(NamedTuple):
    """log p of a new token in nats, before processors, temperature and the like; and the likeliest ids with theirs."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Task:
    """A request with how its tokens are drawn, and what became of it.

    processors: called once a token, in order. n_logprobs: how many of the likeliest tokens to tell of, None: nothing.
    """

    request: Request
    sampling: Sampling
    seed: int = 0
    processors: Sequence[Processor] = ()
    n_logprobs: int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of each new token
    cached_tokens: int = 0  # of the prompt, that were not read again
    error: Exception | None = None  # that ended it
    row: int | None = None  # of the cache
    n_read: int = 0  # tokens of the prompt that the row holds
    speculation: Speculation | None = None  # whose drafter knows its text
    length: FixedLength | AdaptiveLength | None = None  # of its guesses

    @property
    def is_plain(self) -> bool:
        """Whether its tokens follow from the logits and the sampling, and nobody asks for more."""
        return self.n_logprobs is None and not self.processors

    @property
    def last(self) -> tuple[int, int]:
        """The last token, which the cache does not hold yet, and its position."""
        return self.request.token_ids[-1], len(self.request.prompt) + len(self.request.token_ids) - 1


def step_rows(model: Transformer, tokens: Tensor, pos: Tensor, cache: CacheView) -> tuple[Tensor, Tensor]:
    """Logits [B, V] after tokens [B, 1] at pos [B, 1], and the likeliest token [B] by each row of them."""
    logits = model(tokens, pos, cache)
    return logits[:, -1], next_token(model, logits, pos, cache, GREEDY)[:, -1]


class Scheduler:
    """Tasks, waiting, reading their prompts one at a time, or running. Every task belongs to the caller of `submit`.

    n_rows: tasks that run at a time. context: tokens that each may have. A compiled engine has compiled steps. Guesses,
    if the engine looks them up in the text, are made for a task that runs alone: other rows use the processor as well.
    """

    def __init__(self, engine: Engine, n_rows: int, context: int):
        device = engine.model.device
        self.is_cuda = device.type == "cuda"
        engine.reserve(n_rows + self.is_cuda, context)  # the last row of a GPU's is for padding
        self.engine, self.context, self.step_rows = engine, context, step_rows
        if engine.is_compiled:  # on a CPU one form serves any number of rows, on a GPU each is a graph
            self.step_rows = compile_step(step_rows, device, any_length=not self.is_cuda)
        blocks, ranks = engine.model.layers, engine.model.ranks
        small = PANEL_CHUNK if widens_weights(blocks) else SMALL_CHUNK
        self.chunk = CHUNK.get("cuda" if self.is_cuda else cpu.isa(), small)
        # alone, a prompt is read faster in larger chunks, if that changes it in no stage
        is_exact = rounds_each_row(blocks) and (ranks is None or ranks.n_stage == 1)
        self.chunk_alone = max(PREFILL_CHUNK // self.chunk, 1) * self.chunk if is_exact else self.chunk
        self.waiting: deque[Task] = deque()
        self.reading: Task | None = None
        self.running: list[Task] = []
        self.free = list(range(n_rows))  # the one that was left longest ago first
        self.held: list[list[int]] = [[] for _ in range(n_rows)]  # ids of whole chunks of a prompt, in each row
        self.timing, self.speculation = Timing(), engine.speculation

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Call the functions in every form, so that nothing compiles while somebody waits."""
        model, cache, n_rows = self.engine.model, self.engine.cache, len(self.held)
        rows, times = torch.arange(n_rows, device=model.device), 1
        prompt = torch.arange(self.chunk, device=model.device)[None]
        # never one tensor for two arguments: a form is compiled for that alone
        self.engine.forward(model, prompt, prompt.clone(), cache.view(rows[:1], prefix_length(cache, self.chunk)))
        sizes, lengths = [1, 2][:n_rows], {prefix_length(cache, self.context)}
        if self.is_cuda:  # a graph warms up, is captured, then replayed
            sizes, times = [1 << i for i in range((n_rows - 1).bit_length() + 1)], 3
            lengths = {prefix_length(cache, length) for length in range(1, self.context + 1)}
        for size in sizes:
            some = torch.arange(size, device=model.device) % n_rows
            for length in lengths:
                for _ in range(times):
                    self.step_rows(model, some[:, None] * 0, some[:, None] * 0, cache.view(some, length))
        if self.speculation is not None:
            self.speculation.drafter.begin(model, [[0, 0]])
            last = torch.full_like(rows[:1, None], self.context - 1)
            text = Text(last.repeat(1, 2) * 0, last, last + 1, self.context, rows[:1])
            self.speculation.measure(model, cache, text, GREEDY)

    # ------------------------------------------------------------ tasks come and go

    def submit(self, task: Task) -> None:
        """Let a task wait for a row. Raises ValueError if it needs more positions than a row has."""
        request = task.request
        if request.length > self.context:
            raise ValueError(
                f"the prompt's {len(request.prompt)} tokens and {request.max_new_tokens} new ones are more than the "
                f"context of {self.context}"
            )
        self.waiting.append(task)

    def cancel(self, task: Task) -> None:
        """Forget a task, wherever it stands; its row is free at once."""
        if task in self.waiting:
            self.waiting.remove(task)
        elif task.row is not None:
            self.finish(task)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.reading or self.running)

    def can_admit(self) -> bool:
        return bool(self.waiting and self.free and self.reading is None)

    def admit(self) -> None:
        """Give the first task that waits a row, with as much of its prompt as any row holds."""
        task = self.waiting.popleft()
        prompt, cache = task.request.prompt, self.engine.cache
        shared = [self.reusable(row, prompt) for row in range(len(self.held))]
        most = max(shared)
        source = next((row for row in self.free if shared[row] == most), None)  # taking it over needs no copy
        row = self.free[0] if source is None else source
        if source is None:
            copy_prefix(cache, torch.tensor([shared.index(most)]), torch.tensor([row]), most)
        self.free.remove(row)
        self.held[row] = prompt[:most]
        if not task.sampling.is_greedy:
            seed_row(cache, row, task.seed)
        task.row, task.n_read, task.cached_tokens = row, most, most
        if self.speculation is not None and task.is_plain:
            task.speculation = replace(self.speculation, drafter=PromptLookup())
            task.speculation.drafter.begin(self.engine.model, [prompt])
        self.reading = task

    def reusable(self, row: int, prompt: list[int]) -> int:
        """Tokens of a prompt that need not be read, of those that a row holds: whole chunks, and never the last few."""
        left = least_chunk(self.engine.model.device)
        n_chunks = min(shared_prefix(self.held[row], prompt), max(len(prompt) - left, 0)) // self.chunk
        return n_chunks * self.chunk if holds(self.engine.cache, row, n_chunks * self.chunk) else 0

    def finish(self, task: Task) -> None:
        """The task has ended: its row is free."""
        if task is self.reading:
            self.reading = None
        else:
            self.running.remove(task)
        self.free.append(task.row)
        task.row = None

    # ------------------------------------------------------------ passes of the model

    @torch.inference_mode()
    def step(self) -> list[tuple[Task, str]]:
        """One chunk of a prompt, then one step of all that run; new text of tasks, and those that have ended."""
        began, events, running = time.perf_counter(), [], list(self.running)
        if self.can_admit():
            self.admit()
        if self.reading is not None:
            events += self.read_chunk(self.reading)
            self.timing.prefill_s += time.perf_counter() - began
            if self.timing.time_to_first_token_s is None and self.reading is None:
                self.timing.time_to_first_token_s = self.timing.prefill_s
        began, most = time.perf_counter(), GPU_ROWS if self.is_cuda else FEW
        if len(running) == 1 and running[0].speculation is not None:
            events += self.guess(running[0])
        else:
            for i in range(0, len(running), most):
                events += self.run(running[i : i + most])
        self.timing.decode_s += time.perf_counter() - began
        return events

    def read_chunk(self, task: Task) -> list[tuple[Task, str]]:
        """Read the next chunk of a prompt; after the last one draw the first token."""
        model, cache, prompt = self.engine.model, self.engine.cache, task.request.prompt
        size = self.chunk if self.running else self.chunk_alone
        begin, end = task.n_read, chunk_end(task.n_read, len(prompt), size, model.device)
        tokens = torch.tensor([prompt[begin:end]], device=model.device)
        pos = torch.arange(begin, end, device=model.device)[None]
        view = cache.view(self.rows_of([task]), prefix_length(cache, end))
        hidden = self.engine.forward(model, tokens, pos, view)
        task.n_read = end
        self.timing.prompt_tokens += end - begin
        if end - begin == self.chunk or self.chunk_alone > self.chunk:
            self.held[task.row] += prompt[begin : end - (end - begin) % self.chunk]
        if end < len(prompt):
            return []
        self.reading = None
        self.running.append(task)
        return self.draw([task], model.logits(hidden[:, -1:])[:, 0], [len(prompt) - 1])

    def run(self, tasks: list[Task]) -> list[tuple[Task, str]]:
        """One step of these tasks."""
        model, cache = self.engine.model, self.engine.cache
        tokens, places = zip(*(task.last for task in tasks), strict=True)
        padding = [0] * self.n_padding(len(tasks))
        tokens, pos = (torch.tensor([*each, *padding], device=model.device)[:, None] for each in (tokens, places))
        view = cache.view(self.rows_of(tasks, len(padding)), prefix_length(cache, max(places) + 1))
        logits, likeliest = (each[: len(tasks)] for each in self.step_rows(model, tokens, pos, view))
        self.timing.count(len(tasks), 0)
        self.timing.decoded_tokens += len(tasks)
        if all(task.sampling.is_greedy and task.is_plain for task in tasks):
            return self.hand_out(tasks, likeliest.tolist())
        return self.draw(tasks, logits, places)

    def guess(self, task: Task) -> list[tuple[Task, str]]:
        """One round of speculation for the only task that runs."""
        request, place, drafter = task.request, task.last[1], task.speculation.drafter
        recent = [*request.prompt[-1:], *request.token_ids][-2:]
        recent, pos = (torch.tensor([each], device=self.engine.model.device) for each in (recent, [place]))
        text = Text(recent, pos, pos + request.length - place, place + 1, self.rows_of([task]))
        how = (self.engine.model, self.engine.cache, text)
        if task.length is None:
            task.length = task.speculation.chooser(*how, task.sampling).at_most(FEW - 1)
        grades, began = drafter.grades(), time.perf_counter()
        k = task.length.choose(grades, 0, request.length - 1 - place)
        [[*ids, n]] = task.speculation.round(*how, k, task.sampling)[0].tolist()
        task.length.learn(grades, k, 0, [n], time.perf_counter() - began)
        self.timing.count(1, k)
        self.timing.decoded_tokens += n
        return [(task, self.push(task, ids[:n], k))]

    def n_padding(self, n_rows: int) -> int:
        """Rows to add to a step, so that a GPU captures steps of few sizes."""
        return (1 << (n_rows - 1).bit_length()) - n_rows if self.is_cuda else 0

    def rows_of(self, tasks: list[Task], n_padding: int = 0) -> Tensor:
        rows = [*(task.row for task in tasks), *[len(self.held)] * n_padding]
        return torch.tensor(rows, device=self.engine.model.device)

    # ------------------------------------------------------------ tokens

    def draw(self, tasks: list[Task], logits: Tensor, places: Sequence[int]) -> list[tuple[Task, str]]:
        """Draw what follows the places of tasks, by logits [B, V]; those that are drawn alike, together."""
        is_plain = all(task.is_plain for task in tasks)
        needed = [task.sampling.candidates if is_plain else None for task in tasks]
        raw = full_logits(self.engine.model, logits, None if None in needed else max(needed))
        logits = raw if is_plain else self.process(tasks, raw)
        rows, pos = self.rows_of(tasks), torch.tensor(places, device=logits.device)[:, None]
        tokens, alike = [NO_TOKEN] * len(tasks), {}
        for i, task in enumerate(tasks):
            alike.setdefault(task.sampling, []).append(i)
        for sampling, some in alike.items():
            part = slice(None) if len(some) == len(tasks) else some  # picking rows copies their logits
            view = self.engine.cache.view(rows[part])
            drawn = draw(self.engine.model, logits[part][:, None], pos[part], view, sampling)
            for i, token in zip(some, drawn.flatten().tolist(), strict=True):
                tokens[i] = token
        for task, token, row in zip(tasks, tokens, raw, strict=True):
            if task.n_logprobs is not None and token != NO_TOKEN:
                task.logprobs.append(logprobs_of(row, token, task.n_logprobs))
        return self.hand_out(tasks, tokens)

    def hand_out(self, tasks: list[Task], tokens: list[int]) -> list[tuple[Task, str]]:
        """Give each task its new token; the new text, and the tasks that end."""
        events = [(task, self.push(task, [token])) for task, token in zip(tasks, tokens, strict=True)]
        return [(task, text) for task, text in events if text or task.request.finish_reason]

    def process(self, tasks: list[Task], logits: Tensor) -> Tensor:
        """Logits in float32 after the processors of each task; one that fails ends its task alone."""
        logits = logits.float().clone()
        for task, row in zip(tasks, logits, strict=True):
            try:
                for processor in task.processors:
                    row.copy_(processor(row, task.request.token_ids))
            except Exception as error:  # of a library that follows a grammar, or of the grammar
                task.error = error
        return logits

    def push(self, task: Task, ids: list[int], proposed: int = 0) -> str:
        """Give a task its new tokens, of a round with so many proposals; the text that can be shown now."""
        request, text = task.request, ""
        if task.error is None:
            try:
                require_finite(self.engine.model, NO_TOKEN not in ids)
                is_round = task.speculation is not None and request.token_ids  # the first token is the prompt's
                text = request.push_round(ids, proposed) if is_round else request.push(ids)
            except ValueError as error:
                task.error = error
        if task.error is not None:
            request.finish_reason = "error"
            text = request.stream.finish()
        if task.speculation is not None:
            task.speculation.drafter.extend([ids])
        if request.finish_reason:
            self.finish(task)
            self.timing.requests.append(request)
        return text


def logprobs_of(logits: Tensor, token: int, n: int) -> TokenLogprobs:  # [V]
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(n)
    return TokenLogprobs(logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))


def run_tasks(scheduler: Scheduler, tasks: list[Task], timing: Timing) -> Iterator[tuple[Request, str]]:
    """Run tasks until all have ended; yield each piece of text with its request as it is made, and each end.

    Raises the error that ends one of them.
    """
    scheduler.timing = timing
    for task in tasks:
        scheduler.submit(task)
    while scheduler.has_work:
        for task, text in scheduler.step():
            if task.error is not None:
                raise task.error
            yield task.request, text
