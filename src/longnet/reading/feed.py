"""Chunks of bytes on the device, read while it computes on the previous ones."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet.reading.source import ByteSource

# The host runs ahead of a CUDA device by this many chunks.
_AHEAD = 4


class Feeder:
    """Reads a source chunk by chunk into a few buffers of fixed size; on CUDA they are pinned and copied asynchronously.

    Args:
        source: standing where reading starts.
        chunk: bytes a chunk.
        device: where the chunks go.
    """

    def __init__(self, source: ByteSource, chunk: int, device: torch.device) -> None:
        self._source, self._chunk, self._device = source, chunk, device
        self._pinned = device.type == "cuda"
        count = _AHEAD if self._pinned else 1
        self._slots = [torch.empty(chunk, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(count)]
        self._copied = [torch.cuda.Event() for _ in range(count)] if self._pinned else []
        self._turn = 0

    def next(self, most: int | None) -> Tensor:
        """The next chunk, (n,) int64 on the device: ``n`` is the chunk's size, less at ``most`` bytes or at the end, 0 after it.

        Raises:
            ValueError, OSError: as the source does.
        """
        place = self._turn % len(self._slots)
        slot = self._slots[place]
        if self._pinned:
            # The copy out of this buffer may still be under way; an event never recorded is done.
            self._copied[place].synchronize()
        size = self._chunk if most is None else min(self._chunk, most)
        count = self._source.read_into(slot.numpy().data[:size])
        self._turn += 1
        tokens = slot[:count].to(self._device, non_blocking=self._pinned)
        if self._pinned:
            self._copied[place].record(torch.cuda.current_stream(self._device))
        return tokens.to(torch.int64)
