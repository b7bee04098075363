"""``longnet slide-finetune``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from longnet.cli.options import Options, options_of, path_option
from longnet.cli.stopping import INTERRUPTED, stop_on_signal
from longnet.slides.finetune.settings import TASKS, FinetuneSettings


@options_of(FinetuneSettings)
def slide_finetune(
    table: Annotated[Path, typer.Argument(help="CSV with a row for each slide: slide, patient and the targets.")],
    features: Annotated[
        Path,
        typer.Option(
            help="Folder of the slides' tile embeddings (.pt, .npz, .safetensors, .h5, .hdf5), and of folders."
        ),
    ],
    task: Annotated[str, typer.Option(help=f"{', '.join(TASKS)}.")],
    out: Annotated[Path, path_option("--out", "-o", help="Folder of results; the same command continues a run in it.")],
    options: Options,
) -> None:
    """Fine-tune a slide encoder on a cohort, in folds by patient, beside baselines, and write a report.

    Targets are in the column label (names of classes, or numbers for regression), in columns label_* of 0 and 1 for multi-label,
    or in time and event for survival. Training stops early by patients kept apart from those that train; test patients are only
    predicted. Mean pooling with an MLP and ABMIL are trained on the same folds, to show whether the encoder helps.

    The folder holds report.html, metrics.json, predictions.csv, splits.csv, and the weights of each model and fold. Several GPUs:
    torchrun --nproc-per-node 2 -m longnet slide-finetune ...
    """
    settings = FinetuneSettings(table=str(table), features=str(features), out=str(out), task=task, **options)

    import torch.distributed as dist

    from longnet.slides.finetune.fit import Stopped
    from longnet.slides.finetune.metrics import METRICS
    from longnet.slides.finetune.models import ENCODER, RANDOM
    from longnet.slides.finetune.run import finetune
    from longnet.slides.finetune.workers import Workers
    from longnet.training.progress import make_reporter
    from longnet.training.ranks import join_ranks

    with join_ranks(1, settings.device) as (ranks, device):
        reporter = make_reporter()
        say = reporter.say if ranks.is_first else lambda text: None
        workers = Workers(dist.group.WORLD if dist.is_initialized() else None)
        with stop_on_signal(say, "this epoch") as stopping:
            try:
                outcome = finetune(
                    FinetuneSettings(**settings.to_dict() | {"device": device}),
                    reporter=reporter,
                    should_stop=stopping.asked,
                    workers=workers,
                )
            except Stopped:
                say("Stopped. Run the same command to continue.")
                raise typer.Exit(INTERRUPTED) from None
        if ranks.is_first:
            metric = METRICS[settings.task][0]
            for name, means in outcome.means.items():
                mean = means[metric]
                known = "" if math.isnan(mean.low) else f", 95 % interval {mean.low:.3f} to {mean.high:.3f}"
                random = f" of {RANDOM}" if name == ENCODER and settings.checkpoint is None else ""
                print(f"{name}{random}: {metric} {mean.mean:.3f}{known}")
            print(out / "report.html")
