"""Draws many damaged files of every kind, and keeps what was neither an answer nor one line of words.

    TMPDIR=/dev/shm python scripts/fuzz.py --cases 10000 --seed 1

(a folder a case, which a disk takes longer to remove than most cases take to run).

A line for each batch of cases goes to fuzz-SEED.jsonl, and a second run goes on after the last one. In a finding,
`cases` is what makes it happen again, pickled: the case, or all that one child had run.
"""

import argparse
import json
import pickle
import tempfile
from base64 import b64encode
from pathlib import Path

from tqdm import tqdm

from tests.fuzz.forks import Forks
from tests.fuzz.kinds import KINDS, draw
from tests.fuzz.valid import write_valid

BATCH = 250


def run_batch(kind: str, valid: Path, forks: Forks, seed: int, n_cases: int) -> list[dict]:
    """What went wrong: a finding for each different text."""
    found = {each.words[-200:]: each for each in forks.findings(kind, draw(kind, valid, n_cases, seed))}
    return [each._asdict() | {"cases": b64encode(pickle.dumps(each.cases)).decode()} for each in found.values()]


def main(cases: int, start: int, kinds: list[str], state: Path) -> int:
    """The number of findings."""
    sizes = [min(BATCH, cases - first) for first in range(0, cases, BATCH)]
    text = state.read_text() if state.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    done = {(line["kind"], line["batch"], line["cases"]): line["findings"] for line in lines}
    n_findings = 0
    with tempfile.TemporaryDirectory() as folder, state.open("a") as file:
        valid = write_valid(Path(folder))
        for kind in kinds:
            forks = Forks(valid, [kind])
            for i, n_cases in enumerate(tqdm(sizes, desc=kind, unit="batch")):
                findings = done.get((kind, i, n_cases))
                if findings is None:
                    findings = run_batch(kind, valid, forks, start * 1_000_000 + i, n_cases)
                    line = {"kind": kind, "batch": i, "cases": n_cases, "findings": findings}
                    print(json.dumps(line), file=file, flush=True)
                for each in findings:
                    print(f"{kind}: {each['outcome']}\n{each['words']}\n")
                n_findings += len(findings)
            forks.close()
    print(f"{cases} cases of each of {len(kinds)} kinds, {n_findings} findings; the cases are in {state}")
    return n_findings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="draws the cases (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: all")
    args = parser.parse_args()
    raise SystemExit(min(main(args.cases, args.seed, args.kinds, Path(f"fuzz-{args.seed}.jsonl")), 1))
