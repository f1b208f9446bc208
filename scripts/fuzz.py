"""Damaged files of every kind, many: see `tests/fuzz/many.py`, which this runs, for the flags."""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":  # every child imports this file as its main one, so it imports nothing slow
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    runpy.run_module("tests.fuzz.many", run_name="__main__")
