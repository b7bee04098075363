"""What a pattern costs: keys per query, score pairs, FLOPs and bytes, exact and in closed form.

Source: LongNet, arXiv 2307.02486, section 2.5 (the sum over branches of ``w / r`` keys). Integers and fractions only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import accumulate, pairwise

from longnet.checks import check_int, check_ints
from longnet.geometry.pattern import Pattern
from longnet.geometry.rows import Branch

_DIGIT_STEPS = 1 << 20
_SCAN_STEPS = 1 << 22


@dataclass(frozen=True)
class KeysPerQuery:
    """Keys that one query attends to, over all (head, position). A key that two branches share counts twice."""

    min: int
    mean: Fraction
    max: int


@dataclass(frozen=True)
class Work:
    """What one attention call computes and moves. FLOPs are multiplications plus additions; bytes are bytes."""

    pairs: int
    forward_flops: int
    backward_flops: int
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class Cost:
    """The work of a pattern beside that of dense attention on the same tensors."""

    dilated: Work
    dense: Work

    @property
    def ratio(self) -> Fraction:
        """FLOPs of the pattern over FLOPs of dense attention: the same fraction forward and backward."""
        return Fraction(self.dilated.pairs, self.dense.pairs)


def score_pairs(pattern: Pattern, heads: int, length: int, is_causal: bool = False, *, segment_offset: int = 0) -> int:
    """Exact number of (query, key) pairs of one sequence, summed over heads, branches and the window.

    Closed form per branch and offset, so the length does not matter to the time it takes.

    Args:
        pattern: the branches; with ``"grouped"`` offsets what its ``grouped(heads, kv_heads)`` gives.
        heads: query heads H.
        length: tokens N.
        is_causal: keys after the query are left out.
        segment_offset: on the grid position ``p`` counts as ``p + segment_offset``.
    """
    check_ints(1, heads=heads, length=length)
    check_int("segment_offset", segment_offset)
    return _pairs_below(pattern, heads, length, is_causal, length, segment_offset)


def score_pairs_by_shard(
    pattern: Pattern, heads: int, shard_lengths: Sequence[int], is_causal: bool = False
) -> tuple[int, ...]:
    """:func:`score_pairs` of the queries of each shard of a sequence: what every rank of a group computes.

    In causal attention later queries of a segment have more keys. With one causal segment without end the last of R equal
    shards has ``2 - 1 / R`` times the mean: 1.75 at four ranks.

    Args:
        pattern, heads, is_causal: as in :func:`score_pairs`.
        shard_lengths: tokens of every rank's shard, in rank order; shards may be empty.
    """
    check_ints(1, heads=heads)
    check_ints(0, **{f"shard_lengths[{rank}]": length for rank, length in enumerate(shard_lengths)})
    ends = list(accumulate(shard_lengths, initial=0))
    below = [_pairs_below(pattern, heads, ends[-1], is_causal, end) for end in ends]
    return tuple(last - first for first, last in pairwise(below))


def _pairs_below(pattern: Pattern, heads: int, length: int, is_causal: bool, stop: int, segment_offset: int = 0) -> int:
    """The pairs of a sequence of ``length`` whose queries are below ``stop``."""
    total = 0
    if pattern.window is not None:
        # Of the first n tokens: the keys up to each.
        first, last, whole = (
            _square(n, True) - _square(max(0, n - pattern.window), True) for n in (stop, length - stop, length)
        )
        total += heads * (first if is_causal else first + whole - last - stop)
    for branch in pattern.branches:
        for offset, count in Counter(pattern.offset(branch, head, heads) for head in range(heads)).items():
            origin = branch.origin(segment_offset)
            for start, segments, tokens in branch.spans(stop, origin):
                first = start - branch.segment_start(start)
                (earlier, passed), (later, places) = (branch.chosen(at, offset) for at in (first, first + tokens))
                rows = later - earlier
                queries = rows if pattern.dilated_queries else tokens
                if not is_causal:
                    # The segment may go on behind the last query.
                    end = branch.longest(first + length + origin - start)
                    pairs = queries * (branch.chosen(end, offset)[0] - earlier)
                elif pattern.dilated_queries:
                    pairs = _square(rows, True)
                else:
                    pairs = rows * (first + tokens) - (places - passed)
                total += count * segments * pairs
    return total


def keys_per_query(pattern: Pattern, heads: int, length: int, is_causal: bool = False) -> KeysPerQuery:
    """Fewest, mean and most keys a query has, exact, over every head and every position below ``length``.

    The mean is :func:`score_pairs` over H * N. The extremes are found digit by digit when every segment length divides
    the next longer one (any length, at once), and by a scan of one period otherwise.

    Args:
        pattern, heads, length, is_causal: as in :func:`score_pairs`.

    Raises:
        ValueError: segment lengths that do not nest (or rates with a huge common multiple) on a sequence too long to
            scan, or a pattern beyond the paper. ``score_pairs`` has no such limits.
    """
    if pattern.beyond_paper is not None:
        raise ValueError(f"the extremes of {pattern.beyond_paper} are not counted: expected what LongNet's paper has")
    mean = Fraction(score_pairs(pattern, heads, length, is_causal), heads * length)
    chain = sorted(pattern.branches, key=lambda branch: branch.segment_length)
    offsets = sorted({tuple(pattern.offset(branch, head, heads) for branch in chain) for head in range(heads)})
    common = math.lcm(*(branch.dilation_rate for branch in chain))
    if len(offsets) * digit_steps(chain, common) <= _DIGIT_STEPS:
        extremes = [_extremes_by_digits(chain, own, length, is_causal) for own in offsets]
    else:
        spans = (min(length, pattern.period), length % pattern.period if length > pattern.period else 0)
        if len(offsets) * sum(spans) > _SCAN_STEPS:
            raise ValueError(
                f"length={length} is too long for the extremes of segment_lengths={pattern.segment_lengths} with "
                f"dilation_rates={pattern.dilation_rates}: expected segment lengths that each divide the next longer "
                f"one and rates with a small common multiple, or at most {_SCAN_STEPS // len(offsets)} tokens"
            )
        extremes = [_extremes_by_scan(chain, own, span, is_causal) for own in offsets for span in spans if span]
    return KeysPerQuery(min(low for low, _ in extremes), mean, max(high for _, high in extremes))


def cost(
    pattern: Pattern,
    heads: int,
    length: int,
    head_dim: int,
    *,
    is_causal: bool = False,
    kv_heads: int | None = None,
    batch: int = 1,
    bytes_per_element: int = 2,
    segment_offset: int = 0,
) -> Cost:
    """FLOPs and least memory traffic of attention with this pattern and of dense attention.

    FLOPs count the matrix products: two forward (4 * D per pair) and five backward (10 * D per pair). Bytes count each
    tensor once, as if caches were perfect: forward reads q, k, v and writes out and lse; backward reads q, k, v, out,
    its gradient and lse, and writes three gradients. They are the same for dense attention: a pattern saves pairs.

    Args:
        pattern, heads, length, is_causal, segment_offset: as in :func:`score_pairs`.
        head_dim: D.
        kv_heads: key/value heads Hk, a divisor of ``heads``; ``heads`` when None.
        batch: B.
        bytes_per_element: of q, k, v and out (2 for bfloat16). lse has 4 bytes, and 8 when the elements have 8.

    Raises:
        TypeError, ValueError: a number that is no int or below 1, ``heads`` not divisible by ``kv_heads``.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    check_ints(1, heads=heads, length=length, head_dim=head_dim, kv_heads=kv_heads, batch=batch)
    check_ints(1, bytes_per_element=bytes_per_element)
    if heads % kv_heads:
        raise ValueError(f"heads={heads} is not divisible by kv_heads={kv_heads}: expected a divisor of heads")
    query = batch * heads * length * head_dim * bytes_per_element
    key = batch * kv_heads * length * head_dim * bytes_per_element
    lse = batch * heads * length * max(4, bytes_per_element)

    def work(pairs: int) -> Work:
        return Work(
            pairs=pairs,
            forward_flops=4 * head_dim * pairs,
            backward_flops=10 * head_dim * pairs,
            forward_bytes=2 * query + 2 * key + lse,
            backward_bytes=4 * query + 4 * key + lse,
        )

    dense = batch * heads * _square(length, is_causal)
    pattern = pattern if kv_heads == heads else pattern.grouped(heads, kv_heads)
    pairs = score_pairs(pattern, heads, length, is_causal, segment_offset=segment_offset)
    return Cost(work(batch * pairs), work(dense))


