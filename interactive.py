"""A conversation at the terminal: messages and commands in, answers out."""

import os
import re
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from cli import in_words, say, write
from engine.conversation import Conversation
from measure.speed import rate
from ranks import shared, speaks
from weights.files import read_json, require_writable, write_json

HELP = """\
/system TEXT  give the model a system message; without TEXT, take it away
/reset        forget the conversation
/save FILE    write the conversation as JSON
/load FILE    go on with a conversation that was saved
/stats        say how much of the context is used
/quit, /exit  end, as Ctrl-D does
Ctrl-C stops an answer or clears the line; twice, it ends. A line that ends in \\ goes on in the next one."""


def talk(conversation: Conversation, inputs: list[str | Path]) -> None:
    """Talk until the input or a command ends it; inputs: files of the run, over which nothing is saved."""
    ranks = conversation.engine.model.ranks
    read = message_reader() if speaks(ranks) else None
    if conversation.tokenizer.chat_template is None:
        say("This model has no chat template: it continues your text.")
    say("Type a message. Ctrl-C stops an answer, Ctrl-D ends, /help lists the commands.")
    while (message := shared(ranks, read)) is not None:
        command = re.fullmatch(r"\s*/(\w+)(?:\s+(.*))?", message, re.DOTALL)
        if command and command[1] in ("quit", "exit"):
            break
        try:
            if command:
                say(obey(conversation, command[1], (command[2] or "").strip(), inputs))
            elif message.strip():
                reply(conversation, message)
        except ValueError as error:
            say(f"error: {in_words(error)}")
        except KeyboardInterrupt:
            say("\n[interrupted]")


def reply(conversation: Conversation, message: str) -> None:
    """Stream the answer to one message."""
    with closing(conversation.turn(message)) as pieces:  # Ctrl-C stops it
        for piece in pieces:
            write(piece)
    write("\n")
    timing, request = conversation.timing, conversation.request
    facts = [rate(timing.decode_tok_s), f"first token after {timing.time_to_first_token_s:.2f} sec"]
    if conversation.dropped:
        facts.append(f"oldest turns dropped for want of context: {conversation.dropped}")
    if conversation.is_full:
        facts.append("cut where the context ends")
    elif request.finish_reason == "length":
        facts.append(f"cut at {request.max_new_tokens} tokens")
    say(f"[{', '.join(facts)}]")


def obey(conversation: Conversation, name: str, text: str, inputs: list[str | Path]) -> str:
    """Follow the command /name, whose rest is `text`; what to say of it. inputs: see `talk`."""
    ranks = conversation.engine.model.ranks
    if name == "help":
        return HELP
    if name == "reset":
        conversation.reset()
        return "[conversation cleared]"
    if name == "stats":
        used, turns = shared(ranks, lambda: len(conversation.prompt_ids(""))), len(conversation.turns)
        return f"[turns: {turns}, tokens: {used} of {conversation.limits.context}]"
    if name == "system":
        if conversation.tokenizer.chat_template is None:
            raise ValueError("a system message needs a chat template, and this model has none")
        conversation.system = text or None
        return "[system message set]" if text else "[no system message]"
    if name not in ("save", "load"):
        raise ValueError(f"there is no command /{name}; /help lists the commands")
    if not text:
        raise ValueError(f"/{name} needs a file, such as /{name} talk.json")
    text = str(Path(text).expanduser())
    if name == "load":
        conversation.restore(shared(ranks, lambda: read_json(text).get("messages")))
    elif speaks(ranks):
        require_writable(text, inputs)
        write_json(text, {"messages": conversation.messages})
    return f"[turns {'loaded' if name == 'load' else 'saved'}: {len(conversation.turns)}]"


# ---------------------------------------------------------------- what is typed


def message_reader() -> Callable[[], str | None]:
    """A function that waits for the next message; None: the input has ended."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return lambda: read_message(read_piped_line)
    from prompt_toolkit import PromptSession

    session = PromptSession(history=open_history())
    return lambda: read_typed_message(session)


def read_message(read_line: Callable[[str], str]) -> str | None:
    r"""The next line, and those after it as long as one ends in \; read_line: from a prompt to a line, or EOFError."""
    lines = []
    try:
        while not lines or lines[-1].endswith("\\"):
            line = read_line("... " if lines else "> ")
            lines = [*lines[:-1], *(each.removesuffix("\\") for each in lines[-1:]), line]
    except EOFError:
        if not lines:
            return None
    return "\n".join(lines)


def read_piped_line(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def read_typed_message(session) -> str | None:
    """Pasted lines are one message. Ctrl-C clears the message, and ends where nothing was typed since the last one."""
    interrupted = False

    def read_line(prompt: str) -> str:
        nonlocal interrupted
        line, interrupted = session.prompt(prompt), False
        return line

    while True:
        try:
            return read_message(read_line)
        except KeyboardInterrupt:
            if interrupted and not session.default_buffer.text:
                raise
            say("[Ctrl-C again, or Ctrl-D, ends]")
            interrupted = True


def open_history():
    """What was typed in earlier sessions, if it can be kept."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        path = state / "gpt-faster" / "history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except (OSError, RuntimeError):  # there may be no home
        return InMemoryHistory()
    return FileHistory(str(path))
