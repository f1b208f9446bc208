"""Chat templates: programs that come with a model, so they run in a sandbox and within limits of time and size."""

import ctypes
import json
import threading
from datetime import datetime

TEMPLATE_SECONDS = 2.0
TEMPLATE_SIZE = 1_000_000  # characters, items or bits of one value a template may compute


def render(template: str, variables: dict) -> str:
    """What a template writes. Raises ValueError, in one line, on whatever goes wrong."""
    outcome = {}

    def work():
        try:
            outcome["text"] = template_sandbox().from_string(template).render(variables)
        except SystemExit:  # raised below, at the time limit
            pass
        except Exception as error:  # a template can raise anything
            outcome["error"] = " ".join((str(error) or type(error).__name__).split())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(TEMPLATE_SECONDS)
    if thread.is_alive():
        # the sandbox limits one loop, not loops within loops; jinja's handlers catch Exception, never SystemExit
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        thread.join(0.5)
    if "text" not in outcome:
        raise ValueError(f"chat template: {outcome.get('error', f'still running after {TEMPLATE_SECONDS:g} seconds')}")
    return outcome["text"]


def template_sandbox():
    """Jinja as chat templates expect it: the settings and additions of transformers."""
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what training scores; here it is only its content."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**"))

        def call_binop(self, context, operator, left, right):
            if result_size(operator, left, right) > TEMPLATE_SIZE:
                raise SecurityError(f"the result of {operator} is too large")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message):
        raise TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    sandbox.filters["tojson"] = to_json  # jinja's own escapes HTML
    sandbox.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    return sandbox


def result_size(operator: str, left, right) -> int:
    """A bound on the result before it is computed: sequences count their items, numbers their bits."""
    sizes = [len(x) if hasattr(x, "__len__") else x.bit_length() if isinstance(x, int) else 1 for x in (left, right)]
    if operator == "**" and isinstance(right, int):
        return sizes[0] * right
    if operator == "*" and hasattr(left, "__len__") != hasattr(right, "__len__"):
        return sizes[0] * right if isinstance(right, int) else left * sizes[1]
    return sum(sizes)
