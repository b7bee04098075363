"""Draw the pictures of the README and the documentation into docs/images: ``python scripts/make_figures.py``."""

from __future__ import annotations

from pathlib import Path

import traffic

from longnet.figures import (
    plot_cache,
    plot_cost,
    plot_pattern,
    plot_receptive_field,
    plot_selection,
    plot_shards,
    plot_traffic,
)
from longnet.geometry import Pattern

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"

# Small enough that every (query, key) pair is one visible square.
SMALL = Pattern.parse((16, 32, 64), (1, 2, 4))
# What docs/patterns.md shows, with segment offsets.
KINDS = {
    "window": (Pattern.compose(window=12), 0),
    "strided": (Pattern.compose(None, 4, window=12, dilated_queries=False), 0),
    "blocks": (Pattern.compose(None, 4, window=12, dilated_queries=False, dilation_block=4), 0),
    "shifted": (SMALL, 64 * 2 // 3),
    "window_and_branches": (Pattern.compose((16, 32, 64), (1, 2, 4), window=12), 0),
}
# As many rates as the paper's experiments, on a sequence short enough to draw token by token.
GROWING = Pattern.parse((32, 64, 128, 256, 512), (1, 2, 4, 8, 16))
# The paper's base model: 12 heads, segments up to 32,768 tokens.
PAPER = Pattern.parse((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
# As docs/distributed.md has it: the longest segment is as long as 32 shards.
SHARDS = (traffic.SHARD,) * 32


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    schemes = {
        "longnet": [float(traffic.ours(ranks)[1]) for ranks in traffic.RANKS],
        "ring attention": [float(traffic.ring(ranks)) for ranks in traffic.RANKS],
        "all-gather": [float(traffic.all_gather(ranks)) for ranks in traffic.RANKS],
    }
    made = [
        plot_pattern(SMALL, 4, 64, IMAGES / "pattern.png"),
        *(
            plot_pattern(kind, 4, 64, IMAGES / f"{name}.png", segment_offset=offset)
            for name, (kind, offset) in KINDS.items()
        ),
        plot_selection(SMALL, 4, 64, IMAGES / "selection.png"),
        plot_receptive_field(GROWING, 4, 512, 4, IMAGES / "receptive_field.png"),
        plot_cost(PAPER, 12, [2**power for power in range(10, 21)], IMAGES / "cost.png"),
        plot_cache(PAPER, 12, 64, [2**power for power in range(10, 31)], IMAGES / "cache.png"),
        plot_shards(traffic.PATTERN, traffic.HEADS, traffic.HEAD_DIM, SHARDS, IMAGES / "shards.png"),
        plot_traffic(traffic.RANKS, schemes, IMAGES / "traffic.png", f"{traffic.SHARD:,} tokens a rank, causal"),
    ]
    for path in made:
        print(f"{path}  {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
