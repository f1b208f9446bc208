"""A GPU that is not there: fake CUDA tensors, and what inductor and Triton ask a device before they write its code."""

import contextlib
import functools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch._dynamo import device_interface
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton
from triton.backends.compiler import GPUTarget

CUDA = torch.device("cuda", 0)
PROCESSORS = {80: 108, 90: 132, 100: 148}  # of A100, H100 and B200
FAKE = FakeTensorMode()  # one for all models: its tensors do not mix with those of another
FAKE.cache_enabled = False  # keeping results costs more than they save: few operators come twice


@functools.cache
def allow_fake_tensors() -> None:
    """Let a CPU-only PyTorch make fake CUDA tensors."""
    if torch.backends.cuda.is_built():
        return
    from torch.utils import cpp_extension

    folder = Path(__file__).resolve().parent
    scripts = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])  # ninja
    with mock.patch.dict(os.environ, PATH=scripts):
        cpp_extension.load("gpt_faster_guard", [str(folder / "guard.cpp")], is_python_module=False)


def properties(sm: int) -> SimpleNamespace:
    """What `torch.cuda.get_device_properties` says of a GPU of this compute capability."""
    return SimpleNamespace(
        name=f"an imagined GPU, sm_{sm}",
        major=sm // 10,
        minor=sm % 10,
        total_memory=80 << 30,
        multi_processor_count=PROCESSORS[sm],
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=227 << 10 if sm >= 90 else 163 << 10,
        shared_memory_per_multiprocessor=228 << 10 if sm >= 90 else 164 << 10,
        L2_cache_size=50 << 20,
        is_multi_gpu_board=0,
        is_integrated=0,
        gcnArchName="",
    )


class Driver:
    """What Triton asks of a driver while it compiles."""

    def __init__(self, sm: int):
        self.sm = sm

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.sm, 10)

    def get_device_interface(self):
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    @staticmethod
    def is_active() -> bool:
        return True


def answers(sm: int) -> dict:
    """Functions of `torch.cuda` that have an answer without a device."""
    found = properties(sm)
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "current_stream": lambda device=None: None,
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
        "get_device_name": lambda device=None: found.name,
        "get_device_capability": lambda device=None: (found.major, found.minor),
        "get_device_properties": lambda device=None: found,
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (found.total_memory, found.total_memory),
        "memory_allocated": lambda device=None: 0,
        "get_rng_state": lambda device=None: torch.empty(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }


@contextlib.contextmanager
def imagined_gpu(sm: int) -> Iterator[None]:
    """While this lasts, inductor and Triton find one GPU of compute capability `sm`, 80, 90 or 100."""
    allow_fake_tensors()
    found, driver, interface = answers(sm), Driver(sm), device_interface.CudaInterface
    with contextlib.ExitStack() as stack:

        def answer(owner: object, name: str, value) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))

        for name, function in found.items():
            answer(torch.cuda, name, function)
            public = name.removeprefix("_") if "exchange" in name else name
            answer(interface, public, staticmethod(function))
        answer(interface, "get_raw_stream", staticmethod(lambda index: 0))
        answer(interface.Worker, "get_device_properties", staticmethod(found["get_device_properties"]))
        answer(interface.Worker, "current_device", staticmethod(lambda: 0))
        list(device_interface.get_registered_device_interfaces())  # those of PyTorch, before ours takes a place
        for name in ("cuda", "cuda:0"):
            device_interface.register_interface_for_device(name, interface)
        triton.runtime.driver.set_active(driver)
        answer(triton_helpers, "set_driver_to_gpu", lambda: triton.runtime.driver.set_active(driver))
        forget_answers()
        yield
    forget_answers()


def forget_answers() -> None:
    """Have `torch.utils._triton` ask again what the device can do."""
    for function in vars(_triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
