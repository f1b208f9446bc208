"""Every setting of the compiler."""

import os
import shutil
import sys
import sysconfig
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from engine.decode import decode_one_token, forward_chunk, prefill, used_slots
from engine.sampling import Sampling
from model import Transformer


def compile_step(function: Callable, device: torch.device, any_length: bool = False) -> Callable:
    """`function(model, tokens, pos, slots, ...)` compiled for `device`, with the settings found best there.

    Each shape of the arguments is compiled apart, except that one form serves any length of `slots`; with any_length,
    as for prompts, also any size above one of every other dimension. On CUDA, without any_length, every size of `slots`
    is a CUDA graph of its own.
    """
    torch._dynamo.config.specialize_float = True  # models with other eps: a float made dynamic breaks the regions
    torch._dynamo.config.recompile_limit = 64  # every form is wanted: batch sizes, samplings, cache sizes on CUDA
    graphs = device.type == "cuda" and not any_length
    options = {}
    if device.type == "cpu":
        # trust cpuinfo: the trial builds take 5 s; and sizes and strides: checking them again takes a tenth of a step
        options = {"cpp.vec_isa_ok": True, "size_asserts": False, "alignment_asserts": False, "scalar_asserts": False}
    elif graphs:  # what mode="reduce-overhead" sets; torch.compile does not take both a mode and options
        options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    compiled = torch.compile(function, fullgraph=True, dynamic=False if graphs else None, options=options)
    ready = weakref.WeakKeyDictionary()  # model -> the kinds of call it has been compiled for

    def call(model, tokens, *others):
        result = compiled(model, tokens, *others)
        return _cloned(result) if graphs else result  # a CUDA graph overwrites its outputs

    def step(model, tokens, pos, slots, *others):
        kinds = ready.setdefault(model, set())
        cache = model.layers[0].attention.kv_cache.k.shape
        kind = (len(slots), cache, *_kinds((tokens, *others), any_length))
        if kind not in kinds:
            if not graphs:
                mark_shapes(tokens, pos, slots, others, any_length, cache[0])
            result = call(model, tokens, pos, slots, *others)
            kinds.add(kind)  # only now: an interrupted compilation is no form
            return result
        # this very kind of call has passed the guards once; evaluating them all again costs 0.4 ms of a 30-layer model
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            return call(model, tokens, pos, slots, *others)

    return step


def mark_shapes(tokens: Tensor, pos: Tensor, slots: Tensor, others: tuple, any_length: bool, cached_rows: int) -> None:
    """Tell the compiler what varies: the length of `slots`, and with any_length every size above one; nothing else."""
    torch._dynamo.mark_dynamic(slots, 0)
    for tensor in (tokens, pos, *others):
        if isinstance(tensor, Tensor):
            torch._dynamo.mark_static(tensor)  # left to itself, the compiler tries to serve any size, and fails
            for dim, size in enumerate(tensor.shape):
                varies = dim > 0 or cached_rows > 2  # rows that can only be two are no variable, and break the regions
                if any_length and size > 1 and varies:
                    torch._dynamo.mark_dynamic(tensor, dim)


def _kinds(arguments: tuple, any_length: bool) -> Iterator:
    """What of the arguments a compiled form depends on."""
    for argument in arguments:
        if not isinstance(argument, Tensor):
            yield argument
        else:
            yield tuple(size > 1 for size in argument.shape) if any_length else argument.shape


def _cloned(result: Tensor | tuple) -> Tensor | tuple:
    if isinstance(result, tuple):
        return tuple(_cloned(each) for each in result)
    return None if result is None else result.clone()


def require_compiler(device: torch.device) -> None:
    """Raise ValueError that names the packages, if torch.compile cannot work here."""
    if device.type != "cpu":
        return
    missing = []
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # where PyTorch looks
    if shutil.which(compiler) is None:
        missing.append(f"the C++ compiler {compiler} (Debian, Ubuntu: apt-get install g++, and leave CXX unset)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python's headers (Debian, Ubuntu: apt-get install python3-dev)")
    if missing:
        raise ValueError(f"--compile on a CPU needs {' and '.join(missing)}; or leave out --compile")


@torch.inference_mode()  # as decode does: a tensor made outside would be another form
def warm_up(
    model: Transformer, batches: list[list[int]], budget: int, sampling: Sampling, step, forward, speculation=None
) -> None:
    """Call the compiled functions in every form this run will need, so that nothing compiles once text flows.

    batches: the lengths of the prompts in each. The cache slots written here are written again before anything looks
    at them.
    """
    times = 3 if model.device.type == "cuda" else 1  # a CUDA graph warms up, is captured, then replayed
    longest = [max(lengths) for lengths in batches]
    ahead = speculation.look_ahead if speculation else 0
    counts = range(min(longest) + 1, max(longest) + budget + ahead + 1)
    sizes = {len(used_slots(model, count)): count for count in counts}
    for n_rows in {len(lengths) for lengths in batches}:
        prompts = [[0] * max(longest)] * n_rows
        if forward is not forward_chunk:
            prefill(model, prompts, sampling, 0, forward)
        token = torch.zeros(n_rows, 1, dtype=torch.long, device=model.device)
        if speculation:
            speculation.source.begin(model, prompts)
        for count in sizes.values():
            if speculation:
                filled = min(count, len(model.slots) - ahead - 1)
                pos = token + filled - 1
                speculation.measure(model, token.repeat(1, 2), pos, pos + budget, filled, sampling)
            elif step is not decode_one_token:
                for _ in range(times):
                    step(model, token, token + count - 1, used_slots(model, count), sampling)


def choose_functions(device: torch.device, compile: bool, compile_prefill: bool) -> dict[str, Callable]:
    """The step and the prefill, compiled as asked."""
    if compile or compile_prefill:
        require_compiler(device)
    return {
        "step": compile_step(decode_one_token, device) if compile else decode_one_token,
        "forward": compile_step(forward_chunk, device, any_length=True) if compile_prefill else forward_chunk,
    }
