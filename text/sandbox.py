"""Chat templates are programs that come with a model. This program renders them, away from ours: see `chat.py`.

It reads a request a line, {"template": ..., "variables": ...}, and answers each with a line, {"text": ...} or
{"error": ...}. It has a limit of memory, which ends what jinja's own limits allow.
"""

import contextlib
import functools
import json
import sys
import time
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 512 << 20  # bytes of this process
LONGEST = 1_000_000  # characters of a rendered text, beside four times the request's


class Generation(Extension):
    """{% generation %} marks what training scores; here it is only its content."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True))


@functools.lru_cache(maxsize=8)
def compiled(template: str):
    """The template in jinja as chat templates expect it: the settings and additions of transformers."""

    def raise_exception(message):
        raise TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = ["jinja2.ext.loopcontrols", Generation]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = to_json  # jinja's own escapes HTML
    sandbox.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    return sandbox.from_string(template)


def answer(line: bytes) -> bytes:
    try:
        request = json.loads(line)
        text = compiled(request["template"]).render(request["variables"])
        if len(text) > LONGEST + 4 * len(line):
            raise ValueError(f"it writes {len(text)} characters, far more than the conversation has")
        return json.dumps({"text": text}).encode()
    except MemoryError:
        reason = f"it needs more than {MEMORY >> 20} MB of memory"
    except Exception as error:  # a template can raise anything
        reason = " ".join((str(error) or type(error).__name__).split())
    return json.dumps({"error": reason}).encode()


def limit(name: str, value: int) -> None:
    """Lower a limit of this process, where the system has it."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main() -> None:
    limit("RLIMIT_AS", MEMORY)
    limit("RLIMIT_CORE", 0)
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        limit("RLIMIT_CPU", int(time.process_time()) + 10)  # if whoever asks dies before the deadline
        sys.stdout.buffer.write(answer(line) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
