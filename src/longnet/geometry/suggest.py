"""A pattern for a sequence length and a budget of keys: the paper's geometric series.

Source: LongNet, arXiv 2307.02486, section 2.3 (segment lengths and rates grow as geometric series) and section 2.5.
"""

from __future__ import annotations

from longnet.checks import check_int, check_ints
from longnet.geometry.pattern import Pattern
from longnet.geometry.reach import offsets_taken
from longnet.geometry.rows import Branch


def suggest_pattern(
    max_length: int,
    budget: int,
    *,
    heads: int | None = None,
    ratio: int = 2,
    head_offsets: str = "interleaved",
) -> Pattern:
    """The geometric series that keeps the longest exact neighbourhood within a budget of keys.

    Branch ``i`` has the segment length ``w_0 * ratio**i`` and the rate ``min(ratio**i, cap)``. The budget bounds
    ``sum_i w_i / r_i``: the keys of a query that every branch selects, and the keys a head keeps cached. Of all such
    series the one with the fewest branches is chosen, because it has the longest first segment, in which attention is
    dense. Of its largest eighth of first lengths the roundest is taken (the highest power of two divides it).

    The first rate is 1, so every position is covered; every segment length is a multiple of the one before and of its
    rate; the last segment reaches ``max_length``. A budget of ``max_length`` or more gives dense attention.

    Args:
        max_length: longest sequence in tokens.
        budget: keys per query, at most.
        heads: H. Rates then stop at the largest power of ``ratio`` that still gives each residue a head, so that each
            token is also read at a distance. None leaves the rates unlimited.
        ratio: of one segment length to the one before, and of the rates; 2 as in the paper's experiments.
        head_offsets: the convention of the pattern, see :meth:`Pattern.parse`.

    Raises:
        TypeError: a number that is no int.
        ValueError: a number below 1 (``ratio`` below 2), or no such series within the budget: names the least budget.
    """
    check_ints(1, max_length=max_length, budget=budget, ratio=ratio)
    if ratio < 2:
        raise ValueError(f"ratio={ratio} does not grow: expected an int of at least 2")
    cap = None if heads is None else _largest_rate(check_int("heads", heads, 1), ratio, head_offsets, max_length)

    lengths, rates = [1], [1]
    least = max_length
    while True:
        keys = sum(length // rate for length, rate in zip(lengths, rates, strict=True))
        shortest = -(-max_length // lengths[-1])
        longest = min(budget // keys, max_length)
        if shortest <= longest:
            first = _roundest(max(shortest, longest - longest // 8), longest)
            return Pattern.parse([first * length for length in lengths], rates, head_offsets)
        least = min(least, shortest * keys)
        if shortest == 1:
            break
        lengths.append(lengths[-1] * ratio)
        rates.append(rates[-1] * ratio if cap is None else min(rates[-1] * ratio, cap))
    limit = "" if cap is None else f" and rates of at most {cap}, the largest that heads={heads} fill"
    raise ValueError(
        f"budget={budget} keys per query is too small for max_length={max_length} with ratio={ratio}{limit}: "
        f"expected a budget of at least {least}" + ("" if cap is None else ", or more heads")
    )


def spanning_pattern(pattern: Pattern, heads: int, length: int) -> Pattern | None:
    """A pattern that spans ``length`` tokens, from the least power-of-two multiple of this one's keys; None if this one does."""
    if pattern.period >= length:
        return None
    budget = sum(branch.segment_length // branch.dilation_rate for branch in pattern.branches)
    while True:
        try:
            return suggest_pattern(length, budget, heads=heads, head_offsets=pattern.head_offsets)
        except ValueError:
            budget *= 2


def _largest_rate(heads: int, ratio: int, head_offsets: str, max_length: int) -> int:
    rate = 1
    while rate < max_length:
        branch = Branch(rate * ratio, rate * ratio)
        pattern = Pattern.parse(branch.segment_length, branch.dilation_rate, head_offsets)
        if len(offsets_taken(pattern, branch, heads)) < branch.dilation_rate:
            break
        rate *= ratio
    return rate


def _roundest(low: int, high: int) -> int:
    """The number in ``low..high`` that the highest power of two divides; the largest of them."""
    step = 1
    while high // (2 * step) * (2 * step) >= low:
        step *= 2
    return high // step * step
