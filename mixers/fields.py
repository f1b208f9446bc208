"""What the fields of a config may hold."""

from dataclasses import fields
from types import NoneType, UnionType
from typing import get_args

MAX_SIZE, MAX_LAYERS = 1 << 24, 1 << 10  # far above any real model; larger ones would be built forever
SMALLEST, LARGEST = 1e-30, 1.1e30  # of factors: float32 holds them, 1e30 rounded to it, and what they divide


def _positive(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and SMALLEST <= value <= LARGEST


def check_fields(config) -> None:
    """Raise ValueError if a field of a config is not of its type, or no size or factor of any model."""
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        limit = MAX_LAYERS if name in ("n_layer", "n_expert") else MAX_SIZE
        if float in kinds:
            fits, wanted = _positive(value), "a positive number"
        elif tuple[float, ...] in kinds:
            fits, wanted = isinstance(value, tuple) and all(map(_positive, value)), "positive numbers"
        elif tuple[int, ...] in kinds:
            are_layers = isinstance(value, tuple) and all(type(each) is int and each >= 0 for each in value)
            fits, wanted = are_layers, "numbers of layers, from 0"
        elif int in kinds:
            fits, wanted = type(value) is int and 1 <= value <= limit, f"a whole number from 1 to {limit}"
        else:
            is_bool = isinstance(value, bool)  # which Python counts as an int
            fits, wanted = isinstance(value, kinds) and is_bool == (bool in kinds), field.type
        if not fits and not (value is None and NoneType in kinds):
            raise ValueError(f"{name} is {'missing' if value is None else repr(value)}; it must be {wanted}")


def check_sizes(args) -> None:
    """Raise ValueError if sizes of a `model.ModelArgs` do not fit each other."""
    for name in ("head_dim", "full_head_dim"):
        if args.n_head * (getattr(args, name) or 0) > MAX_SIZE:
            raise ValueError(f"n_head {args.n_head} x {name} {getattr(args, name)} is more than {MAX_SIZE}")
    if args.n_head % args.n_kv_head:
        raise ValueError(f"n_head {args.n_head} is not a multiple of n_kv_head {args.n_kv_head}")
    if args.head_dim % 2 or args.turned % 2 or args.turned > args.head_dim:
        raise ValueError(
            f"rope_dim {args.turned} and head_dim {args.head_dim} must be even, and rope_dim not the larger"
        )
    for name in ("full_layers", "unrotated_layers", "dense_layers"):
        if max(getattr(args, name), default=-1) >= args.n_layer:
            raise ValueError(f"{name} {getattr(args, name)} must be below n_layer, {args.n_layer}")
    needs = {"full_layers": "sliding_window", "late_query_scale": "rope_scaling", "qk_norm_last": "qk_norm"}
    needs["norm_bias"] = "mean_norm"
    for name in ("delta", "short_conv"):
        layers = getattr(getattr(args, name), "layers", ())
        if max(layers, default=-1) >= args.n_layer:
            raise ValueError(f"layers {layers} of {name} must be below n_layer, {args.n_layer}")
    for name, needed in needs.items():
        if getattr(args, name) and not getattr(args, needed):
            raise ValueError(f"{name} {getattr(args, name)} needs {needed}")
    turned = args.rope_dim or args.full_head_dim or args.head_dim
    for name in ("factors", "long_factors"):
        factors = getattr(args.rope_scaling, name, ())
        if len(factors) not in (0, turned // 2):
            raise ValueError(
                f"rope has {len(factors)} frequency factors; to turn {turned} numbers it needs half as many"
            )
