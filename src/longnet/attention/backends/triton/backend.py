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
from longnet.attention.backends.triton.bias import bias_gradient
from longnet.attention.backends.triton.launches import Blocks, Settings, Sizes, plan_launches
from longnet.attention.backends.triton.steps import Fill, RepeatedSteps, Run, Step, Tensors
from longnet.attention.backends.views import signed, sum_heads
from longnet.attention.call import AttentionInputs, Gradients, SavedForward
from longnet.geometry import Pattern
from longnet.geometry.needed_rows import needed_by_first
from longnet.geometry.nests import Nest, make_nests
from longnet.runtime.triton_internals import Launch, Value, shared_memory
from longnet.runtime.triton_support import HAS_TRITON, interpreting, power_of_two

_log = logging.getLogger("longnet")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256

# A branch joins a finer one when it keeps at least so many rows of the finer segment: fewer would leave blocks of rows
# mostly empty. Tests lower it.
LEAST_ROWS = 64


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


# Measured on one H200, by kernel and padded head dimension. Threads of 168 registers let three programs run where there would be
# two. ``tests/backends/card_compile.py`` says what shared memory they take on other cards.
_BLOCKS = {
    ("forward", 64): Blocks(64, 64, 4, 3, registers=168),
    ("forward", 128): Blocks(64, 64, 4, 3),
    ("query", 64): Blocks(64, 64, 4, 3, registers=168),
    ("query", 128): Blocks(128, 64, 8, 3),
    ("key_value", 64): Blocks(64, 64, 4, 3),
    ("key_value", 128): Blocks(128, 64, 8, 3),
}

# In place of these where programs have 99 KiB of shared memory (compute capabilities 8.6, 8.9 and 12.0): they would not start.
_SMALLER = {("query", 128): Blocks(64, 32, 4, 3), ("key_value", 128): Blocks(64, 32, 4, 3)}
# What programs have on an A100, the least on which all of ``_BLOCKS`` fit.
_ENOUGH = 163 * 1024


def blocks_for(kernel: str, dim: int, dtype: torch.dtype, shared: int = _ENOUGH) -> Blocks:
    """How the kernel is cut where a program may have ``shared`` bytes of shared memory."""
    is_small = shared < _ENOUGH
    if dtype == torch.float32:
        return Blocks(64, 32, 4, 1) if dim <= 64 else Blocks(32, 16 if is_small and dim > 128 else 32, 4, 1)
    if dim > 128:
        return Blocks(32, 32, 4, 2) if is_small else Blocks(64, 32, 8, 2)
    return ({**_BLOCKS, **_SMALLER} if is_small else _BLOCKS)[kernel, 64 if dim <= 64 else 128]


