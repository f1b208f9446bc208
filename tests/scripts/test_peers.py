"""scripts/bench/peers: programs and environments of other engines, with stand-ins, as none is installed here."""

import sys

import pytest

from measure.memory import peak_main_memory
from scripts.bench.peers import environment
from scripts.bench.peers.protocol import SideProcess
from scripts.bench.peers.table import PEERS, peer_command

STAND_IN = """
import os
from scripts.bench.peers.table import serve

class Side:
    def facts(self):
        return {"stand-in": "1.0"}
    def measure(self, case):
        print("loading")
        os.write(1, b"from C")
        if case.batch > 2:
            raise SystemExit("no memory for so many rows")
        return {"decode_tok_s": 2.0 * case.batch}

serve(Side, lambda: 3_000_000_000)
"""
# what scripts/venv.sh asks of Python and pip; a requirement that is not "fits" cannot be installed
PYTHON = """#!/bin/bash
echo "$*" >>asked
case "$*" in
    *venv*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"install -q"*) grep -qx fits requirements.txt || { echo "ERROR: No such version"; echo "a notice"; exit 1; } >&2 ;;
esac
"""


def test_a_peer_needs_no_package_of_ours_and_what_its_libraries_print_is_no_answer():
    with SideProcess("a peer", [sys.executable, "-S", "-c", STAND_IN]) as side:
        assert side.facts == {"stand-in": "1.0"}
        question = {"batch": 2, "prompt": 5, "new_tokens": 4}
        assert side.ask(question) == side.ask(question) == {"decode_tok_s": 4.0, "peak_memory_gb": 3.0}
        assert 0 < peak_main_memory(side.process.pid) < peak_main_memory()  # it has not loaded torch
        for _ in range(2):  # one that has ended says so again
            with pytest.raises(ValueError, match="a peer ended with exit code 1; its last words: .*no memory for so"):
                side.ask(question | {"batch": 3})


def test_an_environment_is_made_once(monkeypatch, tmp_path):
    python, place = tmp_path / "python", tmp_path / "cache" / "gpt-faster" / "peers" / "some"
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(environment, "FOLDER", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "some.txt").write_text("too-new\n")
    with pytest.raises(ValueError, match="^some cannot be installed: ERROR: No such version$"):
        environment.python_of("some")
    (tmp_path / "some.txt").write_text("fits\n")
    assert environment.python_of("some") == place / ".venv" / "bin" / "python"
    before = (place / "asked").read_text()
    environment.python_of("some")
    assert (place / "asked").read_text() == before
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(
        ValueError, match="^other cannot be installed: error: /no/python not found; install Python 3.11"
    ):
        (tmp_path / "other.txt").write_text("fits\n")
        environment.python_of("other")


def test_what_a_peer_reads_is_made_once_and_whole(monkeypatch, tmp_path):
    asked = []

    def run(command, failed):
        asked.append(command[-1])
        command[3].write_text("half")
        if command[-1] == "int4":
            raise ValueError(f"{failed}: no such precision")

    monkeypatch.setattr(environment, "run", run)
    model, gguf = tmp_path / "model.pth", tmp_path / "model.gguf"
    model.touch()
    with pytest.raises(ValueError, match="has no .gguf file beside it"):
        peer_command("llama.cpp", "int8", str(model), 2)
    gguf.touch()
    for _ in range(2):
        command = peer_command("llama.cpp", "int8", str(model), 2)
    assert command[-3:] == ["llama.cpp", str(tmp_path / "peer-int8.bin"), "2"] and asked == ["bf16", "int8"]
    with pytest.raises(ValueError, match="peer-int4.bin cannot be made: no such precision"):
        peer_command("llama.cpp", "int4", str(model), 2)
    assert {path.name for path in tmp_path.iterdir()} == {"model.pth", "model.gguf", "peer-bf16.bin", "peer-int8.bin"}


def test_every_environment_has_its_requirements():
    for peer in PEERS.values():
        assert peer.environment is None or "==" in (environment.FOLDER / f"{peer.environment}.txt").read_text()
