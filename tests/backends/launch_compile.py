"""Calls of several lengths whose kernels Triton compiles for sm_90, on any machine; says how many it compiled by then.

Run by ``test_steps``. Nothing is launched: what is compiled does nothing here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from longnet import dilated_attention
from longnet.attention.backends.triton import backend


class Driver:
    """What Triton asks of a GPU's driver before it launches something."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


if __name__ == "__main__":
    launched: list[str] = []

    def launch(compiled: Any, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: launched.append(compiled.name)

    driver.set_active(Driver())
    CompiledKernel.__getitem__ = launch
    backend.interpreting = lambda: True  # type: ignore[attr-defined]
    for word in sys.argv[1:]:
        tensors = [torch.randn(2, 4, int(word), 16, dtype=torch.float16, requires_grad=True) for _ in range(3)]
        out = dilated_attention(*tensors, (64, 128), (1, 2), is_causal=True, backend="triton:general")
        out.sum().backward()
        made = len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))
        sys.stdout.write(f"{word} {made} {len(launched)}\n")
        launched.clear()
