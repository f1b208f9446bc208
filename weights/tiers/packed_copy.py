"""A copy of a model's feed-forwards in a file, in the order in which operators read them, so that one can be fetched.

The file begins with the length of a JSON object, in 8 bytes, little-endian, and the object: what the copy was made of,
and where the units of each feed-forward begin. A unit's tensors lie after each other, by name.
"""

import json
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from layers.offload import Unit
from weights.files import atomic_path, open_past_cache, require_space, require_writable

PAGE = 4096  # units begin at multiples, because the disk is read in whole pages
PIECE = 8 << 20  # bytes of one request, and of the memory that each thread reads into


def padded(size: int) -> int:
    return -(-size // PAGE) * PAGE


def state_bytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in layer.state_dict().values())


def source_facts(paths: Iterable[Path], *others: str) -> list:
    """What tells a copy of these files from one of others, or in another form."""
    stats = [(path.name, os.stat(path)) for path in paths]
    return [[[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats], *others]


class PackedCopy:
    """The file at `path` of a model with such facts, whose feed-forwards have these numbers of units of these forms."""

    def __init__(self, path: Path, facts: list, numbers: dict[str, int], forms: dict[str, nn.Module]):
        sizes = {name: state_bytes(form) for name, form in forms.items()}
        tensors = {
            name: {key: [str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in form.state_dict().items()}
            for name, form in forms.items()
        }
        head = {"holds": "feed-forwards as operators read them", "of": facts, "tensors": tensors, "numbers": numbers}
        self.path, self.header = path, json.dumps(head).encode()
        self.begins, self.strides, end = {}, {name: padded(size) for name, size in sizes.items()}, 8 + len(self.header)
        self.sizes = sizes
        for name, number in numbers.items():
            self.begins[name] = padded(end)
            end = self.begins[name] + number * self.strides[name]
        self.size = end

    def is_there(self) -> bool:
        """Whether the file is whole and was made of the same."""
        beginning = len(self.header).to_bytes(8, "little") + self.header
        try:
            with self.path.open("rb") as file:
                return os.fstat(file.fileno()).st_size == self.size and file.read(len(beginning)) == beginning
        except FileNotFoundError:
            return False

    def write(self, units: Iterable[tuple[Unit, nn.Module]]) -> None:
        """Write the file, whole or not at all, from the packed layers of every unit."""
        require_writable(self.path)
        require_space(self.path, self.size)
        with atomic_path(self.path) as temporary, temporary.open("wb") as file:
            file.write(len(self.header).to_bytes(8, "little") + self.header)
            for unit, layer in units:
                assert state_bytes(layer) == self.sizes[unit.module], unit
                file.seek(self.begins[unit.module] + unit.expert * self.strides[unit.module])
                for tensor in layer.state_dict().values():
                    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                file.flush()
                os.fdatasync(file.fileno())  # what is not on the disk yet cannot be dropped
                drop(file.fileno(), 0, 0)
            file.truncate(self.size)

    def open(self) -> None:
        """Prepare to read; what then happens to the name of the file does not matter."""
        self.file, self.own = open_past_cache(self.path), threading.local()
        if hasattr(os, "posix_fadvise"):  # of one that is cached, megabytes after each unit are read too, and kept
            os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, unit: Unit, buffers: list[memoryview]) -> None:
        """Fill the buffers with the tensors of a unit, and leave nothing of them in the page cache.

        They go by way of whole pages: the disk's own reader takes no others.
        """
        if not hasattr(self.own, "pages"):
            self.own.pages = mmap.mmap(-1, PIECE)
        at = self.begins[unit.module] + unit.expert * self.strides[unit.module]
        room = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
        while room:
            end = padded(sum(map(len, room)))
            n = os.preadv(self.file, [memoryview(self.own.pages)[: min(end, PIECE)]], at)
            if n < min(PAGE, end):
                raise ValueError(f"{self.path} was cut short while it was read; start again to make it anew")
            drop(self.file, at, n)
            n -= n % PAGE
            spread(np.frombuffer(self.own.pages, np.uint8, n), room)
            at += n


def spread(data: np.ndarray, room: list[np.ndarray]) -> None:
    """Copy bytes into the arrays in turn, and leave in the list what is not filled yet. Other threads run meanwhile."""
    while room and len(data):
        n = min(len(data), len(room[0]))
        np.copyto(room[0][:n], data[:n])
        data, room[0] = data[n:], room[0][n:]
        if not len(room[0]):
            del room[0]


def drop(file: int, begin: int, size: int) -> None:
    """Give back what the page cache holds of a file; size 0: all from there on."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, begin, size, os.POSIX_FADV_DONTNEED)
