"""scripts/bench: what it measures with, goes on from and writes; the peers themselves are not installed here."""

import json
import math
import subprocess
import sys

import pytest
import torch

from scripts.bench import long_context, report, run, speculation, speed
from scripts.bench.compressed import pruning
from scripts.bench.peers.protocol import Case
from scripts.bench.report import ROOT, take_turns
from scripts.bench.sides import SIDES, start_side
from scripts.bench.speed_tables import GRID, PRECISIONS, QUICK, SHORT, compare_sides, key_of, targets
from tests.tiny import make_tiny_checkpoint

SPEED = {"gpt-faster": 150.0, "llama.cpp": 100.0, "transformers": 25.0}


def test_the_table_of_pruning_by_hand():
    bf16, pruned = {"bytes": 4e6, "perplexity": 10.0}, {"bytes": 3e6, "perplexity": 10 * math.e, "made_s": 61.4}
    variants = {"bf16": bf16, "2:4, magnitude": {"perplexity": 100.0}, "2:4, Wanda": pruned}
    *_, dense, magnitude, wanda = pruning.table({"model": "tiny", "variants": variants}).splitlines()
    assert dense == "| bf16 | 4 MB | 10.00 |  |  |"
    assert magnitude == "| 2:4, magnitude |  | 100.00 | +2.30 |  |"
    assert wanda == "| 2:4, Wanda | 3 MB | 27.18 | +1.00 | 61 s |"


def test_rates_by_hand():
    rates = Case(batch=4, prompt=10, new_tokens=21).rates(prefill_s=0.5, decode_s=2.0)
    assert rates == {"decode_tok_s": 40.0, "prefill_tok_s": 80.0, "time_to_first_token_s": 0.5}


def test_sides_take_turns_after_a_warm_up():
    asked = []

    def side(name, *figures):
        answers = iter(figures)
        return lambda: asked.append(name) or {"tok_s": next(answers)}

    found = take_turns(3, {"a": side("a", 99, 5, 1, 2), "b": side("b", 99, 7, 8, 9)})
    assert asked == ["a", "b"] * 4
    assert found["a"] == {"runs": [{"tok_s": 5}, {"tok_s": 1}, {"tok_s": 2}], "median": {"tok_s": 2}}
    assert found["b"]["median"] == {"tok_s": 8}


def test_a_side_is_a_process_that_answers_and_is_stopped_between(tmp_path):
    path = make_tiny_checkpoint(tmp_path)
    with start_side(str(path), 1, "eager", "int8") as side:
        answer = side.ask({"batch": 2, "prompt": 5, "new_tokens": 4})
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(side.process.pid)], capture_output=True, text=True)
        assert state.stdout.startswith("T")
        assert answer["decode_tok_s"] > 0 and answer["prefill_tok_s"] > 0 and answer["peak_memory_gb"] > 0
        reads = side.ask({"bandwidth": True})
        assert reads["kv_bytes_per_position"] == 2 * 2 * 2 * 16 * 2  # k and v, layers, heads, their size, bfloat16
    assert side.process.poll() is not None
    none = start_side(str(tmp_path / "none.pth"), 1, "eager", "int8")
    with pytest.raises(ValueError, match="eager, int8 ended with exit code 1; its last words: .*no checkpoint"), none:
        pass


def test_tasks_of_a_scheduler_are_a_side():
    side = SIDES["tasks that come and go"]("stories15M", "int8", 1, "cpu", compiled=False, compiled_prefill=False)
    found = [side.measure(Case(2, 40, 6)) for _ in range(2)]
    assert all(value > 0 for each in found for value in each.values())
    assert len(side.scheduler.held) == 2 and not side.scheduler.has_work
    assert [len(request.token_ids) for request in side.scheduler.timing.requests].count(3) == 2


