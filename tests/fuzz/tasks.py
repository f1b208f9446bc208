"""Task files of lm-eval and their data: how damaged ones are drawn, and what reads them."""

import contextlib
from functools import partial
from pathlib import Path
from unittest.mock import patch

import evaluate as metrics  # noqa: F401, what a task imports late is here before the children are forked
import lm_eval.evaluator
import lm_eval.tasks
import pytablewriter  # noqa: F401
from hypothesis import strategies as st

import eval as evaluate
from measure.tasks import MOST_REPEATS
from tests.fuzz.shapes import changed, text_of

TASK = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"validation": "data.json"}},
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{gold}}",
    "doc_to_choice": "{{a}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
    "num_fewshot": 0,
}
DATA = [{"q": "the cat", "a": [" sat", " on"], "gold": 1}, {"q": "he", "a": [" said", " ate"], "gold": 0}]
OPEN = TASK | {"output_type": "generate_until", "doc_to_target": "{{a[0]}}", "metric_list": [{"metric": "exact_match"}]}
OPEN |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 3}, "doc_to_choice": None}


def draw_task(_: Path):
    others = ["fewshot_split", "test_split", "filter_list", "repeats", "description", "doc_to_choice", "group"]
    data = st.one_of(st.just(DATA), changed(DATA).filter(lambda rows: rows[:1] != [None]))  # of which pyarrow 26 dies
    tasks = st.one_of(changed(TASK, others), changed(OPEN, others)).filter(lambda tree: not takes_long(tree))
    return st.tuples(tasks, data)


def takes_long(tree) -> bool:
    """Whether a task does what it asks for, many times."""
    repeats = tree.get("repeats") if isinstance(tree, dict) else None
    return isinstance(repeats, int) and 3 < repeats <= MOST_REPEATS


def run_task(valid: Path, folder: Path, case) -> None:
    tree, data = case
    (folder / "data.json").write_text("\n".join(map(text_of, data)))
    (folder / "mine.yaml").write_text(text_of(tree))
    flags = ["--checkpoint_path", valid / "ours" / "model.pth", "--include_path", ".", "--dtype", "float32"]
    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    slow = patch("lm_eval.tasks.TaskManager", manager), patch("lm_eval.evaluator.add_env_info")  # each takes seconds
    with contextlib.chdir(folder), slow[0], slow[1]:
        parser = evaluate.build_parser()
        evaluate.main(**vars(parser.parse_args([*map(str, flags), "--tasks", "mine"])))
