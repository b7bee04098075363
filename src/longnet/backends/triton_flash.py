"""The Triton backend: flash attention on strided rows of whole nests of branches.

Keys that several branches of a nest share are visited once, with their multiplicity as a weight, and one online softmax
runs through all branches (see :mod:`longnet.geometry.nests`). Branches that do not nest are mixed into the output by
the kernel that computes them. Nothing is gathered, no branch's output is kept, statistics are float32, and there are no
atomics: two runs are bit-identical.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longnet.backends.operators import Spec, register_operators, sum_heads
from longnet.geometry import Nest, Pattern, make_nests

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256

# A branch joins a finer one when it keeps at least so many rows of the finer segment: fewer would leave blocks of rows
# mostly empty. Tests lower it.
LEAST_ROWS = 64


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut: rows a program owns, rows it sweeps over at a time, warps, pipeline stages."""

    owned: int
    swept: int
    warps: int
    stages: int


@dataclass(frozen=True)
class _Launch:
    """One launch: the classes of a nest that share a specialisation."""

    nest: Nest
    merge: bool
    weighted: bool
    segments: int
    tiles: int
    blocks: Blocks
    arguments: tuple[tuple[int, ...], ...]

    @property
    def classes(self) -> int:
        return len(self.arguments[2])


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device_type: str, dtype: torch.dtype, head_dim: int, has_bias: bool) -> str | None:
    """Why this backend cannot run such inputs, or None when it can."""
    if device_type != "cuda" and not (device_type == "cpu" and interpreting()):
        return f"it runs on cuda tensors (cpu ones with TRITON_INTERPRET=1), not {device_type}"
    if dtype not in DTYPES:
        return f"it takes {', '.join(map(str, DTYPES))}, not {dtype}"
    if head_dim > LARGEST_HEAD_DIM:
        return f"it takes head dimensions up to {LARGEST_HEAD_DIM}, not {head_dim}"
    if has_bias:
        return "it gives no gradient for a relative bias yet"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


# Measured on one H200: by kernel and padded head dimension, for rows of level 1 and for the others.
_BLOCKS = {
    ("forward", 64): (Blocks(128, 64, 4, 3), Blocks(128, 64, 4, 3)),
    ("forward", 128): (Blocks(128, 128, 8, 3), Blocks(128, 128, 8, 3)),
    ("query", 64): (Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2)),
    ("query", 128): (Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 2)),
    ("key_value", 64): (Blocks(64, 128, 4, 2), Blocks(64, 128, 4, 2)),
    ("key_value", 128): (Blocks(64, 128, 8, 2), Blocks(64, 128, 8, 2)),
}


def blocks_for(kernel: str, dim: int, dtype: torch.dtype) -> tuple[Blocks, Blocks]:
    """Blocks for rows of level 1, and for the others."""
    if dtype == torch.float32:
        blocks = Blocks(64, 32, 4, 1) if dim <= 64 else Blocks(32, 32, 4, 1)
    elif dim > 128:
        blocks = Blocks(64, 32, 8, 2)
    else:
        return _BLOCKS[kernel, 64 if dim <= 64 else 128]
    return blocks, blocks


