"""What one family of models adds to a plain Llama."""

from collections.abc import Callable
from dataclasses import dataclass, field

from weights.files import Config

ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2"}


@dataclass(frozen=True)
class Family:
    """What a model_type adds to the plain Llama row."""

    fields: dict = field(default_factory=dict)  # of ModelArgs
    fields_from: Callable[[Config], dict] = lambda config: {}  # ... that depend on the config
    defaults: dict = field(default_factory=dict)  # what the config may leave out
    full_layers_every: int | None = None  # the period of layers without a window
    window_rope_base: str | None = None  # the config's name of the rope base of layers with one
    expert_size: str = "intermediate_size"  # the config's name of the width of feed-forwards
    norm_eps: str = "rms_norm_eps"  # the config's name of the norms' epsilon
    biases: dict = field(default_factory=dict)  # the config's names of what has biases -> fields of ModelArgs
    activations: dict = field(default_factory=lambda: ACTIVATION_NAMES)


def activation(config: Config, family: Family) -> str:
    name = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in family.activations:
        raise config.error(f"activation {name!r} is not supported; supported: {', '.join(family.activations)}")
    return family.activations[name]
