"""Calls of several lengths whose kernels Triton compiles for sm_90, on any machine; says how many it compiled by then.

Run by ``test_steps``. Nothing is launched: what is compiled does nothing here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from fake_cuda import Driver

from longnet import dilated_attention
from longnet.attention.backends.triton import backend

if __name__ == "__main__":
    fake = Driver()
    fake.activate()
    backend.interpreting = lambda: True  # type: ignore[attr-defined]
    for word in sys.argv[1:]:
        tensors = [torch.randn(2, 4, int(word), 16, dtype=torch.float16, requires_grad=True) for _ in range(3)]
        out = dilated_attention(*tensors, (64, 128), (1, 2), is_causal=True, backend="triton:general")
        out.sum().backward()
        made = len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))
        sys.stdout.write(f"{word} {made} {len(fake.launched.calls)}\n")
        fake.launched.calls.clear()
