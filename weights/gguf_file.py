"""The GGUF container: metadata and tensors of a file that may be cut short, damaged or hostile."""

import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weights.files import damaged

GGUF_SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", None, None, "<Q", "<q", "<d")))
GGUF_STRING, GGUF_ARRAY = 8, 9
OF_PARTS = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # the name of a file that is a part of a model


class GGUFTensor(NamedTuple):
    """A tensor of a file, whose bytes are read when they are used."""

    where: str  # file and name, for messages
    kind: Any  # a GGMLQuantizationType
    shape: tuple[int, ...]
    rows: Any  # a numpy view of the file: uint8 [rows, bytes of a row]

    def read(self) -> Tensor:
        """The tensor as float32, dequantised a part at a time. Shape [rows, columns] or [n]."""
        from gguf.quants import dequantize

        step = max(1, (1 << 19) // self.shape[-1])  # 2 MiB of float32 at a time
        out = torch.empty(len(self.rows), self.shape[-1], dtype=torch.float32)
        try:
            for row in range(0, len(self.rows), step):
                out[row : row + step] = torch.tensor(dequantize(self.rows[row : row + step], self.kind))
        except NotImplementedError:
            raise ValueError(f"{self.where} is of type {self.kind.name}, which cannot be dequantised") from None
        return out.view(self.shape)


class GGUFFile:
    """Header and tensors of a GGUF file, every count and length checked against the file's size before it is used.

    metadata: plain values. tensors: by name. Format: ggml's gguf.md, versions 2 and 3.
    """

    def __init__(self, path: Path):
        import numpy as np

        self.path, self.paths, self.position = path, (path,), 0
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
        from gguf import GGMLQuantizationType

        version = self._scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported (little-endian 2 and 3 are)")
        n_tensor, n_field = self._count(24), self._count(13)
        self.metadata = {}
        for _ in range(n_field):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
        places = {}
        for _ in range(n_tensor):
            name, n_dim = self._string(), self._scalar("<I")
            if not 1 <= n_dim <= 4:
                raise ValueError(f"{name} has {n_dim} dimensions")
            shape = tuple(self._scalar("<Q") for _ in range(n_dim))[::-1]
            if 0 in shape:
                raise ValueError(f"{name} has a dimension of 0")
            kind, offset = self._scalar("<I"), self._scalar("<Q")
            if kind not in GGMLQuantizationType._value2member_map_:
                raise ValueError(f"{name} is of the unknown type {kind}")
            places[name] = GGMLQuantizationType(kind), shape, offset
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise ValueError(f"an alignment of {alignment!r}")
        self.start = -(-self.position // alignment) * alignment
        self.tensors = {name: self._tensor(name, *place) for name, place in places.items()}

    def _tensor(self, name: str, kind, shape: tuple[int, ...], offset: int) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[kind]
        row_bytes, rows = shape[-1] // block * size, math.prod(shape[:-1])
        begin = self.start + offset
        if shape[-1] % block or begin + rows * row_bytes > len(self.data):
            raise ValueError(f"{name} {list(shape)} does not fit into the file")
        data = self.data[begin : begin + rows * row_bytes]
        return GGUFTensor(f"{self.path}: {name}", kind, shape, data.reshape(rows, row_bytes))


def open_parts(path: Path) -> GGUFFile:
    """A GGUF file; of a model in several, of which `path` is any, the first, with the tensors of all."""
    file = GGUFFile(path)
    count = file.metadata.get("split.count")
    if count in (None, 0, 1):
        return file
    paths = part_paths(path)
    if count != len(paths):
        raise ValueError(f"{path} is a part of {count!r}, which its name must tell, as NAME-00001-of-00003.gguf does")
    for i, each in enumerate(paths):
        if not each.is_file():
            raise ValueError(f"{path.parent} lacks {each.name}, part {i + 1} of {count} of the model; download it too")
    parts = [GGUFFile(each) for each in paths]
    first = parts[0]
    for i, part in enumerate(parts):
        said = [part.metadata.get(f"split.{key}") for key in ("no", "count")]
        if said != [i, count]:
            raise ValueError(f"{part.path}: split.no and split.count are {said}; {[i, count]} are needed in this file")
        if i and (twice := first.tensors.keys() & part.tensors.keys()):
            raise ValueError(f"{part.path} holds {min(twice)}, as another part does")
        first.tensors |= part.tensors
    first.paths = tuple(paths)
    return first


def part_paths(path: Path) -> list[Path]:
    """All files of the model of which `path`, by its name, is a part; itself, where it is none."""
    match = OF_PARTS.fullmatch(path.name)
    if match is None:
        return [path]
    name, _, count = match.groups()
    return [path.with_name(f"{name}-{i:05}-of-{count}.gguf") for i in range(1, int(count) + 1)]


def files_of_models(names: Iterable[str]) -> list[list[str]]:
    """The names that are those of GGUF files, those of the parts of one model together and in order."""
    models = {}
    for name in sorted(name for name in names if name.endswith(".gguf")):
        models.setdefault(OF_PARTS.sub(r"\1 \3", name), []).append(name)
    return list(models.values())


def gguf_models(folder: Path) -> list[Path]:
    """The GGUF files of a folder; of those that are parts of one model, the first that is there."""
    return [folder / files[0] for files in files_of_models(path.name for path in folder.iterdir())]


def is_gguf(path: str | Path) -> bool:
    """Whether the file begins as a GGUF file does."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def read_gguf_metadata(path: str | Path) -> dict:
    """The metadata of a file, or of the model of which it is a part, as plain values."""
    return open_parts(Path(path)).metadata
