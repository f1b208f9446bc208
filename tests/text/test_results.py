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


@pytest.mark.parametrize("line", ['{"index": 1, "prompt": "a dog"}', '{"index": 9, "prompt": "x"}', "[1]", "a", "{}"])
def test_another_runs_file_is_refused_and_kept(line, tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text(f'{{"index": 1, "prompt": "the cat"}}\n{line}\n')
    with pytest.raises(ValueError, match="line 2 .*; name another file"):
        Results(path, PROMPTS)
    assert path.read_text().endswith(f"{line}\n")
