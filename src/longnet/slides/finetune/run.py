"""A cross-validation from a table to a report. What is done already stays: the same command continues after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from longnet.gigapath.heads import SlideHead
from longnet.slides.files import result_bytes
from longnet.slides.finetune.data import ReadOuts, Tiles, digest, read_outs
from longnet.slides.finetune.fit import Epoch, Fit, seed_of
from longnet.slides.finetune.metrics import score
from longnet.slides.finetune.models import ABMIL, ENCODER, MEAN_POOLING, describe_encoder, make_encoder, make_model
from longnet.slides.finetune.outcome import FoldResult, Outcome, as_json, summarise, write_predictions
from longnet.slides.finetune.report import write_report
from longnet.slides.finetune.settings import FinetuneSettings
from longnet.slides.finetune.splits import Split, rare_targets
from longnet.slides.finetune.start import prepare
from longnet.slides.finetune.table import Cohort, read_cohort
from longnet.slides.finetune.tasks import FoldTask
from longnet.slides.finetune.workers import Workers
from longnet.slides.folders import HIDDEN, listed
from longnet.training.device import resolve_device
from longnet.training.files import read_json, write_bytes, write_json
from longnet.training.lock import locked
from longnet.training.progress import Reporter, SilentReporter, task

# Settings of the encoder on which the read-outs of a frozen one depend.
_OF_READ_OUTS = (
    "arch",
    "dim",
    "depth",
    "read_out",
    "global_pool",
    "tile_size",
    "unit",
    "mpp",
    "max_wsi_size",
    "seed",
    "dtype",
)


def finetune(
    settings: FinetuneSettings,
    *,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    workers: Workers | None = None,
) -> Outcome:
    """Train and test the encoder and the baselines on every fold; write results and ``report.html`` into ``settings.out``.

    Args:
        reporter: receives progress messages; silent by default.
        should_stop: asked after every epoch; once true, the state is saved.
        workers: the processes that train together; all call, the first writes.

    Raises:
        ValueError: a table, a slide, a checkpoint or an output folder that cannot be used; the message names it.
        Stopped: ``should_stop`` was true. The same call continues.
        TrainingDiverged: a loss that is not finite.
    """
    workers = workers or Workers()
    tell = reporter if reporter is not None and workers.is_first else SilentReporter()
    device = resolve_device(settings.device, settings.dtype)
    if settings.checkpoint is not None and not Path(settings.checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint={settings.checkpoint!r} is not a file: expected a slide encoder's weights")
    cohort = read_cohort(settings)
    tell.say(describe_encoder(settings))
    if not cohort.has_patients:
        tell.say(f"No column {settings.patient_column!r}: each slide counts as a patient of its own")
    if cohort.hidden:
        tell.say(f"Passed over, {HIDDEN}: {listed(cohort.hidden)}")
    out = Path(settings.out)
    with _locked_by_first(out, workers):
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            splits = prepare(settings, cohort, workers, tell)
            for note in rare_targets(settings.task, cohort, splits):
                tell.say(note)
            results = _all_results(out, settings, cohort, splits, device, workers, tell, should_stop)
        outcome = summarise(settings, cohort, splits, results)
        if workers.is_first:
            write_predictions(out / "predictions.csv", outcome)
            write_json(out / "metrics.json", as_json(outcome))
            tell.say("Drawing the figures")
            write_report(outcome, out)
        workers.any_of(False)
    return outcome


def _all_results(
    out: Path,
    settings: FinetuneSettings,
    cohort: Cohort,
    splits: Sequence[Split],
    device: torch.device,
    workers: Workers,
    tell: Reporter,
    should_stop: Callable[[], bool],
) -> dict[str, list[FoldResult]]:
    names = (ENCODER, MEAN_POOLING, ABMIL) if settings.baselines else (ENCODER,)
    results: dict[str, list[FoldResult]] = {name: [] for name in names}
    tiles = Tiles(cohort.paths, settings, device)
    encoded: ReadOuts | None = None
    for fold, split in enumerate(splits):
        learns = FoldTask(settings, cohort, split.train)
        for name in names:
            done = out / f"fold-{fold}" / f"{name}.json"
            if not workers.first_of(done.is_file()):
                if name == ENCODER and settings.freeze and encoded is None:
                    encoded = _encode(out, settings, cohort, tiles, device, workers, tell)
                slides = encoded if name == ENCODER and encoded is not None else tiles
                torch.manual_seed(seed_of(settings.seed, fold, name))
                model = make_model(name, settings, slides.in_dim, learns.outputs).to(device)
                done.parent.mkdir(parents=True, exist_ok=True)
                state = done.with_suffix(".state.safetensors")
                fit = Fit(name, model, slides, learns, split, fold, settings, state, workers)
                with task(tell, f"Fold {fold} ({fold + 1} of {len(splits)}), {name}"):
                    fitted = fit.run(tell.advance, should_stop)
                if workers.is_first:
                    write_bytes(done.with_suffix(".safetensors"), result_bytes(fitted.weights, {"model": name}))
                    predicted = learns.predict(fitted.outputs).tolist()
                    record = {"best": fitted.best, "epochs": [asdict(one) for one in fitted.epochs]}
                    slides_predicted = dict(zip([cohort.slides[n] for n in split.test], predicted, strict=True))
                    # Written last: where it exists, the model is done.
                    write_json(done, record | {"predictions": slides_predicted})
                    state.unlink(missing_ok=True)
                workers.any_of(False)
            results[name].append(_read_result(done, settings.task, cohort, split))
    return results


def _encode(
    out: Path,
    settings: FinetuneSettings,
    cohort: Cohort,
    tiles: Tiles,
    device: torch.device,
    workers: Workers,
    tell: Reporter,
) -> ReadOuts:
    torch.manual_seed(seed_of(settings.seed, ENCODER))
    head = SlideHead(make_encoder(settings, tiles.in_dim), 1, layers=settings.layers, freeze=True).to(device)
    weights = "random" if settings.checkpoint is None else digest(Path(settings.checkpoint))
    made_from = {name: str(getattr(settings, name)) for name in _OF_READ_OUTS} | {"weights": weights}
    return read_outs(head, tiles, cohort, settings, made_from, out / "encoded", workers, tell)


def _read_result(path: Path, task: str, cohort: Cohort, split: Split) -> FoldResult:
    try:
        record = read_json(path)
        predicted = np.array([record["predictions"][cohort.slides[n]] for n in split.test])
        epochs, best = [Epoch(**one) for one in record["epochs"]], int(record["best"])
        metrics = score(task, cohort.values[list(split.test)], predicted)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): remove the folder {path.parent}, and the same command trains "
            "the fold again"
        ) from None
    return FoldResult(epochs, best, predicted, metrics)


@contextmanager
def _locked_by_first(out: Path, workers: Workers) -> Iterator[None]:
    """The first process holds the lock on the folder for all; if it cannot, all of them raise."""
    with ExitStack() as stack:
        error: Exception | None = None
        if workers.is_first:
            try:
                stack.enter_context(locked(out))
            except (ValueError, OSError) as refusal:
                error = refusal
        workers.agree(error)
        yield
