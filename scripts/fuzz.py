"""Damaged files of every kind, many: see `tests/fuzz/many.py`, which this becomes, for the flags."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    os.execv(sys.executable, [sys.executable, "-m", "tests.fuzz.many", *sys.argv[1:]])
