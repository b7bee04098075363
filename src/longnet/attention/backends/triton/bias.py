"""The launches of the bias kernel: the gradient of a relative bias by distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longnet.attention.backends.views import bias_columns
from longnet.runtime.triton_support import power_of_two

# The most programs that compute the bias gradient of one branch.
PROGRAMS = 2048


def bias_block(rows: int, dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """(distances, warps) of a program of the bias gradient for a branch of ``rows``: registers hold a block by two blocks."""
    size = min(power_of_two(rows), 16 if dtype == torch.float32 else 64 if dim <= 128 else 32)
    return size, 8 if size == 64 else 4


def bias_gradient(call: Any) -> Tensor:
    """The gradient of the relative bias (H, 2L - 1), branch by branch, in float32.

    Args:
        call: the backend's, after its backward pass: the statistics that ``prepare_kernel`` writes are among its tensors.
    """
    from longnet.attention.backends.triton.kernels.bias import bias_kernel

    read = "q k v grad_out row_lse"
    tensors = [call.tensors[name] for name in f"{read} delta mask bias".split()]
    grad = torch.zeros_like(call.tensors["bias"])
    for branch in call.spec.pattern.branches:
        rows = branch.rows(branch.longest(call.length), 0)
        # A causal query meets no key after itself.
        keys = 1 if call.spec.is_causal else rows
        distances = rows + keys - 1
        size, warps = bias_block(rows, call.dim, call.dtype)
        blocks, segments = -(-distances // size), len(branch.starts(call.length))
        units = segments * call.batch
        # Long sequences of short segments have few distances: their segments are shared out among programs.
        share = -(-units // max(1, PROGRAMS // (blocks * call.heads)))
        shares = -(-units // share)
        parts = grad.new_empty(shares, call.heads, distances)
        bias_kernel[(blocks * call.heads * shares,)](
            *tensors, parts, *call.strides(f"{read} mask bias"), call.length, call.heads, call.group, call.scale,
            branch.segment_length, branch.dilation_rate, segments, units, share, blocks, rows, distances,
            call.settings(size, size), num_warps=warps,
        )  # fmt: skip
        grad[:, bias_columns(grad, rows, keys, branch.dilation_rate)] += parts.sum(0)
    return grad
