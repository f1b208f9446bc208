"""Does everything work on this device, and how fast? Correctness against float32 on the CPU, then a table of speeds.

    python scripts/check_device.py --device cuda --models SmolLM2-135M Llama-3.1-8B

Random weights: nothing is downloaded.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import cli

    cli.quit_on_interrupt()  # before the slow imports

import argparse
import functools
import time
from collections.abc import Callable

import torch

from engine.cache import setup_caches
from engine.compile import compile_step, warm_up
from engine.decode import decode_one_token, forward_chunk
from engine.request import generate
from engine.sampling import Sampling
from engine.speculative import DraftModel, Speculation, draft_one_token, verify
from layers.fastest import fastest
from layers.quantized import LAYERS, QuantSpec, layer_of, quantize_weight
from measure.machine import measured_bandwidth, median_seconds
from scripts.reporting import markdown
from weights.checkpoint import build, random_model
from weights.device import parse_dtype, pick_device
from weights.files import GB
from weights.layout import Layout, weight_bytes

GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 6, 7, 8, 9], [11], list(range(100, 140))]
PRECISIONS = {  # of the linear layers, and of the output head
    "float": (None, "float"),
    "int8": (QuantSpec(8), "int8"),
    "int4.g32": (QuantSpec(4, 32), "int8"),
    "int4.g32, head too": (QuantSpec(4, 32), "int4"),
}
BATCH = 32
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}  # of the largest logit


@torch.inference_mode()
def forced_logits(model, tokens: list[int], step) -> torch.Tensor:  # -> [S, V] float32 on the CPU
    """Logits of each position, the first from a prefill and the others from steps of one token."""
    ids = torch.tensor([tokens], device=model.device)
    pos = torch.arange(len(tokens), device=model.device)[None]
    half = len(tokens) // 2
    logits = [model(ids[:, :half], pos[:, :half])[0]]
    for i in range(half, len(tokens)):
        logits.append(step(model, ids[:, i : i + 1].clone(), pos[:, i : i + 1].clone(), model.slots[:256])[0].clone())
    return torch.cat(logits).float().cpu()


def plain_step(model, token, pos, slots):
    return model(token, pos, slots=slots)


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Print how far the logits are from float32 ones on the CPU, plain and compiled. Raises ValueError if too far."""
    reference = random_model("stories15M", "cpu", torch.float32)
    reference.setup_caches(1, 512)
    tokens = torch.randint(32000, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    wanted = forced_logits(reference, tokens, plain_step)
    state = {name: weight.to(device, dtype) for name, weight in reference.state_dict().items()}
    model = build(reference.args, state)
    model.setup_caches(1, 512)
    for name, step in (("plain", plain_step), ("compiled", compile_step(plain_step, device))):
        off = ((forced_logits(model, tokens, step) - wanted).abs().max() / wanted.abs().max()).item()
        print(f"{dtype} {name}: largest error {off:.1e} of the largest logit")
        if not off < TOLERANCE[dtype]:
            raise ValueError(f"{device} in {dtype}, {name}, is off by {off:.1e}; {TOLERANCE[dtype]:.0e} is allowed")


def check_ragged(device: torch.device) -> None:
    """Greedy float32 tokens of a ragged batch, compiled, equal those of each row alone on the CPU."""
    model = random_model("stories15M", "cpu", torch.float32)
    alone = []
    for prompt in PROMPTS:
        setup_caches(model, 1, 256)
        alone.append([row[0] for rows in generate(model, [prompt], 24, GREEDY) for row in rows])
    there = build(model.args, {name: weight.to(device) for name, weight in model.state_dict().items()})
    setup_caches(there, len(PROMPTS), 256)
    functions = {
        "step": compile_step(decode_one_token, device),
        "forward": compile_step(forward_chunk, device, any_length=True),
    }
    chunks = list(generate(there, PROMPTS, 24, GREEDY, **functions))
    together = [[chunk[row][0] for chunk in chunks] for row in range(len(PROMPTS))]
    if together != alone:
        raise ValueError(f"a ragged batch on {device} gives other tokens than its rows alone on the CPU")
    print("ragged batch, compiled: the same tokens as each row alone")


def check_quantised(device: torch.device, dtype: torch.dtype) -> None:
    """Each kind of quantised layer, from one row to many, against its dequantised weight in float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    for spec in (QuantSpec(8), QuantSpec(8, 64), *(QuantSpec(4, size) for size in (32, 64, 128, 256))):
        layer = LAYERS[spec.bits](**quantize_weight(torch.randn(768, 512, generator=generator), spec))
        there = LAYERS[spec.bits](**{name: tensor.to(device) for name, tensor in layer.state_dict().items()})
        faster = fastest(there)
        there = faster(there) if faster else there
        for rows in (1, 2, 5, 16, 17, 512):
            x = torch.randn(rows, 512, generator=generator).to(dtype)
            wanted = torch.nn.functional.linear(x.float(), layer.dequantize())
            require_close(there, [x.to(device)], wanted, f"{spec}, {rows} rows")
        print(f"{spec}: {type(there).__name__} agrees with its dequantised weight, 1 to 512 rows, plain and compiled")


def check_experts(device: torch.device, dtype: torch.dtype) -> None:
    """Layers of 8 experts, 2 for each token, from one token to many, against float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 384, 256, generator=generator).to(dtype)
    for spec in (None, QuantSpec(8), QuantSpec(4, 32)):
        tensors = quantize_weight(weight, spec) if spec else {"weight": weight}
        exact = layer_of(tensors).dequantize() if spec else weight.float()
        layer = layer_of({name: tensor.to(device) for name, tensor in tensors.items()})
        there = fastest(layer)(layer)
        for n_token in (1, 2, 8, 9, 300):
            x = torch.randn(n_token, 1, 256, generator=generator).to(dtype)
            chosen = torch.rand(n_token, 8, generator=generator).argsort(1)[:, :2]
            wanted = torch.einsum("tkoi,ti->tko", exact[chosen], x[:, 0].float())
            require_close(there, [x.to(device), chosen.to(device)], wanted, f"experts {spec}, {n_token} tokens")
        print(
            f"experts {spec or dtype}: {type(there).__name__} agrees with float32, 1 to 300 tokens, plain and compiled"
        )


