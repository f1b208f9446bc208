"""The rows of the KV cache."""

from engine.speculative import Speculation
from model import Transformer
from weights.device import require_memory


def setup_caches(model: Transformer, batch_size: int, length: int, speculation: Speculation | None = None) -> None:
    """Caches for `length` positions, and what speculation looks ahead; those of a draft model too.

    Sizes go in powers of two, so that few forms of the step are ever compiled. Raises ValueError if they do not fit, or
    a draft model's context is shorter.
    """
    models = [model]
    if speculation is not None and speculation.source.model is not None:
        models.append(speculation.source.model)
        require_context(models[-1], length)
    slots = min(max(512, 1 << (length - 1).bit_length()), max(model.args.max_seq_length, length))
    slots += 0 if speculation is None else speculation.look_ahead
    for each in models:
        args = each.args
        size = 2 * args.n_layer * batch_size * args.n_kv_head * slots * args.head_dim * each.dtype.itemsize
        what = f"the caches of {batch_size} x {slots} positions"
        require_memory(size, each.device, what, "use a smaller --max_seq_length, --max_new_tokens or --batch_size")
        each.setup_caches(batch_size, slots)


def require_context(draft: Transformer, length: int) -> None:
    """Raise ValueError if the draft model was made for fewer positions."""
    if length > draft.args.max_seq_length:
        raise ValueError(
            f"the draft's context of {draft.args.max_seq_length} is shorter than the {length} positions asked for; "
            "use a smaller --max_new_tokens or --max_seq_length, or another draft"
        )


def context_length(model: Transformer, asked: int | None) -> int:
    """Positions a row may take. Raises ValueError if more are asked for than the model was made for."""
    if asked is not None and asked > model.args.max_seq_length:
        raise ValueError(f"--max_seq_length {asked} is more than the model's context of {model.args.max_seq_length}")
    return asked or model.args.max_seq_length


def check_fit(longest: int, max_new_tokens: int, context: int) -> int:
    """The longest prompt and its budget in positions. Raises ValueError if the context does not hold them."""
    if longest + max_new_tokens > context:
        fits = max(context - longest, 0)
        advice = f"use --max_new_tokens {fits} or less" if fits else f"shorten the prompt below {context}"
        raise ValueError(
            f"the prompt's {longest} tokens and {max_new_tokens} new ones are more than the context of {context}; "
            f"{advice}"
        )
    return longest + max_new_tokens


def shared_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
