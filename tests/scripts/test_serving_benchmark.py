"""scripts/bench/serving: what clients ask and how their times are counted; one run against our own server."""

import argparse

import pytest

from scripts.bench.report import Report
from scripts.bench.serving import clients, table
from scripts.bench.serving.clients import Answer, Load
from tests.tiny import make_tiny_checkpoint


def test_every_server_is_asked_the_same_and_every_round_something_else():
    load = Load(2, 5, (3, 9), (1, 4))
    first, again, other = ([*load.bodies(50, seed)] for seed in (1, 1, 2))
    assert first == again != other and len(first) == 5
    assert all(3 <= len(body["prompt"]) <= 9 and 1 <= body["max_tokens"] <= 4 for body in first)
    assert all(0 <= token < 50 for body in first for token in body["prompt"])


def test_figures_by_hand(monkeypatch):
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(clients.time, "perf_counter", lambda: next(clock))

    async def asked(*_):
        return [Answer(6, 0.0, [1.0, 1.5, 3.0]), Answer(2, 2.0, [2.5, 2.75])]

    monkeypatch.setattr(clients, "ask_all", asked)
    found = clients.measure("", Load(1, 2, (1, 1), (1, 1)), 50, 0)
    assert found == {
        "output_tok_s": 2.0,
        "requests_s": 0.5,
        "first_p50_s": 0.75,
        "first_p99_s": 1.0,
        "between_p50_s": 0.5,
        "between_p99_s": 1.5,
    }


def test_our_server_is_measured_and_one_that_is_missing_is_named(tmp_path, monkeypatch):
    pytest.importorskip("starlette")
    path = make_tiny_checkpoint(tmp_path)
    loads = {"3 clients": Load(3, 5, (3, 9), (4, 8)), "by chance": Load(9, 4, (3, 9), (4, 8), rate=50.0)}
    monkeypatch.setattr(table, "OUR_FLAGS", ["int8"])
    monkeypatch.setattr(table, "QUICK", loads)
    monkeypatch.setattr(table, "CONTEXT", 64)
    (tmp_path / "some.gguf").touch()
    monkeypatch.setattr(table, "llama_file", lambda gguf, precision: gguf)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    result = {part: {} for part in table.PARTS} | {"model": "tiny", "threads": 1}
    report = Report(str(tmp_path / "out.json"), result)
    table.fill(report, model=str(path), quick=True, rounds=1, threads=1)
    assert result["left_out"] == {"llama-server": "llama-server is not on the path"}
    assert [*result["loads"]] == ["int8, 3 clients", "int8, by chance"]
    for sides in result["loads"].values():
        assert all(value > 0 for value in sides["gpt-faster"]["median"].values())
    assert table.table(result).count("| gpt-faster |") == 2


def test_flags():
    parser = argparse.ArgumentParser()
    table.add_flags(parser)
    assert parser.parse_args([]).output == "benchmarks/serving.json"
