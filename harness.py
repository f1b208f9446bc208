"""Tasks of EleutherAI's lm-evaluation-harness: its requests answered by our models, in batches.

It needs lm-eval (`requirements-eval.txt`), so the command lines import this file only when tasks are asked for.
"""

import contextlib
import difflib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from decoding import Sampling, read_prompts, token_logprobs
from generate import Row, Timing, run_batch, setup_caches
from model import Transformer
from tokenizer import Tokenizer
from tp import full_logits

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}  # of a batch: more do not make a forward faster
MOST_ROWS = 64


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
    """Requests (context, continuation) with the same context put together, the longest first.

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
    return sorted(questions.values(), key=lambda question: -question.length)


@torch.inference_mode()
def score(model: Transformer, questions: list[Question]) -> Iterator[tuple[int, float, bool]]:
    """(request number, log-likelihood in nats, whether greedy decoding writes it) of each continuation.

    The context is read once. The continuations follow it one after another in the same slots of the cache: what an
    earlier one left beyond a position is not seen from there.
    """
    logits, pos = read_prompts(model, [question.context for question in questions])
    first = full_logits(model, logits).float().log_softmax(-1)
    for which in range(max(len(question.numbers) for question in questions)):
        # a row without so many repeats its last
        targets, is_there = padded([question.continuations[: which + 1][-1] for question in questions], model.device)
        logprobs = [first.gather(1, targets[:, :1])]
        likeliest = [first.argmax(-1, keepdim=True) == targets[:, :1]]
        if targets.shape[1] > 1:
            places = pos + torch.arange(targets.shape[1] - 1, device=pos.device)
            places = places.clamp(max=len(model.slots) - 1)  # of padding
            found = token_logprobs(model, targets[:, :-1], places, targets[:, 1:])
            logprobs.append(found[0])
            likeliest.append(found[1])
        sums = torch.cat(logprobs, 1).where(is_there, 0).sum(1).tolist()
        is_greedy = (torch.cat(likeliest, 1) | ~is_there).all(1).tolist()
        for question, total, greedy in zip(questions, sums, is_greedy, strict=True):
            if which < len(question.numbers):
                yield question.numbers[which], total, greedy


def padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of any lengths as ids [B, S], and where they are the row's own [B, S]."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]


class Adapter(TemplateLM):
    """A model and its tokenizer as the harness sees them; tokens go in and come out as with its own HFLM.

    max_length: tokens that the model reads at most. batch_size: None: as many rows as make a good forward.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, name: str, max_length: int, batch_size: int | None = None
    ):
        super().__init__()
        self.model, self.words, self.name = model, tokenizer, name  # `tokenizer` would be probed by the base class
        self.max_length, self.batch_size = max_length, batch_size
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
        text = self.words.render_chat(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()  # which the answer goes on with
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.prefix)
        return self.words.encode(string, add_special_tokens)

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False, **_) -> list[tuple]:
        self.asked = True
        questions = grouped([(context, continuation) for _, context, continuation in requests], self.max_length)
        answers = [None] * len(requests)
        with tqdm(total=len(requests), desc="Scoring", unit="request", disable=disable_tqdm or None) as progress:
            while questions:
                n_rows = self.rows_of(questions[0].length)
                batch, questions = questions[:n_rows], questions[n_rows:]
                setup_caches(self.model, len(batch), batch[0].length + 1)
                for number, total, greedy in score(self.model, batch):
                    answers[number] = (total, greedy)
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
                    progress.update()
        return answers

    def rows_of(self, length: int) -> int:
        if self.batch_size is not None:
            return self.batch_size
        return max(1, min(MOST_ROWS, TOKENS_AT_ONCE.get(self.model.device.type, 2048) // length))

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
        settings: dict[str, Sampling] = {}
        waiting: dict[str, list[tuple[int, Row]]] = {}  # rows of one batch are sampled alike
        for number, request in enumerate(requests):
            context, arguments = request.args
            kwargs = normalize_gen_kwargs(arguments, 256)
            key = str(sorted(arguments.items(), key=str))
            temperature = kwargs.get("temperature", 1.0) if kwargs["do_sample"] else 0.0
            settings[key] = Sampling(temperature, kwargs.get("top_k", 0), kwargs.get("top_p", 1.0))
            room = self.max_length - kwargs["max_gen_toks"]
            if room < 1:
                raise ValueError(
                    f"a task asks for {kwargs['max_gen_toks']} new tokens, and the window has {self.max_length}; "
                    "use a larger --max_seq_length"
                )
            ids = self.words.encode(context, self.words.bos_id is None or not context.startswith(self.prefix))[-room:]
            row = Row(ids, self.words, kwargs["max_gen_toks"], [stop for stop in kwargs["until"] if stop], False)
            row.eos_ids = self.words.declared_eos_ids  # HFLM knows no others
            waiting.setdefault(key, []).append((number, row))
        with tqdm(total=len(requests), desc="Generating", unit="request", disable=disable_tqdm or None) as progress:
            for key, rows in waiting.items():
                rows.sort(key=lambda each: -len(each[1].prompt))
                while rows:
                    n_rows = self.rows_of(len(rows[0][1].prompt) + rows[0][1].max_new_tokens)
                    batch, rows = rows[:n_rows], rows[n_rows:]
                    longest = max(len(row.prompt) + row.max_new_tokens for _, row in batch)
                    setup_caches(self.model, len(batch), longest)
                    run_batch(self.model, [row for _, row in batch], settings[key], Timing(), 0.0, lambda *_: None)
                    for number, row in batch:
                        texts[number] = row.stream.text
                        self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                    progress.update(len(batch))
        return texts


# ---------------------------------------------------------------- tasks


def run_tasks(adapter: Adapter, tasks: list[str], include_path: str | None, seed: int, **options) -> dict:
    """What the harness finds. options: of `lm_eval.simple_evaluate`.

    Raises ValueError on a task that is not known, whose file is malformed or whose data cannot be had.
    """
    manager = task_manager(tasks, include_path)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        return simple_evaluate(
            adapter,
            tasks=tasks,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
            **seeds,
            **options,
        )
    except Exception as error:
        if adapter.asked:
            raise
        for name in tasks:
            with data_of(name):
                manager.load([name])
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
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks)) or "nothing like it"
            raise ValueError(f"lm-eval has no task {name!r}, but {near}; --include_path adds tasks of your own")
    return manager


@contextlib.contextmanager
def data_of(task: str, advice: str = "") -> Iterator[None]:
    """Turn what goes wrong in the block, where a task is loaded, into a ValueError that names it."""
    try:
        yield
    except Exception as error:  # of many libraries: no network, no such data, a mistake in the task's file
        own = f"give a task of your own with --include_path{advice}"
        raise ValueError(f"the data of task {task} cannot be had ({_line(error)}); {own}") from None


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
