"""The sides that are compared and run in our environment; as a program, one of them that serves a parent.

    python -m scripts.bench.sides SIDE PRECISION MODEL THREADS DEVICE

What is asked, and how it answers, stands in `peers/protocol.py`.
"""

import math
import sys
import time
from dataclasses import MISSING, fields, replace
from functools import partial
from importlib.metadata import version

import torch

from engine.cache import row_bytes, slots_for
from engine.engine import Engine, build_engine, generate
from engine.request import Request, Timing
from engine.sampling import Sampling
from engine.speculation.drafters import PromptLookup
from engine.speculation.speculative import build_speculation
from kernels import cpu
from layers.quantized import QuantSpec
from measure.machine import measured_bandwidth, peak_memory
from model import ModelArgs
from scripts.bench.peers.llama import gguf_of
from scripts.bench.peers.protocol import Case, SideProcess, serve
from scripts.bench.peers.table import PEERS, peer_command
from scripts.bench.peers.transformers import read
from serving.scheduler import Scheduler, Task, run_tasks
from text.prompts import IdTokenizer
from weights.checkpoint import load_model, random_model
from weights.device import parse_cache_dtype
from weights.layout import weight_bytes
from weights.registry import REGISTRY, args_from_name

PRECISIONS = {  # of the linear layers, and of the output head
    "bf16": (None, "float"),
    "int8": (QuantSpec(8), "int8"),
    "int4": (QuantSpec(4, 32), "int8"),
    "int4, head too": (QuantSpec(4, 32), "int4"),  # of random weights only
}
GREEDY = Sampling(temperature=0)


def measure_case(engine: Engine, case: Case) -> dict[str, float]:
    """Greedy decoding of a case; the first time with an engine also compiles."""
    size = (case.batch, slots_for(engine.model.args, case.length))
    if engine.cache is None or (engine.cache.n_rows, engine.cache.n_slots) != size:
        engine.cache = None  # of another case, which may be larger than a run of this one alone would have
        engine.reserve(case.batch, case.length)
    prompts, times = case.prompts(engine.model.args.vocab_size), [time.perf_counter()]
    times += [time.perf_counter() for _ in generate(engine, prompts, case.new_tokens, GREEDY)]
    rates = case.rates(times[1] - times[0], times[-1] - times[1])
    if engine.speculation:
        rates["tokens_a_round"] = (case.new_tokens - 1) / (len(times) - 2)
    return rates


class Ours:
    """gpt-faster as `generate.py --compile --compile_prefill --quantize PRECISION` runs it.

    guesses: tokens that prompt lookup guesses a round; 0: it does not speculate. cache_dtype: as `parse_cache_dtype`.
    """

    def __init__(
        self,
        model: str,
        precision: str,
        threads: int,
        device: str,
        compiled: bool = True,
        compiled_prefill: bool = True,
        guesses: int = 0,
        cache_dtype: str | None = None,
    ):
        torch.set_num_threads(threads)
        spec, head = PRECISIONS[precision]
        load = partial(random_model, head=head) if model in REGISTRY else load_model
        loaded = load(model, torch.device(device), quantize=spec)
        loaded.cache_dtype = parse_cache_dtype(cache_dtype)
        speculation = build_speculation(loaded, PromptLookup(), guesses, compile=True) if guesses else None
        self.engine = build_engine(loaded, compiled, compiled_prefill, speculation)

    def facts(self) -> dict[str, str | None]:
        on_cpu = self.engine.model.device.type == "cpu"
        return {"torch": torch.__version__, "isa": cpu.isa() if on_cpu else None}

    def measure(self, case: Case) -> dict[str, float]:
        return measure_case(self.engine, case)

    def bandwidth(self) -> dict[str, float]:
        model = self.engine.model
        return {
            "measured_bandwidth_gb_s": measured_bandwidth(model.device),
            "weight_bytes_per_token": weight_bytes(model),
            "kv_bytes_per_position": row_bytes(model, 1),
        }

    def profile(self, path: str) -> dict[str, list]:
        """The kernels of one step of one row (on a CPU its operators): name, calls, microseconds in all."""
        on_gpu = self.engine.model.device.type == "cuda"
        steps = generate(self.engine, Case(1, 8, 0).prompts(self.engine.model.args.vocab_size), 24, GREEDY)
        for _ in range(16):  # compiled, captured
            next(steps)
        with torch.profiler.profile() as profiler:
            next(steps)
            if on_gpu:
                torch.cuda.synchronize()
        profiler.export_chrome_trace(path)
        events, time = profiler.key_averages(), f"self_{'device' if on_gpu else 'cpu'}_time_total"
        kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        found = [[each.key, each.count, getattr(each, time)] for each in events if each.device_type == kind]
        return {"kernels": sorted(found, key=lambda each: -each[-1])}


