"""Memory in use: of torch's allocator on CUDA, of the process elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def memory_in_use(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes now, and their peak since the last call (CUDA) or since the process began; None where it is not reported."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), peak
    peak_resident = _peak_resident()
    return _resident() or peak_resident, peak_resident


def _resident() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak_resident() -> int | None:
    try:
        import resource
    except ImportError:  # Windows has none.
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
