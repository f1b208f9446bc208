"""The GGUF container: metadata and tensors of a file that may be cut short, damaged or hostile."""

import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from layers.quantized import QuantSpec, pack_nibbles
from weights.files import damaged

GGUF_SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", None, None, "<Q", "<q", "<d")))
GGUF_STRING, GGUF_ARRAY = 8, 9
KEPT = {"Q4_0": QuantSpec(4, 32), "Q4_1": QuantSpec(4, 32), "Q8_0": QuantSpec(8, 32)}  # types `read_codes` reads


class GGUFFile:
    """Header and tensors of a GGUF file, every count and length checked against the file's size before it is used.

    metadata: plain values. tensors: name -> (type, shape, offset in bytes). Format: ggml's gguf.md, versions 2 and 3.
    """

    def __init__(self, path: Path):
        import numpy as np

        self.path, self.position = path, 0
        try:
            self.data = np.memmap(path, mode="r")
            if bytes(self.data[:4]) != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            self.position = 4
            self._read_header()
        except (ValueError, struct.error, OverflowError) as error:
            raise damaged(path, "a GGUF file", error) from None

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise ValueError(f"cut short: {size} bytes wanted at {self.position} of {len(self.data)}")
        self.position += size
        return self.data[self.position - size : self.position].tobytes()

    def _scalar(self, form: str):
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _count(self, smallest: int) -> int:
        """A number of things of which each takes at least `smallest` bytes."""
        count = self._scalar("<Q")
        if count * smallest > len(self.data) - self.position:
            raise ValueError(f"a count of {count} is more than the file can hold")
        return count

    def _string(self) -> str:
        return self._take(self._count(1)).decode("utf-8", errors="replace")

    def _value(self, value_type: int):
        if value_type == GGUF_STRING:
            return self._string()
        if value_type == GGUF_ARRAY:
            return self._array(self._scalar("<I"))
        if GGUF_SCALARS.get(value_type) is None:
            raise ValueError(f"unknown metadata type {value_type}")
        return self._scalar(GGUF_SCALARS[value_type])

    def _array(self, value_type: int) -> list:
        if value_type == GGUF_STRING:
            return [self._string() for _ in range(self._count(8))]
        form = GGUF_SCALARS.get(value_type)
        if form is None:
            raise ValueError(f"unknown type {value_type} in an array")
        count = self._count(struct.calcsize(form))
        return list(struct.unpack(f"<{count}{form[1]}", self._take(count * struct.calcsize(form))))

    def _read_header(self) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        version = self._scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported (little-endian 2 and 3 are)")
        n_tensor, n_field = self._count(24), self._count(13)
        self.metadata = {}
        for _ in range(n_field):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
        self.tensors = {}
        for _ in range(n_tensor):
            name, n_dim = self._string(), self._scalar("<I")
            if not 1 <= n_dim <= 4:
                raise ValueError(f"{name} has {n_dim} dimensions")
            shape = tuple(self._scalar("<Q") for _ in range(n_dim))[::-1]
            if 0 in shape:
                raise ValueError(f"{name} has a dimension of 0")
            tensor_type, offset = self._scalar("<I"), self._scalar("<Q")
            if tensor_type not in GGMLQuantizationType._value2member_map_:
                raise ValueError(f"{name} is of the unknown type {tensor_type}")
            self.tensors[name] = (GGMLQuantizationType(tensor_type), shape, offset)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise ValueError(f"an alignment of {alignment!r}")
        self.start = -(-self.position // alignment) * alignment
        for name, (tensor_type, shape, offset) in self.tensors.items():
            block, size = GGML_QUANT_SIZES[tensor_type]
            if shape[-1] % block or self.start + offset + math.prod(shape) // block * size > len(self.data):
                raise ValueError(f"{name} {list(shape)} does not fit into the file")

    def _rows(self, name: str):
        """The bytes of a tensor as they are in the file: a numpy view [rows, bytes of a row]."""
        from gguf import GGML_QUANT_SIZES

        tensor_type, shape, offset = self.tensors[name]
        block, size = GGML_QUANT_SIZES[tensor_type]
        row_bytes, rows = shape[-1] // block * size, math.prod(shape[:-1])
        begin = self.start + offset
        return self.data[begin : begin + rows * row_bytes].reshape(rows, row_bytes)

    def read(self, name: str) -> Tensor:
        """The tensor as float32, dequantised a part at a time. Shape [rows, columns] or [n]."""
        from gguf.quants import dequantize

        tensor_type, shape, _ = self.tensors[name]
        rows = self._rows(name)
        step = max(1, (1 << 19) // shape[-1])  # 2 MiB of float32 at a time
        out = torch.empty(len(rows), shape[-1], dtype=torch.float32)
        try:
            for row in range(0, len(rows), step):
                out[row : row + step] = torch.tensor(dequantize(rows[row : row + step], tensor_type))
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: {name} is of type {tensor_type.name}, which cannot be dequantised"
            ) from None
        return out.view(shape)

    def read_codes(self, name: str, part: str) -> Tensor:
        """The weight (codes), scales or zeros of a matrix, or a stack, of a type in KEPT, as our layers have them.

        Nothing is rounded anew. Format: a block of ggml-common.h is float16 d (and m in Q4_1), then 32 codes q, int8 or
        16 bytes whose low nibbles come first. A weight is q d in Q8_0, (q - 8) d in Q4_0, q d + m in Q4_1.
        """
        tensor_type, shape, _ = self.tensors[name]
        blocks = self._rows(name).reshape(*shape[:-1], shape[-1] // 32, -1)  # [..., rows, groups, bytes]
        n_byte = 4 if tensor_type.name == "Q4_1" else 2
        if part == "weight":
            q = torch.tensor(blocks[..., n_byte:])
            if tensor_type.name == "Q8_0":
                return q.view(torch.int8).flatten(-2)
            codes = torch.cat((q & 15, q >> 4), dim=-1).to(torch.int8) - 8  # [..., rows, groups, 32], -8..7
            return pack_nibbles(codes.flatten(-2))
        d, *m = torch.tensor(blocks[..., :n_byte]).view(torch.float16).unbind(-1)  # [..., rows, groups] each
        d = d.float() if m else d  # as the zeros, which float16 does not hold
        if part == "scales":
            return d
        return m[0].float() + 8 * d if m else torch.zeros_like(d)


def is_gguf(path: str | Path) -> bool:
    """Whether the file begins as a GGUF file does."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def read_gguf_metadata(path: str | Path) -> dict:
    """The file's metadata as plain values."""
    return GGUFFile(Path(path)).metadata
