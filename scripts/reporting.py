"""What the benchmarks share: facts of the machine, medians, the tables of the README."""

import datetime
import platform
import statistics
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def machine(packages: tuple[str, ...]) -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    facts = {"processor": model, "python": platform.python_version(), "date": str(datetime.date.today())}
    return facts | {name: version(name) for name in packages}


def medians(runs: list[dict]) -> dict:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def require_rounds(rounds: int) -> None:
    """Raise ValueError if nothing would be measured."""
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}; it must be at least 1")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def update_readme(table: str, source: str) -> None:
    """Put the table where the README has one from this file."""
    path = ROOT / "README.md"
    begin, end = f"<!-- table: {source} -->", "<!-- end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    if rest:
        path.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
