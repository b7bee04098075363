"""xPos: rotary positions with a decay, finite at any length.

Source: "A Length-Extrapolatable Transformer", arXiv 2212.10554, section 3. Channel pair i of q at position p is rotated by
``p * theta_i`` and scaled by ``zeta_i ** (p / scale_base)``, of k by the inverse, so that a score carries
``zeta_i ** ((p - k) / scale_base)``. Only that difference matters, so the scales are taken relative to a centre that all
positions sharing a segment have in common: they then stay finite however far the sequence goes. Where keys are read across all
segments, by a window or in a segment without end, there is no such centre: q and k are rotated and not scaled.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from longnet.geometry import Pattern
from longnet.nn.position import fused

# (cos q, sin q, cos k, sin k)
Tables: TypeAlias = tuple[Tensor, ...]

_BASE = 10_000.0
_GAMMA = 0.4
# |log zeta| of the slowest channel, the one whose scale grows fastest.
_STEEPEST = math.log((1 + _GAMMA) / _GAMMA)
# The largest exponent a scale may reach: float32's and bfloat16's range, less that of the values themselves.
_LIMIT = 81.0
# float16's.
_HALF_LIMIT = 8.0


def float64_device(device: torch.device) -> torch.device:
    """Where float64 numbers for ``device`` are computed: there, or on the CPU if it may have no float64, as Apple's GPUs."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


class Positions(NamedTuple):
    """Where the N tokens of a call stand.

    Args:
        start: position of the first.
        whole: tokens of the sequence that they are part of.
        in_document: (N,) int64, each token's position in its document, where several are packed into one row. None for one.
        longest: tokens of the longest of these documents.
        streaming: the sequence goes on, and its end is not known.
        counter: ``start`` as a () int64 tensor, which a captured CUDA graph reads anew at every replay.
        segment_offset: on the grid of segments position ``p`` counts as ``p + segment_offset``. An int, or an int64 tensor
            that fits (B, N): (B, 1) for one offset a row, (N,) for one a token of packed documents.
    """

    start: int
    whole: int
    in_document: Tensor | None = None
    longest: int = 0
    streaming: bool = False
    counter: Tensor | None = None
    segment_offset: int | Tensor = 0


class _Window(NamedTuple):
    """Positions whose scales are relative to one ``centre``; with ``repeats`` the next window begins where segments do."""

    repeats: bool
    centre: float


