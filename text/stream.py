"""Text from tokens as they are drawn, each character once and whole, up to a stop string."""

import codecs
from collections.abc import Sequence

from text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not UTF-8 (yet)


class TextStream:
    """Text of a growing list of ids. A piece is returned once no later id can change it.

    The pieces join to `tokenizer.decode` of all ids, or to what lies before the first stop string. A stop string may
    spell special tokens, which are in no piece.
    """

    CONTEXT = 6  # ids before the new ones that are decoded with them; a character has at most 4 bytes

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self.stop:
            raise ValueError("a stop string is empty; leave it out or write at least one character")
        self.tokenizer, self.stopped = tokenizer, False
        named = {token: text for token, text in tokenizer.special_tokens.items() if any(text in s for s in self.stop)}
        # in the text held back, a special token is half of a surrogate pair, which no decoder writes
        self._marks = {token: chr(0xD800 + i) for i, token in enumerate(named)}
        self._no_marks = dict.fromkeys(map(ord, self._marks.values()))
        self.stop += tuple(self._marked(stop, named) for stop in self.stop if named)
        self._longest = max(map(len, self.stop), default=0)
        self._pieces: list[str] = []
        self._ids: list[int] = []  # context, then the ids whose text is not settled
        self._done = 0  # characters of the text of `_ids` that are settled
        self._held = ""  # settled text that may begin a stop string
        self._run = None  # while byte-fallback tokens run on: the decoder of their bytes
        self._tail = ""  # the last text of the run that may begin a stop string

    @property
    def text(self) -> str:
        """Everything returned so far."""
        return "".join(self._pieces)

    @property
    def content(self) -> str:
        """The text without thoughts, with which a conversation goes on."""
        return self.text

    def push(self, ids: list[int]) -> str:
        """The text that is settled now. Sets `stopped` at the id that completes a stop string and ignores the rest."""
        return "".join([self._push(token) for token in ids])

    def finish(self) -> str:
        """The rest of the text: what might have become a stop string, or a character with its next byte."""
        if self.stopped:
            return ""
        rest, self._ids, self._done = self.tokenizer.decode(self._ids)[self._done :], [], 0
        piece = self._release(rest)
        if not self.stopped:
            piece, self._held = piece + self._give(self._held), ""
        return piece

    def _marked(self, stop: str, named: dict[int, str]) -> str:
        for token in sorted(named, key=lambda token: -len(named[token])):
            stop = stop.replace(named[token], self._marks[token])
        return stop

    def _push(self, token: int) -> str:
        if token in self._marks and not self.stopped:
            text = self.tokenizer.decode(self._ids)
            new, self._done, self._run = text[self._done :], len(text), None
            return self._release(new + self._marks[token])
        if self.stopped or self.tokenizer.skips(token):
            return ""
        self._ids.append(token)
        byte = self.tokenizer.byte(token)
        if byte is not None and not self._run_stops(byte):
            return ""  # one invalid byte later may turn the whole run into replacement characters
        settled = self.tokenizer.decode(self._ids).removesuffix(REPLACEMENT)
        new, self._done, self._run = settled[self._done :], len(settled), None
        self._forget()
        return self._release(new)

    def _run_stops(self, byte: int) -> bool:
        """Whether a run of byte tokens has just completed a stop string."""
        if not self.stop:
            return False
        if self._run is None:
            self._run, self._tail = codecs.getincrementaldecoder("utf-8")("replace"), self._held
        self._tail += self._run.decode(bytes([byte]))
        hit = self._find(self._tail) is not None
        self._tail = self._tail[-self._longest :]
        # cheap so far; the library has the last word, as it may have turned the run into replacement characters
        return hit and self._find(self._held + self.tokenizer.decode(self._ids)[self._done :]) is not None

    def _forget(self) -> None:
        """Keep only a context that renders to text: after it, no decoder strips a leading space."""
        if len(self._ids) > 2 * self.CONTEXT:
            context = self._ids[-self.CONTEXT :]
            settled = self.tokenizer.decode(context).removesuffix(REPLACEMENT)
            if settled:
                self._ids, self._done = context, len(settled)

    def _find(self, text: str) -> int | None:
        """Where the earliest stop string begins."""
        return min((at for at in (text.find(stop) for stop in self.stop) if at >= 0), default=None)

    def _release(self, new: str) -> str:
        """Give out settled text up to a stop string, or up to what may begin one."""
        text = self._held + new
        at = self._find(text)
        self.stopped = at is not None
        if at is None:
            at = len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = "" if self.stopped else text[at:]
        return self._give(text[:at])

    def _give(self, text: str) -> str:
        piece = text.translate(self._no_marks)
        self._pieces.append(piece)
        return piece


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
