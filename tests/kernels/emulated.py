"""The CPU operators in a program of their own, which an emulator can run; it stands for `torch.ops.gpt_faster`."""

import struct
import subprocess
from pathlib import Path

import torch

from kernels import cpu

SOURCE = Path(__file__).with_suffix(".cpp")
LINEAR, EXPERTS, ATTEND, BLOCKS, DELTA = range(5)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8)


class EmulatedOperators:
    """Operators compiled with the flags of a level into `folder`; `emulator` is a command that runs the program."""

    def __init__(self, flags, compiler, emulator, folder):
        program = folder / "operators"
        flags = ["-O1", "-std=c++20", "-static", *flags, "-I", cpu.FOLDER, "-o", program]
        subprocess.run([compiler, *flags, SOURCE, "-lgomp"], check=True)
        self.process = subprocess.Popen([*emulator, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait() == 0

    def call(self, name, arguments, results):
        """Fill the contiguous tensors of `results` with what the operator makes, and return the first."""
        self.process.stdin.write(struct.pack("2q", name, len(arguments)))
        for argument in arguments:
            self.process.stdin.write(packed(argument))
        self.process.stdin.flush()
        for result in results:
            self.process.stdout.readinto(result.view(-1).view(torch.uint8).numpy())
        return results[0]

    def linear_bf16(self, x, weight, bias):
        return self.call(LINEAR, [x, weight, None, bias], [cpu._linear_bf16_shape(x, weight, bias)])

    def linear_codes(self, x, weight, scales, bias):
        return self.call(LINEAR, [x, weight, scales, bias], [cpu._linear_codes_shape(x, weight, scales, bias)])

    def linear_two_four(self, x, weight, scales, bias):
        return self.call(LINEAR, [x, weight, scales, bias], [cpu._linear_two_four_shape(x, weight, scales, bias)])

    def linear_experts(self, x, chosen, weight, scales):
        y = cpu._linear_experts_shape(x, chosen, weight, scales)
        return self.call(EXPERTS, [x, chosen, weight, scales, None], [y])

    def attend(self, q, k, k_scales, v, v_scales, cache_rows, mask, scale, sinks=None):
        arguments = [q, k, k_scales, v, v_scales, cache_rows, mask, scale, sinks]
        return self.call(ATTEND, arguments, [torch.empty(q.shape, dtype=q.dtype)])

    def join_blocks(self, tensors, _, __, attended, eps, scale):
        return tensors, eps, scale

    def join_cache(self, tensors):
        return [tensors[i : i + 4] for i in range(0, len(tensors), 4)]

    def run_blocks(self, x, blocks, cache, cache_rows, pos, cos, sin, mask):
        tensors, eps, scale = blocks
        n = len(tensors) // len(cache)
        layers = [each for i, kv in enumerate(cache) for each in (*kv, *tensors[n * i : n * (i + 1)])]
        arguments = [x, eps, scale, cache_rows, pos, cos, sin, mask, *layers]
        results = [torch.empty(x.shape, dtype=x.dtype), *(each for kv in cache for each in kv if each is not None)]
        return self.call(BLOCKS, arguments, results)

    def delta_net(self, *arguments):
        states, inputs, stands = arguments[7:10]
        return self.call(DELTA, arguments, [cpu._delta_net_shape(*arguments), states, inputs, stands])


def packed(argument):
    """The bytes of an argument: its dtype and sizes, how many bytes follow, and these."""
    if argument is None:
        return struct.pack("3q", 0, 0, 0)
    tensor = torch.as_tensor(argument).detach().contiguous()
    dtype = DTYPES.index(tensor.dtype) if tensor.dtype in DTYPES else 0
    head = struct.pack(f"{tensor.ndim + 3}q", dtype, tensor.ndim, *tensor.shape, tensor.nbytes)
    return head + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
