"""A device against float32 on the CPU: cases for tests/test_device.py, and a plain loop where pytest is missing.

python -m tests.device_cases --device cuda           # every case, each group in a process of its own
python -m tests.device_cases --device cuda model     # the cases of one group
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from engine.cache import prefix_length
from engine.compile import compile_step
from engine.decode import forward_chunk, read_prompts
from engine.drafters import DraftModel, draft_one_token
from engine.engine import build_engine, generate
from engine.sampling import Sampling
from engine.speculative import Speculation, verify
from layers.fastest import fastest
from layers.quantized import LAYERS, QuantSpec, linear_table, quantize_weight
from model import ExpertLinear, ModelArgs, Transformer
from weights.checkpoint import build
from weights.device import parse_dtype
from weights.layout import Layout

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}  # of the largest logit
ROWS = (1, 2, 5, 16, 17, 512)  # of a layer's inputs
ARGS = ModelArgs(
    dim=256, n_layer=2, n_head=4, n_kv_head=2, head_dim=64, intermediate_size=512, vocab_size=1000, max_seq_length=2048
)
CAPPED = replace(ARGS, sliding_window=20, full_layers=(1,), attention_softcap=5.0, logit_softcap=9.0, qk_norm=True)
EXPERTS = replace(ARGS, n_expert=4, n_expert_used=2)
PROMPT_LENGTHS, NEW = (530, 1, 40), 4  # longer than a chunk of the prefill, a single token, and between
GREEDY = Sampling(temperature=0)


def random_state(args: ModelArgs) -> dict[str, Tensor]:
    """float32 weights on the CPU, of a scale that keeps activations of the order of 1."""
    torch.manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in Layout(args).tensors.items()}
    return {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }


def two_models(args: ModelArgs, spec: QuantSpec | None, device, dtype) -> tuple[Transformer, Transformer]:
    """A model in float32 on the CPU, and the same on the device; quantised there, and here dequantised."""
    state, table = random_state(args), {}
    there = {name: tensor.to(device, dtype) for name, tensor in state.items()}
    if spec is not None:
        table = linear_table(build(args, state), spec, QuantSpec(8))
        for layer, each in table.items():
            tensors = quantize_weight(state[f"{layer}.weight"], each)
            state[f"{layer}.weight"] = LAYERS[each.bits](**tensors).dequantize()
            del there[f"{layer}.weight"]
            there |= {f"{layer}.{name}": tensor.to(device) for name, tensor in tensors.items()}
    return build(args, state), build(args, there, table)


def require_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    off = ((found.float().cpu() - wanted).abs().max() / wanted.abs().max()).item()
    assert off < tolerance, f"off by {off:.1e} of the largest value; {tolerance:.0e} is allowed"


def plain_step(model, token, pos, cache):
    return model(token, pos, cache)[:, -1]


@torch.inference_mode()
def check_model(
    args: ModelArgs, spec: QuantSpec | None, compiled: bool, device, dtype, in_float32: bool = False
) -> None:
    """The prefill of a ragged batch and the steps after it, against one full forward of each row."""
    dtype = torch.float32 if in_float32 else dtype
    reference, model = two_models(args, spec, device, dtype)
    step = compile_step(plain_step, device) if compiled else plain_step
    forward = compile_step(forward_chunk, device, any_length=True) if compiled else forward_chunk
    texts = [torch.randint(args.vocab_size, (length + NEW,)).tolist() for length in PROMPT_LENGTHS]
    cache = model.new_cache(len(texts), 1024)
    prompts = [text[:length] for text, length in zip(texts, PROMPT_LENGTHS, strict=True)]
    logits, pos = read_prompts(model, cache, prompts, 0, forward)
    found = [logits]
    for n in range(NEW):
        token = torch.tensor([[text[length + n]] for text, length in zip(texts, PROMPT_LENGTHS, strict=True)])
        view = cache.view(length=prefix_length(cache, max(PROMPT_LENGTHS) + n + 1))
        found.append(step(model, token.to(device), pos + n, view).clone())
    for row, (text, length) in enumerate(zip(texts, PROMPT_LENGTHS, strict=True)):
        whole = reference(torch.tensor([text]), torch.arange(len(text))[None])[0, length - 1 :]
        require_close(torch.stack([each[row] for each in found]), whole, TOLERANCE[dtype])


@torch.inference_mode()
def check_layer(spec: QuantSpec, compiled: bool, device, dtype) -> None:
    """A quantised layer, from one row to many, against its dequantised weight."""
    torch.manual_seed(0)
    tensors = quantize_weight(torch.randn(768, 512), spec)
    work = fast_layer(spec, tensors, compiled, device)
    for n_row in ROWS:
        x = torch.randn(n_row, 512).to(dtype)
        wanted = x.float() @ LAYERS[spec.bits](**tensors).dequantize().T
        require_close(work(x.to(device)), wanted, 2e-2)


@torch.inference_mode()
def check_experts(spec: QuantSpec | None, compiled: bool, device, dtype) -> None:
    """A layer of 8 experts, 2 for each token, from one token to many, against each expert's weight."""
    torch.manual_seed(0)
    weight = torch.randn(8, 384, 256).to(dtype)
    tensors = quantize_weight(weight, spec) if spec else {"weight": weight}
    exact = LAYERS[spec.bits](**tensors).dequantize() if spec else weight.float()
    work = fast_layer(spec, tensors, compiled, device)
    for n_token in (1, 2, 8, 9, 300):
        x, chosen = torch.randn(n_token, 1, 256).to(dtype), torch.rand(n_token, 8).argsort(1)[:, :2]
        wanted = torch.einsum("tkoi,ti->tko", exact[chosen], x[:, 0].float())
        require_close(work(x.to(device), chosen.to(device)), wanted, 2e-2)


