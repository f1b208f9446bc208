"""Rates of a run and what it read."""

import statistics

from cli import say
from engine.engine import Engine
from engine.request import Timing
from measure.machine import measured_bandwidth, peak_memory
from model import Transformer
from weights.files import GB
from weights.layout import weight_bytes


def _median(values) -> float | None:
    """Of the values that are not None."""
    values = [value for value in values if value is not None]
    return statistics.median(values) if values else None


def rate(tok_s: float | None) -> str:
    return "no tokens to time" if tok_s is None else f"{tok_s:.1f} tokens/sec"


def by_each(model: Transformer) -> str:
    return "" if model.ranks is None else " by each rank"


def report_acceptance(timing: Timing) -> None:
    """How many of the proposed tokens were accepted: the fraction of rounds for each number, as gpt-fast prints it."""
    lengths = [accepted for request in timing.requests for _, accepted in request.rounds]
    if lengths:
        fractions = [lengths.count(n) / len(lengths) for n in range(max(lengths) + 1)]
        say(f"Acceptance probs: [{', '.join(f'{fraction:.3f}' for fraction in fractions)}]")
        mean, accepted = acceptance([timing]).values()
        say(f"Mean Accepted: {mean:.2f}" + (f", {accepted:.0%} of those proposed" if accepted is not None else ""))


def acceptance(timings: list[Timing]) -> dict[str, float | None]:
    """Tokens accepted in a round on average, and accepted / proposed; None where there were none."""
    rounds = [each for timing in timings for request in timing.requests for each in request.rounds]
    proposed, accepted = (sum(column) for column in zip(*rounds, strict=True)) if rounds else (0, 0)
    return {
        "mean_accepted": accepted / len(rounds) if rounds else None,
        "acceptance_rate": accepted / proposed if proposed else None,
    }


def bytes_read(timings: list[Timing], engine: Engine) -> int:
    """Bytes of weights that decoding has read: of the model in every step, of a draft model for each token it drew."""
    model, speculation = engine.model, engine.speculation
    draft = speculation.drafter.model if speculation else None
    draft_size = 0 if draft is None else weight_bytes(draft)
    own = sum(each.steps * weight_bytes(model, each.step_tokens / each.steps) for each in timings if each.steps)
    return own + sum(each.draft_steps * draft_size for each in timings)


def summarise(timings: list[Timing], engine: Engine) -> dict:
    """What --output_json says of all samples together; null where something does not apply."""
    model = engine.model
    peak = peak_memory(model.device)  # before the bandwidth buffers
    read, decode_s = bytes_read(timings, engine), sum(timing.decode_s for timing in timings)
    return {
        "decode_tok_s": _median(timing.decode_tok_s for timing in timings),
        "prefill_tok_s": _median(timing.prefill_tok_s for timing in timings),
        "time_to_first_token_s": _median(timing.time_to_first_token_s for timing in timings),
        "weight_bytes_per_token": weight_bytes(model),
        "bandwidth_gb_s": read / decode_s / GB if read and decode_s else None,
        "measured_bandwidth_gb_s": measured_bandwidth(model.device),
        "peak_memory_gb": peak / GB if peak else None,
        **acceptance(timings),
    }


def report(index: int, timing: Timing, engine: Engine) -> None:
    """The lines after one sample, on standard error."""
    total = timing.prefill_s + timing.decode_s
    say(
        f"Time for inference {index}: {total:.2f} sec total, {rate(timing.decode_tok_s)} decoding, "
        f"{timing.prefill_tok_s:.1f} tokens/sec prefill, first token after {timing.time_to_first_token_s:.3f} sec"
    )
    if timing.steps:
        read, step = bytes_read([timing], engine) / GB, "round" if engine.speculation else "step"
        say(
            f"Bandwidth achieved{by_each(engine.model)}: {read / timing.decode_s:.1f} GB/s "
            f"(weights only, {read / timing.steps:.3f} GB a {step})"
        )
    if engine.speculation is not None:
        report_acceptance(timing)


def say_summary(summary: dict, engine: Engine) -> None:
    """The lines after all samples, on standard error."""
    model, ranks = engine.model, engine.model.ranks
    bandwidth = "of this machine" if ranks is None else "that each rank can have"
    say(f"Average tokens/sec: {summary['decode_tok_s'] or 0:.2f}")
    say(f"Bandwidth {bandwidth}: {summary['measured_bandwidth_gb_s'] or 0:.1f} GB/s (measured just now)")
    say(f"Memory used{by_each(model)}: {(summary['peak_memory_gb'] or 0):.2f} GB")
    if ranks is not None and ranks.n_stage > 1:
        say(f"Network: {model.args.dim * model.dtype.itemsize} bytes a token from each stage to the next")
