"""scripts/benchmark.py: what it measures with, goes on from and writes; the peers themselves are not installed here."""

import json
import subprocess
import sys

import pytest
import torch

from engine.compile import compile_step
from engine.decode import decode_one_token
from scripts import benchmark, check_device
from scripts.benchmark import GRID, QUICK, Case, key_of
from scripts.reporting import ROOT
from tests.tiny import make_tiny_checkpoint

CPU = torch.device("cpu")
SPEED = {"gpt-faster": 150.0, "llama.cpp": 100.0, "transformers": 25.0}


def test_rates_by_hand():
    rates = Case(batch=4, prompt=10, new_tokens=21).rates(prefill_s=0.5, decode_s=2.0)
    assert rates == {"decode_tok_s": 40.0, "prefill_tok_s": 80.0, "time_to_first_token_s": 0.5}


def test_an_engine_is_a_process_that_answers_and_is_stopped_between(tmp_path):
    path = make_tiny_checkpoint(tmp_path)
    with benchmark.Engine("eager", "int8", str(path), 1, {}) as engine:
        first, second = (engine.ask({"batch": 2, "prompt": 5, "new_tokens": 4}) for _ in range(2))
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(engine.process.pid)], capture_output=True, text=True)
        assert state.stdout.startswith("T")
        assert engine.load_s > 0 and first["first_s"] > 0 and "first_s" not in second
        assert second["decode_tok_s"] > 0 and second["prefill_tok_s"] > 0 and second["peak_memory_gb"] > 0
        reads = engine.ask({"bandwidth": True})
        assert reads["kv_bytes_per_position"] == 2 * 2 * 2 * 16 * 2  # k and v, layers, heads, their size, bfloat16
    assert engine.process.poll() is not None
    with pytest.raises(ValueError, match="eager, int8 ended with exit code 1; its last words: .*no checkpoint"):
        benchmark.Engine("eager", "int8", str(tmp_path / "none.pth"), 1, {})


