"""The shape of the project: imports point one way, and nothing large or private is committed."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A file imports only files before it in this list (a folder stands for all its files).
ORDER = [
    "command_line",
    "model",
    "kernels",
    "qlinear",
    "tp",
    "gguf_file",
    "checkpoint",
    "tokenizer",
    "decoding",
    "speculative",
]
ORDER += ["generate", "harness", "eval", "gptq", "quantize", "scripts", "tests"]

SOURCES = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts and "checkpoints" not in path.parts]


def owner(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_up_the_list(path):
    rank = ORDER.index(owner(path))
    for name in set(imported(path)) & set(ORDER):
        assert ORDER.index(name) <= rank, f"{path.name} imports {name}"
        assert name != owner(path) or owner(path) in ("scripts", "tests", "kernels")


def test_every_module_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in readme, path.name


def test_the_repository_stays_small():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in names.split("\0") if name]
    assert sum(path.stat().st_size for path in files if path.exists()) < 5_000_000
    assert not [path for path in files if path.suffix in (".pth", ".gguf", ".safetensors", ".bin", ".so")]
