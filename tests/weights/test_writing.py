"""Plain files: what may be written where, whole or not at all, and what killed processes leave."""

import os
import platform

import pytest

from tests.tiny import dead_process
from weights.files import atomic_path, require_writable, size_text, write_json


@pytest.mark.parametrize(
    "size, text",
    [(0, "0.0 kB"), (2345, "2.3 kB"), (98_362_432, "98.4 MB"), (1e9, "1.0 GB"), (811_706_097_664, "811.7 GB")],
)
def test_sizes_by_hand(size, text):
    assert size_text(size) == text


def test_a_write_removes_what_dead_processes_of_this_machine_left_of_the_same_file(tmp_path):
    ours, dead = platform.node(), dead_process()
    kept = [
        f".a.json.{ours}.{os.getppid()}.tmp",  # it may be at work
        f".a.json.elsewhere.{dead}.tmp",
        f".b.json.{ours}.{dead}.tmp",
        f".a.json.{ours}.mine.tmp",
    ]
    (tmp_path / f".a.json.{ours}.{os.getpid()}.tmp").mkdir()  # of the same number, before a restart
    for name in [*kept, f".a.json.{ours}.{dead}.tmp", f".a.json.{ours}.{dead}.tmp.tmp"]:
        (tmp_path / name).write_text("half")
    write_json(tmp_path / "a.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *kept}


def test_a_full_device_is_named():
    with pytest.raises(ValueError, match="^cannot write /dev/full: No space left on device$"):
        write_json("/dev/full", {})


def test_what_a_library_makes_beside_the_temporary_file_goes_with_it(tmp_path):
    with pytest.raises(ValueError, match="cannot write"), atomic_path(tmp_path / "a.json") as temporary:
        temporary.with_name(f"{temporary.name}.tmp").write_text("half")
        raise OSError("full")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["report.json", "results", "answers.txt", "model.json", "config-1.json"])
@pytest.mark.parametrize("model", ["", "model.pth"])
def test_a_report_in_a_models_folder_is_written_again(name, model, tmp_path):
    for _ in range(2):
        require_writable(tmp_path / name, [tmp_path / model, None])
        write_json(tmp_path / name, {})


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "a.gguf", "b.index.json"])
@pytest.mark.parametrize("model", ["", "model.pth"])
def test_a_report_takes_no_name_that_a_models_folder_gives_a_meaning(name, model, tmp_path):
    with pytest.raises(ValueError, match="a file of the model has that name; choose another"):
        require_writable(tmp_path / name, [tmp_path / model])
