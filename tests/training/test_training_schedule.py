"""Learning rates."""

from __future__ import annotations

import pytest

from longnet.training.schedule import SCHEDULES, decay, is_flat_until, warm_up


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.55, 0.19, 0.1]),
        ("cosine", [1.0, 0.55, 0.122, 0.1]),
        ("wsd", [1.0, 1.0, 0.55, 0.1]),
    ],
)
def test_decay_from_the_peak_to_the_floor(schedule: str, expected: list[float]) -> None:
    assert [decay(schedule, progress, 0.1) for progress in (0.0, 0.5, 0.9, 1.0)] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_ever_rises_or_leaves_its_range(schedule: str) -> None:
    factors = [decay(schedule, step / 100, 0.05) for step in range(-5, 120)]
    assert factors == sorted(factors, reverse=True)
    assert max(factors) == 1.0 and min(factors) >= 0.05


def test_warm_up_reaches_one_at_its_last_step() -> None:
    assert [warm_up(step, 4) for step in (1, 2, 4, 5)] == [0.25, 0.5, 1.0, 1.0]
    assert warm_up(1, 0) == 1.0


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule='step' is unknown"):
        decay("step", 0.5, 0.0)


def test_flat_until_says_where_the_decay_has_not_begun() -> None:
    for schedule in SCHEDULES:
        for progress in (0.1, 0.79, 0.81):
            untouched = all(decay(schedule, share * progress, 0.0) == 1.0 for share in (0.25, 0.5, 1.0))
            assert is_flat_until(schedule, progress) == untouched
