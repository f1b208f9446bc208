"""From the checked fields of a request to jobs, one for each answer, and from a job to the scheduler's task."""

import secrets
import time
from dataclasses import dataclass, field
from functools import cached_property

from engine.request import Request
from engine.sampling import Sampling
from serving.interface.fields import (
    CHAT,
    CHAT_NEUTRAL,
    COMPLETIONS,
    COMPLETIONS_NEUTRAL,
    TOKENIZE,
    RequestError,
    read_fields,
)
from serving.processors import Grammars, Logits, processors_of
from serving.scheduler import Task
from serving.tools import Form, calls_grammar, tool_form
from text.prompts import checked_ids
from text.thinking import Marks, Showing, shown_tokens, thinking_marks
from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Served:
    """The model that is served. defaults: of sampling fields; vocab_size: of its logits."""

    name: str
    tokenizer: Tokenizer
    context: int
    vocab_size: int
    defaults: dict
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.vocab_size)  # takes a second with a large vocabulary


@dataclass(frozen=True)
class Job:
    """One answer asked for, in values that another process can read."""

    prompt: list[int]
    max_new_tokens: int
    stop: list[str]
    ignore_eos: bool
    sampling: Sampling
    seed: int
    logits: Logits
    n_logprobs: int | None = None
    shown: dict[int, str] = field(default_factory=dict)  # special tokens that the text has, by id


@dataclass(frozen=True)
class Asked:
    """A request: `n` jobs for each prompt, and how its answers are written."""

    jobs: list[Job]
    n: int
    stream: bool = False
    include_usage: bool = False
    echo: list[str] = field(default_factory=list)  # what each answer begins with
    form: Form | None = None  # of tool calls
    tools: frozenset[str] = frozenset()  # their names
    marks: Marks | None = None  # of thoughts, if the model may think
    is_thinking: bool = False  # from the first token on
    said: dict = field(default_factory=dict)  # what a response repeats of its request


def task_of(job: Job, served: Served) -> Task:
    tokenizer = Showing(served.tokenizer, job.shown) if job.shown else served.tokenizer
    request = Request(job.prompt, tokenizer, job.max_new_tokens, job.stop, job.ignore_eos)
    grammars = None if job.logits.grammar is None else served.grammars
    processors = processors_of(job.logits, job.prompt, grammars)
    return Task(request, job.sampling, job.seed, processors, job.n_logprobs)


# ---------------------------------------------------------------- requests


def read_chat(body: dict, served: Served) -> Asked:
    """The answers that a body of /v1/chat/completions asks for."""
    return asked_in_chat(read_fields(body, CHAT, CHAT_NEUTRAL), served)


def asked_in_chat(fields: dict, served: Served) -> Asked:
    """The answers that the checked fields of a conversation ask for."""
    check_model(fields, served)
    if "messages" not in fields:
        raise RequestError("messages is missing", "messages")
    if "top_logprobs" in fields and not fields.get("logprobs"):
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    if fields.get("tool_choice") == "none":
        fields.pop("tools", None)
    tools = fields.get("tools") or None
    form = tool_form(served.tokenizer.require_template(), "tools") if tools else None
    prompt = render(fields, served)
    ids = checked_ids(served.tokenizer.encode(prompt, add_special_tokens=False), served.tokenizer)
    # an answer that follows a grammar has no place for thoughts
    is_free = fields.get("response_format") is None and not called_tools(fields)
    marks = thinking_marks(served.tokenizer.require_template()) if is_free else None
    shown = shown_tokens(served.tokenizer, [*(form.marks if form else ()), *(marks.all if marks else ())])
    n_logprobs = fields.get("top_logprobs", 0) if fields.get("logprobs") else None
    return Asked(
        jobs_of(fields, served, [ids], "messages", n_logprobs, shown),
        **writing(fields),
        form=form,
        tools=frozenset(tool["function"]["name"] for tool in tools or ()),
        marks=marks,
        is_thinking=marks is not None and marks.are_open(prompt),
    )


def read_completions(body: dict, served: Served) -> Asked:
    """The answers that a body of /v1/completions asks for."""
    fields = read_fields(body, COMPLETIONS, COMPLETIONS_NEUTRAL)
    check_model(fields, served)
    if "prompt" not in fields:
        raise RequestError("prompt is missing", "prompt")
    if fields.get("echo") and "logprobs" in fields:
        raise RequestError("echo with logprobs is not supported; leave one of them out", "echo")
    prompts, tokenizer = fields["prompt"], served.tokenizer
    ids = [encode(each, tokenizer) for each in prompts]
    jobs = jobs_of(fields, served, ids, "prompt", fields.get("logprobs"))
    texts = [each if isinstance(each, str) else tokenizer.decode(each) for each in prompts]
    return Asked(jobs, **writing(fields), echo=texts if fields.get("echo") else [])


