"""The wrapper that inductor wrote, run: its kernels and its memory are replaced by those that are handed in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import async_compile
from torch._inductor.codecache import PyCodeCache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from kernels.gpu import attention, experts, linear
from model import Transformer
from tests.cuda_offline.generated import Generated
from tests.cuda_offline.imagined_gpu import CUDA, FAKE, imagined_gpu
from weights.layout import Layout

aten = torch.ops.aten
OURS = {
    torch.ops.gpt_faster.linear_on_gpu.default: linear.linear,
    torch.ops.gpt_faster.attend_cached.default: attention.attend,
    torch.ops.gpt_faster.experts.default: experts.experts,
}
CACHES = ("k_cache", "k_scales", "v_cache", "v_scales")
READ_BACK = (*CACHES, "partials", "made", "weights")  # what a kernel of ours writes and reads
OUTPUTS = {  # of each kernel of ours, the arguments that it writes to
    "gemv": ("y",),
    "product": ("y", "partials", "counters"),
    "attend_part": (*CACHES, "made", "weights", "counters", "y"),
    "sort_pairs": ("order", "ends"),
    "linear_pairs": ("y",),
}
VIEWS = {
    aten.as_strided.default,
    aten.view.default,
    aten.view.dtype,
    aten.reshape.default,
    aten.t.default,
    aten.select.int,
    aten.alias.default,
}


class Kernels:
    """Stands in for inductor's AsyncCompile: every Triton kernel, loaded but not compiled, goes through `launch`."""

    def __init__(self, launch: Callable):
        self.launch = launch

    def triton(self, name: str, source: str, device_str: str | None = None) -> "Kernels.Kernel":
        source = source.replace(name, "kernel")  # equal kernels of several graphs are loaded, and compiled, once
        return self.Kernel(name, PyCodeCache.load(source).kernel, self.launch)

    def wait(self, scope: dict) -> None:
        pass

    @dataclass
    class Kernel:
        name: str
        tuner: object  # inductor's CachingAutotuner
        launch: Callable

        def run(self, *args, stream=None, **kwargs) -> None:
            self.launch(self, args)


def load(code: str, launch: Callable, device: torch.device) -> dict:
    """The names of the wrapper, whose kernels call `launch(kernel, args)` and whose buffers are on `device`."""
    code = code.replace("device='cuda:0'", f"device='{device}'")
    names = {"__name__": "wrapper"}
    with (
        mock.patch.object(async_compile, "AsyncCompile", lambda: Kernels(launch)),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True),
    ):
        exec(compile(code, "wrapper", "exec"), names)
    names |= {
        "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device),
        "reinterpret_tensor": torch.as_strided,
        "assert_size_stride": lambda *_: None,
        "assert_alignment": lambda *_: None,
    }
    return names


@dataclass
class Launch:
    """One kernel or operator that the wrapper calls."""

    name: str
    part: int | None  # the captured part of the graph it is in; None: it is not captured
    written: list[Tensor]
    read: list[Tensor]


@dataclass
class Record:
    """What one call of the wrapper does."""

    launches: list[Launch] = field(default_factory=list)
    buffers: list[tuple[int, ...]] = field(default_factory=list)  # the shapes it allocates
    tuners: dict[str, object] = field(default_factory=dict)  # of each Triton kernel
    n_parts: int = 0
    part: int | None = None  # that is running

    def launch(self, kernel: Kernels.Kernel, args: tuple) -> None:
        names = kernel.tuner.fn.arg_names
        outputs = {name for name in names if "out_ptr" in name} | set(kernel.tuner.mutated_arg_names)
        tensors = [(name, arg) for name, arg in zip(names, args, strict=False) if isinstance(arg, Tensor)]
        written = [arg for name, arg in tensors if name in outputs]
        read = [arg for name, arg in tensors if name not in outputs or name.startswith("in_out_ptr")]
        self.launches.append(Launch(kernel.name, self.part, written, read))
        self.tuners[kernel.name] = kernel.tuner

    def launch_of_ours(self, kernel: JITFunction, *args, **kwargs) -> None:
        """Of a kernel of `kernels/gpu/` that an operator of ours launches."""
        values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        tensors = [(name, value) for name, value in values.items() if isinstance(value, Tensor)]
        outputs = OUTPUTS[kernel.__name__]
        written = [value for name, value in tensors if name in outputs]
        read = [value for name, value in tensors if name not in outputs or name in READ_BACK]
        self.launches.append(Launch(kernel.__name__, self.part, written, read))

    def capture(self, part: int, function: Callable) -> Callable:
        def captured(args):
            self.part = part
            try:
                return function(args)
            finally:
                self.part = None

        return captured


