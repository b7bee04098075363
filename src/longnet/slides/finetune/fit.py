"""Training one model on one fold: accumulated slides, early stopping, a state after every epoch to continue from.

All random numbers follow from the seed, the fold, the epoch and the slide. So a run that was killed goes on with the same
numbers, and several processes compute what one does; with FSDP only without dropout, as the last layers then compute all rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from longnet.slides.finetune.models import parameter_groups
from longnet.slides.finetune.settings import FinetuneSettings
from longnet.slides.finetune.splits import Split
from longnet.slides.finetune.tasks import FoldTask
from longnet.slides.finetune.workers import Workers, gradients_stay
from longnet.training.checkpoint import (
    Checkpoint,
    StateKind,
    collect_weights,
    read_checkpoint,
    restore_weights,
    save_checkpoint,
)
from longnet.training.device import autocast
from longnet.training.ranks import whole
from longnet.training.schedule import decay
from longnet.training.state import collect_state, restore_state
from longnet.training.trainer import TrainingDiverged

STATE = StateKind("fine-tuning state", "longnet-finetune-state", {"epochs": list, "best": int})
_FLOOR = 0.01


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


class Source(Protocol):
    """Slides by number: x (1, L, in_dim) and coords (1, L, 2)."""

    in_dim: int

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Epoch:
    """Mean losses in nats (of regression: squared errors) of the slides that train and of those for early stopping."""

    train: float
    validation: float
    lr: float


@dataclass(frozen=True)
class Fitted:
    """A model that was trained.

    Attributes:
        epochs: in their order.
        best: the number of the epoch, from 0, whose weights were kept: that of the lowest validation loss.
        outputs: (test slides, K) on the CPU, in the order of the split.
        weights: by name, whole, on the CPU.
    """

    epochs: list[Epoch]
    best: int
    outputs: Tensor
    weights: dict[str, Tensor]


def seed_of(*parts: object) -> int:
    """A seed below 2 ** 63 from anything that can be printed."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


