"""Batches of a step: the same whether they were prepared or not, and the device is not waited for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from longnet.training import TrainSettings, read_corpus
from longnet.training.batches import Batch, Batches
from longnet.training.data import draw_windows
from longnet.training.ranks import Ranks

CPU = torch.device("cpu")


def _same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) and a.cu_seqlens == b.cu_seqlens
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("pack", [None, "documents"])
def test_prepared_batches_are_those_of_the_step(pack: str | None, make_settings: Callable[..., TrainSettings]) -> None:
    settings = make_settings(accumulate=2, pack=pack)
    batches = Batches(settings, data := read_corpus(settings.data), Ranks(), CPU)
    # Another step or length than the prepared one, and a step that is asked for twice.
    for prepared, step, context in ((1, 1, 32), (2, 3, 32), (3, 3, 16), (4, 4, 16), (None, 4, 16)):
        if prepared is not None:
            batches.prepare(prepared, 32 if step == prepared == 3 else context)
        found = batches.at(step, context)
        assert _same(found, Batches(settings, data, Ranks(), CPU).at(step, context))
        if pack is None:
            count = settings.tokens_per_step // context
            expected = draw_windows(data.train, context, count, settings.seed, step)
            for part, whole in zip(zip(*((b.tokens, b.targets) for b in found), strict=True), expected, strict=True):
                assert torch.equal(torch.cat(part), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_preparing_does_not_wait_for_the_device(make_settings: Callable[..., TrainSettings]) -> None:
    settings = make_settings()
    batches = Batches(settings, read_corpus(settings.data), Ranks(), torch.device("cuda"))
    batches.prepare(1, 32)
    torch.cuda._sleep(2_000_000_000)
    ended = torch.cuda.Event()
    ended.record()
    batches.prepare(2, 32)
    assert not ended.query()
    found, expected = batches.at(2, 32), Batches(settings, batches.data, Ranks(), CPU).at(2, 32)
    assert torch.equal(found[0].tokens.cpu(), expected[0].tokens)
