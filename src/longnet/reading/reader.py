"""The model at a position of a stream: its KV cache, and the sum of its losses so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from longnet.models import LongNetLM
from longnet.models.loss import chunked_cross_entropy
from longnet.nn.position import float64_device

# Decade k holds the positions 10^k to 10^(k + 1) - 1, decade 0 position 0 too; the last ends beyond int64.
DECADES = 19
_LOSS_CHUNK = 1 << 14
"""Positions whose logits exist at one time: 16 MB in float32."""


class StreamReader:
    """Reads chunks and sums the losses by decade of position, in float64 on the device, without waiting for it.

    Use it under ``torch.inference_mode`` and under the autocast of the cache.

    Args:
        model: in evaluation mode, on the device of the chunks.

    Attributes:
        position: bytes read, which is the position of the next one.
        cache: the model's KV cache.

    Raises:
        ValueError: a model that does not predict bytes, or has no cached form.
    """

    def __init__(self, model: LongNetLM) -> None:
        if model.config.vocab_size != 256:
            raise ValueError(
                f"vocab_size={model.config.vocab_size} in the model: expected 256, a stream is read as bytes"
            )
        self.model = model
        self.cache = model.new_cache(1)
        self.position = 0
        device = self.cache.layers[-1].device  # the device of the last hidden states
        self._sums = torch.zeros(DECADES, dtype=torch.float64, device=float64_device(device))
        self._last: Tensor | None = None

    def read(self, tokens: Tensor) -> None:
        """Read the next bytes, (n,) int64 with n >= 1, on the device.

        Raises:
            ValueError: an earlier read raised half-way.
        """
        self._check_whole()
        hidden = self.model.hidden(tokens[None], cache=self.cache)[0]
        first, targets = self.position, tokens
        if self._last is None:
            before, first, targets = hidden[:-1], first + 1, tokens[1:]
        else:
            # The state after the chunk before predicts the first byte of this one.
            before = torch.cat((self._last, hidden[:-1]))
        losses = chunked_cross_entropy(self.model.logits, before, targets, _LOSS_CHUNK)
        self._add(first, losses.to(self._sums.device))
        # A copy: a view would keep the whole chunk.
        self._last = hidden[-1:].clone()
        self.position += tokens.numel()

    def nats(self) -> list[float]:
        """The sum of losses in nats, decade by decade; waits for the device."""
        return self._sums.tolist()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to resume; the position is in the cache.

        Raises:
            ValueError: an earlier read raised half-way.
        """
        self._check_whole()
        last = {} if self._last is None else {"last": self._last}
        return {**{f"cache.{name}": x for name, x in self.cache.state_dict().items()}, "sums": self._sums, **last}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state of :meth:`state_dict`, on any device.

        Raises:
            ValueError: entries that are missing, unknown, or of another model or dtype.
        """
        cached = {name.removeprefix("cache."): x for name, x in state.items() if name.startswith("cache.")}
        others = {name: x for name, x in state.items() if not name.startswith("cache.")}
        last, sums = others.pop("last", None), others.pop("sums", None)
        if others or sums is None or sums.shape != (DECADES,) or sums.dtype != torch.float64:
            raise ValueError(
                f"state holds {sorted(others)} and no {DECADES} sums in float64: expected cache, last and sums"
            )
        if last is not None and (last.shape != (1, self.model.config.dim) or not last.is_floating_point()):
            raise ValueError(
                f"last has shape {tuple(last.shape)} and dtype {last.dtype}: expected the last hidden state"
            )
        self.cache.load_state_dict(cached)
        if (self.cache.position > 0) != (last is not None):
            raise ValueError(
                f"state stands at position {self.cache.position}: expected a last hidden state beyond 0 only"
            )
        self.position = self.cache.position
        self._sums.copy_(sums)
        self._last = None if last is None else last.to(self.cache.layers[-1].device)

    def _check_whole(self) -> None:
        if self.position != self.cache.position:
            raise ValueError(
                f"reader counted {self.position} bytes and its cache read {self.cache.position}: an earlier read raised "
                "half-way; expected load_state_dict() of a state before it"
            )

    def _add(self, first: int, losses: Tensor) -> None:
        """Add the losses of the positions from ``first`` on, each to its decade."""
        end = first + losses.numel()
        inside = [10**k for k in range(1, DECADES) if first < 10**k < end]
        for low, high in pairwise((first, *inside, end)):
            self._sums[decade_of(low)] += losses[low - first : high - first].sum(dtype=torch.float64)


def decade_of(position: int) -> int:
    """0 for the positions 0 to 9, 1 for 10 to 99, ..."""
    return len(str(position)) - 1


def decade_counts(position: int) -> list[int]:
    """How many of the bytes before ``position`` are predicted (all but the first), decade by decade."""
    edges = [1, *(10**k for k in range(1, DECADES + 1))]
    return [max(0, min(high, position) - low) for low, high in pairwise(edges)]


def bits_per_byte(nats: float, count: int) -> float | None:
    """Nats over ``count`` bytes as bits per byte; None for no byte."""
    return nats / math.log(2) / count if count else None
