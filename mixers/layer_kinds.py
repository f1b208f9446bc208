"""How layers of one model differ in heads, and in whose keys and values they attend to. args: a `model.ModelArgs`."""

from collections.abc import Iterator

from torch import Tensor


def key_heads(args, windowed: bool) -> tuple[int, int]:
    """Key heads, and the size of every head, of the layers with a window, or of those without one."""
    if windowed:
        return args.n_kv_head, args.head_dim
    return args.full_kv_head or args.n_kv_head, args.full_head_dim or args.head_dim


def source_layers(args) -> list[int]:
    """For each layer, the one whose keys and values it attends to: itself or, of the last, the last before them."""
    first, windows = args.n_layer - (args.n_reusing_layer or 0), args.windows()
    last = {window: layer for layer, window in enumerate(windows[:first])}
    return [*range(first), *(last[window] for window in windows[first:])]


def projected_heads(args, layer: int) -> tuple[int, int, int]:
    """How many heads of q, k and v a layer makes of its input: values may be keys, and both be those of another."""
    is_full = args.windows()[layer] is None
    n_kv_head, _ = key_heads(args, not is_full)
    if source_layers(args)[layer] != layer:
        return args.n_head, 0, 0
    return args.n_head, n_kv_head, 0 if args.keys_as_values and is_full else n_kv_head


def check_layer_kinds(args) -> None:
    """Raise ValueError if the fields by which layers differ contradict each other."""
    needs = {"full_head_dim": "sliding_window", "full_kv_head": "sliding_window", "reusing_size": "n_reusing_layer"}
    needs |= {"layer_input_size": "layer_scales"}
    for name, needed in needs.items():
        if getattr(args, name) and not getattr(args, needed):
            raise ValueError(f"{name} {getattr(args, name)} needs {needed}")
    if args.full_kv_head and args.n_head % args.full_kv_head:
        raise ValueError(f"n_head {args.n_head} is not a multiple of full_kv_head {args.full_kv_head}")
    if args.full_head_dim and (args.full_head_dim % 2 or args.rope_dim or args.joint_qk_norm):
        raise ValueError(f"full_head_dim {args.full_head_dim} must be even, without rope_dim and joint_qk_norm")
    if args.n_reusing_layer:
        first, windows = args.n_layer - args.n_reusing_layer, args.windows()
        if first < 1 or set(windows[max(first, 0) :]) - set(windows[: max(first, 0)]):
            raise ValueError(f"n_reusing_layer {args.n_reusing_layer} needs a layer of each kind before them")
        if args.n_expert and args.reusing_size:
            raise ValueError(f"reusing_size {args.reusing_size} is for a model without experts")


class Handed:
    """Keys or values of a call without a cache, as `model.Vectors`, for later layers that attend to them too."""

    def write(self, rows: Tensor, pos: Tensor, x: Tensor) -> None:  # x [B, S, Hkv, D]
        self.data = x.transpose(1, 2)

    def read(self, rows: Tensor | None, mask: Tensor) -> Tensor:  # [B, Hkv, S, D]
        return self.data

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.data, None))


class WithoutCache:
    """In the place of a `model.CacheView` where layers attend to keys and values of others and nothing is kept."""

    def __init__(self, args):
        sources = source_layers(args)
        kept = {source: (Handed(), Handed(), None) for source in sources}
        self.layers = [kept[source] for source in sources]

    def layer(self, i: int) -> tuple:
        return self.layers[i]
