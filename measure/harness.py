"""Tasks of EleutherAI's lm-evaluation-harness: its requests answered by our models, in batches.

It needs lm-eval (`requirements-eval.txt`), so the command lines import this file only when tasks are asked for.
"""

import contextlib
import difflib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from engine.cache import copy_prefix
from engine.decode import read_prompts
from engine.engine import Engine
from engine.request import Request, Timing, run_batch
from engine.sampling import Sampling
from measure.scoring import logprobs_of, token_logprobs
from text.tokenizer import Tokenizer
from tp import full_logits

CONTINUE_HERE = "CONTINUE-THE-TEXT-HERE "  # stands at the end of a message while it is rendered
# what a task may ask of generation that is not ours to do, and the values that ask for nothing
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "use_cache": True}
BATCH_SIZES = {"cpu": (16, 4, 1), "cuda": (64, 16, 4, 1)}  # few, because each may be compiled apart
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}  # of a batch: more do not make a forward faster
GENERATING = 4  # times as many, because a step reads only one token of each row


@dataclass
class Question:
    """A context and the continuations that are scored after it, in ids, each with the number of its request."""

    context: list[int]
    continuations: list[list[int]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens that the model reads at most: the last of a continuation is only scored."""
        return len(self.context) + max(map(len, self.continuations)) - 1


def grouped(requests: list[tuple[list[int], list[int]]], max_length: int) -> list[Question]:
    """Requests (context, continuation) with the same context put together.

    The model reads at most max_length tokens; contexts are cut from the left. Raises ValueError where a continuation
    alone is longer, or is empty.
    """
    questions: dict[tuple[int, ...], Question] = {}
    for number, (context, continuation) in enumerate(requests):
        if not 1 <= len(continuation) <= max_length:
            raise ValueError(
                f"a continuation to score has {len(continuation)} tokens; from 1 to {max_length} fit the window"
            )
        kept = tuple((context + continuation)[-(max_length + 1) :][: -len(continuation)])
        question = questions.setdefault(kept, Question(list(kept)))
        question.continuations.append(continuation)
        question.numbers.append(number)
    return list(questions.values())


@torch.inference_mode()
def score(engine: Engine, questions: list[Question], n_rows: int) -> Iterator[tuple[int, float, bool]]:
    """(request number, log-likelihood in nats, whether greedy decoding writes it) of each continuation.

    The engine's cache has 2 n_rows rows. Each context is read once, into the first of them. Continuations of like
    length then share a forward, n_rows at a time, each in a row that begins as a copy of its context's.
    """
    model, cache, forward = engine.model, engine.cache, engine.forward
    contexts = [question.context for question in questions]
    # a batch of one row would be compiled apart
    contexts = contexts * 2 if len(contexts) == 1 < n_rows else contexts
    rows = torch.arange(len(contexts), device=model.device)
    logits, pos = read_prompts(model, cache, contexts, 0, forward, rows)
    first = full_logits(model, logits)
    pairs = [
        (continuation, owner, number)
        for owner, question in enumerate(questions)
        for continuation, number in zip(question.continuations, question.numbers, strict=True)
    ]
    pairs.sort(key=lambda pair: -len(pair[0]))
    for part in evenly(pairs, n_rows):
        some = part * 2 if len(part) == 1 < n_rows else part
        owners = torch.tensor([owner for _, owner, _ in some], device=model.device)
        targets, is_there = padded([continuation for continuation, _, _ in some], model.device)
        logprobs, is_greedy = (each[:, None] for each in logprobs_of(first[owners], targets[:, 0]))
        if targets.shape[1] > 1:
            copies = n_rows + torch.arange(len(owners), device=model.device)  # rows after those of the contexts
            copy_prefix(cache, owners, copies, int(pos.max()))
            places = pos[owners] + torch.arange(targets.shape[1] - 1, device=pos.device)
            places = places.clamp(max=cache.n_slots - 2)  # of padding
            found = token_logprobs(model, cache, targets[:, :-1], places, targets[:, 1:], 0, forward, copies)
            logprobs, is_greedy = torch.cat((logprobs, found[0]), 1), torch.cat((is_greedy, found[1]), 1)
        sums = logprobs.where(is_there, 0).sum(1).tolist()
        greedy = (is_greedy | ~is_there).all(1).tolist()
        yield from ((number, *found) for (_, _, number), *found in zip(part, sums, greedy, strict=False))


def evenly(items: list, most: int) -> Iterator[list]:
    """The items in the fewest parts of at most `most`, as equal as can be."""
    n_parts = -(-len(items) // most)
    for part in range(n_parts):
        yield items[part * len(items) // n_parts : (part + 1) * len(items) // n_parts]


def padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of any lengths as ids [B, S], and where they are the row's own [B, S]."""
    longest = max(map(len, rows))
    longest += longest == 2  # one column to read would be compiled apart
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]


