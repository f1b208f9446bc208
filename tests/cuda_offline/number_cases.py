"""Logits of the code for a GPU, in Triton's interpreter, against the plain layers in eager mode. Starts a process.

TRITON_INTERPRET=1 python -m tests.cuda_offline.number_cases NAME...
"""

import json
import sys
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

import layers.fastest
from engine.compile import compile_step
from layers.quantized import QuantSpec, linear_table
from model import ModelArgs, Transformer
from tests.cuda_offline.cases import FAMILIES, FORMATS, fake_model, zeros
from tests.cuda_offline.generated import generated
from tests.cuda_offline.imagined_gpu import CUDA, FAKE
from tests.cuda_offline.interpreted import interpreted
from weights.checkpoint import fill
from weights.layout import Layout

SMALL = {"dim": 64, "head_dim": 16, "n_head": 4, "n_kv_head": 2, "intermediate_size": 96, "vocab_size": 160}
BF16, F32 = torch.bfloat16, torch.float32
CASES = {  # family, format, dtype, rows, tokens a row, and the dtype of the cache if it is another
    "plain": ("plain", "bf16", F32, 1, 1),
    "plain in bf16": ("plain", "bf16", BF16, 4, 1),
    "int8": ("plain", "int8", F32, 1, 1),
    "int8 in bf16": ("plain", "int8", BF16, 2, 3),
    "int4": ("plain", "int4", F32, 1, 1),
    "int8 cache": ("plain", "bf16", F32, 2, 3, torch.int8),
    "biased": ("biased", "bf16", F32, 1, 3),
    "capped": ("capped", "bf16", F32, 2, 1),
    "sinks": ("sinks", "bf16", BF16, 2, 1),
    "experts": ("experts", "bf16", F32, 1, 1),
    "experts in int4": ("experts", "int4", F32, 2, 1),
}


def off(name: str) -> float:
    """The largest difference of a logit, or of a value in the cache, from the plain layers, of the largest value."""
    family, form, dtype, n_rows, n_tokens, *cache_dtype = CASES[name]
    args, spec = replace(FAMILIES[family], **SMALL), FORMATS[form]
    torch.manual_seed(0)
    layout, state = random_state(args, spec, dtype)
    plain, real = layout.model, cuda_forms(args, spec, dtype, state)
    plain.load_state_dict(state | tied(args, state), assign=True)
    fake = fake_model(args, spec, dtype)
    tokens, rows = torch.randint(args.vocab_size, (n_rows, n_tokens)), torch.full((n_rows, 1), n_tokens - 1)
    pos = (7 + torch.arange(n_tokens)).repeat(n_rows, 1)
    for model in (plain, real, fake):
        model.cache_dtype = next(iter(cache_dtype), None)
    caches = [model.new_cache(n_rows, 512) for model in (plain, real)]
    with FAKE, torch.inference_mode():
        caches.append(fake.new_cache(n_rows, 512))
    given = [zeros(*each.shape) for each in (tokens, pos, rows)]
    views = [cache.view(length=256) for cache in caches[:2]]
    with FAKE, torch.inference_mode():
        views.append(caches[2].view(length=256))
    with torch.no_grad():
        wanted = plain.requires_grad_(False)(tokens, pos, views[0], rows)
        made = generated(compile_step(Transformer.forward, CUDA), fake, given[0], given[1], views[2], given[2])
        pairs = [*zip(given, (tokens, pos, rows), strict=True), (views[2].slots, views[1].slots)]
        pairs += [*same_names(fake, real), *same_names(caches[2], caches[1])]
        values = {id(theirs): ours for theirs, ours in pairs}
        found = interpreted(made, [values[id(each)] for each in made.inputs])[0]
    pairs = [(found, wanted), *((a.k, b.k) for a, b in zip(caches[1].layers, caches[0].layers, strict=True))]
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)


def random_state(args: ModelArgs, spec: QuantSpec | None, dtype: torch.dtype) -> tuple[Layout, dict[str, Tensor]]:
    layout = Layout(args)
    if spec is not None:
        layout = layout.quantized(linear_table(layout.model, spec, QuantSpec(8)))

    def draw(name: str, like: Tensor) -> Tensor:
        if not like.is_floating_point():
            low = -128 if like.dtype == torch.int8 else 0
            return torch.randint(low, low + 256, like.shape).to(like.dtype)
        scale = {"scales": 2e-3, "zeros": 2e-2}.get(name.rpartition(".")[2], 0.2)
        values = torch.randn(like.shape) * scale + (like.ndim == 1)
        return values.to(like.dtype if layout.keeps_dtype(name) else dtype)

    return layout, {name: draw(name, like) for name, like in layout.tensors.items()}


def tied(args: ModelArgs, state: dict[str, Tensor]) -> dict[str, Tensor]:
    is_tied = args.tie_embeddings and "output.weight" not in state
    return {"output.weight": state["tok_embeddings.weight"]} if is_tied else {}


def cuda_forms(args: ModelArgs, spec: QuantSpec | None, dtype: torch.dtype, state: dict[str, Tensor]) -> Transformer:
    """The model on the CPU in the forms that its layers have on CUDA."""
    rows = [row for row in layers.fastest.TABLE if row.device != "cpu"]
    layout, _ = random_state(args, spec, dtype)
    with mock.patch.object(layers.fastest, "TABLE", [row._replace(device=None) for row in rows]):
        return fill(layout, state, args, None)


def same_names(fake: torch.nn.Module, real: torch.nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of the fake module with its real one."""
    found = dict([*real.named_parameters(), *real.named_buffers()])
    tensors = [*fake.named_parameters(), *fake.named_buffers()]
    return [(tensor, found[name]) for name, tensor in tensors if name in found]


if __name__ == "__main__":
    print(json.dumps({name: off(name) for name in sys.argv[1:] or CASES}))
