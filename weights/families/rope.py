"""The fields of rope, from a config in Hugging Face's words."""

import math

from mixers.rope import ROPE_TYPES, RopeScaling
from weights.families.family import Family
from weights.files import Config


def rope(config: Config, family: Family, head_dim: int) -> dict:
    """The fields of rope; layers with a window may have a base of their own, and then no scaling.

    Settings occur as rope_theta and rope_scaling, or together as rope_parameters, which may differ by layer type.
    """
    settings, windowed = settings_of(config), config.part(None)
    differs = "full_attention" in settings.values
    if differs:
        windowed, settings = (config.part(settings.get(f"{name}_attention")) for name in ("sliding", "full"))
        if windowed.get("rope_type", "default") != "default":
            raise config.error(f"rope type {windowed.get('rope_type')!r} of windowed layers is not supported")
    window_base = None
    if differs or family.window_rope_base is not None:
        window_base = windowed.number("rope_theta", config.get(family.window_rope_base or "rope_theta"))
    base = settings.number("rope_theta", config.get("rope_theta"))
    rope_type = kind_of(settings)
    part = settings.number("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if rope_type == "proportional":
        part = 1.0  # all numbers are turned, some by no angle
    if part > 1 or (part < 1 and "partial_rotary_factor" not in family.defaults):
        raise config.error(f"partial_rotary_factor {part} is not supported in models of this type")
    if rope_type == "dynamic" and settings.get("alpha"):  # a fixed growth of the base
        rope_type, base = "default", base * settings.number("alpha") ** (head_dim / (head_dim - 2))
    return {
        "rope_base": base,
        "rope_scaling": None if rope_type == "default" else rope_scaling(rope_type, settings, config),
        "rope_dim": None if part == 1 else int(part * head_dim),
        "window_rope_base": window_base,
        "late_query_scale": settings.number("llama_4_scaling_beta") if settings.get("llama_4_scaling_beta") else None,
    }


def rope_scaling(rope_type: str, settings: Config, config: Config) -> RopeScaling:
    rope_type = "longrope" if rope_type == "su" else rope_type  # its first name
    if rope_type not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise settings.error(f"rope type {rope_type!r} is not supported; supported: default, {known}")
    if rope_type == "proportional":
        part = settings.number("partial_rotary_factor", 1.0)
        return RopeScaling(rope_type, settings.number("factor", 1.0), part=part)
    fields, key = {}, "original_max_position_embeddings"
    if rope_type != "linear":  # the trained context stands beside the settings, in them, or is the whole one
        beside = config.get(key) is not None
        fields[key] = (config if beside else settings).whole(key, config.get("max_position_embeddings"))
    if rope_type == "longrope":
        return RopeScaling(rope_type, **fields, **longrope(settings, config, fields[key]))
    fields["factor"] = settings.number("factor")
    if rope_type == "llama3":
        fields |= {key: settings.number(key) for key in ("low_freq_factor", "high_freq_factor")}
    if rope_type == "yarn":
        fields |= {
            "low_freq_factor": settings.number("beta_slow", 1.0),
            "high_freq_factor": settings.number("beta_fast", 32.0),
            "whole_pairs": bool(settings.values.get("truncate", True)),
            "attention_factor": settings.number("attention_factor", yarn_growth(fields["factor"], settings)),
        }
    return RopeScaling(rope_type, **fields)


def longrope(settings: Config, config: Config, trained: int) -> dict:
    factor = settings.number("factor", config.whole("max_position_embeddings") / trained)
    growth = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 < trained else 1.0
    return {
        "factors": tuple(settings.list_of(int | float, "short_factor")),
        "long_factors": tuple(settings.list_of(int | float, "long_factor")),
        "attention_factor": settings.number("attention_factor", growth),
    }


def yarn_growth(factor: float, settings: Config) -> float:
    """YaRN's factor of cosines and sines, where the config does not give it."""
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return growth(factor, settings.number("mscale")) / growth(factor, settings.number("mscale_all_dim"))
    return growth(factor, 1.0)


def growth(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def latent_scale(config: Config, head_dim: int) -> float:
    """The scale of q k in latent attention: with YaRN it is larger, also for the numbers that rope does not turn."""
    settings = settings_of(config)
    if kind_of(settings) == "default" or not settings.get("mscale_all_dim"):
        return head_dim**-0.5
    return head_dim**-0.5 * growth(settings.number("factor"), settings.number("mscale_all_dim")) ** 2


def settings_of(config: Config) -> Config:
    return config.part(config.get("rope_scaling") or config.get("rope_parameters"))


def kind_of(settings: Config) -> str:
    return settings.get("rope_type", settings.get("type", "default"))