class FakeSide:
    """Answers at once; slower with every row and with every position."""

    asked: list[tuple[str, dict]] = []

    def __init__(self, model, threads, side, *_):
        self.name, self.speed, self.facts = side, SPEED.get(side, 50.0), {"version": "1.0"}

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
def bench(monkeypatch, tmp_path, one_thread):
    """The command, with sides that answer at once."""
    monkeypatch.setattr(speed, "start_side", FakeSide)
    monkeypatch.setattr(speed, "start_up", lambda _: {f"{t}_{w}_s": 5.0 for t in ("cold", "warm") for w in WHAT})
    monkeypatch.setattr(report, "machine", lambda: {"processor": "a", "date": "today"})
    monkeypatch.setattr(speed, "gguf_of", lambda _: None)
    monkeypatch.setattr(speed, "peer_command", lambda side, *_: None)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(FakeSide, "asked", [])
    (tmp_path / "README.md").write_text(f"before\n<!-- table: {tmp_path / 'out.json'} -->\nold\n<!-- end -->\nafter\n")

    def ask(**flags):
        defaults = {"model": "TinyLlama-1.1B", "sides": list(SPEED), "quick": True, "batches": False}
        defaults |= {"fresh": False, "rounds": 2}
        defaults |= {"threads": torch.get_num_threads(), "output": str(tmp_path / "out.json")}
        run.main(table="speed", **defaults | flags)
        return json.loads((tmp_path / "out.json").read_text())

    return ask


WHAT = ("compile", "first_token")


def test_sides_take_turns_and_what_is_there_is_not_run_again(bench, tmp_path, capsys):
    quick = bench()
    names = [name for name, question in FakeSide.asked if question.get("prompt") == 8]
    # once to warm up, then 4 rounds; in the end ours, to be compared with itself
    own = ["gpt-faster"] * 5 * 3
    assert names == ["gpt-faster", "llama.cpp", "transformers"] * 5 + ["gpt-faster", "llama.cpp"] * 10 + own
    assert set(quick["cases"]) == {key_of(p, case) for p in PRECISIONS for case in QUICK}
    FakeSide.asked.clear()
    assert bench()["cases"] == quick["cases"] and FakeSide.asked == []
    with pytest.raises(ValueError, match="--batches is for --quick"):
        bench(quick=False, batches=True)
    short = {key_of(p, case) for p in PRECISIONS for case in [*QUICK, *SHORT]}
    assert set(bench(batches=True)["cases"]) == short and len(short) == 3 * 4
    whole = bench(quick=False)
    assert set(whole["cases"]) == {key_of(p, case) for p in PRECISIONS for case in GRID}
    cases = {(q["batch"], q["prompt"]) for name, q in FakeSide.asked if "batch" in q and name == "llama.cpp"}
    assert cases == {(case.batch, case.prompt) for case in GRID} - {(1, 8), (1, 512)}
    rest = {(q["batch"], q["prompt"]) for name, q in FakeSide.asked if "batch" in q and name == "transformers"}
    assert rest == cases - {(16, 2048)}
    assert all(len(own["cases"]) == 3 for own in whole["in_turn"].values())
    assert list(whole["waterfall"]) == list(speed.WATERFALL)
    FakeSide.asked.clear()
    bench(fresh=True)
    assert len([q for _, q in FakeSide.asked if "batch" in q]) == 5 * 2 * (3 + 2 + 2) + 5 * 3
    written = (tmp_path / "out.md").read_text()
    assert written.count("| decode, 200 tokens, int4 | 149 tok/s | 100 tok/s (x1.50) | - |") == 1
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
    readme = (tmp_path / "README.md").read_text().splitlines()
    assert readme[:2] == ["before", f"<!-- table: {tmp_path / 'out.json'} -->"]
    assert readme[-2:] == ["<!-- end -->", "after"] and len(readme) == 2 + 2 + 6 + 2


def test_a_peer_that_cannot_be_installed_is_named_and_left_out(bench, monkeypatch, tmp_path, capsys):
    def command(side, *_):
        if side == "openvino":
            raise ValueError("openvino cannot be installed: no network")

    monkeypatch.setattr(speed, "peer_command", command)
    sides = ["gpt-faster", "openvino", "ik_llama.cpp"]
    result = bench(sides=sides)
    assert set(result["cases"]["int8, batch 1, prompt 8"]) == {"gpt-faster", "ik_llama.cpp"}
    assert "\nopenvino is left out: openvino cannot be installed: no network\n" in f"\n{capsys.readouterr().err}"
    written = (tmp_path / "out.md").read_text()
    assert "| openvino | left out: openvino cannot be installed: no network |" in written
    assert "| ik_llama.cpp, int4 | version 1.0 |" in written
    monkeypatch.setattr(speed, "peer_command", lambda *_: None)
    assert set(bench(sides=sides)["cases"]["int8, batch 1, prompt 8"]) == set(sides)
    assert "left out" not in (tmp_path / "out.md").read_text()


