"""The code that inductor wrote for a GPU, run on the CPU by Triton's interpreter.

Only a process that begins with TRITON_INTERPRET=1 can do this: Triton decides once, while it is imported.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._inductor.runtime import triton_helpers, triton_heuristics

from tests.cuda_offline.generated import Generated
from tests.cuda_offline.imagined_gpu import imagined_gpu
from tests.cuda_offline.wrapper import Kernels, load

LARGEST_BLOCK = 1024


class Libdevice:
    """CUDA's mathematics, which the interpreter lacks, in functions of `tl`, looked up when it has replaced those."""

    def __getattr__(self, name: str):
        return getattr(tl, name)

    def isnan(self, x):
        return x != x

    def isinf(self, x):
        return tl.abs(x) == float("inf")

    def nearbyint(self, x):
        return x + 1.5 * 2**23 - 1.5 * 2**23  # of float32 numbers that are small

    def tanh(self, x):
        return 1 - 2 / (tl.exp(2 * x) + 1)


def launch(kernel: Kernels.Kernel, args: tuple) -> None:
    """One kernel of the wrapper, block after block."""
    tuner = kernel.tuner
    config, values = tuner.configs[0], dict(zip(tuner.fn.arg_names, args, strict=False))
    if "XBLOCK" in config.kwargs:  # as inductor names it: a block costs milliseconds here, whatever its size
        config.kwargs["XBLOCK"] = min(LARGEST_BLOCK, triton.next_power_of_2(values["xnumel"]))
    values |= config.kwargs
    grid = triton_heuristics.GridExpr.from_meta(tuner.inductor_meta, config).eval_slow(values)
    with torch.inference_mode(False):
        tuner.fn[grid](**{name: values[name] for name in tuner.fn.arg_names if name in values})


def interpreted(made: Generated, inputs: list[Tensor | int]) -> tuple[Tensor, ...]:
    """What the wrapper returns for these inputs on the CPU, in the order of `made.inputs`; it writes to some."""
    with imagined_gpu(made.sm):
        triton_helpers.libdevice = triton_helpers.math = Libdevice()
        names = load(made.code, launch, torch.device("cpu"))
        return names["call"](list(inputs))
