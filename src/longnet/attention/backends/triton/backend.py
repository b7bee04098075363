"""The Triton backend: flash attention on strided rows of whole nests of branches.

Keys that several branches of a nest share are visited once, with their multiplicity as a weight, and one online softmax
runs through all branches (see :mod:`longnet.geometry.nests`). Branches that do not nest are mixed into the output by
the kernel that computes them. Nothing is gathered, no branch's output is kept, statistics are float32, and there are no
atomics: two runs are bit-identical.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longnet.attention.backends.triton import bands, hopper, hopper_bands
from longnet.attention.backends.triton.all_heads import backward_among_all_heads, forward_among_all_heads
from longnet.attention.backends.triton.launches import Blocks, Settings, Sizes, plan_launches
from longnet.attention.backends.views import bias_columns, signed, sum_heads
from longnet.attention.call import AttentionInputs, Gradients, SavedForward
from longnet.geometry import Pattern
from longnet.geometry.needed_rows import needed_by_first
from longnet.geometry.nests import Nest, make_nests
from longnet.runtime.triton_internals import shared_memory
from longnet.runtime.triton_support import HAS_TRITON, interpreting, power_of_two

_log = logging.getLogger("longnet")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256

# A branch joins a finer one when it keeps at least so many rows of the finer segment: fewer would leave blocks of rows
# mostly empty. Tests lower it.
LEAST_ROWS = 64

# How many programs share the work of a branch's bias gradient, where there is work for so many.
_BIAS_PROGRAMS = 2048


def unsupported_reason(inputs: AttentionInputs) -> str | None:
    """Why this backend cannot run these inputs, or None when it can."""
    device_type, dtype, head_dim = inputs.query.device.type, inputs.query.dtype, inputs.query.shape[-1]
    if device_type != "cuda" and not (device_type == "cpu" and interpreting()):
        return f"it runs on cuda tensors (cpu ones with TRITON_INTERPRET=1), not {device_type}"
    if dtype not in DTYPES:
        return f"it takes {', '.join(map(str, DTYPES))}, not {dtype}"
    if head_dim > LARGEST_HEAD_DIM:
        return f"it takes head dimensions up to {LARGEST_HEAD_DIM}, not {head_dim}"
    if not HAS_TRITON:
        return "triton is not installed"
    if (beyond := inputs.beyond_paper) is not None:
        if inputs.bias is not None:
            return f"it has no relative bias with {beyond}"
        return bands.unsupported_reason(inputs.spec.pattern, inputs.length)
    return None


# Measured on one H200: by kernel and padded head dimension, for rows of level 1 and for the others.
# ``tests/backends/card_compile.py`` says what shared memory they take on other cards.
_BLOCKS = {
    ("forward", 64): (Blocks(64, 64, 4, 3), Blocks(128, 64, 4, 3)),
    ("forward", 128): (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
    ("query", 64): (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
    ("query", 128): (Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2)),
    ("key_value", 64): (Blocks(64, 128, 4, 2), Blocks(64, 128, 4, 3)),
    ("key_value", 128): (Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2)),
}

# In place of these where programs have 99 KiB of shared memory (compute capabilities 8.6, 8.9 and 12.0): they would not start.
_SMALLER = {("query", 128): (Blocks(64, 64, 4, 2),) * 2, ("key_value", 128): (Blocks(64, 64, 4, 2),) * 2}
# What programs have on an A100, the least on which all of ``_BLOCKS`` fit.
_ENOUGH = 163 * 1024


def blocks_for(kernel: str, dim: int, dtype: torch.dtype, shared: int = _ENOUGH) -> tuple[Blocks, Blocks]:
    """Blocks for rows of level 1, and for the others, where a program may have ``shared`` bytes of shared memory."""
    is_small = shared < _ENOUGH
    if dtype == torch.float32 and dim <= 64:
        blocks = Blocks(64, 32, 4, 1)
    elif dtype == torch.float32:
        blocks = Blocks(32, 16 if is_small and dim > 128 else 32, 4, 1)
    elif dim > 128:
        blocks = Blocks(32, 32, 4, 2) if is_small else Blocks(64, 32, 8, 2)
    else:
        return ({**_BLOCKS, **_SMALLER} if is_small else _BLOCKS)[kernel, 64 if dim <= 64 else 128]
    return blocks, blocks


def _side_by_side(x: Tensor) -> bool:
    """Whether a row's channels are neighbours in memory, as kernels take them."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _unit_stride(x: Tensor) -> Tensor:
    return x if _side_by_side(x) else x.contiguous()