class Tasks(Ours):
    """The same engine behind the scheduler of `serve.py`: as many tasks at a time as the batch has rows, two each."""

    scheduler: Scheduler | None = None
    n_measured = 0

    def measure(self, case: Case) -> dict[str, float]:
        """Tokens/s of all new tokens over all of the time; every second answer is half as long, so that rows change."""
        if self.scheduler is None or (len(self.scheduler.held), self.scheduler.context) != (case.batch, case.length):
            self.scheduler = Scheduler(self.engine, case.batch, case.length)
            self.scheduler.warm_up()
        tokenizer, lengths = IdTokenizer(self.engine.model.args.vocab_size), (case.new_tokens, case.new_tokens // 2)
        self.n_measured += 1  # other prompts each time, because rows keep what they have read
        tasks = [
            Task(Request(prompt, tokenizer, lengths[i % 2], [], True), GREEDY)
            for i, prompt in enumerate(
                replace(case, batch=2 * case.batch).prompts(tokenizer.vocab_size, self.n_measured)
            )
        ]
        timing, began = Timing(), time.perf_counter()
        for _ in run_tasks(self.scheduler, tasks, timing):
            pass
        rate = case.batch * sum(lengths) / (time.perf_counter() - began)
        first = {"time_to_first_token_s": timing.time_to_first_token_s}
        return {"decode_tok_s": rate, "prefill_tok_s": timing.prefill_tok_s} | first


class Transformers:
    """transformers' own generate, eager; or static, with a static cache and compiled.

    Its weights are those of the GGUF file beside the model, or random ones of a registry size.
    """

    def __init__(self, model: str, precision: str, threads: int, device: str, static: bool = False):
        torch.set_num_threads(threads)
        self.model = random_llama(model, device) if model in REGISTRY else read(gguf_of(model)).to(device)
        if static:
            self.model.generation_config.cache_implementation = "static"
        if static and device == "cpu":  # on a GPU generate compiles by itself
            self.model.forward = torch.compile(self.model.forward, fullgraph=True)

    def facts(self) -> dict[str, str]:
        return {"torch": torch.__version__, "transformers": version("transformers")}

    def measure(self, case: Case) -> dict[str, float]:
        ids, times = torch.tensor(case.prompts(self.model.config.vocab_size), device=self.model.device), []

        def note_the_first(ids, scores, **_):
            if not times:
                ids.tolist()  # waits for the device
                times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        lengths = {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens}
        options = lengths | {"do_sample": False, "pad_token_id": 0, "stopping_criteria": [note_the_first]}
        began = time.perf_counter()
        self.model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()
        return case.rates(times[0] - began, time.perf_counter() - times[0])


def random_llama(name: str, device: str):
    """transformers' Llama of a registry size; the scale of rope, which costs no time, is left out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    args = args_from_name(name)
    plain = {"rope_base", "rope_scaling", "tie_embeddings", "norm_eps"}
    others = [each for each in fields(ModelArgs) if each.default is not MISSING and each.name not in plain]
    if any(getattr(args, each.name) != each.default for each in others):
        raise ValueError(f"{name} is no plain Llama, of which alone transformers is measured with random weights")
    config = LlamaConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layer,
        num_attention_heads=args.n_head,
        num_key_value_heads=args.n_kv_head,
        head_dim=args.head_dim,
        intermediate_size=args.intermediate_size,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.max_seq_length,
        tie_word_embeddings=args.tie_embeddings,
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


SIDES = {
    "gpt-faster": Ours,
    "transformers": Transformers,
    "transformers, static cache + compile": partial(Transformers, static=True),
    "eager": partial(Ours, compiled=False, compiled_prefill=False),
    "compiled step": partial(Ours, compiled_prefill=False),
    "compiled prefill": partial(Ours, compiled=False),
    "compiled step, int8 cache": partial(Ours, compiled_prefill=False, cache_dtype="int8"),
    "compiled step, ngram guesses": partial(Ours, compiled_prefill=False, guesses=4),
    "tasks that come and go": Tasks,
}


def start_side(
    model: str,
    threads: int,
    side: str,
    precision: str,
    environment: dict[str, str] | None = None,
    device: str = "cpu",
    deadline: float = math.inf,
) -> SideProcess:
    if side in PEERS:
        command = peer_command(side, precision, model, threads)
    else:
        command = [sys.executable, "-m", "scripts.bench.sides", side, precision, model, str(threads), device]
    return SideProcess(f"{side}, {precision}", command, environment, deadline)


if __name__ == "__main__":
    side, precision, model, threads, device = sys.argv[1:]
    load = partial(SIDES[side], model, precision, int(threads), device)
    serve(load, partial(peak_memory, torch.device(device)))
