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
from benchmarks.learning.patterns import ARMS, WINDOW, cost


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
    batch: int = 2
    steps: int = 4000
    lr: float = 3e-3
    matrix_lr: float | None = 0.02
    warmup: int = 100
    cooldown: float = 0.3
    held_out: int = 192
    check_every: int = 250
    checked: int = 16


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
    model = Model(shape, layers).to(device)
    model.make_masks(device)
    optimizers = _optimizers(model, settings)
    compiled: Any = torch.compile(model, dynamic=False) if device.type == "cuda" else model
    loss_of: Any = torch.compile(model.loss, dynamic=False) if device.type == "cuda" else model.loss
    fixed = windows(text.held_out, settings.held_out, shape.context + 1, 1)
    repeats = np.stack([probes.repeat_distance(window) for window in fixed[: settings.checked]])
    inside = (repeats > 0) & (repeats <= WINDOW)
    losses: list[Tensor] = []
    curve, checks = [], []
    begun, excluded = time.perf_counter(), 0.0
    for step in range(settings.steps):
        rows = windows(text.train, settings.batch, shape.context + 1, (seed << 32) + step)
        tokens = torch.from_numpy(rows.astype(np.int64)).to(device, non_blocking=True)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * _rate(step, settings)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(tokens)
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step == 0:
            _wait(device)
            begun = time.perf_counter()  # compilation apart
        if (step + 1) % settings.check_every == 0 or step + 1 == settings.steps:
            _wait(device)
            paused = time.perf_counter()
            bits = probes.bits_of(compiled, fixed[: settings.checked], device, settings.checked)
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
    score = lambda rows: probes.bits_of(compiled, rows, device, settings.checked)  # noqa: E731
    return {
        "arm": arm,
        "seed": seed,
        "settings": asdict(settings),
        "layers": [asdict(layer) for layer in layers],
        "cost": cost(layers, shape.heads, shape.context),
        "pairs_a_token": sum(layer.pairs(shape.heads, shape.context) for layer in layers) / shape.context,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "tokens": settings.steps * settings.batch * shape.context,
        "tokens_a_second": (settings.steps - 1) * settings.batch * shape.context / seconds,
        "curve": curve,
        "checks": checks,
        "formed": formation_step(checks),
        **probes.all_probes(score, text.held_out, fixed, shape.context),
    }


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


def _optimizers(model: Model, settings: Settings) -> list[tuple[torch.optim.Optimizer, float]]:
    matrices = [weight for weight in model.blocks.parameters() if weight.dim() == 2]
    chosen = {id(weight) for weight in matrices} if settings.matrix_lr is not None else set()
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    made: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True), settings.lr)
    ]
    if settings.matrix_lr is not None:
        muon = torch.optim.Muon(matrices, lr=settings.matrix_lr, weight_decay=0.0, adjust_lr_fn="original")
        made.append((muon, settings.matrix_lr))
    return made
