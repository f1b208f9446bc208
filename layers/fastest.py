"""Which form of each layer is the fastest where it runs."""

import torch
import torch.nn as nn

from kernels import cpu
from layers.blocks import blocks_for
from layers.packed import (
    AnyExperts,
    CodesExperts,
    CodesLinear,
    FewRowsExperts,
    FewRowsLinear,
    OperatorAttend,
    StepAttend,
    TinygemmLinear,
)
from layers.quantized import Int4Experts, Int4Linear, Int8Experts, Int8Linear, replace_
from model import Attend, Attention, ExpertLinear, Gate, Transformer


def fastest(layer: nn.Module) -> type[nn.Module] | None:
    """The class that does the work of `layer` faster on its device; None where the layer itself is the fastest."""
    kind, weight = type(layer), getattr(layer, "weight", None)
    if kind is ExpertLinear:
        is_fast = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and cpu.has_bf16()
        return FewRowsExperts if is_fast else AnyExperts
    if kind in (Int8Experts, Int4Experts):
        return CodesExperts if weight.device.type == "cpu" and cpu.has_vnni() else AnyExperts
    if kind in (nn.Linear, Gate) and weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
        return FewRowsLinear if cpu.has_bf16() else None
    if kind in (Int8Linear, Int4Linear) and weight.device.type == "cpu":
        return CodesLinear if cpu.has_vnni() else None
    if kind is Int4Linear and weight.device.type == "cuda":
        return TinygemmLinear if TinygemmLinear.inner_k_tiles(layer) else None
    return None


def pack_(model: nn.Module) -> None:
    """Give every layer the fastest form its device has; once, after the weights are in place."""
    for name, layer in list(model.named_modules()):
        faster = fastest(layer)
        if faster is not None:
            replace_(model, name, faster(layer))
    if isinstance(model, Transformer):
        for block in model.layers:
            block.attention.attend = attend_for(block.attention, model.device, model.dtype)
        model.layers = blocks_for(model.layers, model.args, model.device)


def attend_for(attention: Attention, device: torch.device, dtype: torch.dtype) -> Attend:
    """The fastest form of attention."""
    plain = attention.attend
    if plain.cap is None and device.type == "cpu" and attention.head_dim in cpu.HEAD_DIMS and cpu.has_vnni():
        return OperatorAttend(plain, dtype == torch.bfloat16 and cpu.has_bf16())
    return StepAttend(plain.scale, plain.cap)
