"""Tasks of EleutherAI's lm-evaluation-harness, found and run. Only here and in `harness.py` is lm-eval imported."""

import contextlib
import difflib
import json
import logging
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

MOST_REPEATS = 1024  # of a question: the harness makes the requests of all of them at once


def require_harness(flag: str, instead: str) -> None:
    """Refuse a flag that needs lm-eval where it is missing, with what installs it or does without."""
    try:
        import_module("lm_eval.tasks")
    except ImportError:
        raise ValueError(f"{flag} needs lm-eval: pip install -r requirements-eval.txt; or {instead}") from None


class Tasks(NamedTuple):
    """Tasks and groups as the harness's own objects, and its TaskManager that loaded them."""

    manager: Any
    loaded: list

    def leaves(self) -> list:
        """The tasks, those in groups too."""
        return list(self.manager.load(self.loaded)["tasks"].values())


def load_tasks(names: list[str], include_path: str | None, advice: str = "") -> Tasks:
    """Tasks and groups of the harness, or of a folder, with their data; `advice` ends the error if it is missing.

    names: as the harness takes them, with commas between them and with patterns such as mmlu_*.
    """
    manager = task_manager(include_path)
    loaded = []
    for name in matching(names, manager):
        with data_of(name, advice):
            some = manager.load([name])
        loaded += [some["groups"][name]] if name in some["groups"] else some["tasks"].values()
    tasks = Tasks(manager, loaded)
    try:
        leaves = tasks.leaves()
    except ValueError as error:  # a group and its member
        raise ValueError(f"{_line(error)}; name the group or its tasks, not both") from None
    for task in leaves:
        repeats = getattr(task.config, "repeats", 1)
        if not isinstance(repeats, int) or not 0 < repeats <= MOST_REPEATS:
            raise ValueError(f"the task {task.task_name} has repeats {repeats!r}; from 1 to {MOST_REPEATS} are run")
    return tasks


def task_manager(include_path: str | None):
    """The harness's TaskManager; include_path: a folder with more tasks."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"there is no folder {include_path}; --include_path needs one with task files")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        manager = TaskManager(include_path=include_path)
    except Exception as error:  # a mistake in one of the folder's files
        raise ValueError(f"the tasks in {include_path} cannot be read: {_line(error)}") from None
    for name in manager.all_tasks:
        if not isinstance(name, str):
            raise ValueError(f"a task in {include_path} has the name {name!r}; a name must be text")
    return manager


def matching(names: list[str], manager) -> list[str]:
    """Every task and group that the names stand for, once."""
    found = []
    for name in [part.strip() for part in ",".join(names).split(",") if part.strip()] or [""]:
        some = manager.match_tasks([name])
        if not some:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks))
            known = f"lm-eval has no task {name!r}" + (f"; similar: {near}" if near else "")
            raise ValueError(f"{known}; --include_path adds tasks of your own")
        found += some
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def data_of(task: str, advice: str = "") -> Iterator[None]:
    """Turn what goes wrong in the block, where a task is loaded, into a ValueError that names it."""
    try:
        yield
    except Exception as error:  # of many libraries: no network, no such data, a mistake in the task's file
        own = f"give a task of your own with --include_path{advice}"
        raise ValueError(f"the task {task} or its data cannot be loaded ({_line(error)}); {own}") from None


def run_tasks(adapter, tasks: Tasks, seed: int, **options) -> dict | None:
    """The harness's report as JSON has it, in the first process of a machine only.

    adapter: see `harness.Adapter`. options: of `lm_eval.simple_evaluate`.
    """
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    options |= {"tasks": tasks.loaded, "task_manager": tasks.manager, "bootstrap_iters": 1000, "log_samples": False}
    try:
        report = simple_evaluate(adapter, **seeds, **options)
    except Exception as error:
        if adapter.is_answering:
            raise
        raise ValueError(f"the tasks cannot be run: {_line(error)}") from None  # a mistake in a task
    return json.loads(json.dumps(report, default=handle_non_serializable))


def _line(error: Exception) -> str:
    words = (str(error).strip() or "no reason given").splitlines()[0]
    # the text of these is only the name that was looked up
    return f"{type(error).__name__}: {words}" if isinstance(error, LookupError | TypeError | AttributeError) else words