def _output_buffer(x: Tensor) -> Tensor:
    """Where kernels write what becomes ``x``: itself if they can."""
    return x if _side_by_side(x) else x.new_empty(x.shape)


def _device(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _launched(inputs: AttentionInputs) -> tuple[Pattern, bool]:
    """(the pattern as launches take it, whether its branches are nests: the paper's, but for where their grid begins)."""
    on_grid = not inputs.spec.segment_offset and inputs.offsets is None
    pattern = inputs.spec.pattern.ended(inputs.length) if on_grid else inputs.spec.pattern
    return pattern, bool(pattern.branches) and pattern.branches_beyond_paper is None


def _nests(pattern: Pattern, heads: int, query: Tensor, shared: int = _ENOUGH) -> tuple[Nest, ...]:
    about = query.shape[-1], query.dtype, shared
    cuts = [blocks_for(name, *about) for name in ("forward", "query", "key_value")]
    unit = min(hopper.UNIT, *(cut.swept for both in cuts for cut in both))
    return make_nests(pattern, heads, unit, LEAST_ROWS)


class _Call:
    """What all launches of one call share."""

    def __init__(self, inputs: AttentionInputs, use_hopper: bool) -> None:
        query, key, value, padding, _, bias = inputs.tensors
        spec = inputs.spec
        # Kernels take the largest scaled score from the largest score, so a scale's sign goes into the query.
        self.q, self.scale = _unit_stride(signed(query, spec.scale)), abs(spec.scale) or 1.0
        self.k, self.v = _unit_stride(key), _unit_stride(value)
        pattern, nested = _launched(inputs)
        self.padding, self.bias = padding, bias
        self.spec = spec if pattern is spec.pattern else replace(spec, pattern=pattern)
        self.batch, self.heads, self.length, self.dim = query.shape
        self.group = inputs.group
        self.mask = self.q if padding is None else padding.view(torch.int8)
        # Statistics are float32, and a bias is part of the scores.
        self.table = self.q if bias is None else bias.to(torch.float32).contiguous()
        self.offsets = None if inputs.offsets is None else inputs.offsets.contiguous()
        self.row_offsets = self.q if self.offsets is None else self.offsets
        # None where each row of the batch has its own.
        self.segment_offset = spec.segment_offset if self.offsets is None else None
        self.shared = shared_memory(query.device)
        self.not_hopper: str | None = "the general ones were asked for"
        if use_hopper:
            self.not_hopper = hopper.unsupported_reason(self.q, padding, bias)
        self.for_hopper, self.left = self._split() if nested else ((), ())
        self.bands = () if inputs.beyond_paper is None else bands.band_launches(pattern, not nested)
        # What :meth:`for_bands` gave: tensors of queries by the id of the original, which lives as long; and keys and values.
        self._readable: dict[int, Tensor] = {}
        self._readable_keys: tuple[Tensor, ...] | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def launches(self, kernel: str) -> Iterator[tuple[tuple[int], tuple[Any, ...], int]]:
        """(grid, last arguments, warps) of every launch of the general kernels."""
        both = blocks_for(kernel, self.dim, self.q.dtype, self.shared)
        for launch in plan_launches(self.left, bool(self.for_hopper), self.length, self.segment_offset, both):
            cut = launch.blocks
            rows = (cut.swept, cut.owned) if kernel == "key_value" else (cut.owned, cut.swept)
            counts = launch.segments, launch.tiles, self.spec.segment_offset
            sizes = Sizes(self.length, self.heads, self.group, self.scale, *counts)
            settings = self.settings(*rows, cut.stages, launch.period, launch.weighted, launch.merge)
            grid = (launch.tiles * launch.segments * self.heads * self.batch,)
            yield grid, (sizes, launch.shape, settings), cut.warps

    def band_order(self, of_keys: bool) -> Iterator[tuple[bands.BandLaunch, bool]]:
        """(a launch of a band kernel, whether it is mixed into what there is) one after the other."""
        # The first launch of all is mixed in too, unless it writes every row.
        merge = bool(self.for_hopper or self.left) or not self.covers(of_keys)
        for launch in self.bands:
            for one in launch.by_band if of_keys else (launch,):
                yield one, merge
                merge = True

    def band_arguments(
        self, kernel: str, launch: bands.BandLaunch, merge: bool
    ) -> tuple[tuple[int], tuple[Any, ...], int]:
        """(grid, last arguments, warps) of a launch of a general band kernel."""
        cut, _ = blocks_for(kernel, self.dim, self.q.dtype, self.shared)
        of_keys = kernel == "key_value"
        tiles = -(-(launch.keys(self.length) if of_keys else launch.rows(self.length)) // cut.owned)
        rows = (cut.swept, cut.owned) if of_keys else (cut.owned, cut.swept)
        settings = bands.BandSettings(
            self.dim, power_of_two(self.dim), *rows, cut.stages, **launch.constants(self.spec.pattern),
            BY_ROW=self.segment_offset is None, CAUSAL=self.spec.is_causal, PADDED=self.padding is not None,
            MERGE=merge, PRECISION="ieee" if self.q.dtype == torch.float32 else "tf32",
        )  # fmt: skip
        sizes = bands.BandSizes(self.length, self.heads, self.group, self.scale, tiles, self.spec.segment_offset)
        return (tiles * self.heads * self.batch,), (sizes, settings), cut.warps

    def band_work(self, launch: bands.BandLaunch, merge: bool) -> hopper_bands.BandWork | None:
        """A launch of a Hopper band kernel, None where a general one is needed; the log says why."""
        reason = self.not_hopper or hopper_bands.unsupported_reason(launch)
        if reason is not None:
            _log.debug("triton: Hopper band kernels passed over: %s", reason)
            return None
        spec = self.spec
        return hopper_bands.BandWork(launch, spec.pattern, self.scale, spec.is_causal, self.segment_offset, merge)

    def for_bands(self, *of_queries: Tensor) -> tuple[Tensor, ...]:
        """These, keys and values as Hopper band kernels read them; what has to be copied is copied once a call."""
        queries = [x for x in of_queries if id(x) not in self._readable]
        if queries:
            self._readable |= zip(map(id, queries), hopper.readable(queries, 1), strict=True)
        if self._readable_keys is None:
            self._readable_keys = hopper.readable((self.k, self.v), hopper_bands.unit_of(self.bands))
        return *(self._readable[id(x)] for x in of_queries), *self._readable_keys

    def settings(
        self, m: int, n: int, stages: int = 1, period: int = 1, weighted: bool = False, merge: bool = False
    ) -> Settings:
        return Settings(
            self.dim, power_of_two(self.dim), m, n, stages, period, weighted,
            BLOCKED=self.spec.pattern.head_offsets == "blocked",
            OFFSET=self.segment_offset != 0, BY_ROW=self.segment_offset is None, CAUSAL=self.spec.is_causal,
            PADDED=self.padding is not None, BIASED=self.bias is not None, MERGE=merge,
            PRECISION="ieee" if self.q.dtype == torch.float32 else "tf32",
        )  # fmt: skip

    def strides(self, *tensors: Tensor) -> tuple[tuple[int, ...], ...]:
        return tuple(x.stride()[:3] for x in tensors)

    def extra_strides(self) -> tuple[tuple[int, ...], ...]:
        """Of the padding mask (B, N), and of the bias (H, 2L - 1) with its centre, the place of distance 0."""
        return self.mask.stride()[:2], (self.table.stride(0), self.table.shape[-1] // 2)

    def _split(self) -> tuple[tuple[Nest, ...], tuple[Nest, ...]]:
        """The nests for the Hopper kernels, and those left to the portable ones; the log says why."""
        nests = _nests(self.spec.pattern, self.heads, self.q, self.shared)
        if self.not_hopper is not None:
            _log.debug("triton: Hopper kernels passed over: %s", self.not_hopper)
            return (), nests
        ours, others = hopper.split_nests(nests, self.length)
        for nest, reason in others:
            _log.debug("triton: Hopper kernels passed over for %s: %s", nest.branches, reason)
        return ours, tuple(nest for nest, _ in others)

    def covers(self, of_keys: bool = False) -> bool:
        """Whether what is launched first writes every row, of queries or of keys; the rest is mixed in."""
        if nests := self.for_hopper + self.left:
            return nests[0].covers_all and not self.spec.needed_by_first
        return self.bands[0].covers(of_keys)

    @property
    def work(self) -> hopper.Work | None:
        """What the Hopper kernels compute of the call. It is launched first."""
        if not self.for_hopper:
            return None
        pattern, is_causal = self.spec.pattern, self.spec.is_causal
        some = self.spec.needed_by_first and not is_causal
        needed = needed_by_first(pattern, self.heads, self.length) if some else None
        return hopper.Work(self.for_hopper, self.scale, is_causal, pattern.head_offsets, needed, self.segment_offset)


def bias_block(rows: int, dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """(distances, warps) of a program of the bias gradient for a branch of ``rows``: registers hold a block by two blocks."""
    size = min(power_of_two(rows), 16 if dtype == torch.float32 else 64 if dim <= 128 else 32)
    return size, 8 if size == 64 else 4


def _bias_gradient(call: _Call, tensors: tuple[Tensor, ...], strides: tuple[Any, ...]) -> Tensor:
    """The gradient of the relative bias (H, 2L - 1), branch by branch, in float32."""
    from longnet.attention.backends.triton.kernels.bias import bias_kernel

    grad = torch.zeros_like(call.table)
    for branch in call.spec.pattern.branches:
        rows = branch.rows(branch.longest(call.length), 0)
        # A causal query meets no key after itself.
        keys = 1 if call.spec.is_causal else rows
        distances = rows + keys - 1
        size, warps = bias_block(rows, call.dim, call.q.dtype)
        blocks, segments = -(-distances // size), len(branch.starts(call.length))
        units = segments * call.batch
        # Long sequences of short segments have few distances: their segments are shared out among programs.
        share = -(-units // max(1, _BIAS_PROGRAMS // (blocks * call.heads)))
        shares = -(-units // share)
        parts = grad.new_empty(shares, call.heads, distances)
        bias_kernel[(blocks * call.heads * shares,)](
            *tensors, parts, *strides, call.length, call.heads, call.group, call.scale,
            branch.segment_length, branch.dilation_rate, segments, units, share, blocks, rows, distances,
            call.settings(size, size), num_warps=warps,
        )  # fmt: skip
        grad[:, bias_columns(grad, rows, keys, branch.dilation_rate)] += parts.sum(0)
    return grad


def forward(inputs: AttentionInputs, use_hopper: bool = True) -> tuple[Tensor, Tensor]:
    """out like the query, and lse (B, H, N)."""
    from longnet.attention.backends.triton.kernels.bands import band_forward_kernel
    from longnet.attention.backends.triton.kernels.forward import forward_kernel

    if inputs.spec.pattern.head_numbers is not None:
        return forward_among_all_heads(partial(forward, use_hopper=use_hopper), inputs)
    out, lse = inputs.empty_outputs()
    if out.numel() == 0:
        return out, lse.fill_(-torch.inf)
    call, buffer = _Call(inputs, use_hopper), _output_buffer(out)
    if not call.covers():
        buffer.zero_()
        lse.fill_(-torch.inf)
    with _device(out):
        if work := call.work:
            work.forward(*call.tensors(), buffer, lse, call.offsets)
        for grid, arguments, warps in call.launches("forward"):
            forward_kernel[grid](
                *call.tensors(), buffer, lse, call.mask, call.table, call.row_offsets,
                *call.strides(*call.tensors(), buffer, lse), *call.extra_strides(), *arguments, num_warps=warps,
            )  # fmt: skip
        for band, merge in call.band_order(of_keys=False):
            if by_tma := call.band_work(band, merge):
                by_tma.run("forward", call.q.shape, call.for_bands(call.q), (buffer, lse), offsets=call.offsets)
                continue
            grid, arguments, warps = call.band_arguments("forward", band, merge)
            band_forward_kernel[grid](
                *call.tensors(), buffer, lse, call.mask, call.row_offsets,
                *call.strides(*call.tensors(), buffer, lse), call.mask.stride()[:2], *arguments, num_warps=warps,
            )  # fmt: skip
    if buffer is not out:
        out.copy_(buffer)
    return out, lse


def backward(saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None, use_hopper: bool = True) -> Gradients:
    """Exact gradients of the joint softmax, by the rule of :mod:`longnet.attention.merge`."""
    from longnet.attention.backends.triton.kernels.backward import key_value_kernel, prepare_kernel, query_kernel
    from longnet.attention.backends.triton.kernels.bands import band_key_value_kernel, band_query_kernel

    inputs = saved.inputs
    if inputs.spec.pattern.head_numbers is not None:
        return backward_among_all_heads(partial(backward, use_hopper=use_hopper), saved, grad_out, grad_lse)
    grads = inputs.empty_gradients()
    if inputs.query.numel() == 0:
        return grads.zeroed()
    grad_out, out, lse = _unit_stride(grad_out), _unit_stride(saved.out), saved.lse.contiguous()
    call = _Call(inputs, use_hopper)
    # Query heads that share a key head write apart and are added up afterwards.
    by_head = grads[1:3] if call.group == 1 else (torch.empty_like(inputs.query), torch.empty_like(inputs.query))
    # Kernels that own keys multiply with whole blocks of queries, where a dead row has to be 0. Their queries lie in the buffer
    # of the query's gradient, which is written last.
    buffers = [_output_buffer(grad) for grad in (grads.query, *by_head)]
    queries, of_keys = buffers[0], buffers[1:]
    statistics = row_lse, delta = torch.empty_like(lse), torch.empty_like(lse)
    extra = lse if grad_lse is None else grad_lse
    rows = min(64, 4096 // power_of_two(call.dim))
    if not call.covers(of_keys=True):
        for buffer in of_keys:
            buffer.zero_()
    with _device(out):
        prepare_kernel[(-(-call.length // rows) * call.batch * call.heads,)](
            call.q, grad_out, out, lse, extra, queries, row_lse, delta,
            *call.strides(call.q, grad_out, out, extra, queries), call.length, call.heads,
            D=call.dim, D_BLOCK=power_of_two(call.dim), M=rows, HAS_LSE=grad_lse is not None,
        )  # fmt: skip
        others = (call.k, call.v, grad_out, row_lse)
        more = (delta, call.mask, call.table)
        if work := call.work:
            readable = work.key_value(queries, call.k, call.v, grad_out, statistics, of_keys, call.offsets)
        for grid, arguments, warps in call.launches("key_value"):
            key_value_kernel[grid](
                queries, *others, *more, call.row_offsets, *of_keys,
                *call.strides(queries, *others), *call.extra_strides(), *call.strides(*of_keys), *arguments, num_warps=warps,
            )  # fmt: skip
        for band, merge in call.band_order(of_keys=True):
            if by_tma := call.band_work(band, merge):
                read = call.for_bands(queries, grad_out)
                by_tma.run("key_value", call.q.shape, read, of_keys, statistics, call.offsets)
                continue
            grid, arguments, warps = call.band_arguments("key_value", band, merge)
            band_key_value_kernel[grid](
                queries, *others, delta, call.mask, call.row_offsets, *of_keys,
                *call.strides(queries, *others), call.mask.stride()[:2], *call.strides(*of_keys), *arguments, num_warps=warps,
            )  # fmt: skip
        if not call.covers():
            queries.zero_()
        shared = (call.q, *others, *more)
        strides = (*call.strides(call.q, *others), *call.extra_strides())
        if work:
            work.query(call.q, readable, statistics, queries, call.offsets)
        for grid, arguments, warps in call.launches("query"):
            query_kernel[grid](
                *shared, call.row_offsets, queries, *strides, *call.strides(queries), *arguments, num_warps=warps
            )
        for band, merge in call.band_order(of_keys=False):
            if by_tma := call.band_work(band, merge):
                read = call.for_bands(call.q, grad_out)
                by_tma.run("query", call.q.shape, read, (queries,), statistics, call.offsets)
                continue
            grid, arguments, warps = call.band_arguments("query", band, merge)
            band_query_kernel[grid](
                call.q, *others, delta, call.mask, call.row_offsets, queries,
                *call.strides(call.q, *others), call.mask.stride()[:2], *call.strides(queries), *arguments, num_warps=warps,
            )  # fmt: skip
        if inputs.bias is not None:
            grads.bias.copy_(_bias_gradient(call, shared, strides))
    for grad, buffer, group in zip(grads, buffers, (1, call.group, call.group), strict=False):
        if buffer is not grad:
            grad.copy_(sum_heads(buffer, group))
    return grads._replace(query=signed(grads.query, inputs.spec.scale))


class General:
    """The backend with the general kernels alone, also where those for Hopper GPUs would fit."""

    @staticmethod
    def unsupported_reason(inputs: AttentionInputs, /) -> str | None:
        return unsupported_reason(inputs)

    @staticmethod
    def forward(inputs: AttentionInputs, /) -> tuple[Tensor, Tensor]:
        return forward(inputs, use_hopper=False)

    @staticmethod
    def backward(saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None, /) -> Gradients:
        return backward(saved, grad_out, grad_lse, use_hopper=False)


class Hopper:
    """The backend with the kernels for Hopper GPUs alone: what they do not take is refused, with the reason."""

    forward, backward = staticmethod(forward), staticmethod(backward)

    @staticmethod
    def unsupported_reason(inputs: AttentionInputs, /) -> str | None:
        reason = unsupported_reason(inputs) or hopper.unsupported_reason(inputs.query, inputs.mask, inputs.bias)
        if reason is not None or inputs.query.numel() == 0:
            return reason
        pattern, nested = _launched(inputs)
        numbers = pattern.head_numbers
        heads = inputs.query.shape[1] if numbers is None else numbers.total
        pattern = replace(pattern, head_numbers=None)
        if nested:
            _, others = hopper.split_nests(_nests(pattern, heads, inputs.query), inputs.length)
            for nest, reason in others:
                return f"{reason} (branches {nest.segment_lengths} at rates {nest.dilation_rates})"
        launches = () if inputs.beyond_paper is None else bands.band_launches(pattern, not nested)
        reasons = (hopper_bands.unsupported_reason(launch) for launch in launches)
        return next((reason for reason in reasons if reason is not None), None)