class FakeEngine:
    """Answers at once; slower with every row and with every position."""

    asked: list[tuple[str, dict]] = []

    def __init__(self, side, precision, *_):
        self.name, self.speed, self.load_s = side, SPEED.get(side, 50.0), 1.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, question):
        self.asked.append((self.name, question))
        if "bandwidth" in question:
            return {"measured_bandwidth_gb_s": 40, "weight_bytes_per_token": 2e9, "kv_bytes_per_position": 1e6}
        case = Case(**question)
        rate = self.speed * case.batch**0.5 / (1 + case.prompt / 2140)
        return {"decode_tok_s": rate, "prefill_tok_s": 9 * rate, "time_to_first_token_s": 1.0, "peak_memory_gb": 1.0}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The command, with engines that answer at once."""
    monkeypatch.setattr(benchmark, "Engine", FakeEngine)
    monkeypatch.setattr(benchmark, "start_up", lambda _: {f"{t}_{w}_s": 5.0 for t in ("cold", "warm") for w in WHAT})
    monkeypatch.setattr(benchmark, "machine", lambda _: {"processor": "a", "date": "today"})
    monkeypatch.setattr(benchmark, "gguf_of", lambda _: None)
    monkeypatch.setattr(benchmark, "update_readme", lambda *_: None)
    monkeypatch.setattr(FakeEngine, "asked", [])

    def run(**flags):
        defaults = {"model": "TinyLlama-1.1B", "sides": list(SPEED), "quick": True, "fresh": False, "rounds": 2}
        defaults |= {"threads": 2, "output": str(tmp_path / "out.json")}
        benchmark.main(**defaults | flags)
        return json.loads((tmp_path / "out.json").read_text())

    return run


WHAT = ("compile", "first_token")


def test_sides_take_turns_and_what_is_there_is_not_run_again(bench, tmp_path, capsys):
    quick = bench()
    names = [name for name, question in FakeEngine.asked if question.get("prompt") == 8]
    own = ["gpt-faster"] * 4 * 3  # in the end, to be compared with itself
    assert names == ["gpt-faster", "llama.cpp", "transformers"] * 4 + ["gpt-faster", "llama.cpp"] * 8 + own
    assert set(quick["cases"]) == {key_of(p, case) for p in benchmark.PRECISIONS for case in QUICK}
    FakeEngine.asked.clear()
    assert bench()["cases"] == quick["cases"] and FakeEngine.asked == []
    whole = bench(quick=False)
    assert set(whole["cases"]) == {key_of(p, case) for p in benchmark.PRECISIONS for case in GRID}
    cases = {(q["batch"], q["prompt"]) for name, q in FakeEngine.asked if "batch" in q and name == "llama.cpp"}
    assert cases == {(case.batch, case.prompt) for case in GRID} - {(1, 8), (1, 512)}
    rest = {(q["batch"], q["prompt"]) for name, q in FakeEngine.asked if "batch" in q and name == "transformers"}
    assert rest == cases - {(16, 2048)}
    assert all(len(own["cases"]) == 3 for own in whole["in_turn"].values())
    assert list(whole["waterfall"]) == list(benchmark.WATERFALL)
    FakeEngine.asked.clear()
    bench(fresh=True)
    assert len([q for _, q in FakeEngine.asked if "batch" in q]) == 4 * 2 * (3 + 2 + 2) + 4 * 3
    written = (tmp_path / "out.md").read_text()
    assert written.count("| decode, 200 tokens, int4 | 149 tok/s | 100 tok/s (x1.50) | - |") == 1
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")


def test_targets_by_hand(bench):
    lines = benchmark.targets(bench(quick=False)).splitlines()
    rows = {cells[1]: cells[2:5] for cells in ([cell.strip() for cell in line.split("|")] for line in lines)}
    assert rows["bf16 decode against llama.cpp BF16"] == [">= 1.05 x", "1.50 x", ""]
    assert rows["bf16 decode at batch 16 against batch 1"] == [">= 6 x", "4.00 x", "missed"]
    # 2 GB a token at 149.4 tok/s, of 40 GB/s
    assert rows["int4 decode, of the rate at which our operator reads one large matrix"][1] == "7.47 x"
    # (1 + 2048 / 2140) / (1 + 8 / 2140) over (2 + 2.148) / (2 + 0.108)
    assert rows["int8 step at position 2148 against 108, over that of their bytes"] == ["<= 1.2 x", "0.99 x", ""]
    assert rows["cold compile"] == ["<= 12 s", "5.00 s", ""]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"rounds": 0}, "--rounds is 0; it must be at least 1"),
        ({"sides": ["llama.cpp"]}, "--sides lacks gpt-faster"),
        ({"threads": 3}, "was measured with another threads (2); use --fresh or another --output"),
        ({"model": "stories15M"}, "was measured with another model (TinyLlama-1.1B)"),
        ({"output": "/no/such/folder/x.json"}, "there is no folder"),
    ],
)
def test_refused(bench, flags, message):
    bench()
    with pytest.raises(ValueError) as error:
        bench(**flags)
    assert message in str(error.value)


def test_another_file_is_refused(bench, tmp_path):
    (tmp_path / "out.json").write_text('{"runs": []}')
    with pytest.raises(ValueError, match="is no result of this version"):
        bench()
    assert bench(fresh=True)["cases"]


def test_another_machine_is_refused(bench, monkeypatch):
    bench()
    monkeypatch.setattr(benchmark, "machine", lambda _: {"processor": "b", "date": "today"})
    with pytest.raises(ValueError, match="measured with another machine"):
        bench()


def test_peers_need_a_file(tmp_path):
    command = [sys.executable, "scripts/benchmark.py", "--model", "stories15M", "--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "stories15M has no .gguf file beside it" in done.stderr


def test_check_of_a_device_runs(capsys):
    """What scripts/check_device.py does beside the checks of other tests, on the smallest size."""
    compile_step(decode_one_token, CPU)  # sets how many forms may be compiled
    check_device.check_experts(CPU, torch.bfloat16)
    check_device.check_speculation(CPU)
    assert capsys.readouterr().out.count("agrees with float32") == 3
    rates = (20.0, check_device.matrix_rate(CPU, torch.bfloat16))
    cells = check_device.speed("stories15M", CPU, torch.bfloat16, "int4.g32, head too", *rates, False).split(" | ")
    assert cells[1:3] == ["int4.g32, head too", "eager"] and cells[4].endswith("%") and cells[7].endswith("%")
    assert all(float(cells[i]) > 0 for i in (3, 5, 6))
