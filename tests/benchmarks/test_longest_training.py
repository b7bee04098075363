"""The search for the longest sequence that trains, on a device that is made up."""

from __future__ import annotations

import pytest

from benchmarks import longest_training
from benchmarks.longest_training import Try


@pytest.mark.parametrize(("room", "spare"), [(70.0, 0.0), (70.0, 6.0)])
def test_the_search_ends_at_a_length_that_fits(monkeypatch: pytest.MonkeyPatch, room: float, spare: float) -> None:
    """Memory grows with the tokens; ``spare`` GiB more are taken than the allocator says, so that the first guess fails."""
    gib = lambda tokens: 2.0 + tokens / 2**15  # noqa: E731

    def attempt(tokens: int, ranks: int, seconds: float, compiled: bool) -> Try:
        fits = gib(tokens) + spare <= room
        return Try(tokens, fits, 1.0, gib(tokens)) if fits else Try(tokens, False)

    monkeypatch.setattr(longest_training, "attempt", attempt)
    tried = list(longest_training.search(1, room, 2**18, 2**16, 1000.0, False))
    assert [one.tokens for one in tried[:2]] == [2**18, 2**19]
    assert tried[-1].fits and sum(not one.fits for one in tried) == (0 if spare == 0 else len(tried) - 3)
    assert room - spare - gib(tried[-1].tokens) < 4.0, "much room was left"
    assert (spare == 0) == (len(tried) == 3)


def test_a_device_without_room_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longest_training, "attempt", lambda tokens, ranks, seconds, compiled: Try(tokens, False))
    assert len(list(longest_training.search(1, 10.0, 2**18, 2**16, 1000.0, False))) == 1
