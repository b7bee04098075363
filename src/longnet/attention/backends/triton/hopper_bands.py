"""The launches of the band kernels for Hopper GPUs: what they take, and how they are cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longnet.attention.backends.triton import hopper
from longnet.attention.backends.triton.bands import BandLaunch
from longnet.attention.backends.triton.padding import count_padding, padding_pointers, strides_of_padding
from longnet.attention.backends.triton.steps import Run, Step, Tensors
from longnet.geometry import Branch, Pattern
from longnet.geometry.rows import UNBOUNDED
from longnet.runtime.launcher_internals import VIEWS
from longnet.runtime.triton_internals import Launch, Value, descriptors

# Rows that a program owns: two warpgroups of 64.
_OWNED = 128
# (rows swept at a time, pipeline stages, items whose own rows are in shared memory, tiles whose products run into one
# another) by kernel and head dimension. The query kernel has one item at a time: with two, ptxas (of CUDA 13.0) computes
# where an item's rows lie inside of its first loop alone, and reads the register after that loop was skipped too.
_CUTS = {
    ("forward", 64): (128, 4, 2, 1),
    ("forward", 128): (128, 2, 1, 1),
    ("query", 64): (128, 3, 1, 1),
    ("query", 128): (64, 3, 1, 1),
    ("key_value", 64): (64, 4, 2, 2),
    ("key_value", 128): (64, 3, 1, 2),
}
# Copies of a part of a tile: the pattern of swizzled shared memory repeats after 8 rows.
_BLOCKS = (8, 16, 32, 64)


@dataclass(frozen=True)
class BandConstants:
    """What a kernel is compiled for: see ``bands.BandSettings`` and ``hopper.Constants``.

    Args:
        OWNED: items whose own rows are in shared memory at a time.
        TOGETHER: tiles whose products run into one another, where keys are owned.
        LONGEST_FIRST: items of all heads in turn, as some take longer than others; else those of one head are neighbours.
        LAST_FIRST: the last rows of a head come first.
        BY_ROW: each row of the batch has an offset of the grid.
        PADDED: there is a padding mask.
    """

    D: int
    CHANNELS: int
    M: int
    N: int
    STAGES: int
    OWNED: int
    TOGETHER: int
    LENGTHS: tuple[int, ...]
    RATES: tuple[int, ...]
    BLOCKS: tuple[int, ...]
    WINDOWS: tuple[int, ...]
    HEAD_OFFSETS: int
    GROUP: int
    CAUSAL: bool
    MERGE: bool
    LONGEST_FIRST: bool
    LAST_FIRST: bool
    BY_ROW: bool
    PADDED: bool

    @property
    def split_channels(self) -> bool:
        """Whether the last quarter of the channels is padding, so that products over channels can do without it."""
        return self.D // 2 < self.CHANNELS <= self.D // 4 * 3


def unsupported_reason(launch: BandLaunch) -> str | None:
    """Why these kernels cannot run a launch, or None when they can. Of tensors ``hopper.unsupported_reason`` says it."""
    if launch.branch is not None:
        return "they take bands of all queries"
    if len(launch.bands) > VIEWS:
        return f"they take {VIEWS} bands, not {len(launch.bands)}"
    for band in launch.bands:
        if isinstance(band, int):
            continue
        if band.segment_length != UNBOUNDED:
            return "they take windows and segments without end"
        if band.block > 1 and band.block not in _BLOCKS:
            return f"they take blocks of {_BLOCKS} keys, not {band.block}"
    return None


def unit_of(launches: Sequence[BandLaunch]) -> int:
    """What the tokens of keys and values have to be a multiple of, so that every band has a view of them."""
    supported = (launch for launch in launches if unsupported_reason(launch) is None)
    return math.lcm(*(_rate(band) for launch in supported for band in launch.bands))


def _rate(band: Branch | int) -> int:
    """The step of a copy's rows: blocks are copied by themselves."""
    return 1 if isinstance(band, int) or band.block > 1 else int(band.dilation_rate)


def rows_of_copy(band: Branch | int, rows: int) -> int:
    """Rows of one copy of a tile of ``rows`` keys."""
    return rows if isinstance(band, int) or band.block == 1 else min(band.block, rows)


