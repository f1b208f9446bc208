"""What is needed of lm-evaluation-harness before it is imported."""

from importlib import import_module


def require_harness(flag: str, instead: str) -> None:
    """Raise ValueError, with what installs it or does without, if lm-eval is missing."""
    try:
        import_module("lm_eval.tasks")
    except ImportError:
        raise ValueError(f"{flag} needs lm-eval: pip install -r requirements-eval.txt; or {instead}") from None
