"""llama.cpp, and its fork ik_llama.cpp, through their C calls; as a program, it writes the files that both read.

    python -m scripts.bench.peers.llama FILE SOURCE PRECISION

The files are requantised by llama.cpp itself: BF16, and Q8_0 and Q4_0 made from that.
"""

import ctypes
import re
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from scripts.bench.peers.environment import make_once
from scripts.bench.peers.protocol import Case

FILE_TYPES = {"bf16": 32, "int8": 7, "int4": 2}
UBATCH = 512  # prompt tokens that it takes at once


class LlamaCpp:
    """llama.cpp through its own batches, with flash attention, its faster setting on a CPU."""

    package, module = "llama-cpp-python", "llama_cpp.llama_cpp"
    model_settings: dict[str, bool] = {}

    def __init__(self, file: str, threads: int):
        self.api, self.threads, self.context = import_module(self.module), threads, None
        parameters = with_settings(self.api.llama_model_default_params(), self.model_settings)
        self.model = self.api.llama_model_load_from_file(file.encode(), parameters)
        self.n_vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))

    def facts(self) -> dict[str, str]:
        weights, system = ctypes.create_string_buffer(100), self.api._lib.llama_print_system_info
        self.api.llama_model_desc(self.model, weights, len(weights))
        system.restype = ctypes.c_char_p
        isa = re.findall(r"(\w+) = 1", system().decode())
        return {
            self.package: version(self.package),
            "weights": weights.value.decode().split()[-1],
            "built for": " ".join(isa),
        }

    def prepare(self, case: Case) -> None:
        if self.context is not None:
            self.api.llama_free(self.context)
            self.api.llama_batch_free(self.batch)
        parameters = with_settings(self.api.llama_context_default_params(), self.context_settings(case))
        parameters.n_seq_max = case.batch
        parameters.n_ctx = case.batch * (-(-case.length // 256) * 256)
        parameters.n_batch = parameters.n_ubatch = UBATCH
        parameters.n_threads = parameters.n_threads_batch = self.threads
        self.context = self.api.llama_init_from_model(self.model, parameters)
        self.batch = self.api.llama_batch_init(UBATCH, 0, 1)

    def context_settings(self, case: Case) -> dict[str, int]:
        return {"flash_attn_type": 1}

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
        rows, tokens = enumerate(case.prompts(self.n_vocab)), []
        entries = [(token, i, row, i == case.prompt - 1) for row, prompt in rows for i, token in enumerate(prompt)]
        began = time.perf_counter()
        for begin in range(0, len(entries), UBATCH):
            part = entries[begin : begin + UBATCH]
            self.run(part)
            tokens += [self.likeliest(i) for i, (*_, wanted) in enumerate(part) if wanted]
        prefill_s = time.perf_counter() - began
        began = time.perf_counter()
        for position in range(case.prompt, case.length - 1):
            self.run([(token, position, row, True) for row, token in enumerate(tokens)])
            tokens = [self.likeliest(row) for row in range(case.batch)]
        return case.rates(prefill_s, time.perf_counter() - began)


class IkLlamaCpp(LlamaCpp):
    """The same calls of another library, with weights packed for the processor, again its faster setting."""

    package, module = "ik-llama-cpp-python", "ik_llama_cpp._ctypes_api"
    model_settings = {"repack_tensors": True}

    def context_settings(self, case: Case) -> dict[str, int]:
        return {"flash_attn": case.batch == 1}  # that of several rows ends the process: GGML_ASSERT(S > 0)


def with_settings(parameters: ctypes.Structure, settings: dict[str, int]) -> ctypes.Structure:
    for name, value in settings.items():
        assert hasattr(parameters, name), name  # ctypes would take any
        setattr(parameters, name, value)
    return parameters


def gguf_of(model: str) -> Path:
    """The GGUF file that a checkpoint came from. Raises ValueError if there is none beside it."""
    files = sorted(Path(model).parent.glob("*.gguf")) if Path(model).exists() else []  # a registry name has none
    if not files:
        raise ValueError(f"{model} has no .gguf file beside it, which its peers read; leave them out with --sides")
    return files[0]


def llama_file(gguf: Path, precision: str) -> Path:
    target = gguf.with_name(f"peer-{precision}.bin")
    if target.exists():
        return target
    source = gguf if precision == "bf16" else llama_file(gguf, "bf16")
    return make_once(target, sys.executable, "scripts.bench.peers.llama", source, precision)


def requantise(target: str, source: str, precision: str) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.allow_requantize, parameters.ftype = True, FILE_TYPES[precision]
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters) != 0:
        raise ValueError(f"llama.cpp cannot requantise {source}")


if __name__ == "__main__":
    requantise(*sys.argv[1:])
