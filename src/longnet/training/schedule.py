"""The learning rate over a run: a linear warm-up in steps times a decay driven by progress.

Progress is the share of the run that is done, in [0, 1): of its steps, of its minutes, or the larger of both. So a
run that stops by the clock decays its rate in full, on a machine of any speed.
"""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant", "wsd")
WSD_DECAY = 0.2
"""The share of a ``wsd`` run (warm-up, stable, decay) that decays, at its end."""


def decay(schedule: str, progress: float, floor: float) -> float:
    """The factor of the peak rate at ``progress``, from 1 down to ``floor``.

    Args:
        schedule: ``"cosine"``, ``"linear"``, ``"constant"`` or ``"wsd"`` (constant, then linear over the last fifth).
        progress: share of the run done; above 1 counts as 1.
        floor: the factor at the end, in [0, 1].

    Raises:
        ValueError: an unknown schedule.
    """
    done = min(max(progress, 0.0), 1.0)
    if schedule == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    elif schedule == "linear":
        left = 1.0 - done
    elif schedule == "constant":
        return 1.0
    elif schedule == "wsd":
        left = min(1.0, (1.0 - done) / WSD_DECAY)
    else:
        raise ValueError(f"schedule={schedule!r} is unknown: expected one of {SCHEDULES}")
    return floor + (1.0 - floor) * left


def warm_up(step: int, warmup: int) -> float:
    """The factor of step ``step`` (the first is 1) in a linear warm-up of ``warmup`` steps; 1 after it."""
    return 1.0 if warmup == 0 else min(1.0, step / warmup)


def is_flat_until(schedule: str, progress: float) -> bool:
    """Whether the decay leaves every rate up to ``progress`` at its peak: a run that stopped there can be made longer."""
    return schedule == "constant" or (schedule == "wsd" and progress <= 1.0 - WSD_DECAY)
