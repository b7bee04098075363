"""The settings of a training run, checked before any work is done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from typing import Any

import torch

from longnet.checks import check_int, check_number
from longnet.models import LongNetConfig
from longnet.training.schedule import SCHEDULES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_AT_LEAST = {
    "context": 1,
    "batch": 1,
    "accumulate": 1,
    "warmup": 0,
    "seed": 0,
    "eval_every": 0,
    "eval_windows": 1,
    "save_every": 0,
    "cp": 1,
}
_FREE_TO_CHANGE = frozenset({"out", "data", "device", "threads", "cp", "eval_every", "eval_windows", "save_every"})
"""Settings that a resumed run may change. ``data`` is compared by content (its fingerprint), not by path."""
_LENGTH = frozenset({"steps", "minutes"})


@dataclass(frozen=True)
class TrainSettings:
    """The settings of one run. Immutable.

    Attributes:
        out: the run folder.
        model: the model to train; byte-level, so ``vocab_size`` is 256, and causal.
        data: a file or folder; ``None`` for the standard library's source.
        context: bytes per window, N.
        steps: optimizer steps; ``None`` for no limit but the minutes.
        minutes: wall-clock limit of the training loop (evaluations and saves count, the report does not).
        batch: windows per forward pass, B.
        accumulate: forward and backward passes per step.
        lr: the peak learning rate of AdamW.
        warmup: steps of linear warm-up.
        schedule: what follows it: ``"cosine"``, ``"linear"``, ``"constant"`` or ``"wsd"``.
        lr_floor: the share of ``lr`` left at the end.
        weight_decay: on matrices only.
        beta1, beta2: of AdamW.
        clip: largest gradient norm; 0 for no clipping.
        dtype: of the forward pass (autocast); weights and optimizer stay float32.
        device: ``"auto"`` (CUDA, else MPS, else the CPU) or a torch device.
        seed: of the initial weights, the windows and dropout.
        eval_every: steps between two evaluations on ``eval_windows`` held-out windows; 0 for none during training.
        save_every: steps between two checkpoints; 0 for one at the end alone.
        threads: CPU threads of torch; ``None`` takes one for a small model on the CPU, else torch's number.
        cp: processes that share one window, of those that torchrun started.
    """

    out: str
    model: LongNetConfig
    data: str | None = None
    context: int = 8192
    steps: int | None = None
    minutes: float | None = None
    batch: int = 1
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 50
    schedule: str = "cosine"
    lr_floor: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0
    eval_every: int = 200
    eval_windows: int = 16
    save_every: int = 100
    threads: int | None = None
    cp: int = 1

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            check_int(name, getattr(self, name), least)
        if self.steps is not None:
            check_int("steps", self.steps, 1)
        if self.threads is not None:
            check_int("threads", self.threads, 1)
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed} is too large: expected less than 2 ** 63")
        if self.steps is None and self.minutes is None:
            raise ValueError("steps=None and minutes=None: expected at least one of them, or the run would never end")
        if self.minutes is not None:
            check_number("minutes", self.minutes, 0.0, above=True)
        check_number("lr", self.lr, 0.0, above=True)
        check_number("weight_decay", self.weight_decay, 0.0)
        check_number("clip", self.clip, 0.0)
        check_number("lr_floor", self.lr_floor, 0.0, most=1.0)
        check_number("beta1", self.beta1, 0.0, most=1.0)
        check_number("beta2", self.beta2, 0.0, most=1.0)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is unknown: expected one of {SCHEDULES}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown: expected one of {tuple(DTYPES)}")
        if self.model.vocab_size != 256:
            raise ValueError(f"vocab_size={self.model.vocab_size} in the model: expected 256, as training is on bytes")
        if not self.model.causal:
            raise ValueError("causal=False in the model: expected True, as it is trained to predict the next byte")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the model as its own dictionary."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainSettings:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: an unknown key.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"settings hold {unknown}: expected only {sorted(known)}")
        return cls(**{**values, "model": LongNetConfig.from_dict(values["model"])})

    def replace(self, **changes: Any) -> TrainSettings:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    @property
    def bytes_per_step(self) -> int:
        """Bytes that one step trains on."""
        return self.batch * self.accumulate * self.context

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run done after ``step`` steps and ``seconds``: of its steps or its minutes, whichever is larger."""
        by_step = step / self.steps if self.steps is not None else 0.0
        by_clock = seconds / (60.0 * self.minutes) if self.minutes is not None else 0.0
        return max(by_step, by_clock)


def changed_settings(saved: TrainSettings, asked: TrainSettings) -> list[str]:
    """The differences between a run's settings and those it is resumed with that would change its losses, in words.

    The length of the run (``steps``, ``minutes``) is not compared here.
    """
    changes = []
    for field in fields(TrainSettings):
        old, new = getattr(saved, field.name), getattr(asked, field.name)
        if field.name in _FREE_TO_CHANGE or field.name in _LENGTH or old == new:
            continue
        if field.name != "model":
            changes.append(f"{field.name} was {old!r}, now {new!r}")
            continue
        before, after = saved.model.to_dict(), asked.model.to_dict()
        changes += [
            f"model {key} was {before[key]!r}, now {after[key]!r}" for key in before if before[key] != after[key]
        ]
    return changes


def resolve_device(device: str, dtype: str) -> torch.device:
    """The torch device of a setting, checked together with the dtype.

    Raises:
        ValueError: an unknown device, one that this machine lacks, or a dtype that it does not train in.
    """
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        chosen = torch.device(kind)
    else:
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"device={device!r} cannot be used: {reason}") from None
    if dtype == "float16" and chosen.type != "cuda":
        raise ValueError(
            f"dtype='float16' on device={chosen.type!r}: expected 'bfloat16' or 'float32'. Gradients in float16 need "
            "loss scaling, which exists on CUDA only, and on CPUs float16 is not faster than bfloat16"
        )
    return chosen


def choose_dtype(device: str) -> str:
    """``"bfloat16"`` where the device multiplies it in hardware, else ``"float32"``: what ``--dtype auto`` stands for.

    A CPU without such instructions (AMX or AVX-512 BF16) would be many times slower in it.
    """
    kind = resolve_device(device, "float32").type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = torch.cpu.get_capabilities() if kind == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
        fast = bool(known.get("amx_bf16") or known.get("avx512_bf16"))
    return "bfloat16" if fast else "float32"
