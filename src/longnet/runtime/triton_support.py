"""Whether Triton is there, and what its kernels ask of sizes."""

from __future__ import annotations

import importlib.util
import os

# Looked up once: torch.compile traces what asks, and cannot trace this.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def power_of_two(rows: int, least: int = 16) -> int:
    """The smallest power of two that is at least ``rows``, and at least 16, as a matrix product needs."""
    return max(least, 1 << max(0, rows - 1).bit_length())
