"""A device against float32 on the CPU: cases for tests/test_device.py, and a plain loop where pytest is missing.

python -m tests.device_cases --device cuda                     # every case, each group in a process of its own
python -m tests.device_cases --device cuda "model, compiled"   # the cases of one group
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from engine.cache import prefix_length
from engine.compile import compile_step
from engine.decode import forward_chunk, read_prompts
from engine.engine import build_engine, generate
from engine.request import Request, Timing
from engine.sampling import Sampling, choose, logits_to_probs
from engine.speculation.drafters import DraftModel, PromptLookup, draft_one_token
from engine.speculation.speculative import build_speculation
from layers.fastest import fastest
from layers.quantized import QuantSpec, linear_table, quantize_weight
from mixers.experts import ExpertLinear
from mixers.recurrent.delta_net import DeltaSizes
from mixers.recurrent.short_conv import ConvSizes
from model import ModelArgs, Transformer
from serving.scheduler import Scheduler, Task, run_tasks
from text.prompts import IdTokenizer
from weights.checkpoint import build
from weights.device import parse_dtype
from weights.layout import Layout

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}  # of the largest logit
ROWS = (1, 2, 5, 16, 17, 64, 65, 512)  # of a layer's inputs
BATCHES = (1, 2, 8, 16, 17, 32, 64)  # rows that decode together
ARGS = ModelArgs(
    dim=256, n_layer=2, n_head=4, n_kv_head=2, head_dim=64, intermediate_size=512, vocab_size=1000, max_seq_length=2048
)
CAPPED = replace(ARGS, sliding_window=20, full_layers=(1,), attention_softcap=5.0, logit_softcap=9.0, qk_norm=True)
EXPERTS = replace(ARGS, n_expert=4, n_expert_used=2)
ALL_USED = replace(EXPERTS, n_expert=2)  # else rounding chooses other experts
LLAMA_HEADS = replace(ARGS, dim=512, n_head=8, head_dim=128, qkv_bias=True)  # four query heads share a key head
LATENT = replace(ARGS, n_kv_head=4, head_dim=96, kv_latent=128, q_latent=96, value_dim=64, rope_dim=32)
DELTA = replace(ARGS, attention_gate=True, rope_dim=16, delta=DeltaSizes((0,), 2, 4, 64, 64, 4))
CONVS = replace(ARGS, qk_norm=True, short_conv=ConvSizes((0,), 256, 3))
TWO_SIZES = replace(ARGS, n_layer=4, sliding_window=20, full_layers=(1, 3), full_head_dim=128, full_kv_head=1)
TWO_SIZES = replace(TWO_SIZES, keys_as_values=True, value_norm=True, qk_norm=True, n_reusing_layer=2)
TWO_SIZES = replace(TWO_SIZES, layer_input_size=32, layer_scales=True, activation="gelu_tanh")
BIASED_EXPERTS = replace(ALL_USED, attention_sinks=True, qkv_bias=True, ffn_bias=True, activation="clamped_swiglu")
FLOAT4 = QuantSpec(4, 32, "float4")
SHIPPED = [FLOAT4, QuantSpec(4, 64, "nf4"), QuantSpec(4, 64, "fp4"), QuantSpec(8, 64, "int8.zeros")]
SHIPPED += [QuantSpec(8, groupsize, "float8") for groupsize in (None, 128)]
TWO_FOUR = [QuantSpec(pattern="2:4"), QuantSpec(8, pattern="2:4")]
PROMPT_LENGTHS, NEW = (530, 1, 40), 4  # longer than a chunk of the prefill, a single token, and between
GREEDY = Sampling(temperature=0)
LAST_CASE = 60.0  # seconds that a case may take which begins in the last second


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
            state[f"{layer}.weight"] = each.layer(**tensors).dequantize()
            del there[f"{layer}.weight"]
            there |= {f"{layer}.{name}": tensor.to(device) for name, tensor in tensors.items()}
    return build(args, state), build(args, there, table)


def require_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    off = ((found.float().cpu() - wanted).abs().max() / wanted.abs().max()).item()
    assert off < tolerance, f"off by {off:.1e} of the largest value; {tolerance:.0e} is allowed"


def plain_step(model, token, pos, cache):
    return model(token, pos, cache)[:, -1]


@torch.inference_mode()
def check_model(args: ModelArgs, spec: QuantSpec | None, compiled: bool, device, dtype, cache_dtype=None) -> None:
    """The prefill of a ragged batch and the steps after it, against one full forward of each row."""
    reference, model = two_models(args, spec, device, dtype)
    model.cache_dtype = cache_dtype
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


def check_model_in_float32(args: ModelArgs, compiled: bool, device, dtype) -> None:
    check_model(args, None, compiled, device, torch.float32)


@torch.inference_mode()
def check_batches(args: ModelArgs, spec: QuantSpec | None, compiled: bool, device, dtype) -> None:
    """Steps of 1 to 64 rows, each at a position of its own, against one full forward of all."""
    reference, model = two_models(args, spec, device, dtype)
    step = compile_step(plain_step, device) if compiled else plain_step
    texts = torch.randint(args.vocab_size, (max(BATCHES), 8))
    whole = reference(texts, torch.arange(8).expand_as(texts))
    cache = model.new_cache(len(texts), 512)
    _, pos = read_prompts(model, cache, [ids[: 1 + row % 5].tolist() for row, ids in enumerate(texts)])
    for n_row, n in product(BATCHES, range(3)):  # a CUDA graph warms up, is captured, then replayed
        here = pos[:n_row].cpu() + n
        token = texts[:n_row].gather(1, here).to(device)
        found = step(model, token, here.to(device), cache.view(length=256))
        require_close(found, whole[torch.arange(n_row), here[:, 0]], TOLERANCE[dtype])


@torch.inference_mode()
def check_graphs(spec: QuantSpec | None, device, dtype) -> None:
    """Steps that CUDA graphs replay, of two caches in turn, against the plain step of the same model."""
    counters.clear()
    _, model = two_models(ARGS, spec, device, dtype)
    step = compile_step(plain_step, device)
    ours, theirs = ([model.new_cache(2, 512) for _ in range(2)] for _ in range(2))
    for n in range(5):  # the first runs warm up, the next are captured, the last replayed
        token = torch.randint(ARGS.vocab_size, (2, 1)).to(device)
        for cache, other in zip(ours, theirs, strict=True):
            found = step(model, token, torch.full_like(token, n), cache.view(length=256))
            wanted = plain_step(model, token, torch.full_like(token, n), other.view(length=256))
            require_close(found, wanted.float().cpu(), TOLERANCE[dtype])
    skipped = counters["inductor"]["cudagraph_skips"]
    assert not skipped, f"inductor made no CUDA graph of {skipped} calls"


@torch.inference_mode()
def check_draws(compiled: bool, device, dtype) -> None:
    """Tokens that 8 rows draw from a large vocabulary, against the probabilities of float64 logits on the CPU."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, 128256, dtype=torch.float64).expand(8, -1)
    draw = torch.compile(choose, fullgraph=True, dynamic=False) if compiled else choose
    assert draw(logits.to(device, torch.float32), GREEDY, None).tolist() == [logits[0].argmax().item()] * 8
    for sampling in (Sampling(top_k=4), Sampling(top_k=50, top_p=0.5)):
        probs = logits_to_probs(logits[:1], sampling)[0]
        numbers = torch.rand(32, 8, device=device)
        found = torch.cat([draw(logits.to(device, torch.float32), sampling, each).cpu() for each in numbers])
        counts = torch.bincount(found, minlength=len(probs))
        assert not counts[probs == 0].any(), f"{sampling} drew tokens whose probability is 0"
        # three standard deviations of the likeliest token's count
        n, p = len(found), probs.max().item()
        assert abs(counts[probs.argmax()] - n * p) < 3 * (n * p * (1 - p)) ** 0.5 + 1


