"""The file of --output_jsonl: appended to, gone on with, and refused where it belongs to another run."""

import json

import pytest

from text.results import Results

PROMPTS = {1: "the cat", 3: "é🍕\u2028", 4: 7}


def test_a_second_run_goes_on(tmp_path):
    path = tmp_path / "out.jsonl"
    first = Results(path, PROMPTS)
    assert first.missing == PROMPTS
    first.add(3, text="sat", token_ids=[1, 2])
    with path.open("ab") as file:
        file.write('{"index": 1, "prompt": "the cat", "text": "é'.encode()[:-1])  # killed within a letter
    second = Results(path, PROMPTS)
    assert second.missing == {1: "the cat", 4: 7}
    second.add(1, text="")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert lines == [
        {"index": 3, "prompt": "é🍕\u2028", "text": "sat", "token_ids": [1, 2]},
        {"index": 1, "prompt": "the cat", "text": ""},
    ]


OTHERS = ['{"index": 1, "prompt": "a dog"}\n', '{"index": 9, "prompt": "x"}\n', '{"index": [1], "prompt": "x"}\n']
OTHERS += ["[1]\n", "a\n", "{}\n", "one line without an end", '{"index" of a book']


@pytest.mark.parametrize("line", OTHERS)
def test_another_runs_file_is_refused_and_kept(line, tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text(text := f'{{"index": 1, "prompt": "the cat"}}\n{line}')
    with pytest.raises(ValueError, match="line.*; name another file"):
        Results(path, PROMPTS)
    assert path.read_text() == text
