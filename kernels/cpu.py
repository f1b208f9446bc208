"""Builds and registers the operators in `cpu/`; a machine that has no level, or cannot build them, does without.

A level is a set of instructions: one library is built for each, with the flags that stand here and no others, so that
what runs is what is named. The algorithms are the same; what differs is the file of primitives that `cpu/simd.h` takes.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import cache_folder, in_words, one_line, scratch

FOLDER = Path(__file__).with_name("cpu")
HEAD_DIMS = (64, 96, 128, 256)  # that `attend` and `join_cache` take
HEAD_UNIT = 32  # of which `attend` takes every multiple for few queries a row
TILE = 16  # outputs of a tile of codes, or of 2:4 weights


@dataclass(frozen=True)
class Level:
    """needs: what `torch.cpu.get_capabilities` must say of the processor. flags: of the compiler."""

    needs: tuple[str, ...]
    flags: tuple[str, ...]

    def with_more(self, need: str, *flags: str) -> "Level":
        return Level((*self.needs, need), (*self.flags, *flags))


AVX512 = Level(
    ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni"),
    ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
)
# a product takes all registers, so what GCC moves and sums in another order ends on the stack: half as many a cycle
IN_ORDER = ("-fno-tree-reassoc", "-fno-tree-ter", "-fno-schedule-insns")
AVX2 = Level(("avx2", "fma3", "f16c"), ("-mavx2", "-mfma", "-mf16c", *IN_ORDER))
NEON = Level(("neon", "dot"), ("-march=armv8.2-a+dotprod", *IN_ORDER))
PLAIN = "plain"  # no operators
AVX512_BF16 = AVX512.with_more("avx512_bf16", "-mavx512bf16")
MATRIX_UNIT = "-DGPT_FASTER_AMX"  # a macro, because the instructions are in PyTorch's oneDNN
LEVELS = {  # the first one that the processor has is used
    "amx": AVX512_BF16.with_more("amx_tile", MATRIX_UNIT).with_more("amx_bf16"),
    "avx512.bf16": AVX512_BF16,
    "avx512": AVX512,
    "avx2.vnni": AVX2.with_more("avx_vnni", "-mavxvnni"),
    "avx2": AVX2,
    "neon.bf16": Level((*NEON.needs, "i8mm", "bf16"), ("-march=armv8.2-a+dotprod+i8mm+bf16", *IN_ORDER)),
    "neon": NEON,
}


@functools.cache
def level() -> str | None:
    """The name of the best level that this processor has, if any; GPT_FASTER_ISA asks for one that is not the best."""
    has = torch.cpu.get_capabilities()
    found = [name for name, each in LEVELS.items() if all(has.get(need) for need in each.needs)]
    asked = os.environ.get("GPT_FASTER_ISA")
    if not asked:
        return next(iter(found), None)
    isas = dict.fromkeys([*map(isa_of, found), PLAIN])
    if asked not in isas:
        raise ValueError(f"GPT_FASTER_ISA is {asked!r}; this processor has {', '.join(isas)}")
    return next((name for name in found if isa_of(name) == asked), None)


def isa_of(name: str) -> str:
    """What GPT_FASTER_ISA calls a level."""
    return name.partition(".")[0]


@functools.cache
def compiler_version() -> str:
    """The first line that the C++ compiler says of itself. Raises RuntimeError if there is none."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"there is no C++ compiler {compiler}; install g++, or name another in CXX")
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return f"{compiler} {said.splitlines()[:1]}"


def build_flags(name: str) -> list[str]:
    unknown = IN_ORDER if "clang" in compiler_version() else ()
    return ["-O3", *(flag for flag in LEVELS[name].flags if flag not in unknown)]


