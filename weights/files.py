"""Plain files: JSON, the values of a config, what can be written, writing whole or not at all, and the page cache."""

import ctypes
import json
import mmap
import os
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cli import scratch
from mixers.fields import LARGEST, MAX_LAYERS, MAX_SIZE, SMALLEST

GB = 1e9
WEIGHTS = (".pth", ".bin", ".safetensors", ".gguf")  # suffixes
OF_MODELS = re.compile(  # names of files that are read because they lie in a model's folder
    r".*\.(pth|bin|safetensors|gguf|model|jinja|index\.json)|merges\.txt"
    r"|(\w*config|tokenizer|special_tokens_map|added_tokens|chat_template|vocab)\.json"
)


def size_text(size: float) -> str:
    """Bytes as a person reads them: 98.4 MB."""
    scale, unit = next((each for each in ((GB, "GB"), (1e6, "MB")) if size >= each[0]), (1e3, "kB"))
    return f"{size / scale:.1f} {unit}"


def refuse_pointer(path: str | Path) -> None:
    """Refuse what Git LFS leaves in the place of a file that it has not fetched."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(100).startswith(b"version https://git-lfs."):
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")


def damaged(path: str | Path, kind: str, reason: object) -> ValueError:
    """The error of a file that is not of the `kind` that it should be."""
    refuse_pointer(path)
    return ValueError(f"{path} is not {kind}, or is cut short or damaged: {reason}")


def read_json(path: str | Path) -> dict:
    """The object in a JSON file."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, "valid JSON", error) from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


@dataclass(frozen=True)
class Config:
    """A model's config by the keys of Hugging Face's config.json; null counts as missing.

    where: the file, for errors. names: what the file calls a key, where it is another name. read: the keys asked for.
    """

    values: dict
    where: str | Path = "config.json"
    names: dict[str, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    def get(self, key: str, default=None):
        self.read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def error(self, text: str) -> ValueError:
        return ValueError(f"{self.where}: {text}")

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        return self._positive(key, (int,), default, 1, MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number from 0 on."""
        return self._positive(key, (int,), default, 0, MAX_SIZE)

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        return float(self._positive(key, (int, float), default, SMALLEST, LARGEST))

    def list_of(self, kind: type, key: str) -> list:
        """A list of values of one kind."""
        values = self.get(key)
        if not isinstance(values, list) or not all(isinstance(each, kind) for each in values):
            raise self.error(f"{key} is {values!r}; a list of numbers is needed")
        return values

    def _positive(self, key: str, types: tuple[type, ...], default, smallest: float, limit: float):
        value, name = self.get(key, default), self.names.get(key, key)
        if type(value) not in types:
            raise self.error(f"{name} is {'missing' if value is None else repr(value)}; it must be a number")
        if not smallest <= value <= limit:
            raise self.error(f"{name} is {value!r}, which is no possible size")
        return value

    def part(self, values) -> "Config":
        """The rope settings, or part of them, as a config of the same file."""
        if not isinstance(values, dict | None):
            raise self.error(f"the rope settings are {values!r}; an object is needed")
        return Config(values or {}, self.where, self.names)


def require_writable(path: str | Path, inputs: Iterable[str | Path | None] = ()) -> None:
    """Refuse, before the work, a file at `path` that could not be written after it, or is one of the inputs.

    `-`: standard output, which can be. An input may be a model's file or folder, beside or in which others are read by
    their names, or None.
    """
    if path == "-":
        return
    path = Path(path)
    real = path.resolve()
    for each in (Path(each).resolve() for each in inputs if each is not None):
        if each == real:
            raise ValueError(f"cannot write {path}: this run reads it")
        if real.parent in (each, each.parent) and OF_MODELS.fullmatch(real.name):
            raise ValueError(f"cannot write {path}: a file of the model has that name; choose another")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: permission denied")


def require_space(path: Path, size: int) -> None:
    """Refuse a file of `size` bytes at `path` for which the disk has no room."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise ValueError(f"cannot write {path}: it needs {size_text(size)}, and {size_text(free)} are free")


def write_json(path: str | Path, value: dict) -> None:
    """Write a report, whole or not at all; `-`: to standard output, also where `sys.stdout` is another stream."""
    if path == "-":
        print(json.dumps(value, indent=2), file=sys.__stdout__, flush=True)
        return
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it if the block succeeds and removed if it does not."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # /dev/stdout is written to, not replaced
            yield Path(path)
            return
        path = Path(os.path.realpath(path))  # a link stays a link
        with scratch(path) as temporary:
            yield temporary
            os.replace(temporary, path)
    except BrokenPipeError:  # of /dev/stdout
        raise
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None


def read_torch(path: Path) -> Any:
    """What torch.save wrote: tensors and plain values only, mapped where the format allows it."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings(action="ignore"):  # the errors below say what is wrong
            return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as error:  # whose text advises to load without weights_only
        if re.search("GLOBAL|unsupported (global|class)", str(error), re.IGNORECASE):
            raise ValueError(
                f"{path} is refused: its pickle names code that would run on loading, not only tensors; "
                "get the model as safetensors"
            ) from None
        raise damaged(path, "a checkpoint", "its pickle cannot be read") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise damaged(path, "a checkpoint", reason) from None


def write_torch(path: str | Path, value: Any, size: int) -> None:
    """Write tensors and plain values of about `size` bytes as torch.save does, whole or not at all."""
    path = Path(path)
    require_writable(path)
    require_space(path, size)
    with atomic_path(path) as temporary:
        try:
            torch.save(value, temporary)
            whole = zipfile.is_zipfile(temporary)  # it has its end: torch.save overlooks a last write that fails
        except RuntimeError:  # all torch.save tells of a full disk is that some position is wrong
            whole = False
        if not whole:
            raise OSError(f"the disk is full, or takes no file of {size_text(size)}")


def drop_page_cache(paths: set[str]) -> None:
    """Give back what Linux counts as our memory though nothing needs it: freed blocks, and pages of mapped files.

    paths: files that are only read, so that a page needed again is read again.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name in paths:
            begin, end = (int(address, 16) for address in span.split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def forget(files: Iterable[Path]) -> None:
    """Give back all that the page cache holds of files, also for other processes."""
    drop_page_cache({os.path.realpath(file) for file in files})  # what is mapped would stay
    for path in files if hasattr(os, "posix_fadvise") else ():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def dropping_page_cache(readers: dict[str, Callable], files: Iterable[Path]) -> dict[str, Callable]:
    """The functions that read the tensors of a model from its files; each drops the pages read before it."""
    paths = {os.path.realpath(file) for file in files}

    def read_after_drop(read: Callable):
        drop_page_cache(paths)
        return read()

    return {name: partial(read_after_drop, read) for name, read in readers.items()}


def open_past_cache(path: Path) -> int:
    """Open a file to read past the page cache, by whole pages into memory that begins at one; else as others."""
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:  # its file system has only the page cache
        return os.open(path, os.O_RDONLY)
