"""The memory of a process, told by the system alone: programs without torch ask too."""

import sys
from pathlib import Path


def peak_main_memory() -> int:
    """Bytes of main memory, at most, that this process has held."""
    try:  # ru_maxrss would count the parent's peak too
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
