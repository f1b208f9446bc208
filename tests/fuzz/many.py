"""Draws many damaged files of every kind, and keeps what was neither an answer nor one line of words.

    python scripts/fuzz.py --cases 10000 --seed 1

A line for each batch of cases goes to fuzz-SEED.jsonl, and a second run goes on after the last one.
"""

import argparse
import json
import pickle
import tempfile
from base64 import b64encode
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from tqdm import tqdm

from tests.fuzz.forks import ALLOWED, Forks
from tests.fuzz.kinds import KINDS, write_valid

BATCH = 250


def run_batch(kind: str, valid: Path, forks: Forks, start: int, n_cases: int) -> list[dict]:
    """What went wrong: a case for each different text."""
    findings = {}

    @seed(start)
    @settings(
        max_examples=n_cases,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(KINDS[kind].draw(valid))
    def check(case):
        outcome, words = forks.outcome(kind, case)
        if outcome not in ALLOWED:
            pickled = b64encode(pickle.dumps(case)).decode()
            findings[words[-200:]] = {"outcome": outcome, "words": words, "case": pickled}

    check()
    return list(findings.values())


def main(cases: int, start: int, kinds: list[str], state: Path) -> int:
    """The number of findings."""

    def cases_of(batch: int) -> int:
        return min(BATCH, cases - batch * BATCH)

    text = state.read_text() if state.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    done = {
        (line["kind"], line["batch"]): line["findings"] for line in lines if line["cases"] == cases_of(line["batch"])
    }
    done = {key: findings for key, findings in done.items() if key[0] in kinds}
    batches = [(kind, i) for i in range(-(-cases // BATCH)) for kind in kinds]
    with tempfile.TemporaryDirectory() as folder, state.open("a") as file:
        valid = write_valid(Path(folder))
        forks = Forks(valid)
        for kind, i in tqdm([batch for batch in batches if batch not in done], unit="batch"):
            n_cases = cases_of(i)
            done[kind, i] = run_batch(kind, valid, forks, start * 1_000_000 + i, n_cases)
            file.write(json.dumps({"kind": kind, "batch": i, "cases": n_cases, "findings": done[kind, i]}) + "\n")
            file.flush()
        forks.close()
    found = [(kind, each) for (kind, _), findings in done.items() for each in findings]
    for kind, each in found:
        print(f"{kind}: {each['outcome']}\n{each['words']}\n")
    print(f"{cases} cases of each of {len(kinds)} kinds, {len(found)} findings; the cases are in {state}")
    return len(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="draws the cases (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: all")
    args = parser.parse_args()
    raise SystemExit(min(main(args.cases, args.seed, args.kinds, Path(f"fuzz-{args.seed}.jsonl")), 1))
