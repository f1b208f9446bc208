"""Environments of peers whose packages do not fit beside ours, and what is made in them; each is made only once."""

import shutil
import subprocess
import sys
from pathlib import Path

from cli import ROOT, cache_folder, one_line, say, scratch

FOLDER = Path(__file__).parent


def python_of(name: str) -> Path:
    """The Python of an environment with what NAME.txt beside this file requires; ValueError if it cannot be made."""
    place = cache_folder() / "peers" / name
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FOLDER / f"{name}.txt", place / "requirements.txt")
    if not (place / ".venv").exists():
        say(f"Installing {name} into {place}, once, which takes minutes ...")
    make = 'PYTHON=$0; source "$1"; make_venv requirements.txt'
    run(["bash", "-c", make, sys.executable, ROOT / "scripts/venv.sh"], f"{name} cannot be installed", place)
    return place / ".venv" / "bin" / "python"


def make_once(target: Path, python: str | Path, module: str, *words: str | Path) -> Path:
    """The target, a file or folder; where it is not there yet, a module of ours writes it: TARGET, then the words."""
    if not target.exists():
        say(f"Making {target}, once ...")
        with scratch(target) as temporary:
            run([python, "-m", module, temporary, *words], f"{target} cannot be made")
            temporary.replace(target)
    return target


def run(command: list, failed: str, place: Path = ROOT) -> None:
    """Raises ValueError with the error that the command told, or its last words."""
    done = subprocess.run([str(word) for word in command], cwd=place, capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        told = [line for line in words if line.startswith("ERROR: ")]  # pip, before more advice
        raise ValueError(f"{failed}: {one_line([*words, *told][-1])}")
