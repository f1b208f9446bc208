"""Answers as JSON Lines, one a prompt as soon as it is there: a run that was interrupted goes on where it stopped."""

import json
import os
from pathlib import Path

from text.files import numbered_lines

START = b'{"index": '  # of each line


class Results:
    """A file with a line for each prompt answered: {"index", "prompt", ...}.

    prompts: what is asked, by number; a file with answers to other prompts is refused.
    """

    def __init__(self, path: str | Path, prompts: dict[int, str | int]):
        self.path, self.prompts = Path(path), prompts
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]  # a run that was killed may have left half a line
        lines = numbered_lines(whole.decode("utf-8", errors="replace")).items()
        self.done = {self._index(line, f"{path}, line {number}") for number, line in lines}
        half = data[len(whole) :]
        if half[: len(START)] != START[: len(half)]:
            raise ValueError(f"{path} ends in a line that is not of --output_jsonl; name another file")
        if half:
            os.truncate(path, len(whole))

    def _index(self, line: str, where: str) -> int:
        try:
            found = json.loads(line)
            index, prompt = found["index"], found["prompt"]
        except (ValueError, RecursionError, KeyError, TypeError):
            raise ValueError(f"{where} is not of --output_jsonl; name another file") from None
        if type(index) is not int or self.prompts.get(index) != prompt:
            raise ValueError(f"{where} answers another prompt {index} than this run asks; name another file")
        return index

    @property
    def missing(self) -> dict[int, str | int]:
        """The prompts that have no line yet."""
        return {index: prompt for index, prompt in self.prompts.items() if index not in self.done}

    def add(self, index: int, **fields) -> None:
        """Append the line of one prompt."""
        self.done.add(index)
        line = json.dumps({"index": index, "prompt": self.prompts[index]} | fields, ensure_ascii=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror}") from None