def read_tokenize(body: dict, served: Served) -> list[int]:
    """The ids that a body of /tokenize asks for."""
    fields = read_fields(body, TOKENIZE)
    check_model(fields, served)
    if ("prompt" in fields) == ("messages" in fields):
        raise RequestError("give either prompt or messages")
    if "prompt" in fields:
        return served.tokenizer.encode(fields["prompt"], fields.get("add_special_tokens", True))
    return served.tokenizer.encode(render(fields, served), fields.get("add_special_tokens", False))


def called_tools(fields: dict) -> list[dict]:
    """The tools of which the answer must call one; none: it may be a text as well."""
    tools, choice = fields.get("tools") or [], fields.get("tool_choice", "auto")
    if choice in ("auto", "none"):
        if tools and not fields.get("parallel_tool_calls", True):
            message = "parallel_tool_calls: false needs a tool_choice that forces a call: required, or a function"
            raise RequestError(message, "parallel_tool_calls")
        return []
    named = [tool for tool in tools if choice == "required" or tool["function"]["name"] == choice["name"]]
    if not named:
        wanted = "tool" if choice == "required" else f"{choice['name']!r} among the tools"
        raise RequestError(f"tool_choice asks for a call, and there is no {wanted}", "tool_choice")
    return named


def check_model(fields: dict, served: Served) -> None:
    name = fields.get("model", served.name)
    if name != served.name:
        raise RequestError(f"there is no model {name!r} here; {served.name} is", "model", "model_not_found", 404)


def render(fields: dict, served: Served) -> str:
    """The conversation as the model's template writes it."""
    settings = fields.get("chat_template_kwargs", {})
    return served.tokenizer.render_chat(fields["messages"], tools=fields.get("tools") or None, settings=settings)


def encode(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return checked_ids(tokenizer.encode(prompt), tokenizer)
    if not all(0 <= token < tokenizer.vocab_size for token in prompt):
        raise RequestError(f"prompt has ids that are not from 0 to {tokenizer.vocab_size - 1}", "prompt")
    return prompt


def writing(fields: dict) -> dict:
    """How answers are written."""
    stream = fields.get("stream", False)
    if "stream_options" in fields and not stream:
        raise RequestError("stream_options needs stream: true", "stream_options")
    usage = fields.get("stream_options", {}).get("include_usage", False)
    return {"n": fields.get("n", 1), "stream": stream, "include_usage": usage}


def jobs_of(
    fields: dict,
    served: Served,
    prompts: list[list[int]],
    param: str,
    n_logprobs: int | None,
    shown: dict[int, str] | None = None,
) -> list[Job]:
    """The jobs of each prompt, whose seeds follow each other."""
    for ids in prompts:
        if len(ids) >= served.context:
            message = f"the prompt takes {len(ids)} tokens; the context has {served.context}; shorten the prompt"
            raise RequestError(message, param, "context_length_exceeded")
    fields = served.defaults | fields
    seed = fields.get("seed", -1)
    seed = secrets.randbits(62) if seed == -1 else seed
    sampling, logits = sampling_of(fields, served), logits_of(fields, served)
    return [
        Job(
            ids,
            min(fields.get("max_tokens", served.context), served.context - len(ids)),
            fields.get("stop", []),
            fields.get("ignore_eos", False),
            sampling,
            (seed + i) % (1 << 63),
            logits,
            n_logprobs,
            shown or {},
        )
        for ids in prompts
        for i in range(fields.get("n", 1))
    ]


def sampling_of(fields: dict, served: Served) -> Sampling:
    """How tokens are drawn; a top_k of -1, as of the whole vocabulary, is off."""
    top_k = fields.get("top_k", 0)
    top_k = top_k if 0 < top_k < served.vocab_size else 0
    return Sampling(fields.get("temperature", 1.0), top_k, fields.get("top_p", 1.0), fields.get("min_p", 0.0))


def logits_of(fields: dict, served: Served) -> Logits:
    """What changes the logits."""
    bias = fields.get("logit_bias", {})
    if bias and max(bias) >= served.vocab_size:
        raise RequestError(f"logit_bias has token {max(bias)}; the model has {served.vocab_size} tokens", "logit_bias")
    penalties = ("frequency_penalty", "presence_penalty", "repetition_penalty")
    given = {name: fields[name] for name in penalties if name in fields}
    return Logits(bias=bias, grammar=grammar_of(fields, served), **given)


def grammar_of(fields: dict, served: Served) -> str | None:
    """The grammar that the answer follows: that of a JSON schema, or of calls."""
    schema, tools = fields.get("response_format"), called_tools(fields)
    if schema is None and not tools:
        return None
    param = "tool_choice" if schema is None else "response_format"
    for other in ("ignore_eos",) if schema is None else ("ignore_eos", "tools"):
        if fields.get(other):
            raise RequestError(f"{param} does not go with {other}; leave one of them out", param)
    try:
        if schema is not None:
            return served.grammars.of_schema(schema)
        tokenizer = served.tokenizer
        form, is_one = tool_form(tokenizer.require_template(), "tools"), not fields.get("parallel_tool_calls", True)
        return served.grammars.checked(calls_grammar(form, tools, is_one, tokenizer.special_tokens))
    except ValueError as error:
        raise RequestError(f"{param}: {error}", param) from None
