"""EleutherAI's lm-evaluation-harness on our models: its requests answered in batches.

The commands import this file only when tasks are asked for, because it needs lm-eval (`requirements-eval.txt`).
"""

from collections.abc import Iterator
from itertools import groupby

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cli import progress
from engine.engine import Engine
from engine.request import Request, Timing
from engine.sampling import Sampling, new_seeds
from measure.scoring import Question, evenly, questions_of, score
from serving.scheduler import Scheduler, Task, run_tasks
from text.tokenizer import Tokenizer

CONTINUE_HERE = "CONTINUE-THE-TEXT-HERE "  # stands at the end of a message while it is rendered
# settings of generation that we do not have, each with the value that changes nothing
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "use_cache": True}
BATCH_SIZES = {"cpu": (16, 4, 1), "cuda": (64, 16, 4, 1)}  # few, because each may be compiled apart
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}  # of a batch: more do not make a forward faster


class Adapter(TemplateLM):
    """A model and its tokenizer as the harness sees them; tokens go in and come out as with its own HFLM.

    max_length: tokens that the model reads at most. batch_size: None: as many rows as make a good forward.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str, max_length: int, batch_size: int | None = None):
        super().__init__()
        self.engine, self.name = engine, name
        self.our_tokenizer = tokenizer  # the base class would look for a Hugging Face one in `tokenizer`
        self.max_length, self.batch_size = max_length, batch_size
        device_type = "cuda" if engine.model.device.type == "cuda" else "cpu"
        self.sizes, self.tokens_at_once = BATCH_SIZES[device_type], TOKENS_AT_ONCE[device_type]
        self.prefix_id = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        self.prefix = tokenizer.vocabulary().get(self.prefix_id)
        self.is_answering = False  # an error while it is answering is ours; every other is one of a task

    # ------------------------------------------------------------ text and ids

    @property
    def eot_token_id(self) -> int | None:
        return self.our_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Stands in for an empty prompt."""
        if self.prefix_id is None:
            raise ValueError(
                "a task scores a text from its first token on, and the tokenizer has neither a BOS nor an EOS token to "
                'stand before it; name one as "bos_token" in tokenizer_config.json, or leave out the task'
            )
        return self.prefix_id

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = self.prefix is None or not string.startswith(self.prefix)
        return self.our_tokenizer.encode(string, add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.our_tokenizer.chat_template if chat_template else None

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
            return self.our_tokenizer.render_chat(messages, add_generation_prompt)
        except ValueError:  # some templates know no system role
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise
            return self.our_tokenizer.render_chat(others, add_generation_prompt)

    # ------------------------------------------------------------ requests

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False, **_) -> list[tuple]:
        self.is_answering = True
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        questions, answers = questions_of(pairs, self.max_length), [None] * len(requests)
        rows_each = 2 if any(question.longest > 1 for question in questions) else 1  # see `score`
        with progress(total=len(requests), desc="Scoring", unit="request", disable=disable_tqdm) as bar:
            for n_rows, batch in self.batches(questions, self.tokens_at_once, rows_each):
                for number, total, is_greedy in score(self.engine, batch, n_rows):
                    answers[number] = (total, is_greedy)
                    bar.update()
        self.is_answering = False
        return answers

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
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        asked = [self.request_of(*request.args) for request in requests]
        self.is_answering = True
        tasks = [Task(*each, seed) for each, seed in zip(asked, new_seeds(len(asked)), strict=True)]
        longest = max(request.length for request, _ in asked)
        n_rows = self.reserve(self.batch_size or max(self.sizes), 1, longest)
        with progress(total=len(requests), desc="Generating", unit="request", disable=disable_tqdm) as bar:
            for request, _ in run_tasks(Scheduler(self.engine, n_rows, longest), tasks, Timing()):
                bar.update(bool(request.finish_reason))
        self.is_answering = False
        return [request.stream.text for request, _ in asked]

    def request_of(self, context: str, settings: dict) -> tuple[Request, Sampling]:
        """What a task asks to generate, and how."""
        settings = normalize_gen_kwargs(settings, 256)
        until, budget, do_sample = (settings.pop(key) for key in ("until", "max_gen_toks", "do_sample"))
        drawing = {key: settings.pop(key) for key in ("temperature", "top_k", "top_p", "min_p") if key in settings}
        for key, value in settings.items():
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
        tokenizer = self.our_tokenizer
        ids = self.tok_encode(context)
        ids = ids[budget - self.max_length :] or [self.prefix_token_id]
        request = Request(ids, tokenizer, budget, [str(stop) for stop in until if stop != ""], False)
        request.eos_ids = tokenizer.declared_eos_ids  # HFLM knows no others
        return request, sampling

    # ------------------------------------------------------------ batches

    def batches(self, items: list[Question], n_tokens: int, rows_each: int) -> Iterator[tuple[int, list]]:
        """The batch size and each batch: items of like length, n_tokens together if so many fit, the shortest first.

        The engine then has a cache with `rows_each` rows for each item. Shorter items come first because they need more
        rows: the cache often serves the longer ones too, so that fewer forms are compiled.
        """
        shortest_first = sorted(items, key=lambda item: item.length)
        for size, some in groupby(shortest_first, lambda item: self.size_for(item.length, n_tokens)):
            some = list(some)
            size = self.reserve(size, rows_each, some[-1].length + 2)  # padding, and a slot that is never read
            some.sort(key=lambda item: -len(item.prompt))
            for batch in evenly(some, size):
                yield size, batch

    def size_for(self, length: int, n_tokens: int) -> int:
        if self.batch_size is not None:
            return self.batch_size
        return next((size for size in self.sizes if size * length <= n_tokens), 1)

    def reserve(self, size: int, rows_each: int, length: int) -> int:
        """Have a cache for batches of this size; returns a smaller one where memory is short and none was asked for."""
        try:
            self.engine.reserve(size * rows_each, length)
        except ValueError:
            # ranks may have different memory, and must not differ here
            if size == 1 or self.batch_size is not None or self.engine.model.ranks is not None:
                raise
            return self.reserve(max(smaller for smaller in self.sizes if smaller < size), rows_each, length)
        return size
