"""Single-token steps of small models on one thread: a second one gains nothing, and costs much beside another load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from longnet.models.placement import device_of

# Up to this many multiplications a step, a second thread gains at most 4 % on two idle cores (one Xeon, torch 2.11). At 10
# million it gains a tenth to a fifth.
_SMALL = 4_000_000


@contextmanager
def step_threads(model: nn.Module, batch_size: int) -> Iterator[None]:
    """A context for single-token steps of ``batch_size`` rows: one thread, if the model is on the CPU and small.

    OpenMP's threads spin while they wait for each other. Beside another load a step with two threads can take many times as long
    as with one. ``torch.set_num_threads`` is set for the calling thread and set back afterwards, on errors too.
    """
    work = batch_size * sum(map(_multiplications, model.modules()))
    with torch_threads(1 if work <= _SMALL and device_of(model).type == "cpu" else None):
        yield


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """A context in which torch uses ``count`` CPU threads; None changes nothing."""
    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _multiplications(module: nn.Module) -> int:
    """Multiplications per token by the module's own weights, quantised or not; an embedding counts as the output head."""
    for rows, columns in (("in_features", "out_features"), ("num_embeddings", "embedding_dim")):
        if hasattr(module, rows) and hasattr(module, columns):
            return int(getattr(module, rows) * getattr(module, columns))
    return 0
