"""The Hopper kernels' launches: what they take, and how they are cut.

They serve the Triton backend where they fit (:func:`unsupported_reason`), and compute what its portable kernels compute.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from longnet.attention.backends.triton.launches import NestShape, kernel_arguments
from longnet.attention.backends.triton.padding import count_padding, padding_pointers, strides_of_padding
from longnet.attention.backends.triton.schedule import Schedule, cached_limits, cached_order
from longnet.attention.backends.triton.steps import Lookup, Run, Step, Tensors
from longnet.geometry.needed_rows import NeededRows
from longnet.geometry.nests import Nest
from longnet.geometry.pattern import HeadOffsets
from longnet.runtime.launcher_internals import VIEWS
from longnet.runtime.tma import View, is_matrix, view_of
from longnet.runtime.triton_internals import Launch, Value, descriptors

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
# Others are filled up with zeros to the next of these; below, the portable kernels multiply fewer of them.
_LEAST_HEAD_DIM = 33

# Rows that a program owns: two warpgroups of 64.
_OWNED = 128

# Measured on one H200: (rows swept at a time, pipeline stages, items of a program in a launch) by kernel and head dimension.
_CUTS = {
    ("forward", 64): (128, 4, 128),
    ("forward", 128): (128, 2, 128),
    ("query", 64): (128, 3, 64),
    ("query", 128): (64, 3, 64),
    ("key_value", 64): (64, 3, 64),
    ("key_value", 128): (64, 2, 64),
}
# The registers of a thread at launch, of which the copying warp gives most to those that compute.
_REGISTERS = 168

# What ``prepare_kernel`` writes, by name.
STATISTICS = ("row_lse", "delta")

# Rows of a copy that a program writes.
_FILLED_ROWS = 64

# Rates of a nest divide it: no kernel sweeps over fewer rows at a time.
UNIT = 64

# Tokens up to which it does not matter how much has to be filled up.
_SHORT = 1024
# Rows up to which sequences shorter than a segment have the kernels of a whole one: few tiles are then without rows.
_SHARED_ROWS = 4096


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=1)
def _has_gluon() -> bool:
    return importlib.util.find_spec("triton.experimental.gluon") is not None


def unsupported_reason(query: Tensor, bias: Tensor | None) -> str | None:
    """Why these kernels cannot run on such tensors, or None when they can."""
    if not query.is_cuda or _capability(query.device)[0] != 9:
        return "they need a GPU of compute capability 9 (Hopper)"
    if not _has_gluon():
        return "this triton has no Gluon"
    if query.dtype not in DTYPES:
        return f"they take {' and '.join(map(str, DTYPES))}, not {query.dtype}"
    if not _LEAST_HEAD_DIM <= query.shape[-1] <= HEAD_DIMS[-1]:
        return f"they take head dimensions {_LEAST_HEAD_DIM} to {HEAD_DIMS[-1]}, not {query.shape[-1]}"
    if bias is not None:
        return "they take no relative bias"
    return None


@lru_cache(maxsize=1024)
def split_nests(nests: tuple[Nest, ...], length: int) -> tuple[tuple[Nest, ...], tuple[tuple[Nest, str], ...]]:
    """(nests that these kernels compute, the others and why not)."""
    ours: list[Nest] = []
    others: list[tuple[Nest, str]] = []
    for nest in nests:
        reason = _unsupported_nest(nest, length, _unit(ours))
        if reason is None:
            ours.append(nest)
        else:
            others.append((nest, reason))
    return tuple(ours), tuple(others)


def _unsupported_nest(nest: Nest, length: int, unit: int) -> str | None:
    if len(nest.branches) > VIEWS:
        return f"they take nests of up to {VIEWS} branches, not {len(nest.branches)}"
    coarsest, width = nest.dilation_rates[-1], nest.segment_lengths[0]
    if width < _OWNED // 2 * coarsest:
        return f"segments of {width} tokens at rate {coarsest} are too short for blocks of {_OWNED} rows"
    # A short sequence is done at once with or without filling: it needs no other kernels.
    if length % coarsest and math.lcm(unit, coarsest) > max(length, _SHORT) // 8:
        return f"the length {length} is no multiple of the rate {coarsest}, and filling it up would take too much"
    return None


def _unit(nests: Sequence[Nest]) -> int:
    """What the tokens of a tensor have to be a multiple of."""
    return math.lcm(*(nest.dilation_rates[-1] for nest in nests))


@lru_cache(maxsize=1024)
def _shape(nest: Nest, length: int) -> tuple[int, NestShape]:
    """(tiles of a segment, what kernels are told of the nest).

    Kernels are compiled for both. Sequences that are shorter than a segment share them, those of many rows up to four times as
    many: what is past their end are tiles without rows.
    """
    room = _SHARED_ROWS * nest.dilation_rates[0]
    while room < length:
        room *= 4
    return kernel_arguments(nest, nest.classes, min(nest.segment_lengths[0], room), _OWNED)


@dataclass(frozen=True)
class Constants:
    """What a kernel is compiled for.

    Args:
        TILES: of a segment.
        D, CHANNELS: of a tile, and those that are not padding.
        M, N: rows that a program owns, and those that it sweeps over at a time.
        STAGES: swept tiles that are on their way at once.
        MERGE: earlier nests have written their results, so these are mixed in.
        LIMITED: not all rows are swept, see :func:`longnet.geometry.needed_rows.swept_limits`.
        OFFSET: the grid does not begin at token 0.
        BY_ROW: each row of the batch has an offset of the grid.
        PADDED: there is a padding mask.
    """

    NEST: NestShape
    TILES: int
    D: int
    CHANNELS: int
    M: int
    N: int
    STAGES: int
    BLOCKED: bool
    CAUSAL: bool
    MERGE: bool
    LIMITED: bool
    OFFSET: bool
    BY_ROW: bool
    PADDED: bool

    @property
    def weighted(self) -> bool:
        """Whether keys have weights: how many branches of the nest select them."""
        return len(self.NEST.dilation_rates) > 1

    @property
    def period(self) -> int:
        """After how many rows of a range their weights repeat, at most."""
        return self.NEST.dilation_rates[-1] if self.weighted else 1

    @property
    def split_channels(self) -> bool:
        """Whether the last quarter of the channels is padding, so that products over channels can do without it."""
        return self.D // 2 < self.CHANNELS <= self.D // 4 * 3


@dataclass(frozen=True)
class Work:
    """What a call computes, apart from its tensors. ``scale`` is positive.

    Its methods give the steps of a kernel, on tensors by name. Queries and gradients of out are (B, H, N, D), keys and values
    (B, Hk, N, D). They are read through copies with zeros at the end of their channels and tokens where the kernels cannot
    read them as they are. What is written has its own shape. Of the query's rows only those that are ``needed`` need be
    right, None for all; others may not be written at all. Where each row of the batch has an offset of the grid,
    ``segment_offset`` is None and launches are given ``offsets`` (B,) int64. ``padding`` is the mask (B, N) int8, or None.
    """

    nests: tuple[Nest, ...]
    scale: float
    is_causal: bool
    head_offsets: HeadOffsets
    needed: NeededRows | None = None
    segment_offset: int | None = 0

    def forward(self, tensors: Tensors) -> Iterator[Step]:
        """From q, k and v write out like the query and lse (B, H, N) float32."""
        read = yield from self._readable(tensors, "q", "k", "v", without_padding="v")
        yield from count_padding(tensors)
        yield from self._launches("forward", tensors, read, ("out", "lse"))

    def key_value(self, tensors: Tensors) -> Generator[Step, None, tuple[str, ...]]:
        """Write grad_k and grad_v, the gradients of keys and values by query head, (B, H, N, D).

        From queries (dead rows 0), k, v, grad_out, and row_lse and delta of ``prepare_kernel``.

        Returns:
            what :meth:`query` takes.
        """
        read = yield from self._readable(tensors, "queries", "grad_out", "k", "v", without_padding="k")
        yield from self._launches("key_value", tensors, read, ("grad_k", "grad_v"), STATISTICS)
        return read

    def query(self, tensors: Tensors, read: tuple[str, ...]) -> Iterator[Step]:
        """Write the gradient of the query over the queries of :meth:`key_value`, where ``read`` comes from."""
        if read[0] == "queries":
            read = (*(yield from self._readable(tensors, "q")), *read[1:])
        yield from count_padding(tensors)
        yield from self._launches("query", tensors, read, ("queries",), STATISTICS)

    def _readable(
        self, tensors: Tensors, *names: str, without_padding: str = ""
    ) -> Generator[Step, None, tuple[str, ...]]:
        return readable(tensors, names, _unit(self.nests), without_padding)

    def _launches(
        self,
        kernel: str,
        tensors: Tensors,
        inputs: tuple[str, ...],
        written: tuple[str, ...],
        statistics: tuple[str, ...] = (),
    ) -> Iterator[Step]:
        """A launch or several for each nest, one after the other."""
        batch, heads, length, channels = tensors["q"].shape
        first, last = tensors[inputs[0]], tensors[inputs[-1]]
        # Inputs that are copies are on the device meta by now.
        key_heads, dim, dtype, device = last.shape[1], first.shape[-1], first.dtype, tensors["q"].device
        # Of the statistics one stride is enough, they are alike.
        strides = strides_of(tensors, (*statistics[:1], *written))
        views = [matrix_of(tensors[name]) for name in inputs]
        padding_at, of_padding = strides_of_padding(tensors), padding_pointers(kernel == "key_value")
        swept, stages, rounds = _CUTS[kernel, dim]
        function, owned = _kernel(kernel)
        rows = [_OWNED if number in owned else swept for number in range(len(views))]
        for number, nest in enumerate(self.nests):
            tiles, nest_shape = _shape(nest, length)
            rates = nest.dilation_rates
            schedule = Schedule(
                nest, nest_shape, length, heads * batch, _multiprocessors(device), rounds, _OWNED, swept,
                self.is_causal, kernel == "key_value", device, self.needed, heads, self.head_offsets, self.segment_offset,
            )  # fmt: skip
            templates = tuple(
                descriptors(view, dtype, dim, rates, count) for view, count in zip(views, rows, strict=True)
            )
            constants = Constants(
                nest_shape, tiles, dim, channels, _OWNED, swept, stages, self.head_offsets == "blocked", self.is_causal,
                MERGE=number > 0, LIMITED=kernel == "key_value" and self.needed is not None,
                OFFSET=self.segment_offset != 0, BY_ROW=self.segment_offset is None, PADDED=padding_at is not None,
            )  # fmt: skip
            options = {"C": constants, "num_warps": 4, "maxnreg": _REGISTERS}
            segments = nest.segments(length, self.segment_offset)
            each = schedule.per_launch
            if constants.LIMITED:
                yield Lookup("limits", partial(cached_limits, schedule))
            for start in range(0, schedule.items, each):
                items = min(each, schedule.items - start)
                rest = (
                    *map(fold_of, views), *strides, padding_at, Value(items), Value(length), heads, heads // key_heads,
                    self.scale, Value(segments), Value(self.segment_offset) if self.segment_offset else None,
                )  # fmt: skip
                launch = Launch(function, min(items, schedule.programs), templates, rest, options)
                order = f"{kernel}, order of {number} from {start}"
                part = None if items == schedule.items else slice(start, start + items)
                yield Lookup(order, partial(_order_of, schedule, part))
                limits = (order if self.needed is None else "limits",) if kernel == "key_value" else ()
                yield Run(launch, (*statistics, *written, order, *limits, "offsets", *of_padding), inputs)


def _order_of(schedule: Schedule, part: slice | None) -> Tensor:
    order = cached_order(schedule)
    return order if part is None else order[part]


def fold_of(view: View) -> tuple[int, ...]:
    """The view's numbers as a kernel takes them; those that follow from the length are values."""
    batch, head, *others = view.arguments
    return Value(batch), Value(head), *others