class XPos:
    """Rotates and scales queries and keys for one pattern.

    Args:
        head_dim: D, even.
        pattern: tells which positions can meet in a score.
        is_causal: a bidirectional score carries the scale in both directions, so its range is half as wide.
        scale_base: tokens over which the decay falls by ``zeta``. Default ``max(512, longest segment / 128)``; for
            bidirectional attention ``max(512, longest segment / 64)``, the same up to 32,768, since growth towards the
            future must stay finite too. Segments without end do not count.

    Attributes:
        scaled: whether q and k are scaled; not where the pattern has a window or a segment without end.

    Raises:
        ValueError: an odd head_dim, or a scale_base so small that scales would overflow within a segment.
    """

    def __init__(self, head_dim: int, pattern: Pattern, is_causal: bool, scale_base: float | None = None) -> None:
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} is odd: xPos rotates pairs of channels, expected an even number")
        longest = pattern.longest_finite
        if scale_base is None:
            scale_base = max(512.0, longest / (128 if is_causal else 64))
        if not (math.isfinite(scale_base) and scale_base > 0):
            raise ValueError(f"xpos_scale_base={scale_base}: expected a positive number of tokens")
        self.head_dim, self.scale_base = head_dim, float(scale_base)
        # Exponents of a bidirectional score add up instead of cancelling.
        self._share = 1.0 if is_causal else 0.5
        reach = self._reach(_LIMIT)
        self.scaled = pattern.closed_period is not None
        if self.scaled and longest > reach:
            raise ValueError(
                f"xpos_scale_base={scale_base} is too small for a segment of {longest} tokens: its scales overflow "
                f"past {reach} tokens, expected at least {math.ceil(longest * scale_base / reach)}"
            )
        # Segments of all branches share a boundary every `period` tokens; a pattern without near common boundaries
        # has one window from position 0, as wide as the scale allows.
        self.window = pattern.period
        self._lengths = pattern.segment_lengths
        self.endless = not self.scaled or pattern.period <= reach

    def __call__(self, query: Tensor, key: Tensor, at: Positions) -> tuple[Tensor, Tensor]:
        """Query and key (B, H, N, D) rotated and scaled.

        Raises:
            ValueError: as :meth:`tables`, or a captured stream that would have to stop at some length.
        """
        dtype, device, length = query.dtype, query.device, query.shape[2]
        grid: dict[str, Any] = {"segment_offset": at.segment_offset}
        if at.in_document is not None:
            tables = self._of_documents(at.in_document, at.longest, dtype, device, at.segment_offset)
        elif at.streaming:
            if not self.endless and query.is_cuda and torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    f"segment_lengths={self._lengths} have no near common boundary, so xPos must stop this stream "
                    "before its scales overflow, which a captured step cannot: expected lengths that divide each other"
                )
            if fused.fits(query, key):
                return self._by_kernel(query, key, at, self._stream_window(length, dtype, at.start))
            tables = self.tables(length, dtype, device, at.start, streaming=True, counter=at.counter, **grid)
        else:
            if fused.fits(query, key):
                return self._by_kernel(query, key, at, self._window(at.whole, dtype))
            tables = self.tables(length, dtype, device, at.start, whole=at.whole, **grid)
        if tables[0].dim() == 3:
            # (B, N, D / 2): alike for all heads.
            tables = tuple(table.unsqueeze(1) for table in tables)
        return rotate(query, *tables[:2]), rotate(key, *tables[2:])

    def _by_kernel(self, query: Tensor, key: Tensor, at: Positions, window: _Window) -> tuple[Tensor, Tensor]:
        scales = fused.Scales(self.scale_base, window.centre, self.window if window.repeats else None)
        grid = at.segment_offset if scales.period is not None and self.scaled else 0
        offsets = None
        if isinstance(grid, Tensor):
            offsets = grid.flatten().contiguous()
        elif grid:
            offsets = query.new_full((len(query),), grid, dtype=torch.int64)
        return fused.rotate_both(
            query,
            key,
            at.start,
            base=_BASE,
            scales=scales if self.scaled else None,
            counter=at.counter,
            offsets=offsets,
        )

    def _of_documents(
        self, in_document: Tensor, longest: int, dtype: torch.dtype, device: torch.device, segment_offset: int | Tensor
    ) -> Tables:
        if isinstance(segment_offset, Tensor):
            made_on = float64_device(device)
            position = in_document.to(made_on, torch.float64)
            return self._tables(position, segment_offset.to(made_on), self._window(longest, dtype), dtype, device)
        tables = self.tables(longest, dtype, device, segment_offset=segment_offset)
        return tuple(table[in_document] for table in tables)

    def _reach(self, limit: float) -> int:
        """The widest window, in tokens, whose scales relative to its centre stay within the limit."""
        return math.floor(2 * limit * self._share * self.scale_base / _STEEPEST)

    def tables(
        self,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        start: int = 0,
        *,
        whole: int | None = None,
        streaming: bool = False,
        counter: Tensor | None = None,
        segment_offset: int | Tensor = 0,
    ) -> Tables:
        """(cos q, sin q, cos k, sin k), each (N, D / 2), for positions ``start .. start + length``.

        float32, or float64 for ``dtype`` float64. Angles are float64 before the sine: position 1e9 in float32 would
        be off by a whole turn. ``dtype`` is that of q and k. ``whole`` is the length of the sequence that these positions are
        part of, where the others have tables of their own; None ends it with them. Tables made for ``streaming`` fit those
        of any other part of the same stream: their centre does not depend on the length, which a stream does not know.
        ``counter`` is ``start`` as a () int64 tensor: what is captured in a CUDA graph reads it anew at every replay. A device
        without float64 gets tables that the CPU has made, from ``start``. With a ``segment_offset`` (B, 1), see
        :class:`Positions`, they are (B, N, D / 2).

        Raises:
            ValueError: scales that would overflow ``dtype`` at this length.
        """
        stop = start + length if whole is None else whole
        window = self._stream_window(length, dtype, start) if streaming else self._window(stop, dtype)
        target = torch.get_default_device() if device is None else torch.device(device)
        made_on = float64_device(target)
        if counter is None or made_on != target:
            position = torch.arange(start, start + length, device=made_on, dtype=torch.float64)
        else:
            position = torch.arange(length, device=made_on, dtype=torch.float64) + counter
        if isinstance(segment_offset, Tensor):
            segment_offset = segment_offset.to(made_on)
        return self._tables(position, segment_offset, window, dtype, target)

    def _tables(
        self, position: Tensor, segment_offset: int | Tensor, window: _Window, dtype: torch.dtype, target: torch.device
    ) -> Tables:
        """As :meth:`tables`, for a position of each token, where float64 numbers are made."""
        pair = torch.arange(0, self.head_dim, 2, device=position.device, dtype=torch.float64) / self.head_dim
        angle = position[:, None] * _BASE**-pair
        cos, sin = torch.cos(angle), torch.sin(angle)
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        tables: Tables
        if self.scaled:
            local = position
            if window.repeats:
                on_grid = (
                    position if isinstance(segment_offset, int) and not segment_offset else position + segment_offset
                )
                local = on_grid % self.window
            exponent = ((local - window.centre) / self.scale_base)[..., None] * torch.log(
                (pair + _GAMMA) / (1 + _GAMMA)
            )
            scale = torch.exp(exponent)
            tables = (cos * scale).to(kind), (sin * scale).to(kind), (cos / scale).to(kind), (sin / scale).to(kind)
        else:
            tables = (cos.to(kind), sin.to(kind)) * 2
        if position.device == target:
            return tables
        return tuple(torch.stack(tables).to(target))

    def _stream_window(self, length: int, dtype: torch.dtype, start: int) -> _Window:
        reach = self._reach(_HALF_LIMIT if dtype == torch.float16 else _LIMIT)
        if not self.scaled or (self.endless and self.window <= reach):
            return _Window(True, self.window / 2)
        # One window from position 0 on, as wide as the scale allows.
        if start + length > reach:
            raise ValueError(
                f"xPos scales overflow {dtype} past {reach} tokens with xpos_scale_base={self.scale_base:g}, and this "
                f"stream has come to {start + length}: expected segment lengths that divide each other, a larger "
                "xpos_scale_base, or bfloat16 or float32 inputs"
            )
        return _Window(False, reach / 2)

    def _window(self, stop: int, dtype: torch.dtype) -> _Window:
        """Of a sequence of ``stop`` tokens."""
        if not self.scaled or (self.endless and dtype != torch.float16):
            return _Window(True, self.window / 2)
        limit = _HALF_LIMIT if dtype == torch.float16 else _LIMIT
        repeats = self.endless and self.window < stop
        width = self.window if repeats else stop
        if width > self._reach(limit):
            raise ValueError(
                f"xPos scales overflow {dtype} past {self._reach(limit)} tokens with xpos_scale_base={self.scale_base:g}, "
                f"and {width} are in reach: expected xpos_scale_base of at least "
                f"{math.ceil(width * self.scale_base / self._reach(limit))}, or bfloat16 or float32 inputs, "
                "or segment lengths that divide each other"
            )
        return _Window(repeats, width / 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of x (..., N, D) by tables (N, D / 2); computed in the tables' dtype, returned in x's."""
    even, odd = x[..., ::2].to(cos.dtype), x[..., 1::2].to(cos.dtype)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
