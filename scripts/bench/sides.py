"""The engines that are compared, each behind one class; as a program, one of them that serves a parent.

    python -m scripts.bench.sides SIDE PRECISION MODEL THREADS DEVICE

Each line of standard input is a JSON object: a case ({"batch": 4, "prompt": 512, "new_tokens": 200}) is measured once;
{"bandwidth": true} asks how fast the side reads memory, {"profile": PATH} for the kernels of one step, and a trace of
them in a file. Each answer is a line of output; {} says that it has loaded.
"""

import contextlib
import json
import math
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path

import torch

from engine.cache import row_bytes, slots_for
from engine.compile import compile_step
from engine.drafters import PromptLookup
from engine.engine import Engine, build_engine, generate
from engine.sampling import Sampling
from engine.speculative import Speculation, verify
from layers.quantized import QuantSpec
from measure.machine import measured_bandwidth, peak_memory
from model import ModelArgs
from scripts.bench.report import ROOT
from weights.checkpoint import load_model, random_model
from weights.device import parse_cache_dtype
from weights.files import GB
from weights.layout import weight_bytes
from weights.registry import REGISTRY, args_from_name

PRECISIONS = {  # of the linear layers, and of the output head
    "bf16": (None, "float"),
    "int8": (QuantSpec(8), "int8"),
    "int4": (QuantSpec(4, 32), "int8"),
    "int4, head too": (QuantSpec(4, 32), "int4"),  # of random weights only
}
LLAMA_FILE_TYPES = {"bf16": 32, "int8": 7, "int4": 2}  # BF16, Q8_0, Q4_0
UBATCH = 512  # prompt tokens that llama.cpp takes at once
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Case:
    """Rows in a batch, tokens of each row's prompt, and new ones after it."""

    batch: int
    prompt: int
    new_tokens: int

    @property
    def length(self) -> int:
        return self.prompt + self.new_tokens

    def prompts(self, vocab_size: int) -> list[list[int]]:
        draw = random.Random(0)
        return [[draw.randrange(vocab_size) for _ in range(self.prompt)] for _ in range(self.batch)]

    def rates(self, prefill_s: float, decode_s: float) -> dict[str, float]:
        """Tokens/s of all rows together. The first new token of each row belongs to the prefill."""
        return {
            "decode_tok_s": self.batch * (self.new_tokens - 1) / decode_s,
            "prefill_tok_s": self.batch * self.prompt / prefill_s,
            "time_to_first_token_s": prefill_s,
        }


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
        speculation = None
        if guesses:
            check = compile_step(verify, loaded.device)
            speculation = Speculation(PromptLookup(), guesses, check, device=loaded.device)
        self.engine = build_engine(loaded, compiled, compiled_prefill, speculation)

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


class Transformers:
    """transformers' own generate, eager; or static, with a static cache and compiled.

    Its weights are those of the GGUF file beside the model, or random ones of a registry size.
    """

    def __init__(self, model: str, precision: str, threads: int, device: str, static: bool = False):
        torch.set_num_threads(threads)
        self.model = random_llama(model, device) if model in REGISTRY else read_by_transformers(model).to(device)
        if static:
            self.model.generation_config.cache_implementation = "static"
        if static and device == "cpu":  # on a GPU generate compiles by itself
            self.model.forward = torch.compile(self.model.forward, fullgraph=True)

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


def read_by_transformers(model: str):
    from transformers import AutoModelForCausalLM

    file = gguf_of(model)
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)


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


