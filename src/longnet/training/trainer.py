"""The loop of one run: steps, evaluations and saves, until the steps or the minutes are used up."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn

from longnet.models.layer_types import DILATED_TYPES
from longnet.training.batches import Batches
from longnet.training.checkpoint import Checkpoint, save_checkpoint
from longnet.training.data import Corpus
from longnet.training.device import autocast
from longnet.training.evaluate import score_windows, window_starts
from longnet.training.folder import RunFolder
from longnet.training.metrics import RUN_LINES, MetricsLog
from longnet.training.models import Config, Model
from longnet.training.optimizer import make_optimizer
from longnet.training.progress import Reporter, format_seconds, task
from longnet.training.ranks import Ranks, is_of_a_collective, whole
from longnet.training.schedule import decay, warm_up
from longnet.training.settings import TrainSettings
from longnet.training.sharded import ShardedSaves, remove_others
from longnet.training.state import collect_state, restore_state
from longnet.training.track import Callback


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is not finite; the last checkpoint is from an earlier step."""


@dataclass(frozen=True)
class TrainSummary:
    """How a call of ``train`` ended.

    Attributes:
        step: steps done in all.
        tokens: trained on in all.
        seconds: time in the loop in all, over every resumption.
        bits_per_byte: of the last steps (a running mean); NaN if no step was done.
        finished: False if it was asked to stop before the end.
        data: what it was trained on, for ``write_report``.
    """

    step: int
    tokens: int
    seconds: float
    bits_per_byte: float
    finished: bool
    data: Corpus = field(repr=False, compare=False)


