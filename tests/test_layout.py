"""The shape of the house: imports point one way, files and functions are short, nothing large is committed."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A file imports only from its own room and from those before it; measure and compress stand on one floor.
ROOMS = ["cli", "mixers", "kernels", "model", "layers", "ranks", "tp", "stages", "weights", "text", "engine", "serving"]
FLOORS = [*([room] for room in ROOMS), ["measure", "compress"], ["flags", "interactive", "answers", "guesses"]]
FLOORS += [["generate", "serve", "quantize", "sparsify", "distill", "eval"], ["gpt_faster"], ["scripts"], ["tests"]]
FLOOR_OF = {name: i for i, floor in enumerate(FLOORS) for name in floor}
COMMANDS = ("generate", "serve", "quantize", "sparsify", "distill", "eval")
LONGEST_FILE, LONGEST_MODEL, LONGEST_FUNCTION, MOST_FILES = 420, 500, 40, 10

SOURCES = [path for path in ROOT.rglob("*.py") if not {".venv", "checkpoints", "build"} & set(path.parts)]
PRODUCT = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "tests"]
KERNELS = [path for path in (ROOT / "kernels").rglob("*") if path.suffix in (".h", ".cpp")]


def name_of(path):
    return str(path.relative_to(ROOT))


def room_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_one_way(path):
    room = room_of(path)
    for name in set(imported(path)) & FLOOR_OF.keys() - {room}:
        assert FLOOR_OF[name] <= FLOOR_OF[room], f"{name_of(path)} imports {name}, which stands above it"
        assert name not in COMMANDS or room in ("scripts", "tests"), f"{name_of(path)} imports the command {name}"


def test_no_room_imports_itself_in_a_circle():
    """Every file can be imported alone, first: a circle would leave one of its names undefined."""
    graph = {}
    for path in PRODUCT:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
        graph[".".join(path.relative_to(ROOT).with_suffix("").parts)] = own
    done = set()
    while ready := {name for name, needs in graph.items() if not (needs & graph.keys()) - done} - done:
        done |= ready
    assert graph.keys() == done


@pytest.mark.parametrize("path", [*PRODUCT, *KERNELS], ids=name_of)
def test_files_are_short(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= (LONGEST_MODEL if path.name == "model.py" else LONGEST_FILE)


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{name_of(path)}: {node.name} has {length} lines"


def test_rooms_are_small():
    rooms = {path.parent for path in PRODUCT if path.parent != ROOT}
    assert not [name_of(room) for room in rooms if len(list(room.glob("*.py"))) > MOST_FILES]


def test_every_room_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in PRODUCT:
        room = f"{room_of(path)}/" if path.parent != ROOT else path.name
        assert f"`{room}`" in readme, room


def test_the_repository_stays_small():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in names.split("\0") if name]
    assert sum(path.stat().st_size for path in files if path.exists()) < 5_000_000
    assert not [path for path in files if path.suffix in (".pth", ".gguf", ".safetensors", ".bin", ".so")]