def strides_of(tensors: Tensors, names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Three strides of each tensor. Those of statistics (B, H, N) follow from the length, and are values."""
    strides = (tensors[name].stride()[:3] for name in names)
    of_length = (name in (*STATISTICS, "lse") for name in names)
    return tuple(
        (*map(Value, each[:2]), each[2]) if is_statistic else each
        for each, is_statistic in zip(strides, of_length, strict=True)
    )


def matrix_of(x: Tensor) -> View:
    """The view of a tensor that is readable."""
    view = view_of(x)
    assert view is not None
    return view


def _kernel(name: str) -> tuple[Any, tuple[int, ...]]:
    """(a kernel by name, which of its inputs are those whose rows its programs own)."""
    from longnet.attention.backends.triton.kernels import hopper_backward, hopper_forward

    return {
        "forward": (hopper_forward.hopper_forward_kernel, (0,)),
        "key_value": (hopper_backward.hopper_key_value_kernel, (2, 3)),
        "query": (hopper_backward.hopper_query_kernel, (0, 1)),
    }[name]


@dataclass(frozen=True)
class Copies:
    """Copies of tensors, see :func:`pad_for_tma`, under other names; ``padding`` is the name of a mask, or None."""

    names: tuple[str, ...]
    copies: tuple[str, ...]
    dim: int
    unit: int
    padding: str | None = None

    def announce(self, tensors: Tensors) -> None:
        for name, copy in zip(self.names, self.copies, strict=True):
            batch, heads, length, _ = tensors[name].shape
            shape = batch, heads, -(-length // self.unit) * self.unit, self.dim
            tensors[copy] = tensors[name].new_empty(shape, device="meta")

    def run(self, tensors: Tensors) -> None:
        padding = None if self.padding is None else tensors[self.padding]
        filled = pad_for_tma([tensors[name] for name in self.names], self.dim, self.unit, padding)
        tensors.update(zip(self.copies, filled, strict=True))


def readable(
    tensors: Tensors, names: Sequence[str], unit: int, without_padding: str = ""
) -> Generator[Step, None, tuple[str, ...]]:
    """The names under which these kernels can read tensors (B, H, N, D), after the steps: some have to be copied.

    Args:
        unit: what the tokens have to be a multiple of.
        without_padding: the name of keys or values whose padded rows have to be 0. A product with a probability of 0 would
            keep what they hold, if that is not finite.
    """
    dim = next(dim for dim in HEAD_DIMS if dim >= tensors[names[0]].shape[-1])
    found = list(names)
    groups: dict[tuple[torch.Size, str | None], list[int]] = {}
    for number, name in enumerate(names):
        padding = "padding" if name == without_padding and tensors["padding"] is not None else None
        if padding is not None or not is_matrix(tensors[name], dim, unit):
            found[number] = f"{name}, in units of {unit}" + ("" if padding is None else ", without padding")
            if found[number] not in tensors:
                groups.setdefault((tensors[name].shape, padding), []).append(number)
    for (_, padding), numbers in groups.items():
        yield Copies(tuple(names[i] for i in numbers), tuple(found[i] for i in numbers), dim, unit, padding)
    return tuple(found)


def pad_for_tma(tensors: Sequence[Tensor], dim: int, unit: int, padding: Tensor | None = None) -> tuple[Tensor, ...]:
    """Up to four tensors (B, H, N, D) of one shape, channels side by side, with zeros after N and D.

    Args:
        padding: (B, N) int8; rows of tokens where it is not 0 are zeros too.

    Returns:
        (B, H, N up to a multiple of ``unit``, dim), contiguous.
    """
    four = (*tensors, *[tensors[-1]] * (4 - len(tensors)))
    first = tensors[0]
    strides = tuple(x.stride()[:3] for x in four)
    padding_at = None if padding is None else padding.stride()
    one, shape = _filling(tuple(first.shape), len(tensors), strides, padding_at, dim, unit, first.dtype, first.device)
    room = first.new_empty(shape)
    one.run((*four, room, padding), ())
    return room.unbind()


@lru_cache(maxsize=512)
def _filling(
    shape: tuple[int, int, int, int],
    count: int,
    strides: tuple[tuple[int, ...], ...],
    padding_at: tuple[int, ...] | None,
    dim: int,
    unit: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Launch, tuple[int, ...]]:
    """(the launch that fills up ``count`` tensors, the shape of the room). Types and devices have launches of their own."""
    from longnet.attention.backends.triton.kernels.pad_for_tma import pad_for_tma_kernel

    batch, heads, length, channels = shape
    filled = -(-length // unit) * unit
    tiles = -(-filled // _FILLED_ROWS)
    programs = tiles * heads * batch
    if padding_at is not None:
        padding_at = Value(padding_at[0]), padding_at[1]
    rest = (*strides, padding_at, Value(length), Value(filled), heads, Value(tiles), Value(programs))
    options = {"CHANNELS": channels, "D": dim, "ROWS": _FILLED_ROWS}
    return Launch(pad_for_tma_kernel, programs * count, (), rest, options), (count, batch, heads, filled, dim)