class Adapter(TemplateLM):
    """A model and its tokenizer as the harness sees them; tokens go in and come out as with its own HFLM.

    max_length: tokens that the model reads at most. batch_size: None: as many rows as make a good forward.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        name: str,
        max_length: int,
        batch_size: int | None = None,
    ):
        super().__init__()
        self.engine, self.words, self.name = engine, tokenizer, name  # `tokenizer` would be probed by the base class
        self.max_length, self.batch_size = max_length, batch_size
        kind = "cuda" if engine.model.device.type == "cuda" else "cpu"
        self.sizes, self.tokens_at_once = BATCH_SIZES[kind], TOKENS_AT_ONCE[kind]
        self.prefix = tokenizer.vocabulary()[self.prefix_token_id]
        self.asked = False  # whether a request has come, so that what goes wrong is no matter of tasks

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Stands in for an empty context."""
        return self.eot_token_id if self.words.bos_id is None else self.words.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.words.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without add_generation_prompt the answer goes on with the last message."""
        if add_generation_prompt:
            return self.render_chat(chat_history, True)
        last = chat_history[-1]
        marked = {**last, "content": last["content"] + CONTINUE_HERE}
        before, _, after = self.render_chat([*chat_history[:-1], marked], False).rpartition(CONTINUE_HERE.strip())
        # a template that trims messages has trimmed the mark too, and would have trimmed the message
        return before if after.startswith(" ") else before.rstrip()

    def render_chat(self, messages: list[dict], add_generation_prompt: bool) -> str:
        try:
            return self.words.render_chat(messages, add_generation_prompt)
        except ValueError:  # some templates know no system role
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise
            return self.words.render_chat(others, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.prefix)
        return self.words.encode(string, add_special_tokens)

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False, **_) -> list[tuple]:
        self.asked = True
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        questions = grouped(pairs, self.max_length)
        answers = [None] * len(requests)
        with tqdm(total=len(requests), desc="Scoring", unit="request", disable=disable_tqdm or None) as progress:
            for n_rows, alike in self.alike(questions, lambda question: question.length):
                alike.sort(key=lambda question: -len(question.context))
                for batch in evenly(alike, n_rows):
                    for number, total, greedy in score(self.engine, batch, n_rows):
                        answers[number] = (total, greedy)
                        if requests[number][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
                        progress.update()
        return answers

    def alike(self, items: list, length: Callable, factor: int = 1) -> Iterator[tuple[int, list]]:
        """How many rows to run at a time, and the items for which this is right, the longest first; with caches set
        up. `length` tells how many tokens an item needs; `factor` times as many as usual are taken at once.
        """
        longest_first = sorted(items, key=length, reverse=True)
        for n_rows, some in groupby(longest_first, lambda item: self.rows_of(length(item) / factor)):
            some = list(some)
            yield self.cached_rows(n_rows, length(some[0]) + 2), some

    def rows_of(self, length: float) -> int:
        """The batch size for so many tokens a row."""
        if self.batch_size is not None:
            return self.batch_size
        most = self.tokens_at_once / length
        return next((size for size in self.sizes if size <= most), 1)

    def cached_rows(self, n_rows: int, length: int) -> int:
        """Set up caches; the rows that they have: fewer where memory is short and no batch size was asked for."""
        try:
            self.engine.reserve(2 * n_rows, length)  # a row for each context and one for each continuation
        except ValueError:
            # ranks may have different memory, and must not differ here
            if n_rows == 1 or self.batch_size is not None or self.engine.model.ranks is not None:
                raise
            return self.cached_rows(max(size for size in self.sizes if size < n_rows), length)
        return n_rows

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        self.asked, texts = True, [None] * len(requests)
        # rows of one batch are sampled alike, and as often
        waiting: dict[tuple[Sampling, int], list[tuple[int, Request]]] = {}
        for number, request in enumerate(requests):
            row, sampling = self.row_of(*request.args)
            waiting.setdefault((sampling, row.max_new_tokens), []).append((number, row))
        with tqdm(total=len(requests), desc="Generating", unit="request", disable=disable_tqdm or None) as progress:
            for (sampling, _), rows in waiting.items():
                for n_rows, alike in self.alike(rows, lambda each: each[1].length, GENERATING):
                    for batch in evenly(alike, n_rows):
                        self.generate([row for _, row in batch], n_rows, sampling)
                        for number, row in batch:
                            texts[number] = row.stream.text
                            self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                        progress.update(len(batch))
        return texts

    def row_of(self, context: str, arguments: dict) -> tuple[Request, Sampling]:
        """What a request to generate asks for. Raises ValueError on settings that cannot be met."""
        kwargs = normalize_gen_kwargs(arguments, 256)
        until, budget, do_sample = (kwargs.pop(key) for key in ("until", "max_gen_toks", "do_sample"))
        drawing = {key: kwargs.pop(key) for key in ("temperature", "top_k", "top_p", "min_p") if key in kwargs}
        for key, value in kwargs.items():
            if NEUTRAL.get(key) != value:
                raise ValueError(f"a task asks for generation with {key} {value}, which is not supported")
        if not 1 <= budget < self.max_length:
            raise ValueError(
                f"a task asks for {budget} new tokens, and the window has {self.max_length}; from 1 to "
                f"{self.max_length - 1} fit it (--max_seq_length)"
            )
        # what transformers assumes where a task says nothing
        asked = {"temperature": 1.0, "top_k": 50} | {key: value for key, value in drawing.items() if value is not None}
        sampling = Sampling(**asked) if do_sample else Sampling(temperature=0)
        ids = self.words.encode(context, self.words.bos_id is None or not context.startswith(self.prefix))
        ids = ids[budget - self.max_length :] or [self.prefix_token_id]
        row = Request(ids, self.words, budget, [str(stop) for stop in until if stop != ""], False)
        row.eos_ids = self.words.declared_eos_ids  # HFLM knows no others
        return row, sampling

    def generate(self, rows: list[Request], n_rows: int, sampling: Sampling) -> None:
        """Generate the rows' texts together."""
        if self.engine.is_compiled:  # a batch size of its own would be compiled apart
            size = min(size for size in (*self.sizes, n_rows) if len(rows) <= size <= n_rows)
            rows = rows + [Request(rows[0].prompt[:1], self.words, 1, [], True) for _ in range(size - len(rows))]
        for _ in run_batch(self.engine, rows, sampling, Timing()):
            pass