def constants_of(
    launch: BandLaunch,
    pattern: Pattern,
    kernel: str,
    dim: int,
    channels: int,
    *,
    is_causal: bool,
    merge: bool,
    by_row: bool,
    padded: bool,
) -> BandConstants:
    """What a kernel of a launch is compiled for."""
    swept, stages, owned, together = _CUTS[kernel, dim]
    unequal = is_causal and not all(isinstance(band, int) for band in launch.bands)
    of_bands = {name: value for name, value in launch.constants(pattern).items() if name not in ("BANDS", "ROWS_OF")}
    return BandConstants(
        dim, channels, _OWNED, swept, stages, owned, together, **of_bands, CAUSAL=is_causal, MERGE=merge,
        LONGEST_FIRST=unequal, LAST_FIRST=unequal and kernel != "key_value", BY_ROW=by_row, PADDED=padded,
    )  # fmt: skip


@dataclass(frozen=True)
class BandWork:
    """What a launch computes, apart from its tensors. ``scale`` is positive.

    ``segment_offset`` is that of the grid, None where each row of the batch has its own.
    """

    launch: BandLaunch
    pattern: Pattern
    scale: float
    is_causal: bool
    segment_offset: int | None
    merge: bool

    def steps(
        self,
        kernel: str,
        tensors: Tensors,
        inputs: tuple[str, ...],
        written: tuple[str, ...],
        statistics: tuple[str, ...] = (),
    ) -> Iterator[Step]:
        """One of its kernels.

        Args:
            kernel: ``"forward"``, ``"key_value"`` or ``"query"``.
            tensors: by name; q is the query, (B, H, N, D), and offsets are those of the grid, (B,) int64, where each row of the
                batch has its own; padding is the mask (B, N) int8, or None.
            inputs: the query, in the backward pass the gradient of out, key (B, Hk, N, D) and value, as ``hopper.readable`` names
                them, with :func:`unit_of` for keys and values. ``"key_value"`` needs dead rows of the query to be 0.
            written: out and lse (B, H, N); the gradients of keys and values by query head; the gradient of the query.
            statistics: lse and delta of ``prepare_kernel``, in the backward pass.
        """
        from longnet.attention.backends.triton.kernels import hopper_bands as kernels

        batch, heads, length, channels = tensors["q"].shape
        first, last = tensors[inputs[0]], tensors[inputs[-1]]
        # Inputs that are copies are on the device meta by now.
        key_heads, dim, dtype, device = last.shape[1], first.shape[-1], first.dtype, tensors["q"].device
        # Of the statistics one stride is enough, they are alike.
        strides = hopper.strides_of(tensors, (*statistics[:1], *written))
        views = [hopper.matrix_of(tensors[name]) for name in inputs]
        of_keys, launch, swept = kernel == "key_value", self.launch, _CUTS[kernel, dim][0]
        count = launch.keys(length) if of_keys else length
        # A block that begins before the first token moves all numbers by less than a block.
        tiles = -(-(count + (launch.block if of_keys else 0)) // _OWNED)
        items = tiles * heads * batch
        constants = constants_of(
            launch, self.pattern, kernel, dim, channels,
            is_causal=self.is_causal, merge=self.merge, by_row=self.segment_offset is None,
            padded=tensors["padding"] is not None,
        )  # fmt: skip
        key_rows = _OWNED if of_keys else swept
        templates = []
        for number, view in enumerate(views):
            if number < len(views) - 2:
                templates.append(descriptors(view, dtype, dim, (1,), swept if of_keys else _OWNED))
                continue
            of_bands = [
                descriptors(view, dtype, dim, (_rate(band),), rows_of_copy(band, key_rows))[0] for band in launch.bands
            ]
            templates.append((*of_bands, *[None] * (VIEWS - len(of_bands))))
        rest = (
            *map(hopper.fold_of, views), *strides, strides_of_padding(tensors), Value(items), Value(length), heads,
            heads // key_heads, Value(tiles), Value(self.segment_offset or 0), self.scale,
        )  # fmt: skip
        function = getattr(kernels, f"hopper_band_{kernel}_kernel")
        options = {"C": constants, "num_warps": 4, "maxnreg": hopper._REGISTERS}
        one = Launch(function, min(items, hopper._multiprocessors(device)), tuple(templates), rest, options)
        yield from count_padding(tensors)
        yield Run(one, (*statistics, *written, "offsets", *padding_pointers(of_keys)), inputs)
