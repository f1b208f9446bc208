"""Every command of the README, as it stands there; only paths, names and sizes are replaced.

Flags of our commands go to their main in this process; how a command starts is tested elsewhere.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.run import build_parser
from tests.tiny import make_tiny_checkpoint

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


BASH = [line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
INLINE = [code for code in re.findall(r"`(python [^`]+)`", README) if ".py" in code]
COMMANDS = [line for line in [*BASH, *INLINE] if line and not line.startswith("#")]


def of(prefix: str | tuple):
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
        "python serve.py",
        "curl http://127.0.0.1:8000/",
        "python quantize.py",
        "python sparsify.py",
        "python distill.py",
        "python eval.py",
        "python scripts/",
        "torchrun ",
        "pip install -r requirements-",
        "./scripts/quickstart.sh",
        "./scripts/test.sh",
        "./scripts/prepare.sh",
    )
    assert [command for command in COMMANDS if not command.startswith(known)] == []
    assert len(of("python generate.py")) >= 9


@pytest.mark.parametrize("command", of("python generate.py"))
def test_generate(command, call, default_model_dir, capsys, tmp_path):
    args = shlex.split(command)[1:]
    if "--help" in args:
        with pytest.raises(SystemExit):
            call(*args)
        assert "--checkpoint_path" in capsys.readouterr().out
        return
    if "--random_weights" in args:
        args = replaced(args, "--random_weights", "stories15M")
    else:
        args = replaced(args, "--checkpoint_path", default_model_dir / "model.pth")
    if "--draft_checkpoint_path" in args:
        args = replaced(args, "--draft_checkpoint_path", default_model_dir / "model.pth")
    if "--draft_checkpoint_path" in args or "--speculate" in args:
        args = replaced(args, "--speculate_k", 2)  # auto compiles five forms
    if "--prompt_file" in args:
        (tmp_path / "prompts.txt").write_text("One\nTwo and three\n", encoding="utf-8")
        args = replaced(args, "--prompt_file", tmp_path / "prompts.txt")
    if "--output_json" in args:
        args = replaced(args, "--output_json", tmp_path / "answers.json")
    if "--output_jsonl" in args:
        args = replaced(args, "--output_jsonl", tmp_path / "answers.jsonl")
    if "--interactive" not in args:
        args = replaced(args, "--num_samples", 1)
    assert call(*replaced(args, "--max_new_tokens", 8), input="Hello\n/exit\n").out.strip()
    assert (
        not (tmp_path / "answers.jsonl").exists()
        or (tmp_path / "answers.jsonl").read_text().count("finish_reason") == 2
    )
    assert not list(tmp_path.glob("*.json")) or "sequences" in (tmp_path / "answers.json").read_text()


def test_serve(tmp_path):
    """The server, the curl line, and the openai client, on a tiny model and a free port."""
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    (command,), (curl,) = of("python serve.py"), of("curl")
    args = replaced(replaced(shlex.split(command)[1:], "--checkpoint_path", checkpoint), "--port", 0)
    (code,) = [block for block in blocks("python") if "openai" in block]
    with subprocess.Popen([sys.executable, *args], cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().split()[-1]
        ask = shlex.split(curl.replace("http://127.0.0.1:8000", url))
        assert '"finish_reason"' in subprocess.run(ask, capture_output=True, text=True, check=True).stdout
        code = code.replace("http://127.0.0.1:8000", url).replace("HuggingFaceTB/SmolLM2-135M-Instruct", "model")
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        server.terminate()
    assert server.returncode == 0


@pytest.mark.parametrize("command", of("torchrun "))
def test_torchrun(command, run_cli, tmp_path):
    """On one machine, with a tiny model that two ranks share."""
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    args = replaced(shlex.split(command)[1:], "--nproc_per_node", 2)
    if "--nnodes" in args:
        args = replaced(replaced(args, "--nnodes", 1), "--rdzv_endpoint", "localhost:0")
    if "distill.py" in args:
        args = distilling(args, checkpoint)
    else:
        args = replaced(args, "--checkpoint_path", checkpoint)
    args = replaced(args, "--device", "cpu")
    if "eval.py" in args:
        (tmp_path / "other.txt").write_text(TEXT, encoding="utf-8")
        args = replaced(replaced(args, "--perplexity", tmp_path / "other.txt"), "--max_seq_length", 32)
    elif "distill.py" not in args:
        args = replaced(replaced(args, "--num_samples", 1), "--max_new_tokens", 8)
    if "--speculate" in args:
        args = replaced(args, "--speculate_k", 2)
    if "--prompt_file" in args:
        (tmp_path / "prompts.txt").write_text("One\nTwo and three\n", encoding="utf-8")
        args = replaced(args, "--prompt_file", tmp_path / "prompts.txt")
    done = run_cli("-m", "torch.distributed.run", *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


TEXT = "The cat sat on the mat, and the dog beside the cat. Nobody had asked either of them to do so. " * 8


@pytest.mark.parametrize("command", of("python sparsify.py"))
def test_sparsify(command, call, tmp_path):
    """On a tiny model."""
    args = shlex.split(command)[1:]
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    for name in ("book.txt", "other.txt"):
        (tmp_path / name).write_text(TEXT, encoding="utf-8")
    args = [str(tmp_path / arg) if arg.endswith(".txt") else arg for arg in args]
    args = replaced(args, "--calibration_seq_length", 32)
    if "--drop" in args:
        args = replaced(args, "--drop", 1)
    assert call(*replaced(args, "--checkpoint_path", checkpoint)).out
    assert len(list(checkpoint.parent.glob("model_*.pth"))) == ("profile" not in args)
    assert len(list(checkpoint.parent.glob("*.profile.json"))) == ("profile" in args)


@pytest.mark.parametrize("command", of("python quantize.py"))
def test_quantize(command, call, tmp_path):
    """On a tiny model; a task that must be fetched is replaced by a file."""
    args = shlex.split(command)[1:]
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    for name in ("book.txt", "other.txt"):
        (tmp_path / name).write_text(TEXT, encoding="utf-8")
    args = [str(tmp_path / arg) if arg.endswith(".txt") else arg for arg in args]
    if "--calibration_tasks" in args:
        at = args.index("--calibration_tasks")
        args[at : at + 2] = ["--calibration_file", str(tmp_path / "book.txt")]
    if "--groupsize" in args:
        args = replaced(args, "--groupsize", 32)  # divides the tiny model's inputs
    if "int4-gptq" in args:
        args = replaced(args, "--calibration_seq_length", 32)
    assert "smaller" in call(*replaced(args, "--checkpoint_path", checkpoint)).out
    assert len(list(checkpoint.parent.glob("model_int*.pth"))) == 1


@pytest.mark.parametrize("command", of("python distill.py"))
def test_distill(command, call, tmp_path):
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    args = distilling(shlex.split(command)[1:], checkpoint)
    assert "accepted of 4 guesses" in call(*args).out
    assert not list(tmp_path.glob("**/*.state"))


def distilling(args, checkpoint):
    """On a tiny model and text, for two steps."""
    folder = checkpoint.parent
    (folder / "book.txt").write_text(TEXT, encoding="utf-8")
    (folder / "more.jsonl").write_text('{"text": "The cat sat."}\n', encoding="utf-8")
    args = [str(folder / arg) if arg.endswith((".txt", ".jsonl", ".png", "student.pth")) else arg for arg in args]
    args = replaced(replaced(args, "--teacher", checkpoint), "--seq_length", 32)
    if "--layers" in args:
        args = replaced(args, "--layers", 2)
    if "--finetune" in args:
        args = replaced(args, "--finetune", checkpoint)
    if "--self_data" in args:
        args = replaced(args, "--self_data", 6)
    if "--minutes" in args:
        args[args.index("--minutes")] = "--steps"
    return replaced(args, "--steps", 2)


@pytest.mark.parametrize("command", of("python eval.py"))
def test_eval(command, call, own_tasks_only, monkeypatch, tmp_path):
    """On a tiny model; tasks that must be fetched are replaced by one of a file."""
    checkpoint = make_tiny_checkpoint(tmp_path / "model")
    args = replaced(shlex.split(command)[1:], "--checkpoint_path", checkpoint)
    if "--tasks" in args:
        write_task(tmp_path)
        args = replaced(replaced(args, "--include_path", tmp_path), "--output_json", tmp_path / "results.json")
        at = args.index("--tasks") + 1
        rest = [i for i in range(at, len(args)) if args[i].startswith("--")]
        args[at : rest[0]] = ["my_task"]
    else:
        (tmp_path / "other.txt").write_text(TEXT, encoding="utf-8")
        args = replaced(replaced(args, "--perplexity", tmp_path / "other.txt"), "--max_seq_length", 32)
        args = replaced(args, "--stride", 16) if "--stride" in args else args
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert ("|my_task|" if "--tasks" in args else "perplexity: ") in call(*args).out


def write_task(folder):
    """The README's task and its line of questions, eight times."""
    (task,) = blocks("yaml")
    data = folder / "questions.json"
    (folder / "my_task.yaml").write_text(task.replace("my_tasks/questions.json", str(data)))
    (line,) = re.findall(r"`({.question.*})`", README)
    data.write_text(f"{line}\n" * 8)


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
    model = "model_quantized.pth" if "--keep_quantized" in command else "model.pth"
    assert names == {model, "tokenizer.json", "tokenizer_config.json", "generation_config.json"}


