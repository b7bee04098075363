"""Muon (Jordan et al., 2024) as ``torch.optim.Muon`` computes it, of many matrices at a time.

torch takes one matrix after the other, in about 35 small kernels. A GPU computes these faster than the host launches them, so
that a step of a small model spends much of its time there. Here matrices of one shape are multiplied as a batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from longnet.training.row_shards import RowShards, own_rows

# Numbers of a batch, at most, unless one matrix has more: larger ones keep a GPU busy by themselves, and take memory.
_BATCH = 1 << 24


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` with updates of the size of AdamW's.

    On shards torch would add up products that each process has rounded to bfloat16. Here each process multiplies some of the
    matrices, whole, as one process does.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As torch's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for matrices in _batches(group["params"]):
                self._step(group, matrices)
        return loss

    def _step(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        momentum, ahead = group["momentum"], []
        for matrix in matrices:
            assert matrix.grad is not None
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            buffer, grad = own_rows(state["momentum_buffer"]), own_rows(matrix.grad)
            ahead.append(grad.lerp(buffer.lerp_(grad, 1 - momentum), momentum))
        batch = torch.stack(ahead)
        # A CPU without instructions for bfloat16 multiplies float32 much faster.
        batch = batch.to(torch.float32 if batch.device.type == "cpu" else torch.bfloat16)
        shards = RowShards(matrices[0], len(matrices)) if isinstance(matrices[0], DTensor) else None
        batch = batch if shards is None else shards.gather(batch)
        updates = orthogonalized(batch, group["ns_coefficients"], group["ns_steps"], group["eps"])
        updates = updates if shards is None else shards.scatter(updates)
        rate = group["lr"] * 0.2 * max(matrices[0].shape) ** 0.5
        for matrix, update in zip(matrices, updates.to(matrices[0].dtype), strict=True):
            own_rows(matrix).mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def orthogonalized(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices (B, m, n) with singular values near 1, by Newton-Schulz iterations in the dtype of ``x``."""
    a, b, c = coefficients
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _batches(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Those with a gradient: of one shape, dtype and device, and no more than a batch has numbers."""
    alike: defaultdict[Any, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        if matrix.grad is not None and matrix.numel():
            alike[matrix.shape, matrix.dtype, matrix.device].append(matrix)
    for (shape, *_), some in alike.items():
        count = max(1, _BATCH // shape.numel())
        yield from (some[start : start + count] for start in range(0, len(some), count))
