"""scripts/bench/serving: what clients ask and how their times are counted; one run against our own server."""

import argparse
from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace

import pytest

from scripts.bench.peers import load
from scripts.bench.peers.load import Answer, Load, figures
from scripts.bench.report import Report
from scripts.bench.serving import clients, servers, table, waits
from scripts.bench.serving.openvino import ContinuousBatching
from tests.tiny import make_tiny_checkpoint


def test_every_server_is_asked_the_same_and_every_round_something_else():
    some = Load(2, 5, (3, 9), (1, 4))
    first, again, other = ([*some.asked(50, seed)] for seed in ("a", "a", "b"))
    assert first == again != other and len(first) == 5
    for due, prompt, tokens in first:
        assert due == 0 and 3 <= len(prompt) <= 9 and 1 <= tokens <= 4 and all(0 <= token < 50 for token in prompt)


def test_requests_by_chance_come_at_their_rate():
    due = [due for due, *_ in Load(1, 4000, (1, 1), (1, 1), rate=2.0).asked(50, "a")]
    gaps = [after - before for before, after in zip(due, due[1:], strict=False)]
    assert min(gaps) > 0 and due[-1] == pytest.approx(2000, rel=0.1)
    assert sum(gap > 0.5 for gap in gaps) / 4000 == pytest.approx(0.3679, abs=0.03)  # exp(-1): an exponential gap


def test_figures_by_hand():
    assert figures([Answer(6, 0.0, [1.0, 1.5, 3.0]), Answer(2, 2.0, [2.5, 2.75])], 4.0) == {
        "output_tok_s": 2.0,
        "requests_s": 0.5,
        "first_p50_s": 0.75,
        "first_p99_s": 1.0,
        "between_p50_s": 0.5,
        "between_p99_s": 1.5,
    }


class Handle:
    """A request of a pipeline that makes a token each step, for `rows` requests at most."""

    def __init__(self, tokens):
        self.left, self.new = tokens, 0

    def can_read(self):
        return self.new > 0

    def read(self):
        self.new -= 1

    def get_status(self):
        return "RUNNING" if self.left else "FINISHED"


@pytest.mark.parametrize(("rate", "most"), [(None, 2), (1000.0, 6)])
def test_a_pipeline_without_a_server_has_as_many_requests_as_there_are_clients(monkeypatch, rate, most):
    clock, handles, running = iter(range(10**6)), [], []  # a second passes at each look
    monkeypatch.setattr(load.time, "perf_counter", lambda: float(next(clock)))
    side = ContinuousBatching.__new__(ContinuousBatching)

    def step():
        running.append(sum(handle.left > 0 for handle in handles))
        for handle in handles:
            if handle.left:
                handle.left, handle.new = handle.left - 1, 1

    side.n_vocab, side.pipeline = 50, SimpleNamespace(step=step)
    side.genai = SimpleNamespace(GenerationStatus=SimpleNamespace(RUNNING="RUNNING"))
    side.request = lambda number, prompt, tokens: handles.append(Handle(tokens)) or handles[-1]
    found = side.under_load(Load(2, 6, (1, 3), (2, 5), rate), "a")
    assert len(handles) == 6 and max(running) == most and all(value > 0 for value in found.values())


class Failing(AbstractContextManager):
    """A server that starts, and takes no load."""

    def __exit__(self, *_):
        pass

    def measure(self, load, seed):
        if load != table.WARM_UP:
            raise ValueError("too much")


def test_a_server_that_is_gone_is_an_error_in_words():
    with pytest.raises(ValueError, match="^the connection failed: .*connection"):
        clients.measure(f"http://127.0.0.1:{servers.free_port()}", servers.by_ids, Load(1, 1, (1, 1), (1, 1)), 50, "a")


def test_our_server_is_measured_and_others_that_are_missing_or_fail_are_named(tmp_path, monkeypatch):
    pytest.importorskip("starlette")
    path = make_tiny_checkpoint(tmp_path)
    loads = {"3 clients": Load(3, 5, (3, 9), (4, 8)), "by chance": Load(1, 4, (3, 9), (4, 8), rate=50.0)}
    some = {name: table.SERVERS[name] for name in ("gpt-faster", "llama-server")} | {"failing": lambda *_: Failing()}
    monkeypatch.setattr(table, "SERVERS", some)
    monkeypatch.setattr(table, "OUR_FLAGS", ["int8"])
    monkeypatch.setattr(table, "QUICK", loads)
    monkeypatch.setattr(table, "LOADS", loads)
    monkeypatch.setattr(servers, "CONTEXT", 64)
    monkeypatch.setattr(servers, "COMPILED", [])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    result = {part: {} for part in table.PARTS} | {"model": "tiny", "threads": 1}
    report = Report(str(tmp_path / "out.json"), result)
    fill = partial(table.fill, report, model=str(path), quick=True, loads=None, rounds=1, threads=1)
    with pytest.raises(ValueError, match="--servers lacks gpt-faster"):
        fill(servers=["llama-server"])
    fill(servers=[*some])
    missing = {"llama-server": "llama-server is not on the path"}
    assert result["left_out"] == missing | {"int8, 3 clients, failing": "too much"}
    assert [*result["loads"]] == ["int8, 3 clients", "int8, by chance"]
    for sides in result["loads"].values():
        assert [*sides] == ["gpt-faster"] and all(value > 0 for value in sides["gpt-faster"]["median"].values())
    written = table.table(result)
    assert written.count("| gpt-faster |") == 2 and "\nLeft out: int8, 3 clients, failing: too much." in written


def test_waits_are_measured_beside_rows_that_run(tmp_path, monkeypatch):
    pytest.importorskip("starlette")
    path = make_tiny_checkpoint(tmp_path)
    sizes = {"PROMPT": 9, "FIRST_TURN": 9, "ANSWER": 3, "QUESTION": 2, "RUNNING": 60, "OUR_FLAGS": ["int8"]}
    for name, value in sizes.items():
        monkeypatch.setattr(waits, name, value)
    monkeypatch.setattr(servers, "CONTEXT", 128)
    monkeypatch.setattr(servers, "COMPILED", [])
    result = {"found": {}, "model": "tiny", "threads": 1}
    waits.fill(Report(str(tmp_path / "out.json"), result), model=str(path), rounds=1, threads=1)
    [found] = result["found"].values()
    assert all(value > 0 for value in found.values())
    assert f"(x{found['second_turn_s'] / found['first_turn_s']:.2f})" in waits.table(result)


def test_flags():
    parser = argparse.ArgumentParser()
    table.add_flags(parser)
    assert parser.parse_args([]).output == "benchmarks/serving.json"