def digit_steps(chain: list[Branch], common: int) -> float:
    """Work of one pass over positions digit by digit; infinite when a segment length does not divide the next.

    ``chain`` is sorted by segment length and ``common`` a multiple of its rates. A position's digits count whole
    segments inside the next longer segment.
    """
    steps = common
    for inner, outer in pairwise(chain):
        if outer.segment_length % inner.segment_length:
            return math.inf
        cycle = common // math.gcd(common, inner.segment_length)
        steps += common * min(cycle, outer.segment_length // inner.segment_length)
    return steps


def _square(rows: int, is_causal: bool) -> int:
    return rows * (rows + 1) // 2 if is_causal else rows * rows


def _extremes_by_digits(chain: list[Branch], offsets: tuple[int, ...], length: int, is_causal: bool) -> tuple[int, int]:
    """Fewest and most keys of one head's queries, for nested segments.

    Everything is scaled by the rates' common multiple M, so that a selected query's ``(u - s) / r + 1`` causal keys are
    integers. A query's residue mod M settles, from the longest segment down, which branches select it; what is left is
    linear in the digits, so only the first and last digit of each residue class can be extreme.
    """
    common = math.lcm(*(branch.dilation_rate for branch in chain))

    @cache
    def extremes(level: int, residue: int, weight: int, size: int) -> tuple[int, int] | None:
        """Over the local positions u < size of a segment of this level with u = residue mod M."""
        constant = 0
        if level < len(chain) and residue % chain[level].dilation_rate == offsets[level]:
            if is_causal:
                share = common // chain[level].dilation_rate
                weight += share
                constant = common - offsets[level] * share
            else:
                constant = common * chain[level].rows(size, offsets[level])
        if level == 0:
            if residue >= size:
                return None
            last = residue + (size - 1 - residue) // common * common
            return constant + weight * residue, constant + weight * last
        step = chain[level - 1].segment_length
        whole, rest = divmod(size, step)
        cycle = common // math.gcd(common, step)
        lows, highs = [], []
        for first in range(min(cycle, whole)):
            inner = extremes(level - 1, (residue - first * step) % common, weight, step)
            if inner is not None:
                last = first + (whole - 1 - first) // cycle * cycle
                lows.append(constant + weight * step * first + inner[0])
                highs.append(constant + weight * step * last + inner[1])
        inner = extremes(level - 1, (residue - whole * step) % common, weight, rest) if rest else None
        if inner is not None:
            lows.append(constant + weight * step * whole + inner[0])
            highs.append(constant + weight * step * whole + inner[1])
        return (min(lows), max(highs)) if lows else None

    by_residue = [extremes(len(chain), residue, 0, length) for residue in range(common)]
    lows, highs = zip(*(pair for pair in by_residue if pair is not None), strict=True)
    return min(lows) // common, max(highs) // common


def _extremes_by_scan(chain: list[Branch], offsets: tuple[int, ...], length: int, is_causal: bool) -> tuple[int, int]:
    keys = [0] * length
    for branch, offset in zip(chain, offsets, strict=True):
        for start in branch.starts(length):
            rows = branch.selected(start, min(branch.segment_stop(start), length), offset)
            for row, position in enumerate(rows.positions, 1):
                keys[position] += row if is_causal else rows.size
    return min(keys), max(keys)
