"""Every command of the README, as it stands there; only paths, names and sizes are replaced."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


BASH = [line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
INLINE = [code for code in re.findall(r"`(python [^`]+)`", README) if ".py" in code]
COMMANDS = [line for line in [*BASH, *INLINE] if line and not line.startswith("#")]


def of(prefix):
    return [command for command in COMMANDS if command.startswith(prefix)]


def replaced(args, option, value):
    """The arguments with option's value replaced, or added."""
    args = list(args)
    if option in args:
        args[args.index(option) + 1] = str(value)
        return args
    return [*args, option, str(value)]


def test_every_command_is_tried_below():
    known = (
        "python generate.py",
        "python scripts/",
        "./scripts/quickstart.sh",
        "./scripts/test.sh",
        "./scripts/prepare.sh",
    )
    assert [command for command in COMMANDS if not command.startswith(known)] == []
    assert len(of("python generate.py")) >= 6


@pytest.mark.parametrize("command", of("python generate.py"))
def test_generate(command, run_cli, default_model_dir, tmp_path):
    args = shlex.split(command)[1:]
    if "--help" in args:
        assert "--checkpoint_path" in run_cli(*args).stdout
        return
    if "--random_weights" in args:
        args = replaced(args, "--random_weights", "stories15M")
    else:
        args = replaced(args, "--checkpoint_path", default_model_dir / "model.pth")
    if "--prompt_file" in args:
        (tmp_path / "prompts.txt").write_text("One\nTwo and three\n", encoding="utf-8")
        args = replaced(args, "--prompt_file", tmp_path / "prompts.txt")
    if "--output_json" in args:
        args = replaced(args, "--output_json", tmp_path / "answers.json")
    if "--interactive" not in args:
        args = replaced(args, "--num_samples", 1)
    done = run_cli(*replaced(args, "--max_new_tokens", 8), input="Hello\n/exit\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(tmp_path.glob("*.json")) or "sequences" in (tmp_path / "answers.json").read_text()


@pytest.mark.parametrize("command", of("python scripts/download.py") + of("./scripts/prepare.sh"))
def test_download_parses_and_says_that_the_hub_is_away(command, tmp_path):
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    env["PATH"] = f"{Path(os.sys.executable).parent}:{env['PATH']}"
    done = subprocess.run(shlex.split(command), cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "reach" in done.stderr and "usage" not in done.stderr


@pytest.mark.parametrize("command", of("python scripts/convert_hf_checkpoint.py"))
def test_convert(command, run_cli, default_gguf, tmp_path):
    os.symlink(default_gguf, tmp_path / default_gguf.name)
    done = run_cli(*replaced(shlex.split(command)[1:], "--checkpoint_dir", tmp_path))
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tmp_path.iterdir()} - {default_gguf.name}
    assert names == {"model.pth", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}


@pytest.mark.parametrize("command", of("./scripts/"))
def test_scripts_are_there_and_parse(command):
    path = ROOT / shlex.split(command)[0]
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_library_example(run_cli, default_model_dir, tmp_path):
    (code,) = blocks("python")
    code = re.sub(r'path = "[^"]+"', f"path = {str(default_model_dir / 'model.pth')!r}", code)
    done = run_cli("-c", code.replace("max_new_tokens=100", "max_new_tokens=12"))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 3
