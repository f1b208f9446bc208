"""What an architecture of GGUF adds to the names of its family."""

from collections.abc import Callable
from dataclasses import dataclass, field

from weights.gguf_file import GGUFFile


@dataclass(frozen=True)
class Architecture:
    """Which of our families an architecture of GGUF is, and what its files have of their own."""

    model_type: str
    with_experts: str | None = None  # the model_type of files with experts
    with_window: str | None = None  # the model_type of files with a window
    interleaved: bool = False  # rope turns neighbouring pairs
    config: dict = field(default_factory=dict)  # what is true of all its models, and no file says
    required: tuple[str, ...] = ()  # keys that files must have, though Hugging Face has defaults for them
    modules: dict = field(default_factory=dict)  # of Hugging Face, where files are split otherwise than its own
    by_layer: Callable[[GGUFFile, dict], dict] = lambda file, values: {}  # keys made of what files say of single layers
    layers_scaled_by_dim: int | None = None  # layers of the one size whose attention is scaled by dim / n_head