def fast_layer(spec: QuantSpec | None, tensors: dict[str, Tensor], compiled: bool, device) -> Callable:
    """The layer in the fastest form that the device has."""
    kind = LAYERS[spec.bits] if spec else ExpertLinear
    layer = kind(**{name: tensor.to(device) for name, tensor in tensors.items()})
    faster = fastest(layer)
    layer = faster(layer) if faster else layer
    return torch.compile(layer, fullgraph=True, dynamic=False) if compiled else layer


def tokens_of(engine, prompts: list[list[int]]) -> list[list[int]]:
    rows = [[] for _ in prompts]
    for chunk in generate(engine, prompts, 24, GREEDY):
        for row, ids in zip(rows, chunk, strict=True):
            row += ids
    return rows


def check_tokens(k: int | str | None, compiled: bool, device, dtype) -> None:
    """Greedy float32 tokens of a ragged batch, with a draft model or not, equal those of each row alone on the CPU."""
    reference, model = two_models(ARGS, None, device, torch.float32)
    prompts = [[5, 6, 7, 8, 9], [11], list(range(100, 140))]
    alone = [tokens_of(build_engine(reference), [prompt])[0] for prompt in prompts]
    speculation = None
    if k is not None:
        draft = build(ARGS, {name: w + 0.05 * w.std() * torch.randn_like(w) for name, w in model.state_dict().items()})
        step, check = (compile_step(each, device) if compiled else each for each in (draft_one_token, verify))
        speculation = Speculation(DraftModel(draft, step), k, check)
    found = tokens_of(build_engine(model, compiled, compiled, speculation), prompts)
    assert found == alone, f"{found} and not {alone}"


def named_cases() -> dict[str, Callable[[torch.device, torch.dtype], None]]:
    """Each case by a name whose first word is its group."""
    int8, int4 = QuantSpec(8), QuantSpec(4, 32)
    all_used = replace(EXPERTS, n_expert=2)  # else rounding chooses other experts
    models = {
        "float": (ARGS, None),
        "int8": (ARGS, int8),
        "int4": (ARGS, int4),
        "with windows and caps": (CAPPED, None),
    }
    models |= {"with experts": (all_used, None), "with int4 experts": (all_used, int4)}
    found = {}
    for compiled in (False, True):
        how = "compiled" if compiled else "eager"
        found |= {f"model {name}, {how}": partial(check_model, *each, compiled) for name, each in models.items()}
        for name, args in (("float", ARGS), ("with experts", EXPERTS)):
            found[f"model {name} in float32, {how}"] = partial(check_model, args, None, compiled, in_float32=True)
        for spec in (int8, QuantSpec(8, 64), *(QuantSpec(4, size) for size in (32, 64, 128, 256))):
            found[f"layer {spec}, {how}"] = partial(check_layer, spec, compiled)
        found |= {
            f"experts {spec or 'float'}, {how}": partial(check_experts, spec, compiled) for spec in (None, int8, int4)
        }
        for k in (None, 1, 4, "auto"):
            name = "plain" if k is None else f"with a draft, k {k}"
            found[f"tokens {name}, {how}"] = partial(check_tokens, k, compiled)
    return found


CASES = named_cases()


def run(group: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Run the cases of a group and say of each whether it passed."""
    passed = True
    for name, case in CASES.items():
        if name.startswith(group):
            began = time.perf_counter()
            torch._dynamo.reset()
            try:
                case(device, dtype)
                words = "passed"
            except Exception as error:  # whatever it is, the other cases are run
                passed, words = False, f"FAILED: {type(error).__name__}: {str(error).strip()[:2000]}"
            print(f"{name}: {words} ({time.perf_counter() - began:.1f} s)", flush=True)
    return passed


def main(group: str | None, device: str, dtype: str) -> bool:
    if group is not None:
        return run(group, torch.device(device), parse_dtype(dtype))
    # processes of their own, because an error on a GPU can leave a process unusable
    command = [sys.executable, "-m", "tests.device_cases", "--device", device, "--dtype", dtype]
    groups = dict.fromkeys(name.split()[0] for name in CASES)
    return not any([subprocess.run([*command, group]).returncode for group in groups])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check a device against float32 on the CPU.")
    parser.add_argument("group", nargs="?", help="the first word of the cases to run (default: all)")
    parser.add_argument("--device", default="cpu", help="cuda, mps or cpu (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    sys.exit(not main(**vars(parser.parse_args())))
