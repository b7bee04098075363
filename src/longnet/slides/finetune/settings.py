"""The settings of ``longnet slide-finetune``, checked before any work is done. Imports no torch: the command line reads them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from longnet.checks import check_settings, documented, setting

TASKS = ("classification", "multi-label", "regression", "survival")
DTYPES = ("float32", "bfloat16")
PARALLEL = ("ddp", "fsdp")

FREE_TO_CHANGE = frozenset({"out", "device", "features", "parallel", "table", "checkpoint"})
"""Settings that a resumed run may change: contents of files are compared by their digests."""


@documented
@dataclass(frozen=True)
class FinetuneSettings:
    """The settings of one run. Immutable. A setting with a help text is an option of ``longnet slide-finetune``.

    Attributes:
        table: a CSV file with a row for each slide.
        features: the folder of the slides' files; a file's name without its suffix is in the table's slide column.
        out: the folder of results.
        task: ``"classification"``, ``"multi-label"``, ``"regression"`` or ``"survival"``.
    """

    table: str
    features: str
    out: str
    task: str = setting(choices=TASKS)
    checkpoint: str | None = setting(None, "Slide encoder's weights, .pth or .safetensors.", shown="random weights")
    arch: str = setting("gigapath_slide_enc12l768d", "Architecture of the checkpoint.")
    dim: int | None = setting(None, "Without a checkpoint: channels of the encoder.", shown="required there", least=16)
    depth: int | None = setting(None, "Without a checkpoint: layers of the encoder.", shown="required there")
    read_out: str = setting("-1", "Layers that the head reads, as 6,12 (0 the embedding, -1 the last).")
    freeze: bool = setting(False, "Train the head alone; each slide is then encoded once.")
    global_pool: bool = setting(False, "Mean of the tiles, not the class token.")
    tile_size: int | None = setting(
        None, "Side of a tile, in pixels of the coordinates.", shown="what the slide says, else 256"
    )
    unit: str | None = setting(
        None,
        "Unit of the coordinates: pixels, um (microns) or tiles.",
        shown="what the slide says or its numbers show, else it is refused",
    )
    mpp: float | None = setting(None, "Microns of a pixel, for --unit um.", shown="the slide's")
    max_wsi_size: int | None = setting(None, "Side of the largest slide, in pixels.", shown="1,024 tiles")
    slide_column: str = setting("slide", "Column of the slides' file names, without suffix.")
    patient_column: str = setting("patient", "Column of the patients; without it each slide is a patient.")
    label_columns: str | None = setting(
        None, "Columns of the targets, with commas between.", shown="label, for multi-label all label_*"
    )
    time_column: str = setting("time", "Column of the time to event or censoring, for survival.")
    event_column: str = setting("event", "Column of 1 where the event happened, 0 where censored, for survival.")
    folds: int = setting(5, "Folds of the cross-validation, split by patient.", least=2)
    validation: float = setting(0.2, "Share of the training patients kept for early stopping.", above=0.0, most=0.5)
    epochs: int = setting(20, "Most passes over the training slides.")
    patience: int = setting(5, "Epochs without a lower validation loss before training stops.")
    warmup: float = setting(1.0, "Epochs of linear warm-up; a cosine follows.", least=0.0)
    lr: float = setting(2e-4, "Peak learning rate of the head.", above=0.0)
    layer_decay: float = setting(
        0.95, "Factor of the learning rate from a layer to the one below.", above=0.0, most=1.0
    )
    weight_decay: float = setting(0.05, "On matrices only.", least=0.0)
    dropout: float = setting(0.25, "Of the encoder's layers and the baselines.", least=0.0, most=0.9)
    drop_path: float = setting(
        0.1, "Of the encoder's layers: chance that the last one is skipped.", least=0.0, most=0.9
    )
    accumulate: int = setting(8, "Slides per optimizer step.")
    intervals: int = setting(4, "Intervals of time of the hazard, for survival.", least=2)
    baselines: bool = setting(True, "Train mean pooling + MLP and ABMIL on the same splits.")
    baseline_lr: float = setting(1e-3, "Peak learning rate of the baselines.", above=0.0)
    seed: int = setting(0, "Of splits, weights, order and dropout.", least=0)
    dtype: str = setting("float32", "Of the forward pass: float32 or bfloat16 (autocast).", choices=DTYPES)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps.")
    parallel: str = setting("ddp", "With several processes: ddp, or fsdp with each block a unit.", choices=PARALLEL)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.unit is not None or self.mpp is not None:
            from longnet.slides.units import check_unit

            check_unit(self.unit, self.mpp)
        if self.unit == "tiles" and self.tile_size is not None:
            raise ValueError(f"tile_size={self.tile_size} with unit='tiles': expected one of the two")
        if self.seed >= 2**31:
            raise ValueError(f"seed={self.seed}: expected less than 2 ** 31")
        random = (self.dim, self.depth)
        if self.checkpoint is None and None in random:
            raise ValueError(
                f"checkpoint=None with dim={self.dim} and depth={self.depth}: expected a checkpoint, or dim and depth for an "
                "encoder with random weights"
            )
        if self.checkpoint is not None and random != (None, None):
            raise ValueError(f"checkpoint with dim={self.dim} and depth={self.depth}: expected one of the two")
        if self.task == "survival" and self.label_columns is not None:
            raise ValueError(
                f"label_columns={self.label_columns!r} with task='survival': expected time_column and event_column"
            )
        _numbers(self.read_out)

    @property
    def layers(self) -> tuple[int, ...]:
        """``read_out`` as numbers."""
        return _numbers(self.read_out)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def _numbers(read_out: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in read_out.split(","))
    except ValueError:
        raise ValueError(f"read_out={read_out!r}: expected whole numbers with commas, as 6,12") from None
