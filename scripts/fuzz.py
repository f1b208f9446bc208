"""Damaged files of every kind, many: see `tests/fuzz/many.py`, which this starts, for the flags."""

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    raise SystemExit(subprocess.call([sys.executable, "-m", "tests.fuzz.many", *sys.argv[1:]], cwd=root))