class LlamaCpp:
    """llama.cpp through its own batches, with flash attention, its faster setting on a CPU."""

    def __init__(self, model: str, precision: str, threads: int, device: str):
        import llama_cpp

        self.api, self.threads, self.context = llama_cpp, threads, None
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept, because C holds no reference
        llama_cpp.llama_log_set(self.quiet, None)
        path = str(llama_file(gguf_of(model), precision)).encode()
        self.model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def prepare(self, case: Case) -> None:
        if self.context is not None:
            self.api.llama_free(self.context)
            self.api.llama_batch_free(self.batch)
        parameters = self.api.llama_context_default_params()
        parameters.n_seq_max = case.batch
        parameters.n_ctx = case.batch * (-(-case.length // 256) * 256)
        parameters.n_batch = parameters.n_ubatch = UBATCH
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.flash_attn_type = 1
        self.context = self.api.llama_init_from_model(self.model, parameters)
        self.batch = self.api.llama_batch_init(UBATCH, 0, 1)

    def run(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Evaluate (token, position, row, whether logits are wanted) of each entry."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, row, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        if self.api.llama_decode(self.context, batch) != 0:
            raise ValueError("llama_decode failed")

    def likeliest(self, index: int) -> int:
        import numpy

        logits = self.api.llama_get_logits_ith(self.context, index)
        return int(numpy.ctypeslib.as_array(logits, shape=(self.n_vocab,)).argmax())

    def measure(self, case: Case) -> dict[str, float]:
        self.prepare(case)
        began, tokens = time.perf_counter(), []
        for row, prompt in enumerate(case.prompts(self.n_vocab)):
            for begin in range(0, case.prompt, UBATCH):
                part = prompt[begin : begin + UBATCH]
                last = begin + len(part) == case.prompt
                self.run([(t, begin + i, row, last and i == len(part) - 1) for i, t in enumerate(part)])
            tokens.append(self.likeliest(len(part) - 1))
        prefill_s = time.perf_counter() - began
        began = time.perf_counter()
        for position in range(case.prompt, case.length - 1):
            self.run([(token, position, row, True) for row, token in enumerate(tokens)])
            tokens = [self.likeliest(row) for row in range(case.batch)]
        return case.rates(prefill_s, time.perf_counter() - began)


def gguf_of(model: str) -> Path:
    """The GGUF file that a checkpoint came from. Raises ValueError if there is none beside it."""
    files = [] if model in REGISTRY else sorted(Path(model).parent.glob("*.gguf"))
    if not files:
        raise ValueError(f"{model} has no .gguf file beside it, which its peers read; leave them out with --sides")
    return files[0]


def llama_file(source: Path, precision: str) -> Path:
    """The file requantised by llama.cpp itself: BF16, and Q8_0 and Q4_0 made from that."""
    import llama_cpp

    target = source.with_name(f"peer-{precision}.bin")
    if not target.exists():
        if precision != "bf16":
            source = llama_file(source, "bf16")
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.allow_requantize, parameters.ftype = True, LLAMA_FILE_TYPES[precision]
        if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters) != 0:
            raise ValueError(f"llama.cpp cannot write {target}")
    return target


SIDES = {
    "gpt-faster": Ours,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "transformers, static cache + compile": partial(Transformers, static=True),
    "eager": partial(Ours, compiled=False, compiled_prefill=False),
    "compiled step": partial(Ours, compiled_prefill=False),
    "compiled prefill": partial(Ours, compiled=False),
    "compiled step, int8 cache": partial(Ours, compiled_prefill=False, cache_dtype="int8"),
    "compiled step, ngram guesses": partial(Ours, compiled_prefill=False, guesses=4),
}


class SideProcess(contextlib.AbstractContextManager):
    """A process that serves one side, stopped but for the time of a question.

    deadline: of time.monotonic(), at which an answer is no longer waited for: TimeoutError.
    """

    def __init__(
        self,
        model: str,
        threads: int,
        side: str,
        precision: str,
        environment: dict[str, str] | None = None,
        device: str = "cpu",
        deadline: float = math.inf,
    ):
        self.name, self.deadline = f"{side}, {precision}", deadline
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.bench.sides", side, precision, model, str(threads), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env=os.environ | (environment or {}),
        )

    def __enter__(self) -> "SideProcess":
        """Wait until it has loaded."""
        try:
            self.answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def ask(self, question: dict) -> dict:
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        """Its next answer, after which it is stopped. Raises ValueError with its last words if it ended."""
        if self.deadline < math.inf:
            seconds = max(0.0, self.deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], seconds)[0]:
                raise TimeoutError(f"{self.name} did not answer in time")
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            words = self.log.read().strip().splitlines() or ["none"]
            code = self.process.wait()
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            raise ValueError(f"{self.name} ended {how}; its last words: {words[-1]}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)


def serve(side: str, precision: str, model: str, threads: str, device: str) -> None:
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no answer
        engine = SIDES[side](model, precision, int(threads), device)
        print("{}", file=answers, flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            if "profile" in asked:
                answer = engine.profile(asked["profile"])
            elif "bandwidth" in asked:
                answer = engine.bandwidth()
            else:
                answer = engine.measure(Case(**asked))
            memory = {"peak_memory_gb": peak_memory(torch.device(device)) / GB}
            print(json.dumps(answer | memory), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
