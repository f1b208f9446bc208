"""Which layers have a window, and which have rope, from a config in Hugging Face's words."""

from weights.files import Config


def windows(config: Config, n_layer: int, period: int | None) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers without one. use_sliding_window: false wins over a window size.

    period: one layer in so many has none, unless the config says which.
    """
    layer_types, is_full = config.get("layer_types"), {"full_attention": True, "sliding_attention": False}
    if config.get("sliding_window") is None or not config.get("use_sliding_window", True):
        return None, ()
    if layer_types is not None:
        fits = isinstance(layer_types, list) and len(layer_types) == n_layer
        if not fits or not all(str(each) in is_full for each in layer_types):
            needed = f"{n_layer} of {' and '.join(is_full)}"
            raise config.error(f"layer_types is {layer_types!r}; {needed} are needed")
        full = tuple(i for i, each in enumerate(layer_types) if is_full[each])
    elif period is not None:
        period = config.whole("sliding_window_pattern", period)
        full = tuple(range(period - 1, n_layer, period))
    else:  # the first layers may be full
        n_full = config.get("max_window_layers", 0)
        if type(n_full) is not int:
            raise config.error(f"max_window_layers is {n_full!r}; a number is needed")
        full = tuple(range(min(n_full, n_layer)))
    return (None, ()) if len(full) == n_layer else (config.whole("sliding_window"), full)


def rope_in_some(config: Config) -> dict:
    """The config says which layers have rope, or that one in so many has none."""
    n_layer, window = config.whole("num_hidden_layers"), bool(config.get("use_sliding_window"))
    period = config.whole("no_rope_layer_interval")
    rotated = [(i + 1) % period for i in range(n_layer)]
    if config.get("no_rope_layers") is not None:
        rotated = config.list_of(int, "no_rope_layers")[:n_layer]
    if window and config.get("layer_types") is None:
        raise config.error("use_sliding_window needs layer_types, which say the layers with a window")
    return {"unrotated_layers": tuple(i for i, has_rope in enumerate(rotated) if not has_rope)}


def rope_with_window(config: Config) -> dict:
    """Only layers with a window have rope."""
    n_layer = config.whole("num_hidden_layers")
    window, full_layers = windows(config, n_layer, 4)
    return {"unrotated_layers": tuple(range(n_layer)) if window is None else full_layers}