@torch.inference_mode()
def check_layer(spec: QuantSpec, compiled: bool, device, dtype) -> None:
    """A quantised layer, from one row to many, against its dequantised weight."""
    torch.manual_seed(0)
    weight = torch.randn(768, 512)
    if spec.pattern is not None:
        weight *= (torch.rand(768, 128, 4).argsort(-1) < 2).flatten(1)
    tensors = quantize_weight(weight if spec.bits else weight.to(dtype), spec)
    work = fast_layer(spec, tensors, compiled, device)
    for n_row in ROWS:
        x = torch.randn(n_row, 512).to(dtype)
        wanted = x.float() @ spec.layer(**tensors).dequantize().T
        require_close(work(x.to(device)), wanted, 2e-2)


@torch.inference_mode()
def check_experts(spec: QuantSpec | None, compiled: bool, device, dtype) -> None:
    """A layer of 8 experts, 2 for each token, from one token to many, against each expert's weight."""
    torch.manual_seed(0)
    weight = torch.randn(8, 384, 256).to(dtype)
    tensors = quantize_weight(weight, spec) if spec else {"weight": weight}
    exact = spec.layer(**tensors).dequantize() if spec else weight.float()
    work = fast_layer(spec, tensors, compiled, device)
    for n_token in (1, 2, 8, 9, 64, 300):
        x, chosen = torch.randn(n_token, 1, 256).to(dtype), torch.rand(n_token, 8).argsort(1)[:, :2]
        wanted = torch.einsum("tkoi,ti->tko", exact[chosen], x[:, 0].float())
        require_close(work(x.to(device), chosen.to(device)), wanted, 2e-2)


