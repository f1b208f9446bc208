"""The memory of a process, told by the system alone: programs without torch ask too."""

import sys
from pathlib import Path


def status_of(process: int | None, name: str) -> int:
    """Bytes of main memory that Linux tells under this name. Raises OSError or StopIteration if it does not."""
    status = Path(f"/proc/{process or 'self'}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main_memory() -> int:
    """Bytes of main memory that this process holds now."""
    try:
        return status_of(None, "VmRSS")
    except (OSError, StopIteration):
        return peak_main_memory()


def peak_main_memory(process: int | None = None) -> int:
    """Bytes of main memory, at most, that a process has held; None: this one. Of another only Linux tells."""
    try:  # ru_maxrss would count the parent's peak too
        return status_of(process, "VmHWM")
    except (OSError, StopIteration):
        if process is not None:
            raise ValueError(f"the system does not tell how much memory process {process} has held") from None
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
