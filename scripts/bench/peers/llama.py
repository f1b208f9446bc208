"""llama.cpp through its C calls, on files that it has requantised itself."""

import time
from pathlib import Path

from scripts.bench.peers.protocol import Case

LLAMA_FILE_TYPES = {"bf16": 32, "int8": 7, "int4": 2}  # BF16, Q8_0, Q4_0
UBATCH = 512  # prompt tokens that llama.cpp takes at once


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
    files = sorted(Path(model).parent.glob("*.gguf")) if Path(model).exists() else []  # a registry name has none
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
