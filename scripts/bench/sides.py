"""The engines that are compared, each behind one class; as a program, one of them that serves a parent.

    python -m scripts.bench.sides SIDE PRECISION MODEL THREADS

Each line of standard input is a JSON object: a case ({"batch": 4, "prompt": 512, "new_tokens": 200}) is measured once;
{"bandwidth": true} asks how fast the side reads memory. Each answer is a line of output; {} says that it has loaded.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from engine.engine import build_engine
from layers.quantized import quant_spec
from measure.cases import Case, measure_case
from measure.machine import measured_bandwidth, peak_memory
from scripts.bench.report import ROOT
from weights.checkpoint import load_model, random_model
from weights.layout import weight_bytes
from weights.registry import REGISTRY

LLAMA_FILE_TYPES = {"bf16": 32, "int8": 7, "int4": 2}  # BF16, Q8_0, Q4_0
UBATCH = 512  # prompt tokens that llama.cpp takes at once


class Ours:
    """gpt-faster as `generate.py --compile --compile_prefill --quantize PRECISION` runs it."""

    def __init__(self, model: str, precision: str, threads: int, compiled: bool = True):
        torch.set_num_threads(threads)
        spec = None if precision == "bf16" else quant_spec(precision, None)
        load = random_model if model in REGISTRY else load_model
        self.engine = build_engine(load(model, quantize=spec), compiled, compiled)

    def measure(self, case: Case) -> dict[str, float]:
        return measure_case(self.engine, case)

    def bandwidth(self) -> dict[str, float]:
        model, args = self.engine.model, self.engine.model.args
        return {
            "measured_bandwidth_gb_s": measured_bandwidth(model.device),
            "weight_bytes_per_token": weight_bytes(model),
            "kv_bytes_per_position": 2 * args.n_layer * args.n_kv_head * args.head_dim * model.dtype.itemsize,
        }


class Transformers:
    """transformers' own generate on the weights of the GGUF file, eager; or static, compiled with a static cache."""

    def __init__(self, model: str, precision: str, threads: int, static: bool = False):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        file = gguf_of(model)
        self.model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        if static:
            self.model.generation_config.cache_implementation = "static"
            self.model.forward = torch.compile(self.model.forward, fullgraph=True)

    def measure(self, case: Case) -> dict[str, float]:
        ids, times = torch.tensor(case.prompts(self.model.config.vocab_size)), []

        def note_the_time(ids, scores, **_):
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        lengths = {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens}
        options = lengths | {"do_sample": False, "pad_token_id": 0, "stopping_criteria": [note_the_time]}
        began = time.perf_counter()
        self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return case.rates(times[0] - began, times[-1] - times[0])


class LlamaCpp:
    """llama.cpp through its own batches, with flash attention, its faster setting on a CPU."""

    def __init__(self, model: str, precision: str, threads: int):
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
    "eager": partial(Ours, compiled=False),
}


class SideProcess(contextlib.AbstractContextManager):
    """A process that serves one side, stopped but for the time of a question."""

    def __init__(self, model: str, threads: int, side: str, precision: str, environment: dict[str, str] | None = None):
        self.name = f"{side}, {precision}"
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scripts.bench.sides", side, precision, model, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env=os.environ | (environment or {}),
        )
        self.answer()  # it has loaded

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
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            words = self.log.read().strip().splitlines() or ["none"]
            code = self.process.wait()
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            raise ValueError(f"{self.name} ended {how}; its last words: {words[-1]}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)


def serve(side: str, precision: str, model: str, threads: str) -> None:
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no answer
        engine = SIDES[side](model, precision, int(threads))
        print("{}", file=answers, flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            answer = engine.bandwidth() if "bandwidth" in asked else engine.measure(Case(**asked))
            memory = {"peak_memory_gb": peak_memory(torch.device("cpu")) / 1e9}
            print(json.dumps(answer | memory), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
