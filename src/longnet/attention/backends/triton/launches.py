"""How a pattern becomes launches of the Triton kernels: integers only, cached.

Rows that one branch selects and rows that several select are different specialisations of a kernel (only the latter weigh
keys by their multiplicity), so every nest has at most two launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from longnet.geometry.nests import Nest, RowClass
from longnet.runtime.triton_support import power_of_two


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut: rows a program owns, rows it sweeps over at a time, warps, pipeline stages.

    Args:
        registers: the most of a thread, None for the compiler's choice.
    """

    owned: int
    swept: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def copies(self) -> int:
        """How often the two statistics of swept rows are loaded, see ``key_value_kernel``: once or twice."""
        return 1 if 2 * self.swept >= 32 * self.warps else 2

    @property
    def options(self) -> dict[str, int]:
        """How a kernel is compiled."""
        return {"num_warps": self.warps} | ({} if self.registers is None else {"maxnreg": self.registers})


class NestShape(NamedTuple):
    """What kernels are told of a nest: two numbers of each branch, and five of each class of rows. A tile is a program's rows.

    Args:
        first_tiles: how many tiles of a segment come before the class.
        tiles: of one residue of the class.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    levels: tuple[int, ...]
    inner_rates: tuple[int, ...]
    steps: tuple[int, ...]
    first_tiles: tuple[int, ...]
    tiles: tuple[int, ...]


class Sizes(NamedTuple):
    """The numbers of one launch of the general kernels.

    Args:
        group: query heads of a key head.
        segments: of the nest's finest branch.
        tiles: blocks of rows in one of them.
        segment_offset: of the grid, where it is one for all rows of the batch.
    """

    length: int
    heads: int
    group: int
    scale: float
    segments: int
    tiles: int
    segment_offset: int


@dataclass(frozen=True)
class Settings:
    """What a general kernel is compiled for.

    Args:
        D, D_BLOCK: channels, and the power of two that they are loaded as.
        M, N: rows of queries and of keys at a time.
        STAGES: of the pipeline.
        PERIOD: after how many keys of a range their weights repeat, at most.
        WEIGHTED: rows that several branches select.
        OFFSET: the grid does not begin at token 0.
        BY_ROW: each row of the batch has an offset of the grid.
        MERGE: earlier launches have written these rows already, so results are mixed in.
        COPIES: of the statistics of rows, see :attr:`Blocks.copies`.
    """

    D: int
    D_BLOCK: int
    M: int
    N: int
    STAGES: int
    PERIOD: int
    WEIGHTED: bool
    BLOCKED: bool
    OFFSET: bool
    BY_ROW: bool
    CAUSAL: bool
    PADDED: bool
    BIASED: bool
    MERGE: bool
    PRECISION: str
    COPIES: int = 1


@dataclass(frozen=True)
class Launch:
    """One launch: the classes of a nest that share a specialisation.

    Args:
        merge: earlier launches have written these rows already, so results are mixed in.
        weighted: rows that several branches select.
        segments: of the finest branch.
        tiles: blocks of rows in one of them.
    """

    nest: Nest
    merge: bool
    weighted: bool
    segments: int
    tiles: int
    blocks: Blocks
    shape: NestShape

    @property
    def period(self) -> int:
        """After how many keys of a range their weights repeat, at most."""
        return self.nest.dilation_rates[-1] if len(self.nest.branches) > 1 else 1


def kernel_arguments(nest: Nest, classes: Sequence[RowClass], width: int, owned: int) -> tuple[int, NestShape]:
    """(tiles of a segment, what kernels are told) for ``classes`` of a nest, segments of ``width`` tokens, ``owned`` rows."""
    firsts, counts, tiles = [], [], 0
    for c in classes:
        firsts.append(tiles)
        counts.append(-(-width // (c.step * owned)))
        tiles += counts[-1] * c.residues
    return tiles, NestShape(
        nest.segment_lengths,
        nest.dilation_rates,
        tuple(c.level for c in classes),
        tuple(c.inner for c in classes),
        tuple(c.step for c in classes),
        tuple(firsts),
        tuple(counts),
    )


@lru_cache(maxsize=4096)
def plan_launches(
    nests: tuple[Nest, ...], merge: bool, length: int, segment_offset: int | None, blocks: Blocks
) -> tuple[Launch, ...]:
    """Launches in the order in which they are to run.

    Args:
        merge: rows have been written already, so the first nest too is mixed in.
        segment_offset: of the grid, None where each row of the batch has its own.
    """
    found = []
    for number, nest in enumerate(nests):
        width = min(nest.segment_lengths[0], length)
        for weighted in (True, False):
            classes = [c for c in nest.classes if (c.level > 1) == weighted]
            if not classes:
                continue
            most = max(-(-width // c.step) for c in classes)
            owned = min(blocks.owned, power_of_two(most))
            swept = blocks.swept
            if len(nest.branches) == 1:
                swept = min(swept, power_of_two(-(-width // nest.dilation_rates[0])))
            tiles, shape = kernel_arguments(nest, classes, width, owned)
            found.append(
                Launch(
                    nest,
                    merge or number > 0,
                    weighted,
                    nest.segments(length, segment_offset),
                    tiles,
                    replace(blocks, owned=owned, swept=swept),
                    shape,
                )
            )
    return tuple(found)
