"""Thoughts of models that think, told apart from their answers while the text streams."""

from collections.abc import Iterable
from dataclasses import dataclass

from text.stream import TextStream
from text.tokenizer import Tokenizer

CONTENT, REASONING, HEADER = "content", "reasoning_content", "header"  # the last is in no answer


@dataclass(frozen=True)
class Marks:
    """What stands before and after thoughts."""

    open: str
    close: str

    @property
    def all(self) -> tuple[str, ...]:
        return (self.open.rstrip(), self.close)

    def are_open(self, prompt: str) -> bool:
        """Whether an answer to the prompt begins with thoughts: some templates write the first mark themselves."""
        return prompt.rstrip().endswith(self.open.rstrip())

    def parts_after(self, part: str, held: str, is_empty: bool) -> dict[str, str]:
        """The part that begins after each mark that can come; held: the text of this part that is not settled."""
        if part == REASONING:
            return {self.close: CONTENT}
        may_think = is_empty and self.open.startswith(held.lstrip()[: len(self.open)])
        return {self.open: REASONING} if may_think else {}


class Channels(Marks):
    """Harmony, the form of gpt-oss: messages, each with a header that names its channel."""

    all = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")

    def are_open(self, prompt: str) -> bool:
        return False

    def parts_after(self, part: str, held: str, is_empty: bool) -> dict[str, str]:
        if part == HEADER:
            return {self.open: REASONING, "<|message|>": CONTENT}
        return dict.fromkeys(("<|end|>", "<|start|>", "<|channel|>"), HEADER)


THINK = Marks("<think>", "</think>")  # Qwen, DeepSeek, GLM, SmolLM3, EXAONE, Hunyuan
HARMONY = Channels("analysis<|message|>", "<|end|>")
KNOWN = {  # by what a model's chat template has
    "<|channel|>": HARMONY,
    "</think>": THINK,
    "[/THINK]": Marks("[THINK]", "[/THINK]"),  # Mistral
    "</seed:think>": Marks("<seed:think>", "</seed:think>"),
    "<channel|>": Marks("<|channel>thought\n", "<channel|>"),  # Gemma 4
}
SEAMS = {  # what is shown between two parts
    (None, CONTENT): "",
    (None, REASONING): f"{THINK.open}\n",
    (REASONING, CONTENT): f"\n{THINK.close}\n\n",
    (CONTENT, REASONING): f"\n\n{THINK.open}\n",
}


def thinking_marks(template: str) -> Marks | None:
    """The marks around the thoughts of a model with this chat template; None: it does not think."""
    return next((marks for sign, marks in KNOWN.items() if sign in template), None)


class Splitter:
    """Takes the text of an answer in pieces, and gives it out as content and reasoning_content.

    What may begin a mark is held back. White space beside marks is dropped; a blank line parts messages of one kind.
    """

    def __init__(self, marks: Marks | None, is_thinking: bool):
        self.marks = marks
        self.strips = marks is not None
        self.part = REASONING if is_thinking else CONTENT
        self.is_empty = True  # nothing but white space of this part has come
        self.mark = ""  # with which this part began
        self.seen: set[str] = set()  # parts that are not empty
        self.held = ""

    def push(self, text: str, ends: bool = False) -> dict:
        """What is settled, by its part; ends: this is the last piece."""
        self.held += text
        settled: dict = {}
        while self.pass_mark(settled, ends):
            pass
        settled.pop(HEADER, None)
        return settled

    def pass_mark(self, settled: dict, ends: bool) -> bool:
        """Settle the part that has come so far, up to a mark; whether there is one, after which another part begins."""
        parts = self.parts_after()
        found = {self.held.find(mark): mark for mark in parts if mark in self.held}
        if not found:
            self.settle(settled, len(self.held) if ends else self.certain(parts))
            return False
        at, mark = min(found.items())
        rest, self.held = self.held[at + len(mark) :], self.held[:at].rstrip()
        self.settle(settled, at)
        self.begin(parts[mark], mark, rest)
        return True

    def parts_after(self) -> dict[str, str]:
        """What begins after each mark that can come here."""
        return self.marks.parts_after(self.part, self.held, self.is_empty) if self.marks else {}

    def certain(self, marks: Iterable[str]) -> int:
        """How much of the held text no mark, and no white space before one, can begin in."""
        lengths = [n for mark in marks for n in range(1, len(mark)) if self.held.endswith(mark[:n])]
        rest = self.held[: len(self.held) - max(lengths, default=0)]
        return len(rest.rstrip() if marks else rest)

    def settle(self, settled: dict, length: int) -> None:
        text, self.held = self.held[:length], self.held[length:]
        if self.is_empty and self.strips:
            text = text.lstrip()
        if text:
            seam = "\n\n" if self.is_empty and self.mark and self.part in self.seen else ""
            settled[self.part] = settled.get(self.part, "") + seam + text
            self.is_empty = False
            self.seen.add(self.part)

    def begin(self, part: str, mark: str, rest: str) -> None:
        self.part, self.mark, self.held, self.is_empty = part, mark, rest, True


class Showing:
    """A tokenizer whose text has some special tokens too: those that mark parts of an answer.

    shown: these tokens, by id.
    """

    def __init__(self, tokenizer: Tokenizer, shown: dict[int, str]):
        self.tokenizer, self.shown = tokenizer, shown

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)

    def skips(self, token: int) -> bool:
        return token not in self.shown and self.tokenizer.skips(token)

    def decode(self, ids: list[int]) -> str:
        parts, begin = [], 0
        for at, token in enumerate(ids):
            if token in self.shown:
                parts += [self.tokenizer.decode(ids[begin:at]), self.shown[token]]
                begin = at + 1
        return "".join([*parts, self.tokenizer.decode(ids[begin:])])


def shown_tokens(tokenizer: Tokenizer, marks: Iterable[str]) -> dict[int, str]:
    """The special tokens, by id, that spell a mark or the beginning of one."""
    return {i: text for i, text in tokenizer.special_tokens.items() if any(mark.startswith(text) for mark in marks)}


@dataclass(frozen=True)
class Thoughts:
    """How the thoughts in an answer are marked, and whether they are left out."""

    marks: Marks
    hidden: bool


class ThinkingStream(TextStream):
    """Text whose thoughts stand between <think> and </think>, whatever the model's own marks are, or are left out.

    prompt: ids.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str], thoughts: Thoughts, prompt: list[int]):
        marks, self.hidden = thoughts.marks, thoughts.hidden
        super().__init__(Showing(tokenizer, shown_tokens(tokenizer, marks.all)), stop)
        is_thinking = marks.are_open(self.tokenizer.decode(prompt[-16:]))
        self.splitter, self._shown, self._content = Splitter(marks, is_thinking), "", ""
        self.last: str | None = None  # the part that was seen last

    @property
    def text(self) -> str:
        return self._shown

    @property
    def content(self) -> str:
        return self._content

    def push(self, ids: list[int]) -> str:
        return self.show(super().push(ids), ends=False)

    def finish(self) -> str:
        return self.show(super().finish(), ends=True)

    def show(self, text: str, ends: bool) -> str:
        """What is seen of the text that has come."""
        before = len(self._shown)
        for part, own in self.splitter.push(text, ends).items():
            if part == CONTENT:
                self._content += own
            elif self.hidden:
                continue
            if part != self.last:
                own, self.last = SEAMS[self.last, part] + own.lstrip(), part
            self._shown += own
        return self._shown[before:]
