from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from longnet import DilatedCache
from longnet.figures import (
    curves,
    plot_cache,
    plot_cost,
    plot_pattern,
    plot_receptive_field,
    plot_selection,
    plot_shards,
    plot_traffic,
)
from longnet.figures.patterns import _cell_pairs
from longnet.figures.style import COLORS
from longnet.geometry.pattern import Pattern

PATTERN = Pattern.parse([16, 32, 64], [1, 2, 4])


def pixels(path: Path, color: str, legend: int = 80) -> int:
    """How many pixels of the PNG have this colour, above the legend at its lower edge."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = imread(path)[:-legend, :, :3]
    assert min(image.shape[:2]) > 300
    return int((np.abs(image - np.array(to_rgb(color))).max(axis=-1) < 0.01).sum())


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_colour_has_the_area_of_its_branchs_pairs(tmp_path: Path, is_causal: bool) -> None:
    cells = [0, 0, 0]
    for query in range(64):
        for key in range(query + 1 if is_causal else 64):
            reading = [
                index
                for index, branch in enumerate(PATTERN.branches)
                if query // branch.segment_length == key // branch.segment_length
                and PATTERN.selects(branch, 0, 1, query)
                and PATTERN.selects(branch, 0, 1, key)
            ]
            if reading:
                cells[max(reading)] += 1
    path = plot_pattern(PATTERN, 1, 64, tmp_path / "pattern.png", is_causal=is_causal)
    drawn = [pixels(path, color) for color in COLORS[:3]]
    assert [count / sum(drawn) for count in drawn] == pytest.approx([c / sum(cells) for c in cells], rel=0.03)


@pytest.mark.parametrize("offset", [0, 21])
def test_what_is_beyond_the_paper_is_drawn_pair_by_pair(tmp_path: Path, offset: int) -> None:
    pattern = Pattern.compose((16, None), (1, 4), window=6, dilated_queries=False, dilation_block=2)
    parts = [replace(pattern, branches=()), *(pattern.of(branch) for branch in pattern.branches)]
    place, cells = np.arange(64), np.zeros((64, 64), dtype=int)
    for index, part in enumerate(parts, 1):
        cells[part.times_read(0, place[:, None], place, heads=1, is_causal=True, segment_offset=offset) > 0] = index
    expected = [float((cells == index).sum()) for index in (1, 2, 3)]
    path = plot_pattern(pattern, 1, 64, tmp_path / "pattern.png", segment_offset=offset)
    drawn = [pixels(path, color) for color in COLORS[:3]]
    assert [count / sum(drawn) for count in drawn] == pytest.approx([c / sum(expected) for c in expected], rel=0.03)


@pytest.mark.parametrize(("window", "offset"), [(6, 0), (None, 3)])
def test_a_long_sequence_beyond_the_paper_is_refused(tmp_path: Path, window: int | None, offset: int) -> None:
    with pytest.raises(ValueError, match=r"length=129 with (window=6|segment_offset=3) is too long to draw"):
        plot_pattern(Pattern.compose(8, 1, window=window), 1, 129, tmp_path / "pattern.png", segment_offset=offset)


@pytest.mark.parametrize("length", [1, 100, 129, 3000])
def test_any_length_is_drawn(tmp_path: Path, length: int) -> None:
    path = plot_pattern(PATTERN, 4, length, tmp_path / "pattern.png")
    assert path == tmp_path / "pattern.png"
    assert sum(pixels(path, color) for color in COLORS[:3]) > 1000


def test_causal_leaves_out_half_of_the_picture(tmp_path: Path) -> None:
    both = plot_pattern(Pattern.parse(64, 1), 1, 64, tmp_path / "both.png", is_causal=False)
    causal = plot_pattern(Pattern.parse(64, 1), 1, 64, tmp_path / "causal.png")
    assert pixels(causal, COLORS[0]) / pixels(both, COLORS[0]) == pytest.approx(65 / 128, rel=0.02)


def test_a_million_tokens_and_many_branches_and_heads_are_drawn(tmp_path: Path) -> None:
    pattern = Pattern.parse([64 << i for i in range(12)], [1 << i % 6 for i in range(12)], "blocked")
    assert pixels(plot_pattern(pattern, 32, 10**6, tmp_path / "pattern.png"), "#ffffff") > 1000


@pytest.mark.parametrize(("segment", "rate", "offset"), [(5, 2, 1), (7, 3, 0), (40, 4, 3), (200, 1, 0), (3, 1, 0)])
def test_cells_of_the_overview_count_the_pairs(segment: int, rate: int, offset: int) -> None:
    length = 120
    pattern = Pattern.parse(segment, rate)
    taken = np.array([pattern.selects(pattern.branches[0], offset, rate, p) for p in range(length)])
    same = np.arange(length)[:, None] // segment == np.arange(length) // segment
    whole = (taken[:, None] & taken & same).astype(int)
    edges = np.array([0, 10, 25, 31, 32, 70, 120])
    expected = np.add.reduceat(np.add.reduceat(whole, edges[:-1], axis=0), edges[:-1], axis=1)
    found = _cell_pairs(pattern.branches[0], offset, edges)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("length", "layers", "is_causal"), [(1, 1, True), (64, 2, False), (5000, 4, True)])
def test_the_receptive_field_is_drawn(tmp_path: Path, length: int, layers: int, is_causal: bool) -> None:
    path = plot_receptive_field(PATTERN, 4, length, layers, tmp_path / "reach.png", is_causal=is_causal)
    assert pixels(path, "#12485a") > 300


def test_deeper_layers_darken_the_receptive_field(tmp_path: Path) -> None:
    one = plot_receptive_field(PATTERN, 4, 64, 1, tmp_path / "one.png")
    three = plot_receptive_field(PATTERN, 4, 64, 3, tmp_path / "three.png")
    assert pixels(three, "#12485a") > 2 * pixels(one, "#12485a")


def test_the_cost_is_drawn_and_needs_two_lengths(tmp_path: Path) -> None:
    path = plot_cost(PATTERN, 4, [64, 2**10, 2**30], tmp_path / "cost.png")
    assert pixels(path, "#12485a") > 500
    with pytest.raises(ValueError, match=r"lengths=\(64, 64\)"):
        plot_cost(PATTERN, 4, [64, 64], tmp_path / "cost.png")


def test_bad_numbers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="length=0"):
        plot_pattern(PATTERN, 4, 0, tmp_path / "pattern.png")
    with pytest.raises(ValueError, match="heads=0"):
        plot_pattern(PATTERN, 0, 64, tmp_path / "pattern.png")


def test_every_selected_position_has_its_cell(tmp_path: Path) -> None:
    path = plot_selection(PATTERN, 4, 64, tmp_path / "selection.png")
    drawn = [pixels(path, color, legend=40) for color in COLORS[:3]]
    # A head keeps all, half and a quarter of the positions.
    assert [count / drawn[0] for count in drawn] == pytest.approx([1, 1 / 2, 1 / 4], rel=0.06)
    with pytest.raises(ValueError, match="length=129 is too long"):
        plot_selection(PATTERN, 4, 129, tmp_path / "selection.png")


def drawn_curves(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """What the curves of the next picture are made of."""
    found: dict[str, list[float]] = {}
    plot = curves._plot

    def spy(x, values, *rest, **options):
        found.update({name: list(curve) for name, curve in values.items()})
        return plot(x, values, *rest, **options)

    monkeypatch.setattr(curves, "_plot", spy)
    return found


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_the_cache_is_drawn_as_large_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_heads: int | None
) -> None:
    found = drawn_curves(monkeypatch)
    path = plot_cache(PATTERN, 4, 8, [1, 100, 2**20], tmp_path / "cache.png", kv_heads=kv_heads, bytes_per_element=4)
    cache = DilatedCache((16, 32, 64), (1, 2, 4), batch_size=1, heads=4, kv_heads=kv_heads, head_dim=8)
    assert found["dilated"] == [cache.keys.nbytes + cache.values.nbytes] * 3
    assert found["dense"] == [2 * (kv_heads or 4) * tokens * 8 * 4 for tokens in (1, 100, 2**20)]
    assert pixels(path, "#12485a") > 500
    with pytest.raises(ValueError, match="heads=4 is not divisible by kv_heads=3"):
        plot_cache(PATTERN, 4, 8, [1, 2], tmp_path / "cache.png", kv_heads=3)


def test_traffic_is_drawn_and_needs_two_numbers_of_ranks(tmp_path: Path) -> None:
    sent = {"ours": [1e6, 2e6], "another": [1e6, 4e9], "a third": [1e7, 1e13]}
    path = plot_traffic([2, 64], sent, tmp_path / "traffic.png", "a sequence")
    assert pixels(path, "#12485a") > 500
    assert pixels(path, "#d1603d") > 100
    with pytest.raises(ValueError, match=r"ranks=\(2,\)"):
        plot_traffic([2], sent, tmp_path / "traffic.png", "a sequence")


@pytest.mark.parametrize(("is_causal", "share"), [(True, 0.5), (False, 1.0)])
def test_what_ranks_send_is_drawn(tmp_path: Path, is_causal: bool, share: float) -> None:
    pattern = Pattern.parse(64, 1)
    path = plot_shards(pattern, 2, 8, [16] * 4, tmp_path / "shards.png", is_causal=is_causal)
    # One branch over all ranks: every pair of ranks that sends does so equally much, in the darkest colour.
    both = plot_shards(pattern, 2, 8, [16] * 4, tmp_path / "both.png", is_causal=False)
    left = [imread(picture)[60:-80, : imread(picture).shape[1] // 2, :3] for picture in (path, both)]
    dark = [int((np.abs(part - np.array(to_rgb("#12485a"))).max(axis=-1) < 0.02).sum()) for part in left]
    assert dark[0] / dark[1] == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("ranks", [1, 65])
def test_too_few_and_too_many_ranks_are_refused(tmp_path: Path, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"shard_lengths holds {ranks} lengths"):
        plot_shards(PATTERN, 4, 8, [16] * ranks, tmp_path / "shards.png")


def test_nothing_that_travels_is_drawn_too(tmp_path: Path) -> None:
    path = plot_shards(Pattern.parse(16, 1), 4, 8, [16] * 4, tmp_path / "shards.png")
    assert pixels(path, "#f1f0ec") > 1000


def test_the_title_says_how_busy_the_busiest_rank_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    real = Axes.set_title
    monkeypatch.setattr(
        Axes, "set_title", lambda axes, text, **options: said.append(text) or real(axes, text, **options)
    )
    pattern = Pattern.compose(None, 4, dilated_queries=False, head_offsets="grouped")
    for is_causal, times in ((True, "1.75"), (False, "1.00")):
        plot_shards(pattern, 8, 8, [1 << 16] * 4, tmp_path / "shards.png", kv_heads=4, is_causal=is_causal)
        assert said[-1].endswith(f"work of the busiest rank: {times} times the mean")
    with pytest.raises(ValueError, match="heads=8 is not divisible by kv_heads=3"):
        plot_shards(pattern, 8, 8, [16] * 4, tmp_path / "shards.png", kv_heads=3)
