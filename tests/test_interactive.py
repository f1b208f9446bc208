"""A conversation with generate.py --interactive: through a pipe, and at a terminal."""

import json
import os
import pty
import select
import sys
import time

from tests.tiny import GREEDY_FLAGS as GREEDY
from tests.tiny import greedy_text, make_tiny_checkpoint, start


def test_conversation_through_a_pipe(talk, tiny):
    lines = "the cat\nthe dog\n/reset\n\nthe cat\n/exit\nno\n"
    result = talk("--interactive", "--system", "he said", *GREEDY, input=lines)
    messages, answers = [{"role": "system", "content": "he said"}], []
    for text in ("the cat", "the dog"):
        messages.append({"role": "user", "content": text})
        answers.append(greedy_text(tiny, messages))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert result.out == "".join(f"{answer}\n" for answer in [*answers, answers[0]])
    assert result.err.count("tokens/sec, first token after") == 3
    assert "[conversation cleared]" in result.err


def test_conversation_in_a_small_context(talk):
    long = "the dog ate the hat " * 30
    result = talk("--interactive", "--max_seq_length", 48, "--ignore_eos", input=f"the cat\n{long}\nhe\nthe cat")
    assert "the context has 48; shorten it" in result.err and result.err.count("tokens/sec") == 3
    assert "oldest turns dropped for want of context: " in result.err


def test_commands_of_a_conversation(talk, tmp_path):
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"messages": [{"role": "user", "content": 5}]}')
    said = [  # what is typed, and what is said then
        ("/help", "goes on in the next one."),
        ("/reste", "error: there is no command /reste; /help lists the commands"),
        ("the cat", "tokens/sec"),
        ("/stats", "[turns: 1, tokens: "),
        ("/etc/passwd is", "tokens/sec"),  # a message
        ("/reset", "[conversation cleared]"),
        ("the cat\\\n\\\nhe", "tokens/sec"),  # one message of three lines
        ("/stats", "[turns: 1, "),
        ("/save", "error: /save needs a file, such as /save talk.json"),
        ("/save /no/such/folder/a", "error: cannot write /no/such/folder/a: there is no folder"),
        ("/load nowhere.json", "error: nowhere.json is missing"),
        (f"/load {wrong}", "error: the messages must be texts of user and assistant in turn"),
    ]
    err = talk("--interactive", input="\n".join([*(typed for typed, _ in said), "/quit", "/stats"])).err
    rest = err.partition("/help lists the commands.")[2]
    for typed, says in said:
        assert says in rest, (typed, err)
        rest = rest.partition(says)[2]
    assert rest.count("\n") == 1  # nothing is said after /quit


def test_a_conversation_is_saved_and_loaded(talk, tiny, tmp_path):
    file, flags = tmp_path / "talk.json", ("--interactive", *GREEDY)
    whole = talk(*flags, input=f"/system he said\nthe cat\n/save {file}\nthe dog\n").out
    messages = json.loads(file.read_text())["messages"]
    assert messages[:2] == [{"role": "system", "content": "he said"}, {"role": "user", "content": "the cat"}]
    assert messages[2:] == [{"role": "assistant", "content": greedy_text(tiny, messages[:2])}]
    assert messages[2]["content"] + "\n" + talk(*flags, input=f"/load {file}\nthe dog\n").out == whole


class Terminal:
    """generate.py on a pseudo-terminal."""

    def __init__(self, *flags, state):
        self.master, slave = pty.openpty()
        take = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        python = ("-c", take, sys.executable)
        env = os.environ | {"XDG_STATE_HOME": str(state), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        self.process = start(*flags, python=python, env=env, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.seen = ""

    def expect(self, text, timeout=240):
        """Read on until `text` comes; return what came before it."""
        until = time.monotonic() + timeout
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0, until - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # the other side has closed
                raise AssertionError(f"ended without {text!r}: {self.seen!r}") from None
        before, self.seen = self.seen.split(text, 1)
        return before

    def type(self, text):
        os.write(self.master, text.encode())


PASTES = "\x1b[?2004h"  # the prompt is there: it takes pasted lines as one


def test_a_conversation_at_a_terminal(tmp_path):
    # on a fast machine 500 tokens were over before the Ctrl-C came; these take seconds there
    endless = make_tiny_checkpoint(tmp_path / "endless", context=6_000)
    flags = ("--interactive", "--checkpoint_path", endless, "--temperature", 0, "--ignore_eos")
    terminal = Terminal(*flags, state=tmp_path)
    terminal.expect(PASTES)
    terminal.type("forgotten\x03")
    terminal.expect("[Ctrl-C again, or Ctrl-D, ends]")
    terminal.type("the cat\\\r")
    terminal.expect("..")
    terminal.type("he said\r")
    terminal.expect("\x1b[?2004l")  # the line is read; the answer begins
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.expect("[interrupted]")
    terminal.expect(PASTES)
    terminal.type("\x1b[200~the dog\nthe hat\x1b[201~\r")  # a paste
    terminal.expect("tokens/sec")
    terminal.type("/stats\r")
    terminal.expect("[turns: ")
    assert terminal.expect(", tokens: ") in ("1", "2")  # a paste is one; the first may have been dropped
    terminal.expect(PASTES)
    terminal.type("\x03")
    terminal.expect("[Ctrl-C again, or Ctrl-D, ends]")
    terminal.type("\x03")
    assert terminal.process.wait(timeout=20) == 130
    history = (tmp_path / "gpt-faster" / "history").read_text()
    assert "+the dog\n+the hat\n" in history and "forgotten" not in history
    terminal = Terminal(*flags, state=tmp_path)
    terminal.expect(PASTES)
    terminal.type("\x1b[A")  # the last line of the session before
    terminal.expect("/stats")
    terminal.type("\x15\x04")
    assert terminal.process.wait(timeout=20) == 0