def library_folder(name: str) -> Path:
    """Where the operators for a level are kept: a folder for each text of the sources, torch, platform and build.

    Machines that share a home folder find each other's libraries only where they can run them.
    """
    texts = [path.read_text() for path in sorted(FOLDER.iterdir())]
    runs_on = sys.platform, *platform.libc_ver()
    key = repr((texts, torch.__version__, runs_on, name, compiler_version(), build_flags(name)))
    return cache_folder() / "kernels" / digest(key.encode())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def find_library(folder: Path) -> Path | None:
    """The library in a folder, called by the digest of its content: one that was cut would kill the process."""
    return next(filter(is_whole, folder.glob("*.so")), None)


def is_whole(library: Path) -> bool:
    return library.stem == digest(library.read_bytes())


def build(name: str, folder: Path) -> Path:
    """Compile the operators for a level: the library. Raises what `available` catches if they cannot be."""
    from torch.utils import cpp_extension

    print("Building the CPU operators, once, one to two minutes ...", file=sys.stderr, flush=True)
    # ninja is installed beside this Python, whose folder is on the path only in an activated environment
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"{in_words(error)}; set XDG_CACHE_HOME to a folder where you can write") from None
    for library in folder.glob("*.so"):
        if not is_whole(library):
            library.unlink(missing_ok=True)
    with scratch(folder / "build") as place:
        place.mkdir()
        source, flags = str(FOLDER / "ops.cpp"), build_flags(name)
        cpp_extension.load("cpu", [source], extra_cflags=flags, build_directory=str(place), is_python_module=False)
        built = place / "cpu.so"
        library = folder / f"{digest(built.read_bytes())}.so"
        return built.replace(library)  # several processes may build; each finds a whole one


@functools.cache
def available() -> bool:
    """Load the operators, building them first if need be. False, with one line on standard error, if that fails.

    A processor that has no level is not told so: it takes PyTorch's operators.
    """
    name = level()
    if name is None:
        return False
    try:
        folder = library_folder(name)
        torch.ops.load_library(str(find_library(folder) or build(name, folder)))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        reason = one_line(next((line for line in lines if "error: " in line), lines[0]))  # what the compiler says
        print(f"PyTorch's own linear layers are used: the CPU operators cannot be built ({reason})", file=sys.stderr)
        return False
    torch.library.register_fake("gpt_faster::linear_bf16")(_linear_bf16_shape)
    torch.library.register_fake("gpt_faster::linear_codes")(_linear_codes_shape)
    torch.library.register_fake("gpt_faster::linear_two_four")(_linear_two_four_shape)
    torch.library.register_fake("gpt_faster::linear_experts")(_linear_experts_shape)
    torch.library.register_fake("gpt_faster::delta_net")(_delta_net_shape)
    torch.library.register_fake("gpt_faster::linear_sparse")(_linear_sparse_shape)
    torch.library.register_fake("gpt_faster::linear_wanted")(lambda x, *others: torch.empty_like(others[-1]))
    for operator in ("attend", "run_blocks"):
        torch.library.register_fake(f"gpt_faster::{operator}")(lambda x, *_: torch.empty_like(x))
    return True


def bf16_rows_apart() -> bool:
    """Whether the operators, which must be available, multiply rows of bfloat16 one by one, however many there are."""
    return torch.ops.gpt_faster.bf16_rows_apart()


def isa() -> str:
    """What the operators use that there are, as GPT_FASTER_ISA calls it."""
    return isa_of(level()) if available() else PLAIN


def _linear_bf16_shape(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_codes_shape(x, weight, scales, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0] * scales.shape[3])


def _linear_two_four_shape(x, weight, scales, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0] * TILE)


def _linear_sparse_shape(x, weight, scales, bias, out, threshold):
    return x.new_empty(*x.shape[:-1], out)


def _linear_experts_shape(x, chosen, weight, scales):
    return x.new_empty(*chosen.shape, weight.shape[1] * (1 if scales is None else scales.shape[4]))


def _delta_net_shape(x, gates, pos, counts, taps, rates, norm, states, *_):
    return x.new_empty(*x.shape[:2], states.shape[2] * states.shape[4])