@torch.inference_mode()
def require_close(layer: torch.nn.Module, inputs: list[torch.Tensor], wanted: torch.Tensor, what: str) -> None:
    """Raise ValueError if the layer, plain or compiled, is further from `wanted` than rounding explains."""
    for work in (layer, torch.compile(layer, fullgraph=True, dynamic=False)):
        off = ((work(*inputs).float().cpu() - wanted).abs().max() / wanted.abs().max()).item()
        if not off < 2e-2:
            raise ValueError(f"{type(layer).__name__} {what} on {inputs[0].device}: off by {off:.1e}")


def speed(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    bandwidth: float | None,
    matrix_rate: float,
    compiled: bool,
) -> str:
    """A row of the table: decoding 200 tokens after 8, alone and in a batch, and the prefill of 2048.

    matrix_rate: operations/s of a product of two large matrices, of which the prefill reaches a share.
    """
    spec, head = PRECISIONS[precision]
    model = random_model(name, device, dtype, quantize=spec, head=head)
    long = min(2048, model.args.max_seq_length - 2)
    setup_caches(model, 1, long + 2)
    step = compile_step(decode_one_token, device) if compiled else decode_one_token
    began = time.perf_counter()
    warm_up(model, [[8]], 200, GREEDY, step, forward_chunk)
    compile_s = time.perf_counter() - began if compiled else 0.0
    tok_s = rate(generate(model, [list(range(8))], 200, GREEDY, step=step))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        next(generate(model, [[1] * long], 1, GREEDY))
        seconds.append(time.perf_counter() - began)
    setup_caches(model, BATCH, 208)
    warm_up(model, [[8] * BATCH], 200, GREEDY, step, forward_chunk)
    together = rate(generate(model, BATCH * [list(range(8))], 200, GREEDY, step=step))
    share = f"{tok_s * weight_bytes(model) / GB / bandwidth:.0%}" if bandwidth else "-"
    how = "compiled" if compiled else "eager"
    prefill = long / sorted(seconds)[1]
    weights = Layout(model.args).tensors
    operations = 2 * sum(weight.numel() for key, weight in weights.items() if key.startswith("layers."))  # a token
    of_matrix = f"{prefill * operations / matrix_rate:.0%}"
    cells = [name, precision, how, f"{tok_s:.1f}", share, f"{together:.0f}", f"{prefill:.0f}", of_matrix]
    return f"| {' | '.join(cells)} | {compile_s:.1f} |"


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations/s of a product of two square matrices: the median of five."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: (a @ b)[0, 0].item(), 5)


