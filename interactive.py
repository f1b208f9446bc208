"""A conversation at the terminal: messages and commands in, answers out."""

import sys

from cli import say, write
from engine.conversation import Conversation
from measure.speed import rate
from ranks import shared


def talk(conversation: Conversation) -> None:
    """Talk until Ctrl-D or /exit."""
    if conversation.tokenizer.chat_template is None:
        say("This model has no chat template: it continues your text.")
    say("Type a message. /reset clears the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer.")
    ranks = conversation.engine.model.ranks
    while (line := shared(ranks, read_line)) is not None and line.strip() != "/exit":
        if line.strip() == "/reset":
            conversation.reset()
            say("[conversation cleared]")
        elif line.strip():
            try:
                reply(conversation, line)
            except ValueError as error:
                say(f"error: {error}")


def reply(conversation: Conversation, line: str) -> None:
    """Stream the answer to one message; Ctrl-C stops it."""
    pieces = conversation.turn(line)
    try:
        for piece in pieces:
            write(piece)
    except KeyboardInterrupt:
        pieces.close()
        say("\n[interrupted]")
        return
    write("\n")
    timing, request, cut = conversation.timing, conversation.request, ""
    if request.finish_reason == "length":
        cut = f"; cut at {request.max_new_tokens} tokens"
        cut = "; the context is full, /reset clears it" if conversation.is_full else cut
    say(f"[{rate(timing.decode_tok_s)}, first token after {timing.time_to_first_token_s:.2f} sec{cut}]")


def read_line() -> str | None:
    """The next line typed, None at the end of the input."""
    try:
        if sys.stdin.isatty() and sys.stdout.isatty():
            import readline  # noqa: F401, gives input() its line editing

            return input("> ")
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    except EOFError:
        return None