def _side_by_side(x: Tensor) -> bool:
    """Whether a row's channels are neighbours in memory, as kernels take them."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _unit_stride(x: Tensor) -> Tensor:
    return x if _side_by_side(x) else x.contiguous()


def _output_buffer(x: Tensor) -> Tensor:
    """Where kernels write what becomes ``x``: itself if they can."""
    return x if _side_by_side(x) else x.new_empty(x.shape)


def _device(x: Tensor) -> AbstractContextManager[Any]:
    is_current = not x.is_cuda or torch.cuda.current_device() == x.device.index
    return nullcontext() if is_current else torch.cuda.device(x.device)


def _launched(inputs: AttentionInputs) -> tuple[Pattern, bool]:
    """(the pattern as launches take it, whether its branches are nests: the paper's, but for where their grid begins)."""
    on_grid = not inputs.spec.segment_offset and inputs.offsets is None
    pattern = inputs.spec.pattern.ended(inputs.length) if on_grid else inputs.spec.pattern
    return pattern, bool(pattern.branches) and pattern.branches_beyond_paper is None


def _nests(pattern: Pattern, heads: int, query: Tensor, shared: int = _ENOUGH) -> tuple[Nest, ...]:
    about = query.shape[-1], query.dtype, shared
    cuts = [blocks_for(name, *about) for name in ("forward", "query", "key_value")]
    unit = min(hopper.UNIT, *(cut.swept for cut in cuts))
    return make_nests(pattern, heads, unit, LEAST_ROWS)


class _Call:
    """What all launches of one call share, worked out when it is first made."""

    def __init__(self, inputs: AttentionInputs, tensors: Tensors, use_hopper: bool) -> None:
        spec = inputs.spec
        self.tensors, self.scale = tensors, abs(spec.scale) or 1.0
        pattern, nested = _launched(inputs)
        self.padding, self.bias = inputs.mask, inputs.bias
        self.spec = spec if pattern is spec.pattern else replace(spec, pattern=pattern)
        self.batch, self.heads, self.length, self.dim = inputs.query.shape
        self.dtype, self.group = inputs.query.dtype, inputs.group
        # None where each row of the batch has its own.
        self.segment_offset = spec.segment_offset if inputs.offsets is None else None
        self.shared = shared_memory(inputs.query.device)
        self.not_hopper: str | None = "the general ones were asked for"
        if use_hopper:
            self.not_hopper = hopper.unsupported_reason(tensors["q"], self.bias)
        self.for_hopper, self.left = self._split() if nested else ((), ())
        self.bands = () if inputs.beyond_paper is None else bands.band_launches(pattern, not nested)

    def general(self, kernel: Any, name: str, pointers: str, strided: str) -> Iterator[Step]:
        """The launches of a general kernel.

        Args:
            name: that of its blocks.
            pointers, strided: names of tensors: the kernel's first arguments, and those of which strides come next.
        """
        blocks = blocks_for(name, self.dim, self.dtype, self.shared)
        for launch in plan_launches(self.left, bool(self.for_hopper), self.length, self.segment_offset, blocks):
            cut = launch.blocks
            rows = (cut.swept, cut.owned) if name == "key_value" else (cut.owned, cut.swept)
            counts = map(Value, (launch.segments, launch.tiles, self.spec.segment_offset))
            sizes = Sizes(Value(self.length), self.heads, self.group, self.scale, *counts)
            shape = launch.shape
            shape = shape._replace(
                # Of a single range, as of level 1, the compiler would know that there is no loop, and ptxas then waits for
                # each product of matrices before the next (C7510).
                levels=tuple(map(Value, shape.levels)),
                first_tiles=tuple(map(Value, shape.first_tiles)),
                tiles=tuple(map(Value, shape.tiles)),
            )
            settings = self.settings(*rows, cut.stages, launch.period, launch.weighted, launch.merge, cut.copies)
            programs = launch.tiles * launch.segments * self.heads * self.batch
            rest = (*self.strides(strided), sizes, shape)
            yield self._run(kernel, programs, pointers, rest, {"C": settings, **cut.options})

    def band_order(self, of_keys: bool) -> Iterator[tuple[bands.BandLaunch, bool]]:
        """(a launch of a band kernel, whether it is mixed into what there is) one after the other."""
        # The first launch of all is mixed in too, unless it writes every row.
        merge = bool(self.for_hopper or self.left) or not self.covers(of_keys)
        for launch in self.bands:
            for one in launch.by_band if of_keys else (launch,):
                yield one, merge
                merge = True

    def band_steps(
        self, kernel: Any, name: str, pointers: str, strided: str, by_tma: tuple[str, str, str]
    ) -> Iterator[Step]:
        """The launches of a band kernel, general or Hopper. Arguments as of :meth:`general`.

        Args:
            by_tma: names for a Hopper kernel: its inputs but for keys and values, what it writes, the statistics that it reads.
        """
        of_keys = name == "key_value"
        for launch, merge in self.band_order(of_keys):
            work = self._band_work(launch, merge)
            if work is None:
                yield self._general_band(kernel, name, pointers, strided, launch, merge)
                continue
            queries, written, statistics = (names.split() for names in by_tma)
            read = yield from hopper.readable(self.tensors, queries, 1)
            unit, zeroed = hopper_bands.unit_of(self.bands), "v" if name == "forward" else "k"
            keys = yield from hopper.readable(self.tensors, ("k", "v"), unit, zeroed)
            yield from work.steps(name, self.tensors, (*read, *keys), tuple(written), tuple(statistics))

    def _general_band(
        self, kernel: Any, name: str, pointers: str, strided: str, launch: bands.BandLaunch, merge: bool
    ) -> Run:
        cut = blocks_for(name, self.dim, self.dtype, self.shared)
        of_keys = name == "key_value"
        tiles = -(-(launch.keys(self.length) if of_keys else launch.rows(self.length)) // cut.owned)
        rows = (cut.swept, cut.owned) if of_keys else (cut.owned, cut.swept)
        settings = bands.BandSettings(
            self.dim, power_of_two(self.dim), *rows, cut.stages, **launch.constants(self.spec.pattern),
            BY_ROW=self.segment_offset is None, CAUSAL=self.spec.is_causal, PADDED=self.padding is not None,
            MERGE=merge, PRECISION="ieee" if self.dtype == torch.float32 else "tf32",
        )  # fmt: skip
        counts = map(Value, (tiles, self.spec.segment_offset))
        sizes = bands.BandSizes(Value(self.length), self.heads, self.group, self.scale, *counts)
        rest = (*self.strides(strided), sizes)
        return self._run(kernel, tiles * self.heads * self.batch, pointers, rest, {"C": settings, **cut.options})

    def _band_work(self, launch: bands.BandLaunch, merge: bool) -> hopper_bands.BandWork | None:
        """A launch of a Hopper band kernel, None where a general one is needed; the log says why."""
        reason = self.not_hopper or hopper_bands.unsupported_reason(launch)
        if reason is not None:
            _log.debug("triton: Hopper band kernels passed over: %s", reason)
            return None
        spec = self.spec
        return hopper_bands.BandWork(launch, spec.pattern, self.scale, spec.is_causal, self.segment_offset, merge)

    def prepare(self, kernel: Any, has_lse: bool) -> Run:
        """What the kernels of the backward pass read besides the call's own tensors."""
        rows = min(64, 4096 // power_of_two(self.dim))
        programs = -(-self.length // rows) * self.batch * self.heads
        constants = {"D": self.dim, "D_BLOCK": power_of_two(self.dim), "M": rows, "HAS_LSE": has_lse}
        rest = (*self.strides("q grad_out out grad_lse queries"), Value(self.length), self.heads)
        return self._run(kernel, programs, "q grad_out out lse grad_lse queries row_lse delta", rest, constants)

    def _run(self, kernel: Any, programs: int, pointers: str, rest: tuple[Any, ...], options: dict[str, Any]) -> Run:
        return Run(Launch(kernel, programs, (), rest, options), tuple(pointers.split()))

    def settings(
        self,
        m: int,
        n: int,
        stages: int = 1,
        period: int = 1,
        weighted: bool = False,
        merge: bool = False,
        copies: int = 1,
    ) -> Settings:
        return Settings(
            self.dim, power_of_two(self.dim), m, n, stages, period, weighted,
            BLOCKED=self.spec.pattern.head_offsets == "blocked",
            OFFSET=self.segment_offset != 0, BY_ROW=self.segment_offset is None, CAUSAL=self.spec.is_causal,
            PADDED=self.padding is not None, BIASED=self.bias is not None, MERGE=merge,
            PRECISION="ieee" if self.dtype == torch.float32 else "tf32", COPIES=copies,
        )  # fmt: skip

    def strides(self, names: str) -> Iterator[tuple[int, ...]]:
        """Of tensors by name: three of each, two of the mask (B, N); of the bias (H, 2L - 1) one, and the place of distance 0.

        Those that follow from the length are values. Tensors that there are not have strides that no kernel reads.
        """
        for name in names.split():
            x = self.tensors[name]
            if name == "bias":
                yield Value(x.stride(0)), Value(x.shape[-1] // 2)
            elif name == "mask":
                yield Value(x.stride(0)), x.stride(1) if self.padding is not None else 1
            elif x.dim() == 3:
                yield Value(x.stride(0)), Value(x.stride(1)), x.stride(2)
            else:
                yield x.stride()[:3]

    def _split(self) -> tuple[tuple[Nest, ...], tuple[Nest, ...]]:
        """The nests for the Hopper kernels, and those left to the portable ones; the log says why."""
        nests = _nests(self.spec.pattern, self.heads, self.tensors["q"], self.shared)
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


def _forward_steps(call: _Call) -> Iterator[Step]:
    """From q, k and v write out and lse."""
    from longnet.attention.backends.triton.kernels.bands import band_forward_kernel
    from longnet.attention.backends.triton.kernels.forward import forward_kernel

    if not call.covers():
        yield Fill("out")
        yield Fill("lse", -torch.inf)
    if work := call.work:
        yield from work.forward(call.tensors)
    pointers, strided = "q k v out lse mask {} row_offsets", "q k v out lse mask"
    yield from call.general(forward_kernel, "forward", pointers.format("bias"), f"{strided} bias")
    by_tma = "q", "out lse", ""
    yield from call.band_steps(band_forward_kernel, "forward", pointers.format(""), strided, by_tma)


def _backward_steps(call: _Call, has_lse: bool) -> Iterator[Step]:
    """From q, k, v, out, lse, grad_out and grad_lse write row_lse, delta, queries (the query's gradient), grad_k and grad_v."""
    from longnet.attention.backends.triton.kernels.backward import key_value_kernel, prepare_kernel, query_kernel
    from longnet.attention.backends.triton.kernels.bands import band_key_value_kernel, band_query_kernel

    if not call.covers(of_keys=True):
        yield Fill("grad_k")
        yield Fill("grad_v")
    yield call.prepare(prepare_kernel, has_lse)
    # ``queries`` are those whose dead rows are 0: kernels that own keys multiply with whole blocks of them.
    if work := call.work:
        read = yield from work.key_value(call.tensors)
    pointers = "{} k v grad_out row_lse delta mask {} row_offsets {}"
    strided = "{} k v grad_out row_lse mask {} {}"
    of_keys = "grad_k grad_v"
    yield from call.general(
        key_value_kernel,
        "key_value",
        pointers.format("queries", "bias", of_keys),
        strided.format("queries", "bias", of_keys),
    )
    yield from call.band_steps(
        band_key_value_kernel, "key_value", pointers.format("queries", "", of_keys), strided.format("queries", "", of_keys),
        ("queries grad_out", of_keys, "row_lse delta"),
    )  # fmt: skip
    if not call.covers():
        yield Fill("queries")
    if work:
        yield from work.query(call.tensors, read)
    yield from call.general(
        query_kernel, "query", pointers.format("q", "bias", "queries"), strided.format("q", "bias", "queries")
    )
    yield from call.band_steps(
        band_query_kernel, "query", pointers.format("q", "", "queries"), strided.format("q", "", "queries"),
        ("q grad_out", "queries", "row_lse delta"),
    )  # fmt: skip


# The steps of earlier calls. Tests that change how kernels are cut clear it.
STEPS = RepeatedSteps(1024)


def _tensors(inputs: AttentionInputs) -> Tensors:
    """The call's tensors by name, as kernels take them. For a mask, bias or offsets that are not given general
    kernels get the query, and Hopper kernels None."""
    query, key, value, padding, offsets, bias = inputs.tensors
    # Kernels take the largest scaled score from the largest score, so a scale's sign goes into the query.
    q = _unit_stride(signed(query, inputs.spec.scale))
    found = {"q": q, "k": _unit_stride(key), "v": _unit_stride(value), "offsets": None, "padding": None}
    found["mask"], found["padding_counts"] = q, None
    if padding is not None:
        found["mask"] = found["padding"] = padding.view(torch.int8)
    # Statistics are float32, and a bias is part of the scores.
    found["bias"] = q if bias is None else bias.to(torch.float32).contiguous()
    found["row_offsets"] = q
    if offsets is not None:
        found["offsets"] = found["row_offsets"] = offsets.contiguous()
    return found


def _form(x: Tensor) -> tuple[Any, ...]:
    """What steps depend on, of a tensor on a known device."""
    return x.shape, x.stride(), x.dtype, x.data_ptr() % 16


def _key(inputs: AttentionInputs, use_hopper: bool, tensors: Tensors, others: tuple[str, ...]) -> tuple[Any, ...]:
    """What the steps of a call depend on."""
    q = tensors["q"]
    given = [name for name in ("mask", "bias") if tensors[name] is not q]
    forms = [_form(tensors[name]) for name in ("q", "k", "v", *given, *others)]
    has_offsets = inputs.offsets is not None
    return inputs.spec, use_hopper, q.device, has_offsets, *given, *forms


def forward(inputs: AttentionInputs, use_hopper: bool = True) -> tuple[Tensor, Tensor]:
    """out like the query, and lse (B, H, N)."""
    if inputs.spec.pattern.head_numbers is not None:
        return forward_among_all_heads(partial(forward, use_hopper=use_hopper), inputs)
    out, lse = inputs.empty_outputs()
    if out.numel() == 0:
        return out, lse.fill_(-torch.inf)
    buffer = _output_buffer(out)
    tensors = _tensors(inputs) | {"out": buffer, "lse": lse}
    with _device(out):
        key = _key(inputs, use_hopper, tensors, ("out",))
        is_trained = any(x.requires_grad for x in (inputs.query, inputs.key, inputs.value))
        STEPS.run(
            key, tensors, lambda: _forward_steps(_Call(inputs, tensors, use_hopper)),
            partial(_likely_backward, inputs, tensors, use_hopper) if is_trained else None,
        )  # fmt: skip
    if buffer is not out:
        out.copy_(buffer)
    return out, lse


def _likely_backward(inputs: AttentionInputs, tensors: Tensors, use_hopper: bool) -> tuple[Iterator[Step], Tensors]:
    """The steps of the backward pass of a loss that does not read lse, and tensors of which some have no memory."""
    on_meta = partial(torch.empty_like, device="meta")
    query, lse = tensors["q"], tensors["lse"]
    likely = tensors | {"grad_lse": lse}
    likely |= {name: on_meta(query) for name in ("queries", "grad_k", "grad_v", "grad_out")}
    likely |= {name: on_meta(lse) for name in ("row_lse", "delta")}
    return _backward_steps(_Call(inputs, likely, use_hopper), False), likely


def backward(saved: SavedForward, grad_out: Tensor, grad_lse: Tensor | None, use_hopper: bool = True) -> Gradients:
    """Exact gradients of the joint softmax, by the rule of :mod:`longnet.attention.merge`."""
    inputs = saved.inputs
    if inputs.spec.pattern.head_numbers is not None:
        return backward_among_all_heads(partial(backward, use_hopper=use_hopper), saved, grad_out, grad_lse)
    grads = inputs.empty_gradients()
    if inputs.query.numel() == 0:
        return grads.zeroed()
    group, lse = inputs.group, saved.lse.contiguous()
    # Query heads that share a key head write apart and are added up afterwards.
    by_head = grads[1:3] if group == 1 else (torch.empty_like(inputs.query), torch.empty_like(inputs.query))
    # Kernels read queries from the buffer of the query's gradient, which is written last.
    buffers = [_output_buffer(grad) for grad in (grads.query, *by_head)]
    tensors = _tensors(inputs) | dict(zip(("queries", "grad_k", "grad_v"), buffers, strict=True))
    tensors |= {"grad_out": _unit_stride(grad_out), "out": _unit_stride(saved.out), "lse": lse}
    tensors |= {"grad_lse": lse if grad_lse is None else grad_lse, "row_lse": torch.empty_like(lse)}
    tensors["delta"] = torch.empty_like(lse)
    with _device(lse):
        others = ("grad_out", "out", "grad_lse", "queries", "grad_k", "grad_v")
        has_lse = grad_lse is not None
        key = (has_lse, *_key(inputs, use_hopper, tensors, others))
        STEPS.run(key, tensors, lambda: _backward_steps(_Call(inputs, tensors, use_hopper), has_lse))
        if inputs.bias is not None:
            grads.bias.copy_(bias_gradient(_Call(inputs, tensors, use_hopper)))
    for grad, buffer, heads in zip(grads, buffers, (1, group, group), strict=False):
        if buffer is not grad:
            grad.copy_(sum_heads(buffer, heads))
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
        reason = unsupported_reason(inputs) or hopper.unsupported_reason(inputs.query, inputs.bias)
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
