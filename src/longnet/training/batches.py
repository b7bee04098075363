"""The windows of each step, on the device; those of the next step are prepared while it computes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longnet.training.data import Corpus, cut_windows, draw_starts, pack_windows
from longnet.training.ranks import Ranks
from longnet.training.settings import TrainSettings


class Batch(NamedTuple):
    """This process's part of the windows of one forward pass.

    Attributes:
        tokens, targets: (windows, N) int64; (1, windows * N) where documents are packed.
        cu_seqlens: where the packed documents begin, and the end.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: list[int] | None


class Batches:
    """The batches of every step of a run. They depend on the step and the length alone, not on what was prepared."""

    def __init__(self, settings: TrainSettings, data: Corpus, ranks: Ranks, device: torch.device) -> None:
        self.settings, self.data, self.ranks, self.device = settings, data, ranks, device
        self._prepared: tuple[int, int, list[Batch]] | None = None

    def at(self, step: int, context: int) -> list[Batch]:
        """The batches of a step, counted from 1, one for each pass of ``accumulate``, of windows of ``context`` tokens."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[:2] == (step, context):
            return prepared[2]
        settings, stream = self.settings, self.data.train
        starts = draw_starts(stream, context, settings.tokens_per_step // context, settings.seed, step)
        return [self._batch(context, some) for some in np.split(starts, settings.accumulate)]

    def prepare(self, step: int, context: int) -> None:
        """Make the batches that ``at`` will be asked for. The device goes on computing."""
        self._prepared = (step, context, self.at(step, context))

    def _batch(self, context: int, starts: np.ndarray) -> Batch:
        tokens, targets = map(self.ranks.own_windows, cut_windows(self.data.train, context, starts))
        bounds = None
        if self.settings.pack is not None:
            own = self.ranks.own_windows(torch.from_numpy(starts)[:, None])[:, 0].numpy()
            tokens, targets, bounds = pack_windows(tokens, targets, self.data.documents, own)
        return Batch(self._moved(tokens), self._moved(targets), bounds)

    def _moved(self, x: Tensor) -> Tensor:
        # From pinned memory: a copy of pageable memory would wait for everything that the device still has to compute.
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)
