"""Tensors that are made once. What graphs ask of them: ``tests/gpu``."""

from __future__ import annotations

import torch

from longnet.backends.kept import Kept

CPU = torch.device("cpu")


def test_a_key_is_made_once_and_the_last_asked_for_stay():
    made: list[int] = []

    def ask(kept: Kept, key: int) -> float:
        return float(kept.get(key, CPU, lambda: made.append(key) or torch.tensor(float(key))))  # type: ignore[func-returns-value]

    kept = Kept(2)
    assert [ask(kept, key) for key in (1, 2, 1, 3, 1, 2)] == [1.0, 2.0, 1.0, 3.0, 1.0, 2.0]
    # 2 was the one asked for longest ago when 3 came.
    assert made == [1, 2, 3, 2]