class Trainer:
    """Model, optimizer and clock of one run. Call ``start``, ``run`` and ``close`` once, in this order."""

    def __init__(
        self,
        settings: TrainSettings,
        folder: RunFolder,
        data: Corpus,
        model: Model,
        device: torch.device,
        reporter: Reporter,
        ranks: Ranks,
    ) -> None:
        self.settings, self.folder, self.data = settings, folder, data
        self.model, self.device, self.reporter, self.ranks = model, device, reporter, ranks
        ranks.prepare(model)
        self.dtype = getattr(torch, settings.dtype)
        self.batches = Batches(settings, data, ranks, device)
        self.optimizer = make_optimizer(model, settings)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.step, self.saved_step, self.evaluated_step = 0, -1, -1
        self.metrics: MetricsLog | None = None
        self.saves: ShardedSaves | None = None
        if ranks.background is not None and settings.checkpoint == "sharded":
            self.saves = ShardedSaves(folder.checkpoint_folder, ranks.background, self._write_model)
        self.callbacks: Sequence[Callback] = ()
        self.share = 0.0
        self.earlier_seconds, self.started = 0.0, time.monotonic()
        self.smooth_bits, self.smooth_seconds = math.nan, math.nan
        self.eval_context = min(settings.context, data.held_out.size - 1)

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    @property
    def tokens(self) -> int:
        return self.step * self.settings.tokens_per_step

    @property
    def progress(self) -> float:
        """Share of the run that is done: of its steps or its minutes, whichever is larger."""
        return min(1.0, self.settings.progress(self.step, self.seconds))

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Describe the run, then restore the checkpoint or save a first one."""
        settings, config = self.settings, self.settings.model
        in_weights = "" if settings.weights == "float32" else f" and {settings.weights} weights"
        count = sum(weight.numel() for weight in self.model.parameters())
        self.reporter.say(
            f"Model: {count:,} parameters, {config.layers} layers, width {config.dim}, {config.heads} heads; "
            + _describe_layers(config)
        )
        self.reporter.say(
            f"Training on {self.device} in {settings.dtype}{in_weights} with {torch.get_num_threads()} CPU threads: context "
            f"{settings.context:,}, {settings.tokens_per_step:,} {self.data.unit} "
            f"a step, {_length(settings)}, into {self.folder.path}"
        )
        if settings.short_context is not None:
            self.reporter.say(
                f"The first {settings.short_share:.0%} of the run reads windows of {settings.short_context:,} {self.data.unit}"
            )
        if settings.optimizer == "muon":
            self.reporter.say(f"Muon trains the blocks' matrices, peak learning rate {settings.peak_matrix_lr:g}")
        if several := self.ranks.describe():
            self.reporter.say(several)
        if self.eval_context < settings.context:
            self.reporter.say(
                f"The held-out part is shorter than one context: evaluating on {self.eval_context:,} {self.data.unit}"
            )
        if checkpoint is not None:
            restore_state(checkpoint, self.model, self.optimizer, self.device)
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(checkpoint.progress["scaler"])
            self.step = self.saved_step = checkpoint.progress["step"]
            self.earlier_seconds = checkpoint.progress["seconds"]
            self.reporter.say(f"Resuming after step {self.step:,}, {format_seconds(self.earlier_seconds)} into the run")
        if self.ranks.is_first:
            self.folder.write_start(settings.to_dict(), self.data.describe(), self.device)
            self.data.tokenizer.save(self.folder.path)
            remove_others(self.folder.checkpoint_folder, None if checkpoint is None else checkpoint.path)
            self.metrics = MetricsLog(self.folder.metrics_file, keep_to=self.step, kinds=RUN_LINES)
            if checkpoint is not None:
                self._repair_model(checkpoint)
        if checkpoint is None:
            self.save()
            if self.saves is not None:
                self.saves.wait()
        self.started = time.monotonic()

    def _repair_model(self, checkpoint: Checkpoint) -> None:
        """Write ``model.safetensors`` again unless it is the checkpoint's model: a kill may have come between the two."""
        weights, config = checkpoint.weights(), self.settings.model
        if not self.folder.holds_weights(weights, config):
            self.reporter.say(
                f"{self.folder.model_file} is missing, damaged or of another step: writing it from the checkpoint"
            )
            self.folder.write_weights(weights, config)

    def _write_model(self, checkpoint: Checkpoint) -> None:
        """After a kill before this, the next start writes the model from the checkpoint."""
        self.folder.write_weights(checkpoint.weights(), self.settings.model)

    def run(self, should_stop: Callable[[], bool]) -> TrainSummary:
        """Step until the end, or until asked to stop; the state is saved either way."""
        try:
            return self._run(should_stop)
        except Exception as error:
            # A save cannot end without a process that is gone.
            if self.saves is not None and not is_of_a_collective(error):
                self.saves.settle()
            raise

    def _run(self, should_stop: Callable[[], bool]) -> TrainSummary:
        settings, finished = self.settings, True
        with task(self.reporter, "Training", self.progress):
            while True:
                # After a save that failed the next one raises its error, in all processes at the same step.
                has_failed = self.saves is not None and self.saves.has_failed
                self.share, stop = self.ranks.decide(self.progress, should_stop() or has_failed)
                if self.share >= 1.0:
                    break
                if stop:
                    finished = False
                    break
                self.train_step()
                if settings.eval_every and self.step % settings.eval_every == 0:
                    self.evaluate()
                if settings.save_every and self.step % settings.save_every == 0:
                    self.save()
            if self.saved_step != self.step:
                if finished and settings.eval_every and self.evaluated_step != self.step:
                    self.evaluate()
                self.save()
            if self.saves is not None:
                self.saves.wait()
        return TrainSummary(self.step, self.tokens, self.seconds, self.smooth_bits, finished, self.data)

    def close(self) -> None:
        """Close the metrics."""
        if self.metrics is not None:
            self.metrics.close()

    def train_step(self) -> None:
        settings, begun = self.settings, time.monotonic()
        warmed, left = warm_up(self.step + 1, settings.warmup), decay(settings.schedule, self.share, settings.lr_floor)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * warmed * left
        context = settings.context_at(self.share)
        self.model.train()
        # By the step: a resumed run draws what an uninterrupted one does.
        self.ranks.vary_dropout(settings.seed + self.step)
        losses = []
        for tokens, targets, bounds in self.batches.at(self.step + 1, context):
            with autocast(self.device, self.dtype):
                part_loss = self.model.loss(tokens, targets, cu_seqlens=bounds) / settings.accumulate
            self.scaler.scale(part_loss).backward()
            losses.append(part_loss.detach().float())
        self.scaler.unscale_(self.optimizer)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip or math.inf))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.batches.prepare(self.step + 2, context)
        # A step waits for the device here alone: it computes gradients while the host issues the optimizer's operations.
        *parts, norm = torch.stack((*losses, norm.float())).tolist()
        loss = sum(parts)
        self._require_finite("loss", loss)
        # With loss scaling an infinite gradient can happen: the scaler skips that step.
        if not self.scaler.is_enabled():
            self._require_finite("gradient norm", norm)
        self.step += 1
        self._record(loss, settings.lr * warmed * left, norm, time.monotonic() - begun)

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            if self.saves is not None:
                self.saves.wait()
            file = self.folder.checkpoint_file if self.saves is None else self.folder.latest_file
            of_muon = (
                f" and matrix_lr (now {self.settings.peak_matrix_lr:g})" if self.settings.optimizer == "muon" else ""
            )
            raise TrainingDiverged(
                f"the {what} of step {self.step + 1} is {value}: training stopped, and {file} still holds "
                f"step {self.saved_step}. A lower lr (now {self.settings.lr}){of_muon}, a longer warmup or clipping may "
                "help"
            )

    def _record(self, loss: float, rate: float, norm: float, took: float) -> None:
        bits, speed = loss / math.log(2) * self.data.tokens_per_byte, self.settings.tokens_per_step / took
        self._write(
            kind="train",
            step=self.step,
            loss=loss,
            bits_per_byte=bits,
            lr=rate,
            grad_norm=norm if math.isfinite(norm) else None,
            tokens=self.tokens,
            seconds=round(self.seconds, 3),
            tokens_per_second=round(speed, 1),
        )
        self.smooth_bits = bits if math.isnan(self.smooth_bits) else 0.95 * self.smooth_bits + 0.05 * bits
        self.smooth_seconds = took if math.isnan(self.smooth_seconds) else 0.9 * self.smooth_seconds + 0.1 * took
        nats = self.smooth_bits * math.log(2) / self.data.tokens_per_byte
        self.reporter.advance(
            self.progress,
            f"step {self.step:,}  loss {nats:.4f}  {self.smooth_bits:.3f} bits/byte  "
            f"{self.settings.tokens_per_step / self.smooth_seconds:,.0f} tokens/s",
        )

    def _write(self, **values: Any) -> None:
        if self.metrics is not None:
            self.metrics.write(**values)
            for callback in self.callbacks:
                callback(dict(values))

    def evaluate(self) -> None:
        """Held-out bits per byte on a fixed, evenly spaced set of windows."""
        settings = self.settings
        starts = window_starts(self.data.held_out.size, self.eval_context, settings.eval_windows)
        bits = score_windows(
            self.model,
            self.data.held_out,
            self.eval_context,
            starts,
            batch=settings.batch,
            device=self.device,
            dtype=self.dtype,
            ranks=self.ranks,
        )
        mean = float(bits.mean(dtype="float64")) * self.data.tokens_per_byte
        self._write(
            kind="eval",
            step=self.step,
            loss=mean * math.log(2) / self.data.tokens_per_byte,
            bits_per_byte=mean,
            tokens=self.tokens,
            seconds=round(self.seconds, 3),
            windows=int(starts.size),
        )
        self.evaluated_step = self.step
        self.reporter.say(f"Step {self.step:,}: {mean:.4f} bits per held-out byte ({starts.size} windows)")

    def save(self) -> None:
        """Commit the state, at once or in the background. The metrics reach the disk first: it is never ahead of them."""
        tensors = collect_state(self.model, self.optimizer, self.device, sharded=self.saves is not None)
        if self.metrics is not None:
            self.metrics.flush_to_disk()
        progress: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "settings": self.settings.to_dict(),
            "data": self.data.fingerprint,
        }
        if self.scaler.is_enabled():
            progress["scaler"] = self.scaler.state_dict()
        if self.saves is not None:
            # One process goes on where a run of several was: the random numbers of the first are the run's.
            own = {name: x for name, x in tensors.items() if self.ranks.is_first or not name.startswith("rng.")}
            self.saves.begin(own, progress)
        elif self.ranks.is_first:
            path = self.folder.checkpoint_file
            save_checkpoint(path, tensors, progress)
            remove_others(path.parent, path)
            self._write_model(Checkpoint(path, tensors, progress))
        self.saved_step = self.step


def _describe_layers(config: Config) -> str:
    segments = f"segments {config.segment_lengths}, dilation rates {config.dilation_rates}"
    if config.layer_types is None:
        return segments
    # Fewer types than layers are repeated.
    types = islice(cycle(config.layer_types), config.layers)
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(types).items())
    window = "their own" if config.sliding_window is None else f"{config.sliding_window:,}"
    numbers = [segments] if set(DILATED_TYPES) & set(config.layer_types) else []
    if {"sliding_attention", "strided_attention"} & set(config.layer_types):
        numbers.append(f"window {window}")
    if "strided_attention" in config.layer_types:
        numbers.append(f"stride {config.stride} by {config.stride_block}")
    return "; ".join(filter(None, (kinds, ", ".join(numbers))))


def _length(settings: TrainSettings) -> str:
    parts = []
    if settings.steps is not None:
        parts.append(f"{settings.steps:,} steps")
    if settings.minutes is not None:
        parts.append(f"{settings.minutes:g} minutes")
    return " or ".join(parts)
