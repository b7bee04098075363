"""The settings of a training run, checked before any work is done. Imports no torch: the command line reads them."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from longnet.checks import check_path, check_settings, documented, setting, short_repr
from longnet.training.schedule import SCHEDULES
from longnet.training.transformer_config import TransformerConfig

# For tools that resolve the annotations; the longnet command reads the settings before torch is imported.
if TYPE_CHECKING or "torch" in sys.modules:
    from longnet.models import LongNetConfig

DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
PACKS = ("documents",)
CHECKPOINTS = ("sharded", "whole")
MATRIX_LR = 3.0
"""``matrix_lr`` where it is not given, in units of ``lr``: as in a trial, 0.01 beside AdamW's 0.003. Updates of both optimizers
are of about one size at one rate."""
DEFAULT_STEPS = 1000
"""Steps of ``longnet train`` when neither steps nor minutes are given."""

_FREE_TO_CHANGE = frozenset(
    {"out", "device", "threads", "cp", "compile", "eval_every", "eval_windows", "save_every", "checkpoint", "track"}
    | {"skip_bad_rows"}
)
"""Settings that a resumed run may change."""
_LENGTH = frozenset({"steps", "minutes"})
_PATHS = ("out", "data", "tokenizer", "init_from")
"""Settings that also take an ``os.PathLike``; they keep its string."""


@documented
@dataclass(frozen=True)
class TrainSettings:
    """The settings of one run. Immutable. A setting with a help text is an option of ``longnet train``.

    Paths (``out``, ``data``, ``tokenizer``, ``init_from``) may be ``pathlib.Path`` objects; they become strings.

    Attributes:
        out: the run folder.
        model: the model to train; causal, and its ``vocab_size`` is the tokenizer's, 256 for bytes. A ``TransformerConfig`` for
            a decoder of Hugging Face, see :func:`longnet.training.read_transformer`.
        data: a file or folder, see ``read_corpus``; ``None`` for the standard library's source.
        tokenizer: ``"bytes"``, a ``tokenizer.json`` or a folder that holds one.
        field: which field of a row is its text.
        skip_bad_rows: leave out rows without such a text, instead of an error.
        pack: ``"documents"`` lets no token see another document than its own; ``None`` reads across.
        init_from: where the first weights come from: a run, a saved model, a checkpoint file or a Hugging Face folder;
            ``None`` for random ones.
        init_digest: of these weights. Others are refused; ``None`` takes any, and the run records what it found.
        context: tokens per window, N.
        short_context: tokens per window in the first part of the run; it divides ``context``. There are as many windows more, so
            a step has as many tokens. ``None`` for whole windows from the start.
        short_share: the share of the run's steps, or minutes, that is that part.
        steps: optimizer steps; ``None`` for no limit but the minutes.
        minutes: wall-clock limit of the training loop (evaluations and saves count, the report does not).
        batch: windows per forward pass, B.
        lr: of AdamW.
        matrix_lr: of Muon, for the matrices of the blocks; ``None`` for three times ``lr``. It has the same schedule.
        schedule: what follows the warm-up: ``"cosine"``, ``"linear"``, ``"constant"`` or ``"wsd"``.
        lr_floor: the share of ``lr`` left at the end.
        beta1, beta2: of AdamW.
        dtype: of the forward pass (autocast).
        weights: dtype of weights, gradients and the optimizer's moments; ``"bfloat16"`` needs that ``dtype`` too.
        device: ``"auto"`` (CUDA, else MPS, else the CPU) or a torch device.
        eval_windows: held-out windows of an evaluation during training.
        checkpoint: how several processes save: ``"sharded"``, each its part while training goes on, into a folder that all of
            them share, or ``"whole"``, one file of the first process. One process writes a whole file.
        compile: whether ``torch.compile`` compiles the blocks; ``None`` does on a GPU that it supports.
        threads: CPU threads of torch; ``None`` takes one for a small model on the CPU, else torch's number.
    """

    out: str
    model: LongNetConfig | TransformerConfig
    data: str | None = None
    tokenizer: str = setting("bytes", "bytes, a tokenizer.json, or a folder that holds one.")
    field: str = setting("text", "Which field of a row of JSON lines, Parquet or a data set is its text.")
    skip_bad_rows: bool = setting(False, "Leave out rows without such a text, and count them.", shown="refuse them")
    pack: str | None = setting(None, "documents: no token sees another document.", choices=PACKS, shown="no")
    context: int = setting(8192, "Tokens (bytes without --tokenizer) per window.")
    short_context: int | None = setting(
        None, "Tokens per window at first, in as many windows more.", least=1, shown="that of --context"
    )
    short_share: float = setting(0.75, "Share of the run with --short-context.", least=0.0, most=1.0)
    steps: int | None = setting(None, "Optimizer steps.", shown=f"{DEFAULT_STEPS}, no limit with --minutes")
    minutes: float | None = setting(None, "Stop training after this long (the report comes after).", above=0.0)
    batch: int = setting(1, "Windows per forward pass.")
    accumulate: int = setting(1, "Forward passes per step.")
    optimizer: str = setting(
        "adamw", "adamw, or muon: Muon for the blocks' matrices, AdamW for the rest.", choices=OPTIMIZERS
    )
    lr: float = setting(1e-3, "Peak learning rate.", above=0.0)
    matrix_lr: float | None = setting(
        None, "Peak learning rate of matrices under Muon.", above=0.0, shown=f"{MATRIX_LR:g} times --lr"
    )
    warmup: int = setting(50, "Steps of linear warm-up.", least=0)
    schedule: str = setting("cosine", "cosine, linear, constant or wsd.", choices=SCHEDULES)
    lr_floor: float = setting(0.05, least=0.0, most=1.0)
    weight_decay: float = setting(0.1, "On matrices only.", least=0.0)
    beta1: float = setting(0.9, least=0.0, most=1.0)
    beta2: float = setting(0.95, least=0.0, most=1.0)
    clip: float = setting(1.0, "Largest gradient norm, 0 for any.", least=0.0)
    dtype: str = setting(
        "float32",
        "Of the forward pass: float32, bfloat16, float16 (CUDA), or auto for the fastest of the first two.",
        choices=DTYPES,
        shown="auto",
    )
    weights: str = setting(
        "float32",
        "Of weights, gradients and optimizer: float32, or bfloat16 with that --dtype (half the memory; small updates are lost).",
        choices=WEIGHTS,
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps.")
    seed: int = setting(0, "Of weights, windows and dropout.", least=0)
    eval_every: int = setting(200, "Steps between evaluations, 0 for none.", least=0)
    eval_windows: int = 16
    save_every: int = setting(100, "Steps between checkpoints, 0 for one at the end.", least=0)
    checkpoint: str = setting(
        "sharded",
        "Of several processes: sharded, where each writes its part while training goes on, or whole, one file.",
        choices=CHECKPOINTS,
    )
    threads: int | None = setting(None, "CPU threads.", shown="torch's choice, 1 for a small model")
    cp: int = setting(1, "Processes that share each window, of those torchrun started.")
    compile: bool | None = setting(None, "Compile the blocks: the first steps take longer.", shown="on a GPU")
    track: str = setting("none", "Show the metrics in tensorboard, wandb or trackio, or none.", choices=TRACKERS)
    init_from: str | None = None
    init_digest: str | None = None

    def __post_init__(self) -> None:
        _check_model(self.model)
        for name in _PATHS:
            value = getattr(self, name)
            if value is not None or name in ("out", "tokenizer"):
                object.__setattr__(self, name, check_path(name, value))
        check_settings(self)
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed} is too large: expected less than 2 ** 63")
        if self.weights != "float32" and self.dtype != self.weights:
            raise ValueError(f"weights={self.weights!r} with dtype={self.dtype!r}: expected dtype={self.weights!r} too")
        if self.matrix_lr is not None and self.optimizer != "muon":
            raise ValueError(f"matrix_lr={self.matrix_lr} with optimizer={self.optimizer!r}: expected optimizer='muon'")
        if self.steps is None and self.minutes is None:
            raise ValueError("steps=None and minutes=None: expected at least one of them, or the run would never end")
        if self.init_digest is not None and self.init_from is None:
            raise ValueError(f"init_digest={self.init_digest!r} with init_from=None: expected both, or init_from alone")
        if self.short_context is not None and self.context % self.short_context:
            raise ValueError(
                f"short_context={self.short_context} with context={self.context}: expected a divisor of the context"
            )
        if self.pack is not None and self.cp > 1:
            raise ValueError(f"pack={self.pack!r} with cp={self.cp}: expected cp=1, as packed documents are one row")
        if isinstance(self.model, TransformerConfig):
            kind = f"a model of transformers ({self.model.transformer['model_type']!r})"
            if self.cp > 1:
                raise ValueError(
                    f"cp={self.cp} with {kind}: expected cp=1, as its positions and attention know no shards"
                )
            if self.compile:
                raise ValueError(
                    f"compile=True with {kind}: expected compile=False, as its attention looks at the documents of each batch"
                )
        if not self.model.causal:
            raise ValueError("causal=False in the model: expected True, as it is trained to predict the next byte")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the model as its own dictionary."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainSettings:
        """The inverse of ``to_dict``; values from before there was a choice of optimizers are of AdamW.

        Raises:
            ValueError: an unknown key.
        """
        from longnet.training.models import config_from_dict

        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"settings hold {unknown}: expected only {sorted(known)}")
        return cls(**{"optimizer": "adamw", **values, "model": config_from_dict(values["model"])})

    def replace(self, **changes: Any) -> TrainSettings:
        """A copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step trains on."""
        return self.batch * self.accumulate * self.context

    def context_at(self, progress: float) -> int:
        """Tokens per window of the step that begins when ``progress`` of the run is done."""
        return self.context if self.short_context is None or progress >= self.short_share else self.short_context

    @property
    def peak_matrix_lr(self) -> float:
        """Muon's peak learning rate."""
        return MATRIX_LR * self.lr if self.matrix_lr is None else self.matrix_lr

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run done after ``step`` steps and ``seconds``: of its steps or its minutes, whichever is larger."""
        by_step = step / self.steps if self.steps is not None else 0.0
        by_clock = seconds / (60.0 * self.minutes) if self.minutes is not None else 0.0
        return max(by_step, by_clock)


def _check_model(model: object) -> None:
    """Raise TypeError unless it is the config of a model that a run can train."""
    if isinstance(model, TransformerConfig):
        return
    from longnet.models import LongNetConfig

    if not isinstance(model, LongNetConfig):
        raise TypeError(
            f"model={short_repr(model)} has type {type(model).__name__}: expected a longnet.LongNetConfig, such as "
            "LongNetConfig.preset('nano'), or a TransformerConfig of longnet.training.read_transformer"
        )


def changed_fields(old: LongNetConfig | TransformerConfig, new: LongNetConfig | TransformerConfig) -> list[str]:
    """The fields in which two configs differ, each in words; those of transformers' own config among them."""
    before, after = _values_of(old), _values_of(new)
    values = ((name, before.get(name), after.get(name)) for name in dict.fromkeys((*before, *after)))
    return [f"{name} was {was!r}, now {now!r}" for name, was, now in values if was != now]


def _values_of(config: LongNetConfig | TransformerConfig) -> dict[str, Any]:
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {**values.pop("transformer", {}), **values}


def changed_settings(saved: TrainSettings, asked: TrainSettings) -> list[str]:
    """The differences between a run's settings and those it is resumed with that would change its losses, in words.

    The length of the run (``steps``, ``minutes``) is not compared here.
    """
    changes = []
    for field in fields(TrainSettings):
        old, new = getattr(saved, field.name), getattr(asked, field.name)
        if field.name in _FREE_TO_CHANGE or field.name in _LENGTH or old == new:
            continue
        # The weights of another path are compared by their digest; one that is not given is the run's.
        if (field.name == "init_from" and None not in (old, new)) or (field.name == "init_digest" and new is None):
            continue
        if field.name == "model":
            changes += [f"model {change}" for change in changed_fields(old, new)]
        else:
            changes.append(f"{field.name} was {old!r}, now {new!r}")
    return changes
