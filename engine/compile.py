"""Every setting of the compiler, and the warm-up that compiles all that a run will need."""

import os
import shutil
import sys
import sysconfig
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from model import CacheView


def compile_step(function: Callable, device: torch.device, any_length: bool = False) -> Callable:
    """`function(model, tokens, pos, cache, ...)` compiled for `device`, with the settings found best there.

    Each shape of the arguments is compiled apart, except that one form serves any prefix of the cache; with any_length,
    as for prompts, also any size above one of every other dimension. On CUDA, without any_length, every prefix of the
    cache is a CUDA graph of its own.
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
    ready = weakref.WeakKeyDictionary()  # model -> the forms of call that it has been compiled for

    def call(*arguments):
        result = compiled(*arguments)
        return _cloned(result) if graphs else result  # a CUDA graph overwrites its outputs

    def step(model, tokens, pos, cache, *others):
        forms = ready.setdefault(model, set())
        sizes = (len(cache.slots), cache.cache.n_rows, cache.cache.n_slots)
        form = (*sizes, *_form_of((tokens, cache.cache_rows, cache.counts, *others), any_length))
        if form not in forms:
            if not graphs:
                mark_shapes((tokens, pos, cache.cache_rows, cache.counts, *others), cache, any_length)
            result = call(model, tokens, pos, cache, *others)
            forms.add(form)  # only now: an interrupted compilation is no form
            return result
        # this form of call has passed the guards once; evaluating them all again costs 0.4 ms of a 30-layer model
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            return call(model, tokens, pos, cache, *others)

    return step


def mark_shapes(arguments: tuple, cache: CacheView, any_length: bool) -> None:
    """Tell the compiler what varies: the prefix of the cache, with any_length also every size above one."""
    torch._dynamo.mark_dynamic(cache.slots, 0)
    for tensor in arguments:
        if isinstance(tensor, Tensor):
            torch._dynamo.mark_static(tensor)  # left to itself, the compiler tries to serve any size, and fails
            for dim, size in enumerate(tensor.shape):
                # a number of rows that can only be two does not vary, and as a variable it breaks the regions
                varies = dim > 0 or cache.cache.n_rows > 2
                if any_length and size > 1 and varies:
                    torch._dynamo.mark_dynamic(tensor, dim)


def _form_of(arguments: tuple, any_length: bool) -> Iterator:
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
