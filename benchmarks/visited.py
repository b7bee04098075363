"""How many score pairs the kernels compute: keys that branches of a nest share are visited once, with a weight."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from benchmarks.cases import Case
from longnet.attention.backends.triton import backend as triton_flash
from longnet.geometry import Branch, HeadOffsets, Pattern, score_pairs
from longnet.geometry.nests import Nest, make_nests


def visited_pairs(nests: Iterable[Nest], head_offsets: HeadOffsets, heads: int, length: int, is_causal: bool) -> int:
    """Exact (query, key) pairs of one sequence, summed over heads and nests, each once in a nest.

    A row that branch ``i`` of a nest selects meets that branch's keys outside the segment of branch ``i - 1``. That
    segment is a multiple of branch ``i``'s rate long, so what is left out is what a branch of this rate and the shorter
    segment would see. Pairs that a kernel computes and masks, in blocks on the diagonal and at ends, are not counted.
    """

    def pairs(segment_length: int, rate: int) -> int:
        branch = Pattern((Branch(segment_length, rate),), head_offsets)
        return score_pairs(branch, heads, length, is_causal)

    total = 0
    for nest in nests:
        total += pairs(nest.segment_lengths[0], nest.dilation_rates[0])
        for finer, branch in pairwise(nest.branches):
            total += pairs(branch.segment_length, branch.dilation_rate)
            total -= pairs(finer.segment_length, branch.dilation_rate)
    return total


def visited_share(case: Case) -> float:
    """Score pairs that the GPU kernels visit over those of the pattern."""
    pattern, sizes = case.pattern, (case.heads, case.length, case.is_causal)
    return visited_pairs(kernel_nests(case), pattern.head_offsets, *sizes) / score_pairs(pattern, *sizes)


def kernel_nests(case: Case) -> tuple[Nest, ...]:
    """The nests that the Triton backend makes of the case's pattern."""
    kernels = ("forward", "query", "key_value")
    blocks = [triton_flash.blocks_for(kernel, case.head_dim, case.torch_dtype) for kernel in kernels]
    unit = min(one.swept for one in blocks)
    return make_nests(case.pattern, case.heads, unit, triton_flash.LEAST_ROWS)
