"""Machine code read back by the tools in Triton's wheels for x86."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def disassembled(cubin: bytes) -> tuple[str, str]:
    """What one kernel uses, as registers and stack, and its instructions. FileNotFoundError where a tool is missing."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return output("cuobjdump", "--dump-resource-usage", file.name), output("nvdisasm", "-c", file.name)


def hands_over(ptx: str) -> bool:
    """Whether all threads of a program have written before one of them counts, and read only after it has."""
    before, after = re.split(r"atom\.global\.gpu\.acq_rel\.add", ptx)  # one counter
    has_written = before.rindex("bar.sync") > before.rindex("st.global")
    return has_written and after.index("bar.sync") < after.index("ld.global.cg")


def output(tool: str, *args: str) -> str:
    return subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout
