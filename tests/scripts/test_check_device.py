"""scripts/check_device.py: on a CPU as it runs on a GPU, with few rows; and with sides that answer at once."""

import gzip
import json
import sys

import pytest

from engine.decode import forward_chunk
from engine.speculation.speculative import verify
from scripts import check_device
from scripts.bench import sides
from scripts.bench.peers.protocol import Case
from scripts.device_rows import ALL, GUESSES, POSITIONS, PREFILL, STEP, Row, rows_in_order, step

CASES = [sys.executable, "-c", "print('passed: a (1 s)', 'FAILED: b (1 s): off by one', 'left out: c', sep='\\n')"]
ORDER = [row.name for row in rows_in_order()]


@pytest.fixture
def check(monkeypatch, tmp_path, one_thread):
    """The command, which gives its result and its document."""
    monkeypatch.setattr(check_device, "CASES", CASES)

    def run(**flags):
        defaults = {"device": "cpu", "model": "Llama-3.1-8B", "minutes": 9.0, "no_checks": True, "fresh": False}
        output = tmp_path / "out.json"
        try:
            check_device.main(**defaults | {"output": str(output)} | flags)
        finally:
            run.written = output.with_suffix(".md").read_text()
        return json.loads(output.read_text())

    return run


class FakeSide:
    """Answers at once, more slowly at later positions; `fails` are raised instead."""

    asked: list[str] = []
    fails: dict[str, Exception] = {}

    def __init__(self, model, threads, side, precision, environment, device, deadline):
        self.side, self.precision, self.environment = side, precision, tuple(environment.items())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, question):
        if "bandwidth" in question:
            return {"measured_bandwidth_gb_s": 4000, "weight_bytes_per_token": 16e9, "kv_bytes_per_position": 1e6}
        case = None if "profile" in question else Case(**question)
        row = Row(self.side, self.precision, case, self.environment)
        self.asked.append(row.name)
        if error := self.fails.get(row.name):
            raise error
        if row.case is None:
            return {"kernels": [["gemv", 2, 30.0], ["copy", 1, 10.0]]}
        rate = 200.0 * row.case.batch / (1 + row.case.prompt // 8192)
        return {"decode_tok_s": rate, "prefill_tok_s": 9 * rate, "peak_memory_gb": 1.0, "tokens_a_round": 1.5}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(check_device, "start_side", FakeSide)
    monkeypatch.setattr("scripts.device_rows.has_dependent_launch", lambda: True)
    monkeypatch.setattr(check_device, "limits", lambda _: {"gb_s": 4000.0, "tflop_s": 100.0})
    monkeypatch.setattr(FakeSide, "asked", [])
    monkeypatch.setattr(FakeSide, "fails", {})
    return FakeSide


def test_the_device_is_measured_in_processes(check, monkeypatch, tmp_path):
    rows = [Row("eager", "bf16", case) for case in (Case(2, 8, 5), None, Case(1, 8192, 100))]
    monkeypatch.setattr(check_device, "rows_in_order", lambda: rows)
    result = check(model="stories15M")
    small, profile, large = (row.name for row in rows)
    assert len(result["rows"][small]["runs"]) == 3 and result["rows"][small]["median"]["decode_tok_s"] > 0
    assert result["rows"][small]["first_call_s"] > 0 and result["rows"][profile]["kernels"][0][2] > 0
    assert result["left_out"] == {large: "needs 8292 positions, and the model has 256"}
    with gzip.open(tmp_path / "out.bf16.trace.json.gz") as file:
        assert json.load(file)["traceEvents"]


def test_every_row_and_table(check, fake):
    result = check()
    assert list(result["rows"]) == ORDER and not result["left_out"]
    # 16 GB and 58 positions of 1 MB, 200 times a second, of 4,000 GB/s
    assert "| bf16 | 200.0 | 1600.0 | 6400.0 | 25600.0 | 80% |" in check.written
    # at 8192: half the rate; 16 + 8.242 GB, 100 times a second; at 32768 a fifth, 16 + 32.818 GB, 40 times
    assert "| int8 | 100.0 | 61% | 40.0 | 49% |" in check.written
    # 2 x 6.98 billion operations, 1,800 times a second
    assert "| int4 | 1800.0 | 1800.0 | 25% |" in check.written
    assert "| compiled, int8, 4 guesses a round | 200.0 | 1.5 |" in check.written
    assert "| `gemv` | 2 | 30 | 75% |" in check.written
    fake.asked.clear()
    assert check()["rows"] == result["rows"] and not fake.asked  # the same command goes on


def test_what_fails_or_finds_no_time_costs_no_other_row(check, fake):
    broken, slow = step("int8").name, step("bf16", 1, POSITIONS[0]).name
    fake.fails |= {broken: ValueError("an illegal address"), slow: TimeoutError("no answer")}
    with pytest.raises(ValueError, match=f"1 checks or rows FAILED, the first is {broken}"):
        check()
    assert f"- {broken}: FAILED: an illegal address\n- {slow}: no time was left" in check.written
    assert set(ORDER) - set(fake.asked) == set()
    fake.fails.clear()
    fake.asked.clear()
    check()
    assert set(fake.asked) == {broken, slow}
    assert check(minutes=0.0, fresh=True)["left_out"] == dict.fromkeys(ORDER, "no time was left")


def test_rows_are_left_by_ctrl_c_and_a_peer_that_is_not_there_is_named(check, fake, monkeypatch):
    monkeypatch.setattr("scripts.device_rows.find_spec", lambda name: None)
    monkeypatch.setattr("scripts.device_rows.has_dependent_launch", lambda: False)
    fake.fails[ORDER[3]] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        check()
    assert "| bf16 | 200.0 | - | 6400.0 | - | 80% |" in check.written
    assert "compile, bf16, batch 1, prompt 8: transformers is not installed" in check.written
    assert "GPT_FASTER_PDL=1: a GPU of compute capability 9.0 or more is not there" in check.written


def test_verdicts_of_the_cases_are_kept(check, fake):
    with pytest.raises(ValueError, match="1 checks or rows FAILED, the first is b"):
        check(no_checks=False)
    assert "1 of 3 checks passed.\n\n- FAILED: b (1 s): off by one\n- left out: c" in check.written


def test_sides_with_random_weights(one_thread):
    ours = {name: sides.SIDES[name]("stories15M", ALL, 1, "cpu").engine for name in (STEP, PREFILL, GUESSES)}
    assert [engine.is_compiled for engine in ours.values()] == [True, False, True]
    assert [engine.forward is forward_chunk for engine in ours.values()] == [True, False, True]
    guessing = sides.Ours("stories15M", "bf16", 1, "cpu", compiled=False, compiled_prefill=False, guesses=4)
    guessing.engine.speculation.verify = verify
    assert 1 <= guessing.measure(Case(1, 3, 9))["tokens_a_round"] <= 5


def test_transformers_with_random_weights(one_thread):
    peer = sides.Transformers("stories15M", "bf16", 1, "cpu")
    assert peer.model.num_parameters() == 15_191_712
    assert peer.measure(Case(2, 3, 3))["decode_tok_s"] > 0
    with pytest.raises(ValueError, match="Qwen2.5-7B is no plain Llama"):
        sides.random_llama("Qwen2.5-7B", "cpu")
