"""What is fuzzed: for each kind of input, how damaged ones are drawn, and what reads them.

A case is drawn in the process that has hypothesis, and run in a child (`forks.py`) in an empty folder of its own.
"""

from importlib import import_module
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

HEALTH = list(HealthCheck)
KINDS_OF = {
    "damaged_weights": ["config", "safetensors", "index", "pth", "gguf"],
    "damaged_text": ["tokenizer", "template", "prompts"],
    "commands": ["flags"],
    "tasks": ["task"],
}
# the module of each kind, imported where it is used: a server of a few kinds stays small
KINDS = {kind: f"tests.fuzz.{module}" for module, kinds in KINDS_OF.items() for kind in kinds}


def draw(kind: str, valid: Path, n_cases: int, seed: int) -> list:
    """Cases, made from the folder of valid files."""
    cases = []

    @seeded(seed)
    @settings(max_examples=n_cases, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=HEALTH)
    @given(getattr(import_module(KINDS[kind]), f"draw_{kind}")(valid))
    def keep(case):
        cases.append(case)

    keep()
    return cases


def run(kind: str, valid: Path, folder: Path, case) -> None:
    """Read a case in an empty folder."""
    getattr(import_module(KINDS[kind]), f"run_{kind}")(valid, folder, case)