def check_speculation(device: torch.device) -> None:
    """Greedy float32 tokens of a ragged batch with a draft, compiled, equal those without."""
    model, draft = (random_model("stories15M", device, torch.float32) for _ in range(2))
    draft.load_state_dict({name: w + 0.1 * w.std() * torch.randn_like(w) for name, w in model.state_dict().items()})
    draft_step = compile_step(draft_one_token, device)
    for k in (1, 4, "auto"):
        speculation = Speculation(DraftModel(draft, draft_step), k, compile_step(verify, device))
        setup_caches(model, len(PROMPTS), 256, speculation)
        plain, fast = ([[] for _ in PROMPTS] for _ in range(2))
        for rows, options in ((plain, {}), (fast, {"speculation": speculation})):
            for chunk in generate(model, PROMPTS, 48, GREEDY, **options):
                for row, ids in zip(rows, chunk, strict=True):
                    row += ids
        if fast != plain:
            raise ValueError(f"speculation with k {k} on {device} gives other tokens than plain decoding")
    print("speculation, compiled, k 1, 4 and auto: the same tokens as plain decoding")


def forced(chance: float) -> Callable:
    """Stands in for `accept`: each draft token is accepted with this chance, whatever the models say."""

    def accept(logits, draft, draft_probs, sampling):
        agreed = torch.rand(draft.shape, device=draft.device) < chance
        return logits.argmax(-1), 1 + agreed.long().cumprod(1).sum(1, keepdim=True)

    return accept


def speculation_speed(target: str, draft: str, device: torch.device, dtype: torch.dtype, k: int = 5) -> list[str]:
    """Rows of the table: tokens/s by acceptance, beside what the seconds of a round predict.

    k tokens, each accepted with chance a, give (1 - a^(k + 1)) / (1 - a) tokens a round (Leviathan et al. 2023).
    """
    model, small = (random_model(name, device, dtype) for name in (target, draft))
    prompt, rows = [list(range(8))], []
    plain, draft_step = compile_step(decode_one_token, device), compile_step(draft_one_token, device)
    setup_caches(model, 1, 208)
    warm_up(model, [[8]], 200, GREEDY, plain, forward_chunk)
    base = rate(generate(model, prompt, 200, GREEDY, step=plain))
    for chance in (0.0, 0.5, 0.7, 0.8, 0.9, 1.0):
        how = functools.partial(verify, accept=forced(chance))
        speculation = Speculation(DraftModel(small, draft_step), k, compile_step(how, device))
        setup_caches(model, 1, 208, speculation)
        warm_up(model, [[8]], 200, GREEDY, plain, forward_chunk, speculation)
        tok_s = rate(generate(model, prompt, 200, GREEDY, speculation=speculation))
        expected = sum(chance**i for i in range(k + 1)) / speculation.costs[1].rounds[k]
        rows.append(f"| {target} | {draft} | {chance:.1f} | {tok_s:.1f} | {expected:.1f} | x{tok_s / base:.2f} |")
    return rows


def rate(chunks) -> float:
    """Tokens/s of decoding, all rows together; their first tokens and the prefill are left out."""
    times, counts = zip(*((time.perf_counter(), sum(map(len, rows))) for rows in chunks), strict=True)
    return sum(counts[1:]) / (times[-1] - times[0])


def main(*, device: str | None, dtype: str, models: list[str], speculate: list[str] | None) -> None:
    target = pick_device(device)
    for each in (torch.float32, parse_dtype(dtype)):
        check(target, each)
    check_ragged(target)
    check_speculation(target)
    check_quantised(target, parse_dtype(dtype))
    check_experts(target, parse_dtype(dtype))
    bandwidth = measured_bandwidth(target)
    matrices = matrix_rate(target, parse_dtype(dtype))
    print(f"\nmeasured bandwidth: {bandwidth or 0:.0f} GB/s; product of matrices: {matrices / 1e12:.2f} TFLOP/s\n")
    header = ["model", "weights", "step", "decode, tok/s", "of bandwidth", f"batch {BATCH}, tok/s", "prefill, tok/s"]
    print(markdown([*header, "of matrix rate", "compile, s"], []))
    for name in models:
        for precision in PRECISIONS:
            for compiled in (False, True):
                print(speed(name, target, parse_dtype(dtype), precision, bandwidth, matrices, compiled), flush=True)
    if speculate:
        print("\n| model | draft | acceptance | tok/s | by the formula | of plain |\n" + "|---" * 6 + "|")
        print("\n".join(speculation_speed(*speculate, target, parse_dtype(dtype))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check a device against float32 on the CPU and time it.")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--dtype", default="bfloat16", help="weights (default: %(default)s)")
    parser.add_argument(
        "--models", nargs="+", default=["stories15M"], help="registry sizes to time (default: stories15M)"
    )
    parser.add_argument(
        "--speculate", nargs=2, metavar=("MODEL", "DRAFT"), help="registry sizes to time speculation with, k = 5"
    )
    cli.run(main, parser)
