"""xPos: rotary positions with a decay, finite at any length.

Source: "A Length-Extrapolatable Transformer", arXiv 2212.10554, section 3. Channel pair i of q at position p is rotated by
``p * theta_i`` and scaled by ``zeta_i ** (p / scale_base)``, of k by the inverse, so that a score carries
``zeta_i ** ((p - k) / scale_base)``. Only that difference matters, so the scales are taken relative to a centre that all
positions sharing a segment have in common: they then stay finite however far the sequence goes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from longnet.geometry import Pattern

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
    """

    start: int
    whole: int
    in_document: Tensor | None = None
    longest: int = 0
    streaming: bool = False
    counter: Tensor | None = None


class XPos:
    """Rotates and scales queries and keys for one pattern.

    Args:
        head_dim: D, even.
        pattern: tells which positions can meet in a score.
        is_causal: a bidirectional score carries the scale in both directions, so its range is half as wide.
        scale_base: tokens over which the decay falls by ``zeta``. Default ``max(512, longest segment / 128)``; for
            bidirectional attention ``max(512, longest segment / 64)``, the same up to 32,768, since growth towards the
            future must stay finite too.

    Raises:
        ValueError: an odd head_dim, or a scale_base so small that scales would overflow within a segment.
    """

    def __init__(self, head_dim: int, pattern: Pattern, is_causal: bool, scale_base: float | None = None) -> None:
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} is odd: xPos rotates pairs of channels, expected an even number")
        longest = max(pattern.segment_lengths)
        if scale_base is None:
            scale_base = max(512.0, longest / (128 if is_causal else 64))
        if not (math.isfinite(scale_base) and scale_base > 0):
            raise ValueError(f"xpos_scale_base={scale_base}: expected a positive number of tokens")
        self.head_dim, self.scale_base = head_dim, float(scale_base)
        # Exponents of a bidirectional score add up instead of cancelling.
        self._share = 1.0 if is_causal else 0.5
        reach = self._reach(_LIMIT)
        if longest > reach:
            raise ValueError(
                f"xpos_scale_base={scale_base} is too small for a segment of {longest} tokens: its scales overflow "
                f"past {reach} tokens, expected at least {math.ceil(longest * scale_base / reach)}"
            )
        # Segments of all branches share a boundary every `period` tokens; a pattern without near common boundaries
        # has one window from position 0, as wide as the scale allows.
        self.window = pattern.period
        self._lengths = pattern.segment_lengths
        self.endless = pattern.period <= reach

    def __call__(self, query: Tensor, key: Tensor, at: Positions) -> tuple[Tensor, Tensor]:
        """Query and key (B, H, N, D) rotated and scaled.

        Raises:
            ValueError: as :meth:`tables`, or a captured stream that would have to stop at some length.
        """
        dtype, device = query.dtype, query.device
        if at.in_document is not None:
            tables = tuple(table[at.in_document] for table in self.tables(at.longest, dtype, device))
        elif at.streaming:
            if not self.endless and query.is_cuda and torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    f"segment_lengths={self._lengths} have no near common boundary, so xPos must stop this stream "
                    "before its scales overflow, which a captured step cannot: expected lengths that divide each other"
                )
            tables = self.tables(query.shape[2], dtype, device, at.start, streaming=True, counter=at.counter)
        else:
            tables = self.tables(query.shape[2], dtype, device, at.start, whole=at.whole)
        return rotate(query, *tables[:2]), rotate(key, *tables[2:])

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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(cos q, sin q, cos k, sin k), each (N, D / 2), for positions ``start .. start + length``.

        float32, or float64 for ``dtype`` float64. Angles are float64 before the sine: position 1e9 in float32 would
        be off by a whole turn. ``dtype`` is that of q and k. ``whole`` is the length of the sequence that these positions are
        part of, where the others have tables of their own; None ends it with them. Tables made for ``streaming`` fit those
        of any other part of the same stream: their centre does not depend on the length, which a stream does not know.
        ``counter`` is ``start`` as a () int64 tensor: what is captured in a CUDA graph reads it anew at every replay. A device
        without float64 gets tables that the CPU has made, from ``start``.

        Raises:
            ValueError: scales that would overflow ``dtype`` at this length.
        """
        stop = start + length if whole is None else whole
        centre = self._stream_centre(length, dtype, start) if streaming else self._centre(stop, dtype)
        target = torch.get_default_device() if device is None else torch.device(device)
        made_on = float64_device(target)
        if counter is None or made_on != target:
            position = torch.arange(start, start + length, device=made_on, dtype=torch.float64)
        else:
            position = torch.arange(length, device=made_on, dtype=torch.float64) + counter
        pair = torch.arange(0, self.head_dim, 2, device=made_on, dtype=torch.float64) / self.head_dim
        angle = position[:, None] * _BASE**-pair
        local = (position % self.window if self.endless else position) - centre
        exponent = (local / self.scale_base)[:, None] * torch.log((pair + _GAMMA) / (1 + _GAMMA))
        scale, cos, sin = torch.exp(exponent), torch.cos(angle), torch.sin(angle)
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        tables = (cos * scale).to(kind), (sin * scale).to(kind), (cos / scale).to(kind), (sin / scale).to(kind)
        if made_on == target:
            return tables
        cos_q, sin_q, cos_k, sin_k = torch.stack(tables).to(target)
        return cos_q, sin_q, cos_k, sin_k

    def _stream_centre(self, length: int, dtype: torch.dtype, start: int) -> float:
        reach = self._reach(_HALF_LIMIT if dtype == torch.float16 else _LIMIT)
        if self.endless and self.window <= reach:
            return self.window / 2
        # One window from position 0 on, as wide as the scale allows.
        stop = min(self.window, start + length) if self.endless else start + length
        if stop > reach:
            raise ValueError(
                f"xPos scales overflow {dtype} past {reach} tokens with xpos_scale_base={self.scale_base:g}, and this "
                f"stream has come to {start + length}: expected segment lengths that divide each other, a larger "
                "xpos_scale_base, or bfloat16 or float32 inputs"
            )
        return reach / 2

    def _centre(self, stop: int, dtype: torch.dtype) -> float:
        if self.endless and dtype != torch.float16:
            return self.window / 2
        limit = _HALF_LIMIT if dtype == torch.float16 else _LIMIT
        width = min(self.window, stop) if self.endless else stop
        if width > self._reach(limit):
            raise ValueError(
                f"xPos scales overflow {dtype} past {self._reach(limit)} tokens with xpos_scale_base={self.scale_base:g}, "
                f"and {width} are in reach: expected xpos_scale_base of at least "
                f"{math.ceil(width * self.scale_base / self._reach(limit))}, or bfloat16 or float32 inputs, "
                "or segment lengths that divide each other"
            )
        return width / 2


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of x (..., N, D) by tables (N, D / 2); computed in the tables' dtype, returned in x's."""
    even, odd = x[..., ::2].to(cos.dtype), x[..., 1::2].to(cos.dtype)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