# ---------------------------------------------------------------- tasks


class Tasks(NamedTuple):
    """What `load_tasks` found: the harness's own objects, and what it keeps them in."""

    manager: TaskManager
    loaded: list[Task | Group]

    def leaves(self) -> list[Task]:
        return list(self.manager.load(self.loaded)["tasks"].values())


def load_tasks(names: list[str], include_path: str | None, advice: str = "") -> Tasks:
    """Tasks and groups of the harness, or of a folder, with their data.

    Raises ValueError on a task that is not known, whose file is malformed or whose data cannot be had; it ends with
    `advice`.
    """
    manager = task_manager(names, include_path)
    found = []
    for name in dict.fromkeys(names):
        with data_of(name, advice):
            some = manager.load([name])
        found += [some["groups"][name]] if name in some["groups"] else some["tasks"].values()
    tasks = Tasks(manager, found)
    try:
        tasks.leaves()
    except ValueError as error:  # a group and its member
        raise ValueError(_line(error)) from None
    return tasks


def run_tasks(adapter: Adapter, tasks: Tasks, seed: int, **options) -> dict:
    """What the harness finds. options: of `lm_eval.simple_evaluate`. Raises ValueError on a mistake in a task."""
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        return simple_evaluate(
            adapter,
            tasks=tasks.loaded,
            task_manager=tasks.manager,
            bootstrap_iters=1000,
            log_samples=False,
            **seeds,
            **options,
        )
    except Exception as error:
        if adapter.asked:
            raise
        raise ValueError(f"the tasks cannot be run: {_line(error)}") from None


def task_manager(tasks: list[str], include_path: str | None) -> TaskManager:
    """The harness's tasks and those in a folder. Raises ValueError if `tasks` are not all among them."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        manager = TaskManager(include_path=include_path)
    except Exception as error:  # a mistake in one of the folder's files
        raise ValueError(f"the tasks in {include_path} cannot be read: {_line(error)}") from None
    for name in tasks:
        if name not in manager.task_index:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks))
            known = f"lm-eval has no task {name!r}" + (f", but {near}" if near else "")
            raise ValueError(f"{known}; --include_path adds tasks of your own")
    return manager


@contextlib.contextmanager
def data_of(task: str, advice: str = "") -> Iterator[None]:
    """Turn what goes wrong in the block, where a task is loaded, into a ValueError that names it."""
    try:
        yield
    except Exception as error:  # of many libraries: no network, no such data, a mistake in the task's file
        own = f"give a task of your own with --include_path{advice}"
        raise ValueError(f"the task {task} or its data cannot be had ({_line(error)}); {own}") from None


def _line(error: Exception) -> str:
    words = (str(error).strip() or "no reason given").splitlines()[0]
    # these say only what was looked for
    return f"{type(error).__name__}: {words}" if isinstance(error, LookupError | TypeError | AttributeError) else words
