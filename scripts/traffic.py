"""Bytes that a rank sends per layer in a forward pass over 2 to 4,096 ranks, from the plan alone, beside two other schemes.

    python scripts/traffic.py

A million tokens a rank, 16 heads of 64 channels in bfloat16, causal. The pattern is w = 2,048 * 4^i at rates 4^i up to
33,554,432 tokens, the length of 32 shards. Backward sends as much again, the gradients of the same rows, the other way.
"""

from __future__ import annotations

from longnet.geometry import Pattern
from longnet.geometry.shards import Shards, rows_sent

SHARD, HEADS, HEAD_DIM, ITEM = 1 << 20, 16, 64, 2
LEVELS = 8
PATTERN = Pattern.parse([2048 * 4**i for i in range(LEVELS)], [4**i for i in range(LEVELS)])
RANKS = tuple(2**i for i in range(1, 13))
# A key and a value.
ROW = 2 * HEAD_DIM * ITEM


def ours(ranks: int) -> tuple[float, int]:
    """Bytes sent by a rank: (mean, most)."""
    shards = Shards((SHARD,) * ranks)
    # Ranks repeat with the longest segment.
    some = range(min(ranks, max(PATTERN.segment_lengths) // SHARD))
    sent = [sum(rows_sent(PATTERN, HEADS, HEADS, shards, rank, True).values()) * ROW for rank in some]
    return sum(sent) / len(sent), max(sent)


def all_gather(ranks: int) -> int:
    """torchscale's: of every branch longer than a shard, the selected rows of every rank to every other."""
    rows = sum(HEADS * SHARD // branch.dilation_rate for branch in PATTERN.branches if branch.segment_length > SHARD)
    return rows * ROW * (ranks - 1)


def ring(ranks: int) -> int:
    """Ring attention over all tokens: every key and value passes through every rank."""
    return HEADS * SHARD * ROW * (ranks - 1)


def table() -> list[str]:
    """Lines of Markdown."""
    lines = [
        "| ranks | tokens | longnet, mean MiB | longnet, most MiB | all-gather MiB | ring attention MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for ranks in RANKS:
        mean, most = ours(ranks)
        cells = [f"{ranks:,}", f"{ranks * SHARD:,}", *(f"{n / 2**20:,.1f}" for n in (mean, most)),
                 *(f"{n(ranks) / 2**20:,.0f}" for n in (all_gather, ring))]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print(*table(), sep="\n")
