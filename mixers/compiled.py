"""What code may ask about sizes while it is compiled."""

import torch


def surely_few(size: int, most: int) -> bool:
    """Whether a size is at most `most`, in every call that a compiled form with this size serves."""
    if torch.compiler.is_compiling():  # a comparison would compile another form for short prompts
        return torch.fx.experimental.symbolic_shapes.statically_known_true(size <= most)
    return size <= most


def is_fixed(size: int) -> bool:
    """Whether a size is the same in every call that a compiled form serves."""
    return not torch.compiler.is_compiling() or torch.fx.experimental.symbolic_shapes.has_static_value(size)