class Fit:
    """The training of one model on one fold.

    Args:
        name: of the model, see :mod:`longnet.slides.finetune.models`.
        model: on its device; the same weights in every process.
        fold: its number.
        state: where the state is written after every epoch; training continues from it if it is there.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        slides: Source,
        task: FoldTask,
        split: Split,
        fold: int,
        settings: FinetuneSettings,
        state: Path,
        workers: Workers | None = None,
    ) -> None:
        self._workers = workers or Workers()
        self._model, self._slides, self._task, self._split = model, slides, task, split
        self._name, self._fold, self._settings, self._state = name, fold, settings, state
        self._device = next(model.parameters()).device
        self._call = self._workers.wrap(model, settings.parallel, self._device)
        groups = parameter_groups(name, model, settings)
        self._peaks = [group["lr"] for group in groups]
        self._optimizer = torch.optim.AdamW(groups)
        self._epochs: list[Epoch] = []
        self._best, self._best_weights = 0, self._weights()

    def run(
        self,
        on_progress: Callable[[float, str], None] = lambda done, detail: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Fitted:
        """Train until the validation loss has not fallen for ``patience`` epochs; predict the test slides.

        Raises:
            Stopped: ``should_stop`` was true after an epoch.
            TrainingDiverged: a loss that is not finite.
            CheckpointError: a state that is damaged or of another model.
        """
        settings = self._settings
        if self._workers.first_of(self._state.is_file()):
            self._restore(read_checkpoint(self._state, STATE))
        while len(self._epochs) < settings.epochs and len(self._epochs) - self._best <= settings.patience:
            number = len(self._epochs)
            train = self._train(number, on_progress)
            loss = self.loss_of(self._split.validation)
            if not (math.isfinite(train) and math.isfinite(loss)):
                raise TrainingDiverged(
                    f"{self._name}, fold {self._fold}, epoch {number}: the loss is {train} in training and {loss} in validation: "
                    "expected finite losses; a lower --lr or --dtype float32 may help"
                )
            self._epochs.append(Epoch(train, loss, self._peaks[-1] * self._factor(number + 1.0)))
            if loss < self._epochs[self._best].validation or number == 0:
                self._best, self._best_weights = number, self._weights()
            self._save()
            if self._workers.any_of(should_stop()):
                raise Stopped
        on_progress(1.0, self._detail())
        restore_weights(self._model, self._best_weights, self._state)
        test = self.outputs_of(self._split.test)
        return Fitted(self._epochs, self._best, torch.stack([test[n] for n in self._split.test]), self._best_weights)

    def outputs_of(self, slides: Sequence[int]) -> dict[int, Tensor]:
        """By slide, (K,) float32 on the CPU, in evaluation mode; on every process."""
        self._call.eval()
        found = {}
        with torch.no_grad():
            for number, own in self._workers.share(slides):
                output = self._forward(number)
                if own:
                    found[number] = output[0].float().cpu()
        return self._workers.merge(found)

    def loss_of(self, slides: Sequence[int]) -> float:
        """The mean loss of slides in evaluation mode."""
        outputs = self.outputs_of(slides)
        return math.fsum(float(self._task.loss(output[None], n)) for n, output in outputs.items()) / len(outputs)

    def step(self, slides: Sequence[int], epoch: int = 0) -> dict[int, float]:
        """Gradients of the mean loss of slides, on every process, added to those that are there; the loss of each slide.

        DDP and FSDP average gradients over processes: a slide counts ``processes / slides``.
        """
        share = self._workers.share(slides)
        losses = {}
        for turn, (number, own) in enumerate(share, 1):
            torch.manual_seed(seed_of(self._settings.seed, self._fold, epoch, number))
            with gradients_stay(self._call, turn < len(share)):
                loss = self._task.loss(self._forward(number), number)
                (loss * (self._workers.size / len(slides) if own else 0.0)).backward()
            if own:
                losses[number] = float(loss.detach())
        return losses

    def _train(self, epoch: int, on_progress: Callable[[float, str], None]) -> float:
        self._call.train()
        settings, train = self._settings, self._split.train
        generator = torch.Generator().manual_seed(seed_of(settings.seed, self._fold, epoch, "order"))
        order = [train[place] for place in torch.randperm(len(train), generator=generator).tolist()]
        losses: dict[int, float] = {}
        for first in range(0, len(order), settings.accumulate):
            chosen = order[first : first + settings.accumulate]
            losses |= self.step(chosen, epoch)
            factor = self._factor(epoch + (first + len(chosen)) / len(order))
            for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
                group["lr"] = peak * factor
            self._optimizer.step()
            self._optimizer.zero_grad()
            on_progress((epoch + (first + len(chosen)) / len(order)) / settings.epochs, self._detail())
        merged = self._workers.merge(losses)
        return math.fsum(merged.values()) / len(merged)

    def _factor(self, epochs: float) -> float:
        """The learning rate after ``epochs`` epochs, as a share of its peak: a linear warm-up, then a cosine."""
        warmup, whole_run = self._settings.warmup, self._settings.epochs
        rising = min(1.0, epochs / warmup) if warmup else 1.0
        return rising * decay("cosine", (epochs - warmup) / max(whole_run - warmup, 1e-9), _FLOOR)

    def _forward(self, number: int) -> Tensor:
        x, coords = self._slides[number]
        with autocast(self._device, getattr(torch, self._settings.dtype)):
            return self._call(x, coords)

    def _detail(self) -> str:
        if not self._epochs:
            return "epoch 0"
        last = self._epochs[-1]
        return f"epoch {len(self._epochs)}, loss {last.train:.3f}, validation {last.validation:.3f}"

    def _weights(self) -> dict[str, Tensor]:
        return {name: whole(one).detach().cpu().clone() for name, one in collect_weights(self._model).items()}

    def _save(self) -> None:
        tensors = collect_state(self._model, self._optimizer, self._device)
        if self._workers.is_first:
            best = {f"best.{name}": one for name, one in self._best_weights.items()}
            progress = {"epochs": [asdict(one) for one in self._epochs], "best": self._best}
            save_checkpoint(self._state, tensors | best, progress, STATE)
        self._workers.any_of(False)

    def _restore(self, saved: Checkpoint) -> None:
        best = {name.removeprefix("best."): one for name, one in saved.tensors.items() if name.startswith("best.")}
        restore_state(saved, self._model, self._optimizer, self._device)
        self._epochs = [Epoch(**one) for one in saved.progress["epochs"]]
        self._best, self._best_weights = saved.progress["best"], best