def fast_layer(spec: QuantSpec | None, tensors: dict[str, Tensor], compiled: bool, device) -> Callable:
    """The layer in the fastest form that the device has."""
    kind = spec.layer if spec else ExpertLinear
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


def check_tokens(draft: str | None, k: int | str, compiled: bool, device, dtype) -> None:
    """Greedy float32 tokens of a ragged batch, with guesses or not, equal those of each row alone on the CPU.

    draft: "model", "ngram" or None.
    """
    reference, model = two_models(ARGS, None, device, torch.float32)
    prompts = [[5, 6, 7, 8, 9], [11], list(range(100, 140))]
    alone = [tokens_of(build_engine(reference), [prompt])[0] for prompt in prompts]
    speculation = None
    if draft is not None:
        step = compile_step(draft_one_token, device) if compiled else draft_one_token
        noisy = {name: w + 0.05 * w.std() * torch.randn_like(w) for name, w in model.state_dict().items()}
        drafter = PromptLookup() if draft == "ngram" else DraftModel(build(ARGS, noisy), step)
        speculation = build_speculation(model, drafter, k, compiled)
    found = tokens_of(build_engine(model, compiled, compiled, speculation), prompts)
    assert found == alone, f"{found} and not {alone}"


def check_scheduler(compiled: bool, device, dtype) -> None:
    """Greedy float32 tokens of tasks that share two rows equal those of each alone on the CPU."""
    reference, model = two_models(ARGS, None, device, torch.float32)
    prompts = [[5, 6, 7, 8, 9], [11], list(range(100, 140)), list(range(600))]
    alone = [tokens_of(build_engine(reference), [prompt])[0] for prompt in prompts]
    scheduler = Scheduler(build_engine(model, compiled, compiled), 2, 640)
    scheduler.warm_up()
    requests = [Request(prompt, IdTokenizer(ARGS.vocab_size), 24, [], True) for prompt in prompts]
    for _ in run_tasks(scheduler, [Task(request, GREEDY) for request in requests], Timing()):
        pass
    found = [request.token_ids for request in requests]
    assert found == alone, f"{found} and not {alone}"


