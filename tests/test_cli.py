"""What cli.py does for every command: streams, pipes, errors in words and Ctrl-C, on commands that do little."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def bash(command, **options):
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, timeout=120, **options)


def command_of(body):
    """A command whose main is `body`, as every command of ours is run."""
    main = "".join(f"    {line}\n" for line in body.splitlines())
    run = "cli.run(main, cli.Parser())"
    return [sys.executable, "-c", f"import cli, sys, time\ndef main():\n{main}{run}"]


def test_emoji_pass_in_the_c_locale():
    env = os.environ | {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = command_of(r"print(sys.stdin.read())" "\n" r"print('\N{SLICE OF PIZZA}', file=sys.stderr)")
    result = subprocess.run(command, cwd=ROOT, input="👍".encode(), env=env, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout.decode(), result.stderr.decode()) == (0, "👍\n", "🍕\n")


@pytest.mark.parametrize("streams", ["", "2>&1"])
def test_a_broken_pipe_ends_quietly(streams):
    words = shlex.join(command_of("while True:\n    print('text', flush=True)\n    print('line', file=sys.stderr)"))
    result = bash(f"{words} {streams} | head -c 1 >/dev/null; echo ${{PIPESTATUS[0]}}", text=True)
    assert set(result.stderr.split()) <= {"line"}
    assert result.stdout.strip() in ("0", "141")


@pytest.mark.parametrize("closed", ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_an_empty_one(closed):
    words = command_of("file = open('cli.py')\nprint(file.fileno() > 2, sys.stdin.read())\nprint(1, file=sys.stderr)")
    result = bash(f"{shlex.join(words)} {closed}", input=b"")
    out, err = b"" if " >" in f" {closed}" else b"True \n", b"" if "2>" in closed else b"1\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, out, err)


@pytest.mark.parametrize(
    "body, flags, code, out, error",
    [
        ("pass", "--no_such", 2, "", "error: unrecognized arguments: --no_such; -c --help lists the flags"),
        ("pass", "--version", 0, "gpt-faster 0.1.0\n", ""),
        ("raise ValueError('why')", "", 2, "", "error: why"),
        ("import no_such", "", 2, "", f"error: Python at {sys.executable} has no package no_such; use: "),
        ("raise OSError(28, 'No space left on device', 'a.pth')", "", 2, "", "error: No space left on device: a.pth"),
        ("raise OSError(2, 'No such file', 'a\\n\\x1b')", "", 2, "", "error: No such file: a \\x1b"),
    ],
)
def test_exit_code_and_one_line(body, flags, code, out, error):
    result = subprocess.run([*command_of(body), *flags.split()], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (code, out)
    assert result.stderr.startswith(error) and result.stderr.count("\n") == (1 if error else 0)


def test_a_package_missing_before_main_says_what_to_activate():
    code = "import cli; cli.begin(); import no_such"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: Python at ") and "/" in result.stderr


def test_an_interrupt_in_a_finaliser_is_not_lost():
    body = """class Slow:
    def __del__(self):
        print("now", file=sys.stderr, flush=True)
        time.sleep(20)
slow = Slow()
del slow
time.sleep(20)"""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(command_of(body), cwd=ROOT, start_new_session=True, **pipes)
    assert process.stderr.readline() == b"now\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[1].strip() == b"" and process.returncode == 130


def test_sigterm_leaves_nothing_behind(tmp_path):
    body = f"with cli.scratch(cli.Path({str(tmp_path / 'a')!r})) as path:"
    body += "\n    path.mkdir()\n    cli.say('made')\n    time.sleep(60)"
    process = subprocess.Popen(command_of(body), cwd=ROOT, stderr=subprocess.PIPE)
    assert process.stderr.readline() == b"made\n"
    process.terminate()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert process.stderr.read().strip() == b"" and not list(tmp_path.iterdir())


def test_a_full_disk_behind_standard_output_is_named():
    result = bash(f"{shlex.join(command_of('print(1)'))} > /dev/full", text=True)
    assert (result.returncode, result.stderr) == (2, "error: No space left on device: standard output\n")
