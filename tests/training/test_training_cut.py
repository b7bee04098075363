"""Windows cut for equal work: against every pair counted, and against memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from longnet.models import LongNetConfig
from longnet.training import TrainSettings, cut
from longnet.training.cut import busiest, choose_cut, equal_work_cut, even_cut
from longnet.training.estimate import step_flops, window_flops

CPU = torch.device("cpu")
FAR = ("sliding_attention", "strided_attention", "full_attention")
Make = Callable[..., TrainSettings]


def _config(**changes: object) -> LongNetConfig:
    return LongNetConfig(
        layers=3,
        dim=32,
        heads=4,
        layer_types=FAR,
        segment_lengths=(64,),
        dilation_rates=(2,),
        sliding_window=40,
        stride=4,
    ).replace(**changes)


def _pairs(config: LongNetConfig, start: int, stop: int) -> int:
    """Those of the queries from start to stop, one after the other: window, window and every fourth key, all keys."""
    total = 0
    for query in range(start, stop):
        near = min(query + 1, config.sliding_window)
        for head in range(config.heads):
            total += near + near + len(range(head % 4, query + 1, 4)) + query + 1
    return total


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("length", [1000, 4097])
def test_parts_have_equal_work(ranks: int, length: int) -> None:
    config = _config()
    parts = equal_work_cut(config, length, ranks)
    of_token, of_pair = window_flops(config)
    ends = [sum(parts[:count]) for count in range(ranks + 1)]
    work = [(stop - start) * of_token + _pairs(config, start, stop) * of_pair for start, stop in pairwise(ends)]
    assert sum(parts) == length and len(parts) == ranks
    assert max(work) == busiest(config, parts)
    assert max(work) < 1.1 * sum(work) / ranks
    assert parts[0] > parts[-1] and busiest(config, even_cut(length, ranks)) > max(work)


@pytest.mark.parametrize("length", [1, 2, 5, 64])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_parts_of_any_window_add_up(length: int, ranks: int) -> None:
    for parts in (equal_work_cut(_config(), length, ranks), even_cut(length, ranks)):
        assert len(parts) == ranks and sum(parts) == length and min(parts) >= 0


def test_the_work_of_all_parts_is_that_of_a_step(make_settings: Make) -> None:
    settings = make_settings(model=_config(), context=640, batch=1)
    assert busiest(settings.model, (640,)) == step_flops(settings)


def test_windows_are_cut_for_equal_work_where_that_fits(make_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(model=_config(), context=4096)
    monkeypatch.setattr(cut, "free_memory", lambda device: 1 << 40)
    chosen, (line,) = choose_cut(settings, CPU, 1, 4)
    parts = equal_work_cut(settings.model, 4096, 4)
    assert chosen(4096) == parts and chosen(4096) != even_cut(4096, 4)
    assert line.startswith(f"Processes share a window of 4,096 tokens in parts of {parts[0]:,}, {parts[1]:,}, ")
    monkeypatch.setattr(cut, "free_memory", lambda device: 1 << 20)
    chosen, (line,) = choose_cut(settings, CPU, 1, 4)
    assert chosen(4096) == even_cut(4096, 4)
    assert line.startswith(
        f"Processes share a window in equal parts. For equal work one would have {parts[0]:,} tokens"
    )
    monkeypatch.setattr(cut, "free_memory", lambda device: None)
    assert choose_cut(settings, CPU, 1, 4)[0](4096) == parts


def test_windows_alone_and_the_papers_pattern_are_cut_evenly(make_settings: Make) -> None:
    for types in (("sliding_attention",), ("dilated_attention",)):
        chosen, lines = choose_cut(make_settings(model=_config(layer_types=types * 3), context=4096), CPU, 1, 4)
        assert chosen(4096) == even_cut(4096, 4) and lines == []
    # One process has whole windows.
    assert choose_cut(make_settings(model=_config()), CPU, 2, 1)[1] == []


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_no_part_is_empty_that_need_not_be(ranks: int) -> None:
    for length in range(ranks, 70):
        parts = equal_work_cut(_config(), length, ranks)
        assert busiest(_config(), parts) <= busiest(_config(), even_cut(length, ranks))
        assert min(parts) > 0
