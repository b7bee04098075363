"""One run: a pattern, a seed, a budget of tokens; its losses, and what it can do at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.learning import probes
from benchmarks.learning.data import Text, windows
from benchmarks.learning.model import Model, Shape
from benchmarks.learning.patterns import ARMS, FIRST, WINDOW, cost


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share.

    Args:
        batch: windows a step.
        lr: peak learning rate of AdamW, for embeddings, head and gains.
        matrix_lr: of Muon, for matrices; None trains them by AdamW.
        held_out: windows that are scored at the end; ``checked`` of them every ``check_every`` steps.
    """

    shape: Shape = field(default_factory=Shape)
    batch: int = 1
    steps: int = 6000
    lr: float = 3e-3
    matrix_lr: float | None = 0.02
    warmup: int = 100
    cooldown: float = 0.3
    held_out: int = 192
    check_every: int = 250
    checked: int = 16

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The inverse of ``asdict``; what it does not hold is as by default."""
        return cls(**{**values, "shape": Shape(**values["shape"])})


def run(
    arm: str, seed: int, settings: Settings, text: Text, device: torch.device, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train and probe one pattern.

    Returns:
        what a result file holds.
    """
    shape = settings.shape
    layers = ARMS[arm](shape.layers)
    torch.manual_seed(seed)
    share, first = FIRST.get(arm, (0.0, ARMS[arm]))
    model = _model(shape, device)
    model.read_as(first(shape.layers), device)
    train = _Steps(model, settings, device)
    fixed = windows(text.held_out, settings.held_out, shape.context + 1, 1)
    repeats = np.stack([probes.repeat_distance(window) for window in fixed[: settings.checked]])
    inside = (repeats > 0) & (repeats <= WINDOW)
    losses: list[Tensor] = []
    curve, checks = [], []
    begun, excluded = time.perf_counter(), 0.0
    for step in range(settings.steps):
        if step == int(share * settings.steps) > 0:
            model.read_as(layers, device)
            train.begin_anew()
        rows = windows(text.train, settings.batch, shape.context + 1, (seed << 32) + step)
        losses.append(train.step(rows, _rate(step, settings)))
        if step == _Steps.EAGER:
            _wait(device)
            begun, excluded = time.perf_counter(), 0.0  # compilation and capture apart
        if (step + 1) % settings.check_every == 0 or step + 1 == settings.steps:
            _wait(device)
            paused = time.perf_counter()
            bits = probes.bits_of(model, fixed[: settings.checked], device, settings.checked)
            curve.append([step + 1, float(torch.stack(losses).mean()) / math.log(2)])
            losses.clear()
            late = float(bits[:, shape.context // 2 :].mean())
            near, far = (float(bits[which].mean()) if which.any() else None for which in (inside, repeats > WINDOW))
            checks.append({"step": step + 1, "late_bits": late, "near_repeats": near, "far_repeats": far})
            say(f"{arm}, seed {seed}: step {step + 1} of {settings.steps}, {curve[-1][1]:.4f} bits, late {late:.4f}")
            if not math.isfinite(curve[-1][1]):
                raise ValueError(f"{arm}: the loss is {curve[-1][1]} at step {step + 1}")
            excluded += time.perf_counter() - paused
    seconds = time.perf_counter() - begun - excluded
    timed = settings.steps - 1 - _Steps.EAGER
    score = lambda rows: probes.bits_of(model, rows, device, settings.checked)  # noqa: E731
    return {
        "arm": arm,
        "seed": seed,
        "settings": asdict(settings),
        "layers": [asdict(layer) for layer in layers],
        "cost": cost(layers, shape.heads, shape.context),
        "pairs_a_token": sum(layer.pairs(shape.heads, shape.context) for layer in layers) / shape.context,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "tokens": settings.steps * settings.batch * shape.context,
        "tokens_a_second": timed * settings.batch * shape.context / seconds if timed > 0 else None,
        "curve": curve,
        "checks": checks,
        "formed": formation_step(checks),
        **probes.all_probes(score, text.held_out, fixed, shape.context),
    }


def warm_up(arm: str, settings: Settings, device: torch.device) -> None:
    """Compile what :func:`run` needs, on random bytes: another process then finds it in the compiler's cache."""
    shape = settings.shape
    model = _model(shape, device)
    rows = np.random.default_rng(0).integers(0, 256, (settings.checked, shape.context + 1), dtype=np.uint8)
    _, first = FIRST.get(arm, (0.0, ARMS[arm]))
    for stack in dict.fromkeys((first, ARMS[arm])):
        model.read_as(stack(shape.layers), device)
        train = _Steps(model, settings, device)
        for _ in range(_Steps.EAGER + 1):
            train.step(rows[: settings.batch], 0.0)
        probes.bits_of(model, rows, device, settings.checked)


def _model(shape: Shape, device: torch.device) -> Model:
    model = Model(shape).to(device)
    if device.type == "cuda":
        for block in model.blocks:
            block.compile(dynamic=False)  # equal layers are compiled once
    return model


def formation_step(checks: list[dict[str, Any]]) -> int | None:
    """The first check at which repeated bytes cost less than 1 bit within the window and at most 0.3 bits more beyond it."""
    for one in checks:
        near, far = one["near_repeats"], one["far_repeats"]
        if near is not None and far is not None and near < 1.0 and far - near < 0.3:
            return int(one["step"])
    return None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _rate(step: int, settings: Settings) -> float:
    """A warm-up, a plateau, and a straight line to zero."""
    left = (settings.steps - step) / max(1.0, settings.cooldown * settings.steps)
    return min(1.0, (step + 1) / settings.warmup, left)


class _Steps:
    """Training steps; on a GPU one CUDA graph after the first few, since the optimizer alone launches a thousand kernels."""

    EAGER = 3

    def __init__(self, model: Model, settings: Settings, device: torch.device) -> None:
        self._model, self._device = model, device
        self._weights = _in_one_row(model)
        self._optimizers = _optimizers(model, settings, capturable=device.type == "cuda")
        self._streams = [torch.cuda.Stream() for _ in self._optimizers] if device.type == "cuda" else []
        self._tokens = torch.zeros(settings.batch, model.shape.context + 1, dtype=torch.uint8, device=device)
        self._rate = torch.zeros((), device=device)
        self._loss = torch.zeros((), device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager = 0

    def begin_anew(self) -> None:
        """After the model has changed: the graph is captured again."""
        self._graph, self._eager = None, 0

    def step(self, rows: np.ndarray, rate: float) -> Tensor:
        """Train on (batch, context + 1) bytes at this share of the peak learning rates.

        Returns:
            the mean loss in nats.
        """
        self._tokens.copy_(torch.from_numpy(rows))
        self._rate.fill_(rate)
        if self._device.type == "cpu":
            self._run()
        elif self._eager < self.EAGER:
            self._eager += 1
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                self._run()
            here.wait_stream(aside)
        else:
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._run()
            self._graph.replay()
        return self._loss.clone()

    def _run(self) -> None:
        self._model.zero_grad(set_to_none=True)
        enabled = self._device.type == "cuda"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=enabled, cache_enabled=False):
            loss = self._model.loss(self._tokens.long())
        loss.backward()
        before = self._weights.clone()
        self._optimize()
        # Without weight decay both optimizers move a weight in proportion to their learning rate, which the graph holds.
        self._weights.copy_(torch.lerp(before, self._weights, self._rate))
        self._loss.copy_(loss.detach())

    def _optimize(self) -> None:
        """Every optimizer on a stream of its own: Muon's products of one matrix fill a tenth of a GPU."""
        if not self._streams:
            for optimizer in self._optimizers:
                optimizer.step()
            return
        here = torch.cuda.current_stream()
        for optimizer, stream in zip(self._optimizers, self._streams, strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                optimizer.step()
        for stream in self._streams:
            here.wait_stream(stream)


def _in_one_row(model: Model) -> Tensor:
    """Let all weights be views of one row, so that an operation on all of them is one kernel."""
    weights = list(model.parameters())
    row = torch.cat([weight.detach().flatten() for weight in weights])
    for weight, part in zip(weights, row.split([weight.numel() for weight in weights]), strict=True):
        weight.data = part.view_as(weight)
    return row


def _optimizers(model: Model, settings: Settings, capturable: bool) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices of each block."""
    blocks = [[weight for weight in block.parameters() if weight.dim() == 2] for block in model.blocks]
    chosen = {id(weight) for block in blocks for weight in block} if settings.matrix_lr is not None else set()
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            others, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=capturable
        )
    ]
    if settings.matrix_lr is not None:
        made += [
            torch.optim.Muon(block, lr=settings.matrix_lr, weight_decay=0.0, adjust_lr_fn="original")
            for block in blocks
        ]
    return made
