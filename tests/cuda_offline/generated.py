"""The code that inductor writes for a GPU, and what it says of the graph; nothing is loaded or run."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import compile_fx
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda_offline.imagined_gpu import CUDA, FAKE, imagined_gpu


@dataclass(frozen=True)
class Generated:
    """What inductor made of one graph. static: the numbers of the inputs that a CUDA graph need not copy."""

    code: str  # the wrapper, with the source of every Triton kernel
    inputs: tuple[Tensor | int, ...]  # fake, of one size that the code serves
    static: frozenset[int]
    device_types: frozenset[str]
    why_no_cuda_graph: str | None
    sm: int


class Written(Exception):
    """Inductor has written the code, and would load it next."""


class FoldedOnCPU(TorchDispatchMode):
    """What inductor computes while it folds constants, it computes on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def moved(value):
            return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value

        return function(*map(moved, args), **{name: moved(value) for name, value in (kwargs or {}).items()})


def generated(function: Callable, *args, sm: int = 90) -> Generated:
    """What inductor writes for `function(*args)`, which compiles one graph when it is called, on fake CUDA tensors."""
    made = []
    with FAKE, torch.inference_mode(), stopping_at_the_code(made, sm):
        try:
            function(*args)
        except Exception as error:
            if not is_caused_by(error, Written):
                raise
    assert len(made) == 1, f"{len(made)} graphs"
    return made[0]


def is_caused_by(error: BaseException | None, kind: type) -> bool:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None


@contextlib.contextmanager
def stopping_at_the_code(made: list[Generated], sm: int) -> Iterator[None]:
    """While this lasts, inductor compiles for the imagined GPU, and appends to `made` instead of loading the code."""
    compile_graph, lower = compile_fx.compile_fx, compile_fx._InProcessFxCompile.codegen_and_compile
    fold, facts = joint_graph.UniformValueConstantFolder.run, {"sm": sm}

    def on_the_gpu(graph_module, example_inputs, *args, **kwargs):
        facts.setdefault("inputs", tuple(map(of_one_size, example_inputs)))  # of the whole graph, which comes first
        joint_graph.lazy_init(CUDA)  # PyTorch traces the patterns of these passes on the CPU, as without a device
        with imagined_gpu(sm):
            return compile_graph(graph_module, example_inputs, *args, **kwargs)

    def noted(self, graph_module, example_inputs, inputs_to_check, graph_kwargs):
        facts["static"] = frozenset(graph_kwargs.get("static_input_idxs") or ())
        return lower(self, graph_module, example_inputs, inputs_to_check, graph_kwargs)

    def stop(graph):
        code, devices = graph.codegen()[0], frozenset(graph.device_types)
        facts["why_no_cuda_graph"] = graph.disable_cudagraphs_reason
        made.append(Generated(getattr(code, "value", code), device_types=devices, **facts))
        raise Written

    def folded(self):
        with FoldedOnCPU():
            return fold(self)

    settings = {"fx_graph_cache": False, "compile_threads": 1}
    settings["shape_padding"] = False  # decided by timing on the device
    torch._dynamo.reset()
    with (
        mock.patch.object(compile_fx, "compile_fx", on_the_gpu),
        mock.patch.object(compile_fx._InProcessFxCompile, "codegen_and_compile", noted),
        mock.patch.object(GraphLowering, "_compile_to_module", stop),
        mock.patch.object(joint_graph.UniformValueConstantFolder, "run", folded),
        torch._inductor.config.patch(settings),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


def of_one_size(value: Tensor | torch.SymInt | int) -> Tensor | int:
    """An input of the graph; where the code serves any size, one with the sizes that it was traced with."""
    if not isinstance(value, Tensor):
        return hint(value)
    if all(isinstance(size, int) for size in (*value.shape, *value.stride())):
        return value
    size, stride = (tuple(map(hint, each)) for each in (value.shape, value.stride()))
    with FAKE:
        return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)


def hint(size: torch.SymInt | int) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else size