def named_cases() -> dict[str, Callable[[torch.device, torch.dtype], None]]:
    """Each case by a name that begins with its group."""
    int8, int4 = QuantSpec(8), QuantSpec(4, 32)
    specs = {"float": None, "int8": int8, "int4": int4}
    shipped = {str(spec): spec for spec in SHIPPED}
    models = {name: (ARGS, spec) for name, spec in specs.items()}
    models |= {"with windows and caps": (CAPPED, None), "with Llama's heads and biases": (LLAMA_HEADS, int4)}
    models |= {"with experts": (ALL_USED, None), "with int4 experts": (ALL_USED, int4)}
    families = {"with latent attention": (LATENT, None), "with gated DeltaNet": (DELTA, None)}
    families |= {"with short convolutions": (CONVS, None)} | {name: (ARGS, spec) for name, spec in shipped.items()}
    families |= {"with heads of two sizes": (TWO_SIZES, None), "with biased experts in FP4": (BIASED_EXPERTS, FLOAT4)}
    found = {f"graphs: {name}": partial(check_graphs, spec) for name, spec in specs.items()}
    for how, compiled in (("eager", False), ("compiled", True)):
        of_how = models | families if compiled else models
        found |= {f"model, {how}: {name}": partial(check_model, *each, compiled) for name, each in of_how.items()}
        found[f"model, {how}: with an int8 cache"] = partial(check_model, ARGS, int4, compiled, cache_dtype=torch.int8)
        for name, args in (("float", ARGS), ("with experts", EXPERTS)):
            found[f"model, {how}: {name} in float32"] = partial(check_model_in_float32, args, compiled)
        for spec in (int8, QuantSpec(8, 64), *(QuantSpec(4, size) for size in (32, 64, 128, 256)), *SHIPPED, *TWO_FOUR):
            found[f"layer, {how}: {spec}"] = partial(check_layer, spec, compiled)
        for name, spec in (specs | shipped).items():
            found[f"experts, {how}: {name}"] = partial(check_experts, spec, compiled)
        for name in (*specs, "with experts", "with int4 experts"):
            found[f"batches, {how}: {name}"] = partial(check_batches, *models[name], compiled)
        found[f"draws, {how}"] = partial(check_draws, compiled)
        for draft, k in ((None, 0), ("model", 4), ("model", "auto"), ("ngram", 4)):
            name = "plain" if draft is None else f"guesses of {draft}, k {k}"
            found[f"tokens, {how}: {name}"] = partial(check_tokens, draft, k, compiled)
        found[f"tokens, {how}: of a scheduler"] = partial(check_scheduler, compiled)
    return found


CASES = named_cases()


def group_of(name: str) -> str:
    return name.partition(":")[0]


def run(group: str, device: torch.device, dtype: torch.dtype, seconds: float) -> bool:
    """Run the cases of a group, as many as are begun within the seconds, and say of each whether it passed."""
    passed, start = True, time.perf_counter()
    for name in (name for name in CASES if group_of(name) == group):
        began = time.perf_counter()
        if began - start > seconds:
            print(f"left out: {name}", flush=True)
            continue
        torch._dynamo.reset()
        verdict, words = "passed", ""
        try:
            CASES[name](device, dtype)
        except Exception as error:  # whatever it is, the other cases are run
            passed, verdict = False, "FAILED"
            words = f": {type(error).__name__}: {' '.join(str(error).split())[:2000]}"
        print(f"{verdict}: {name} ({time.perf_counter() - began:.1f} s){words}", flush=True)
    return passed


def run_all(device: str, dtype: str, seconds: float) -> bool:
    """Each group in a process of its own, because an error on a GPU can leave a process unusable."""
    command = [sys.executable, "-m", "tests.device_cases", "--device", device, "--dtype", dtype]
    processes, start = {}, time.perf_counter()
    for group in dict.fromkeys(map(group_of, CASES)):
        left = max(0.0, seconds - (time.perf_counter() - start))
        processes[group] = subprocess.Popen([*command, "--seconds", str(left), group])
        if device == "cpu":  # on a GPU groups run side by side, because most of the time goes to compiling
            processes[group].wait()
    return all([finish(*each, seconds - (time.perf_counter() - start)) for each in processes.items()])


def finish(group: str, process: subprocess.Popen, seconds: float) -> bool:
    """Wait for a group, and end it if a case hangs, as a kernel on a GPU can."""
    try:
        return process.wait(None if seconds == math.inf else max(0, seconds) + LAST_CASE) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        print(f"FAILED: {group}: a case did not end", flush=True)
        return False


def main(group: str | None, device: str, dtype: str, seconds: float) -> bool:
    if group is None:
        return run_all(device, dtype, seconds)
    return run(group, torch.device(device), parse_dtype(dtype), seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check a device against float32 on the CPU.")
    parser.add_argument("group", nargs="?", help="what stands before the colon in names of cases (default: all)")
    parser.add_argument("--device", default="cpu", help="cuda, mps or cpu (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case later (default: no limit)")
    sys.exit(not main(**vars(parser.parse_args())))