@pytest.mark.parametrize("command", of("./scripts/"))
def test_scripts_are_there_and_parse(command):
    path = ROOT / shlex.split(command)[0]
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", path]).returncode == 0


@pytest.mark.parametrize("command", of("python scripts/bench/run.py"))
def test_benchmarks_parse(command):
    """They take minutes, and peers that are not installed here."""
    args = shlex.split(command)[2:]
    assert build_parser(args).parse_args(args).output


def test_library_example(run_cli, default_model_dir, tmp_path):
    """In a folder whose own modules have the names of our rooms."""
    for name in ("model", "text"):
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    (code,) = [block for block in blocks("python") if "gpt_faster" in block]
    code = re.sub(r'load\("[^"]+"', f"load({str(default_model_dir / 'model.pth')!r}", code)
    code = code.replace("max_new_tokens=100", "max_new_tokens=12")
    # as pip install -e does: the file is found, its folder is not on the path
    found = f"""import importlib.util, sys
spec = importlib.util.spec_from_file_location("gpt_faster", {str(ROOT / "gpt_faster.py")!r})
sys.modules["gpt_faster"] = gpt_faster = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpt_faster)"""
    checks = "import model, text; assert model.MINE and text.MINE and model is not gpt_faster.model"
    lines = [found, code, "print('|')", code.replace("compile=False", "compile=True"), checks]
    done = run_cli("-c", "\n".join(lines), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(len(text.split()) > 3 for text in done.stdout.split("|\n")), done.stdout