def test_slow_sides_have_no_long_prompts_in_batches():
    assert speed.sides_of("int8", Case(16, 2048, 200), speed.SIDES) == ["gpt-faster", "llama.cpp", "openvino"]
    assert speed.sides_of("bf16", Case(16, 512, 200), speed.SIDES) == [*speed.SIDES[:4], "transformers"]


def test_the_chart_has_no_empty_panel_and_its_markdown_shows_it(bench, tmp_path):
    for quick in (True, False):
        bench(quick=quick)
        assert ("one technique after the other" in (tmp_path / "out.svg").read_text()) == (not quick)
        written = (tmp_path / "out.md").read_text()
        assert "](out.svg)" in written and ("two figures" in written) == (not quick)


def test_bars_stand_around_their_label_and_no_legend_over_them():
    from matplotlib.figure import Figure

    median = {"median": {"decode_tok_s": 9.0}}
    cases = [dict.fromkeys(sides, median) for sides in (("a", "b", "c"), ("a", "c"), ("c",))]
    axes = (figure := Figure()).subplots()
    compare_sides(axes, cases)
    figure.draw_without_rendering()
    centres = sorted(bar.get_x() + bar.get_width() / 2 for bar in axes.patches)
    w = 0.8 / 3
    assert centres == pytest.approx([-w, 0, w, 1 - w / 2, 1 + w / 2, 2])
    assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1


def test_targets_by_hand(bench):
    lines = targets(bench(quick=False)).splitlines()
    rows = {cells[1]: cells[2:5] for cells in ([cell.strip() for cell in line.split("|")] for line in lines)}
    assert rows["bf16 decode against llama.cpp BF16"] == [">= 1.05 x", "1.50 x", ""]
    assert rows["int8 decode at batch 4 against the fastest peer, llama.cpp"] == [">= 1.2 x", "1.50 x", ""]
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
        ({"threads": 7}, "was measured with another threads (1); use --fresh or another --output"),
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
    monkeypatch.setattr(report, "machine", lambda: {"processor": "b", "date": "today"})
    with pytest.raises(ValueError, match="measured with another machine"):
        bench()


def test_a_package_or_a_day_more_is_the_same_machine(bench, monkeypatch):
    before = bench()
    monkeypatch.setattr(report, "machine", lambda: {"processor": "a", "date": "tomorrow", "lm_eval": "1"})
    assert bench()["cases"] == before["cases"]


def test_peers_need_a_file(tmp_path):
    command = [sys.executable, "scripts/bench/run.py", "speed", "--model", "stories15M"]
    done = subprocess.run([*command, "--output", str(tmp_path / "out.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "stories15M has no .gguf file beside it" in done.stderr


@pytest.mark.parametrize("table", run.TABLES)
def test_every_table_explains_itself(table, capsys):
    with pytest.raises(SystemExit) as end:
        run.build_parser([table]).parse_args([table, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "--output" in text and "--fresh" in text and "--threads" in text


@pytest.mark.parametrize("way", ["foo 4", "ngram", "int4 0", "ngram:a.pth 4", "int4 -1"])
def test_a_way_that_is_none_is_refused(way):
    with pytest.raises(ValueError, match=f"--ways has '{way}'; give a drafter .* and its k"):
        speculation.parse_way(way)


def test_a_way_names_a_drafter_a_checkpoint_and_a_length():
    assert speculation.parse_way("int4:my folder/a.pth auto") == ("int4:my folder/a.pth", "auto")
    assert speculation.parse_way("ngram 4") == ("ngram", 4)
    assert [speculation.shown(way) for way in ("int4:my folder/a.pth auto", "int4 2")] == ["int4 a auto", "int4 2"]


def test_late_steps_stand_beside_their_bytes():
    bf16, int8 = (long_context.name_of(8000, dtype) for dtype in (None, "int8"))
    early = long_context.name_of(108, None)
    steps = {name: {"median": {"step_ms": ms}} for name, ms in ((early, 4.0), (bf16, 12.0), (int8, 10.0))}
    found = {"bytes": {early: 100, bf16: 200, int8: 160}, "steps": steps}
    table = long_context.table({"model": "a", "threads": 2, "found": {"int4": found}})
    assert "| int4 weights, position 8000, bf16 cache | 12.00 ms | 3.00 (2.00) |  |" in table
    assert "| int4 weights, position 8000, int8 cache | 10.00 ms | 2.50 (1.60) | 1.20 (1.25) |" in table
