"""What an architecture of GGUF adds to the names of its family."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from model import ModelArgs
from weights.gguf_file import GGUFFile
from weights.layout import Readers


@dataclass(frozen=True)
class Architecture:
    """Which of our families an architecture of GGUF is, and what its files have of their own."""

    model_type: str
    with_experts: str | None = None  # the model_type of files with experts
    with_window: str | None = None  # the model_type of files with a window
    others: tuple[str, ...] = ()  # the model_types of other files, which `by_layer` may tell apart
    interleaved: bool = False  # rope turns neighbouring pairs
    config: dict = field(default_factory=dict)  # what is true of all its models, and no file says
    required: tuple[str, ...] = ()  # keys that files must have, though Hugging Face has defaults for them
    modules: dict = field(default_factory=dict)  # of Hugging Face, where files are split otherwise than its own
    by_layer: Callable[[GGUFFile, dict], dict] = lambda file, values: {}  # other keys, made of what a file says
    rows: Callable[[ModelArgs], dict[str, Tensor]] = lambda args: {}  # in another order than ours, see `layout.rename`
    tensors: Callable[[ModelArgs, Readers], Readers] = lambda args, raw: raw  # those of a file as its family has them
    layers_scaled_by_dim: int | None = None  # layers of the one size whose attention is scaled by dim / n_head

    @property
    def model_types(self) -> set[str]:
        """Of all files that it may have."""
        return {self.model_type, *self.others} | {self.with_experts, self.with_window} - {None}
