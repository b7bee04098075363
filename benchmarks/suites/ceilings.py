"""What a GPU can do today: a bf16 matrix product of random data, and a copy counted as read plus written."""

from __future__ import annotations

import torch

from benchmarks.cases import Record, draw_shape
from benchmarks.run import Run, Suite
from benchmarks.timing import Function

# Side of the matrices, bytes of the copy.
CELLS = {"cuda": ((8192, 4 * 2**30),), "cuda-quick": ((256, 2**20),)}


def measure(run: Run, cell: tuple[int, int]) -> Record:
    (side, size), device = cell, run.device.device
    one, other, *_ = draw_shape((side, side), torch.bfloat16, 0, device).all
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    functions: dict[str, Function] = {"matrix": lambda: torch.mm(one, other), "copy": lambda: target.copy_(source)}
    seconds = {name: run.time({name: function}, (20, 20))[name] for name, function in functions.items()}
    return {"matrix_side": side, "matrix_flops": 2 * side**3, "copy_bytes": 2 * size, "seconds": seconds}


SUITE = Suite("ceilings", CELLS, measure, single=True)