class Operators(TorchDispatchMode):
    """Notes the operators of PyTorch that a wrapper calls, and what it allocates.

    An operator of ours in Triton is looked into: what its implementation does is noted, and cannot wait for the device,
    because fake tensors have no values.
    """

    def __init__(self, record: Record):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in OURS:
            launch = self.record.launch_of_ours
            with self, mock.patch.object(JITFunction, "run", lambda kernel, *args, **kw: launch(kernel, *args, **kw)):
                return OURS[function](*args, **kwargs)
        result = function(*args, **kwargs)
        if function in (aten.empty_strided.default, aten.empty.memory_format, aten.new_empty.default):
            self.record.buffers.append(tuple(result.shape))
        elif function not in VIEWS and function.namespace != "prim":
            values = {**dict(zip((a.name for a in function._schema.arguments), args, strict=False)), **kwargs}
            mutable = [a.name for a in function._schema.arguments if a.alias_info and a.alias_info.is_write]
            written = [values[name] for name in mutable if isinstance(values.get(name), Tensor)]
            if not mutable:
                written = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
            given = [each for each in tree_leaves(values) if isinstance(each, Tensor)]
            read = [each for each in given if all(each is not other for other in written)]
            self.record.launches.append(Launch(str(function), self.record.part, written, read))
        return result


def recorded(made: Generated) -> Record:
    """What the wrapper does, from a call with fake tensors."""
    record = Record()
    with imagined_gpu(made.sm), FAKE, torch.inference_mode():
        names = load(made.code, record.launch, CUDA)
        if "runner" in names:
            record.n_parts = len(names["runner"].partitions)
            names["recursively_apply_fns"]([partial(record.capture, part) for part in range(record.n_parts)])
        with Operators(record):
            names["call"](list(made.inputs))
    return record


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def written_inputs(made: Generated, record: Record) -> set[int]:
    """The numbers of the inputs that the wrapper writes to."""
    numbers = {storage(each): i for i, each in enumerate(made.inputs) if isinstance(each, Tensor)}
    written = {storage(each) for launch in record.launches for each in launch.written}
    return {numbers[each] for each in written & numbers.keys()}


def layer_of(made: Generated, record: Record) -> list[Launch]:
    """Launches from the first write to a layer's cache to the first write to that of the next."""
    inputs = {storage(each) for each in made.inputs if isinstance(each, Tensor)}
    first = {}  # of each cache, keys and values of one layer after the other
    for i, launch in enumerate(record.launches):
        for each in launch.written:
            if storage(each) in inputs and each.ndim == 4:
                first.setdefault(storage(each), i)
    begins = list(first.values())
    return record.launches[begins[0] : begins[2]]


def kernels_a_layer(made: Generated, record: Record) -> int:
    return len(layer_of(made, record))


def copied_weights(model: Transformer, record: Record) -> list[tuple[int, ...]]:
    """The shapes of buffers that hold a whole weight, or one for each row; a gate is as small as activations are."""
    tensors = Layout(model.args).tensors.items()
    shapes = {tuple(like.shape[-2:]) for name, like in tensors if like.ndim > 1 and not name.endswith("gate.weight")}
    shapes = {shape for shape in shapes if 1 not in shape}  # a convolution's, which is as small
    weights = shapes | {shape[::-1] for shape in shapes}
    return [shape for shape in record.buffers if shape[-2:] in weights]
