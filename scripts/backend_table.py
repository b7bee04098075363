"""What each backend can do, as the table of docs/backends.md: ``python scripts/backend_table.py``.

Devices, types, head dimensions and the bias are asked of the backends themselves, memory is read from committed
benchmark results; ``tests/backends/test_backend_table.py`` runs what the other columns say.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from longnet.attention.backends import BACKENDS, Backend
from longnet.attention.backends.triton import hopper
from longnet.attention.call import AttentionSpec
from longnet.geometry import Pattern

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
DEVICES = ("cpu", "cuda", "mps", "xpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST = 1024
COLUMNS = (
    "backend", "devices", "dtypes", "D", "relative bias", "padding", "lse", "beyond the paper", "same bits twice",
    "memory, forward / with backward",
)  # fmt: skip
PAPER = AttentionSpec(Pattern.parse(8, 1), True, 1.0)
# See docs/patterns.md.
BEYOND = {
    "windows": replace(PAPER, pattern=Pattern.compose(window=4)),
    "strides": replace(PAPER, pattern=Pattern.compose(None, 2, dilated_queries=False)),
    "blocks": replace(PAPER, pattern=Pattern.compose(8, 2, dilation_block=2)),
    "offset grids": replace(PAPER, segment_offset=3),
}
# Held by tests for every backend, on the CPU; on GPUs by tests/gpu. The portable backend uses torch's matrix products there.
SAME = {
    "cpu_flash": "yes",
    "triton": "yes, no atomics",
    "portable": "yes on a CPU; elsewhere as torch's matrix products are",
}
MEASURED = {"cpu_flash": ("cpu-2026-11-23.json", 131_072), "triton": ("gpu-2026-11-25.json", 1_048_576)}


def devices(backend: Backend) -> str:
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}):
        found = [device for device in DEVICES if takes(backend, device)]
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        interpreted = takes(backend, "cpu") and "cpu" not in found
    said = "every one" if len(found) == len(DEVICES) else ", ".join(found)
    return said + ("; cpu in Triton's interpreter, by name" if interpreted else "")


def takes(
    backend: Backend,
    device: str,
    dtype: torch.dtype = torch.float32,
    dim: int = 64,
    bias: bool = False,
    spec: AttentionSpec = PAPER,
) -> bool:
    # Of a call, the question looks at no more; most of these devices are not there.
    query = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 1, 1, dim))
    about = {"bias": query if bias else None, "offsets": None, "beyond_paper": spec.beyond_paper, "length": 8}
    inputs: Any = SimpleNamespace(query=query, spec=spec, **about)
    return backend.kernels.unsupported_reason(inputs) is None


def row(backend: Backend) -> list[str]:
    home = next(device for device in DEVICES if takes(backend, device))
    dims = [dim for dim in range(1, LARGEST + 1) if takes(backend, home, dim=dim)]
    return [
        f"`{backend.name}`", devices(backend), names(tuple(dtype for dtype in DTYPES if takes(backend, home, dtype))),
        "any" if len(dims) == LARGEST else f"{dims[0]} to {dims[-1]}", "yes" if takes(backend, home, bias=True) else "no",
        "yes", "yes, differentiable", beyond(backend, home), SAME[backend.name], memory(backend.name),
    ]  # fmt: skip


def beyond(backend: Backend, device: str) -> str:
    taken = [name for name, spec in BEYOND.items() if takes(backend, device, spec=spec)]
    all_of_it = "all" if len(taken) == len(BEYOND) else ", ".join(taken)
    biased = all(takes(backend, device, bias=True, spec=spec) for spec in BEYOND.values())
    return all_of_it if biased or not takes(backend, device, bias=True) else f"{all_of_it}, without a bias"


def hopper_row() -> list[str]:
    """The kernels that the Triton backend prefers on Hopper GPUs, nest by nest."""
    dims = ", ".join(map(str, hopper.HEAD_DIMS))
    name, device = "`triton` on Hopper GPUs prefers", "cuda, capability 9"
    bands = "windows, strides without segments"
    return [name, device, names(hopper.DTYPES), dims, "no", "yes", "as above", bands, *["as above"] * 2]


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def memory(name: str) -> str:
    """Peak beyond q, k and v, in sizes of the output, the output and the gradient given for it counted."""
    if name not in MEASURED:
        return "linear in N; not measured"
    file, length = MEASURED[name]
    entries = json.loads((RESULTS / file).read_text(encoding="utf-8"))["memory"]
    found = []
    for kind in ("forward", "forward_backward"):
        cell = {"pass": kind, "length": length, "is_causal": True}
        entry = next(e for e in entries if cell.items() <= {**e["case"], "pass": e["pass"]}.items())
        peak = entry["peak_bytes"]
        peak = sorted(peak)[len(peak) // 2] if isinstance(peak, list) else peak
        found.append((peak + entry.get("grad_out_bytes", 0)) / entry["output_bytes"])
    return f"{found[0]:.2f} / {found[1]:.2f} outputs at N={length:,}"


def table() -> list[str]:
    """Lines of Markdown."""
    rows = []
    for backend in BACKENDS:
        rows.append(row(backend))
        if backend.name == "triton":
            rows.append(hopper_row())
    return [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]


if __name__ == "__main__":
    print(*table(), sep="\n")
