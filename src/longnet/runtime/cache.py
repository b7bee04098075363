"""Tensors that depend on shapes alone: made when they are first needed, and cached for later calls.

On a GPU three things can go wrong with such a tensor. Another stream may ask for it before it is there, so an event says when it
will be. While torch warms up for a CUDA graph, what this thread allocates lies in the graph's own memory, which is used again
later; so it is made in another thread. A captured graph reads it at every replay and holds no reference, so it is never given up.

While torch traces (compilation, export, fake tensors) what is made is no real tensor. Nothing is cached then: a later call would
get it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from longnet.runtime.torch_internals import current_stream_handle
from longnet.runtime.tracing import is_traced

P = ParamSpec("P")
R = TypeVar("R")


def tensor_cache(most: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """``functools.lru_cache`` for functions whose results hold tensors: not used while torch traces."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        cached = lru_cache(maxsize=most)(function)

        @wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> R:
            return function(*args, **options) if is_traced() else cached(*args, **options)  # type: ignore[arg-type]

        return call

    return decorate


@dataclass
class _Made:
    """A tensor, and when it will be there: None once that is known to be past.

    Args:
        streams: handles of those that read it before; given up, its memory waits for them.
    """

    tensor: Tensor
    ready: torch.cuda.Event | None
    streams: set[int] = field(default_factory=set)


class GraphSafeCache:
    """The ``most`` tensors that were asked for last, and all that captured graphs read."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: OrderedDict[Hashable, _Made] = OrderedDict()
        self._captured: dict[Hashable, _Made] = {}

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of a key, for work on the current stream of its device; made by ``make`` if need be.

        Args:
            key: all that the tensor depends on, the device too.
        """
        if is_traced():
            return make()
        if device.type != "cuda":
            return self._find(key, lambda: _Made(make(), None)).tensor
        if device.index == torch.cuda.current_device():
            entry = self._made.get(key) or self._captured.get(key)
            if entry is not None and _needs_nothing(entry, device.index):
                self._asked_for(key)
                return entry.tensor
        # Streams below are those of the tensor's device.
        with torch.cuda.device(device):
            return self._get_on_cuda(key, make)

    def _find(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        entry = self._made.get(key) or self._captured.get(key)
        if entry is None:
            entry = self._made[key] = make()
            if len(self._made) > self._most:
                self._made.popitem(last=False)
        else:
            self._asked_for(key)
        return entry

    def _asked_for(self, key: Hashable) -> None:
        # Captured graphs alone may have it, or another thread may have given it up meanwhile.
        with suppress(KeyError):
            self._made.move_to_end(key)

    def _get_on_cuda(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        capturing = torch.cuda.is_current_stream_capturing()
        if capturing and key not in self._made and key not in self._captured:
            # The graph makes it itself, at every replay.
            return make()
        entry = self._find(key, lambda: _elsewhere(make))
        if capturing:
            self._captured[key] = entry
            if entry.ready is not None:
                torch.cuda.current_stream().wait_event(entry.ready)
            return entry.tensor
        if entry.ready is not None:
            if entry.ready.query():
                entry.ready = None
            else:
                torch.cuda.current_stream().wait_event(entry.ready)
        # Given up, its memory must not be used again before this stream has read it.
        stream = torch.cuda.current_stream()
        entry.tensor.record_stream(stream)
        entry.streams.add(stream.cuda_stream)
        return entry.tensor


def _needs_nothing(entry: _Made, device: int) -> bool:
    """Whether the current stream of the current device has read it before, and no graph is captured."""
    return (
        entry.ready is None
        and current_stream_handle(device) in entry.streams
        and not torch.cuda.is_current_stream_capturing()
    )


def _elsewhere(make: Callable[[], Tensor]) -> _Made:
    """Made on the current stream, in memory that belongs to no graph."""
    stream = torch.cuda.current_stream()

    def inside() -> _Made:
        with torch.cuda.stream(stream):
            # A graph that is captured later may wait for it.
            entry = _Made(make(), torch.cuda.Event(external=True))
            entry.ready.record()  # type: ignore[union-attr]
        return entry

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(inside).result()
