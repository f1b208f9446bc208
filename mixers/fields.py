"""What the fields of a config may hold."""

from dataclasses import fields
from types import NoneType, UnionType
from typing import get_args

MAX_SIZE, MAX_LAYERS = 1 << 24, 1 << 10  # far above any real model; larger ones would be built forever
SMALLEST, LARGEST = 1e-30, 1e30  # of factors: float32 holds them and what they divide


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