@lru_cache(maxsize=4096)
def _launches(
    pattern: Pattern, heads: int, length: int, both_blocks: tuple[Blocks, Blocks], unit: int, least_rows: int
) -> tuple[_Launch, ...]:
    found = []
    for number, nest in enumerate(make_nests(pattern, heads, unit, least_rows)):
        width = min(nest.segment_lengths[0], length)
        for weighted in (True, False):
            classes = [c for c in nest.classes if (c.level > 1) == weighted]
            if not classes:
                continue
            blocks = both_blocks[weighted]
            most = max(-(-width // c.step) for c in classes)
            owned = min(blocks.owned, max(16, 1 << (most - 1).bit_length()))
            swept = blocks.swept
            if len(nest.branches) == 1:
                swept = min(swept, max(16, 1 << (-(-width // nest.dilation_rates[0]) - 1).bit_length()))
            counts = [-(-(-(-width // c.step)) // owned) for c in classes]
            firsts, tiles = [], 0
            for c, count in zip(classes, counts, strict=True):
                firsts.append(tiles)
                tiles += count * c.residues
            found.append(
                _Launch(
                    nest,
                    number > 0,
                    weighted,
                    -(-length // nest.segment_lengths[0]),
                    tiles,
                    Blocks(owned, swept, blocks.warps, blocks.stages),
                    (
                        nest.segment_lengths,
                        nest.dilation_rates,
                        tuple(c.level for c in classes),
                        tuple(c.inner for c in classes),
                        tuple(c.step for c in classes),
                        tuple(firsts),
                        tuple(counts),
                    ),
                )
            )
    return tuple(found)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _device(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


class _Call:
    """What all launches of one call share."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, bias: Tensor | None, spec: Spec
    ) -> None:
        # A negative scale is a negative query: kernels take the largest scaled score from the largest score.
        self.negative = spec.scale < 0
        self.q = _unit_stride(-query if self.negative else query)
        self.k, self.v = _unit_stride(key), _unit_stride(value)
        self.padding, self.bias, self.spec = padding, bias, spec
        self.batch, self.heads, self.length, self.dim = query.shape
        self.group = self.heads // key.shape[1]
        self.mask = self.q if padding is None else padding.view(torch.int8)
        self.table = self.q if bias is None else bias.contiguous()

    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v

    def launches(self, kernel: str) -> Iterator[tuple[tuple[int], tuple[Any, ...], dict[str, Any]]]:
        """(grid, shared arguments, options) of every launch."""
        blocks = {name: blocks_for(name, self.dim, self.q.dtype) for name in ("forward", "query", "key_value")}
        unit = 1 if self.bias is not None else min(b.swept for both in blocks.values() for b in both)
        for launch in _launches(self.spec.pattern, self.heads, self.length, blocks[kernel], unit, LEAST_ROWS):
            cut = launch.blocks
            owned, swept = ("N", "M") if kernel == "key_value" else ("M", "N")
            yield (
                (launch.tiles * launch.segments * self.heads * self.batch,),
                (
                    self.length, self.heads, self.group, abs(self.spec.scale), launch.segments, launch.tiles,
                    *launch.arguments,
                ),
                {
                    owned: cut.owned, swept: cut.swept, "STAGES": cut.stages, "num_warps": cut.warps,
                    "D": self.dim, "D_BLOCK": max(16, 1 << (self.dim - 1).bit_length()),
                    "BRANCHES": len(launch.nest.branches), "CLASSES": launch.classes, "WEIGHTED": launch.weighted,
                    "BLOCKED": self.spec.pattern.head_offsets == "blocked", "CAUSAL": self.spec.is_causal,
                    "PADDED": self.padding is not None, "BIASED": self.bias is not None, "MERGE": launch.merge,
                    "PRECISION": "ieee" if self.q.dtype == torch.float32 else "tf32",
                },
            )  # fmt: skip

    def strides(self, *tensors: Tensor) -> tuple[tuple[int, ...], ...]:
        return tuple(x.stride()[:3] for x in tensors)

    def extra_strides(self) -> tuple[tuple[int, ...], ...]:
        """Of the padding mask (B, N), and of the bias (H, 2L - 1) with its centre."""
        return self.mask.stride()[:2], (self.table.stride(0), self.table.shape[-1] // 2)

    def covered(self) -> bool:
        nests = make_nests(self.spec.pattern, self.heads, 1, LEAST_ROWS)
        return nests[0].covers_all


def forward(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, bias: Tensor | None, spec: Spec
) -> tuple[Tensor, Tensor]:
    """(B, H, N, D) queries and (B, Hk, N, D) keys and values to out like query and lse (B, H, N)."""
    from longnet.backends.kernels.forward import forward_kernel

    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if query.numel() == 0:
        return out, lse.fill_(-torch.inf)
    call = _Call(query, key, value, padding, bias, spec)
    if not call.covered():
        out.zero_()
        lse.fill_(-torch.inf)
    with _device(query):
        for grid, arguments, options in call.launches("forward"):
            forward_kernel[grid](
                *call.tensors(), out, lse, call.mask, call.table,
                *call.strides(*call.tensors(), out, lse), *call.extra_strides(), *arguments, **options,
            )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact gradients of the joint softmax, by the rule of :mod:`longnet.mixing`."""
    from longnet.backends.kernels.backward import delta_kernel, key_value_kernel, query_kernel

    no_bias = query.new_empty(0)
    grad_q, grad_k, grad_v = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    if query.numel() == 0:
        return grad_q, grad_k.zero_(), grad_v.zero_(), no_bias
    call = _Call(query, key, value, padding, bias, spec)
    # Query heads that share a key head write side by side and are added up afterwards.
    by_head = (grad_k, grad_v) if call.group == 1 else (torch.empty_like(query), torch.empty_like(query))
    if not call.covered():
        for grad in (grad_q, *by_head):
            grad.zero_()
    grad_out, out, lse = _unit_stride(grad_out), _unit_stride(out), lse.contiguous()
    delta = torch.empty_like(lse)
    extra = lse if grad_lse is None else grad_lse
    with _device(query):
        delta_kernel[(-(-call.length // 64) * call.batch * call.heads,)](
            grad_out, out, extra, delta, *call.strides(grad_out, out, extra), call.length, call.heads,
            D=call.dim, D_BLOCK=max(16, 1 << (call.dim - 1).bit_length()), M=64, HAS_LSE=grad_lse is not None,
        )  # fmt: skip
        shared = (*call.tensors(), grad_out, lse, delta, call.mask, call.table)
        strides = (*call.strides(*call.tensors(), grad_out, lse), *call.extra_strides())
        for grid, arguments, options in call.launches("key_value"):
            key_value_kernel[grid](*shared, *by_head, *strides, *call.strides(*by_head), *arguments, **options)
        for grid, arguments, options in call.launches("query"):
            query_kernel[grid](*shared, grad_q, *strides, *call.strides(grad_q), *arguments, **options)
    if call.group > 1:
        for grad, parts in zip((grad_k, grad_v), by_head, strict=True):
            grad.copy_(sum_heads(parts, call.group))
    return -grad_q if call.negative else grad_q, grad_k, grad_v, no_bias


run = register_operators("triton", forward, backward)
