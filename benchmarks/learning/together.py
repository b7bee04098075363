"""Runs that train side by side on one GPU: kernels of a small model leave a part of it idle."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from benchmarks.learning.train import Run

Name = TypeVar("Name")


@dataclass
class _Running(Generic[Name]):
    name: Name
    run: Run
    stream: torch.cuda.Stream | None
    begun: float = field(default_factory=time.monotonic)


def train_together(
    waiting: Iterator[tuple[Name, Run]], count: int, device: torch.device
) -> Iterator[tuple[Name, dict[str, Any], float]]:
    """Train the runs, ``count`` at a time, in steps by turns.

    Yields:
        (name, what its result file holds, minutes) of each when it has ended.
    """
    # Every pattern is compiled; past its limit torch would go on uncompiled.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    running: list[_Running[Name]] = []
    while True:
        while len(running) < count and (one := next(waiting, None)) is not None:
            running.append(_Running(*one, torch.cuda.Stream() if device.type == "cuda" else None))
        if not running:
            return
        for trained in tuple(running):
            with torch.cuda.stream(trained.stream) if trained.stream else nullcontext():
                try:
                    next(trained.run)
                except StopIteration as ended:
                    running.remove(trained)
                    yield trained.name, ended.value, (time.monotonic() - trained.begun) / 60
