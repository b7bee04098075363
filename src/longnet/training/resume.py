"""Checks that a run can be resumed with given settings, before any of its files is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from longnet.training.checkpoint import Checkpoint, CheckpointError
from longnet.training.data import Corpus, is_prepared, open_corpus
from longnet.training.files import read_json
from longnet.training.folder import RunFolder, software_versions
from longnet.training.metrics import RUN_LINES, read_metrics
from longnet.training.schedule import is_flat_until
from longnet.training.settings import TrainSettings, changed_settings


def read_settings(folder: RunFolder) -> TrainSettings:
    """The settings of the run in ``folder``, or of one that was stopped there while its data were prepared.

    Raises:
        ValueError: no run there, or a ``run.json`` that holds none.
    """
    if folder.is_starting:
        return TrainSettings.from_dict(read_json(folder.starting_file))
    return TrainSettings.from_dict(_section(folder, "settings"))


def check_starting(folder: RunFolder, settings: TrainSettings) -> None:
    """Raise ValueError unless a run that was stopped while its data were prepared begins with the settings it was given."""
    if changes := changed_settings(read_settings(folder), settings):
        raise ValueError(_refusal(folder, changes))


def _refusal(folder: RunFolder, changes: list[str]) -> str:
    return (
        f"the run in {str(folder.path)!r} cannot be resumed with other settings: {'; '.join(changes)}. "
        "Expected the same ones (leave them out), or a new --out"
    )


def check_resume(
    folder: RunFolder, settings: TrainSettings, corpus: Corpus, checkpoint: Checkpoint | None
) -> list[str]:
    """Raise unless resuming gives the losses of the run that was started; return notes for the user.

    Args:
        folder: of the run.
        settings: those of the resumed run.
        corpus: the data as read now.
        checkpoint: the last one; ``None`` if the run was killed before its first.

    Raises:
        ValueError: settings or data differ; the message names each of them.
    """
    saved = read_settings(folder)
    # Prepared data may be moved: their fingerprint says whether they are the same.
    is_moved = settings.data is not None and is_prepared(settings.data)
    changes = changed_settings(saved.replace(data=settings.data) if is_moved else saved, settings)
    fingerprint = _section(folder, "data").get("fingerprint")
    if (change := data_change(folder, corpus)) is not None:
        changes.append(
            f"data {corpus.source!r} is not what the run was started on (its fingerprint differs: {change}): restore it"
        )
    if changes:
        raise ValueError(_refusal(folder, changes))
    notes = []
    if checkpoint is None:
        _check_new(folder)
        notes.append("The run was stopped before its first checkpoint: starting from step 0")
    else:
        _check_origin(folder, saved, checkpoint, fingerprint)
        if (step := checkpoint.progress["step"]) > 0:
            folder.require_metrics(step)
        _check_length(folder, saved, settings, checkpoint)
    if (saved.device, saved.threads) != (settings.device, settings.threads):
        notes.append("Note: another device or thread count than before, losses may differ in their last digits")
    before, now = _section(folder, "versions"), software_versions()
    other = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if other:
        notes.append(f"Note: other versions than before ({', '.join(other)}), losses may differ in their last digits")
    return notes


def _check_new(folder: RunFolder) -> None:
    """Refuse a run that has lost its checkpoint: every run commits one before its first step."""
    lines = read_metrics(folder.metrics_file, kinds=RUN_LINES) if folder.metrics_file.exists() else []
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    if steps:
        raise CheckpointError(
            f"{folder.checkpoint_folder} holds neither {folder.checkpoint_file.name} nor {folder.latest_file.name}, and "
            f"{folder.metrics_file.name} has steps up to {steps[-1]}: expected the run's last checkpoint there. "
            "Nothing was changed"
        )


def open_data(folder: RunFolder, settings: TrainSettings, say: Callable[[str], None]) -> Corpus:
    """The data that a run has prepared, or was given prepared.

    Raises:
        ValueError: they are missing or damaged.
    """
    given = settings.data is not None and is_prepared(settings.data)
    return open_corpus(settings.data if given and settings.data else folder.data_folder, say)


def data_change(folder: RunFolder, corpus: Corpus) -> str | None:
    """How the data differ from those that the run in ``folder`` was started on, in words; None if they are the same."""
    recorded = _section(folder, "data")
    if recorded.get("fingerprint") == corpus.fingerprint:
        return None
    then, now = (
        f"{one.get('train_bytes', 0):,} training and {one.get('held_out_bytes', 0):,} held-out bytes"
        for one in (recorded, corpus.describe())
    )
    return f"{then}, as then, but other contents" if then == now else f"{then} then, {now} now"


def _check_origin(folder: RunFolder, saved: TrainSettings, checkpoint: Checkpoint, fingerprint: object) -> None:
    """Refuse the checkpoint of another run: all its shapes may fit."""
    changes = changed_settings(saved, TrainSettings.from_dict(checkpoint.progress["settings"]))
    if checkpoint.progress["data"] != fingerprint:
        changes.append("its data are different")
    if changes:
        raise CheckpointError(
            f"{checkpoint.path} belongs to another run than {folder.settings_file} (run.json first): {'; '.join(changes)}"
        )


def _check_length(folder: RunFolder, saved: TrainSettings, settings: TrainSettings, checkpoint: Checkpoint) -> None:
    """A run may be made longer if that changes no learning rate of the steps already done."""
    step, seconds = checkpoint.progress["step"], checkpoint.progress["seconds"]
    if settings.steps is not None and settings.steps < step:
        raise ValueError(f"steps={settings.steps}: the run has done {step} already, expected at least that many")
    changes = [
        f"{name} was {getattr(saved, name)}, now {getattr(settings, name)}"
        for name in ("steps", "minutes")
        if getattr(saved, name) != getattr(settings, name)
    ]
    reached = [one.progress(step, seconds) for one in (saved, settings)]
    others = []
    if not all(is_flat_until(saved.schedule, progress) for progress in reached):
        others.append(f"its schedule={saved.schedule!r} would have given other learning rates")
    if saved.short_context is not None and max(reached) > saved.short_share:
        others.append(f"its short_share={saved.short_share} would have given other windows")
    if changes and step > 0 and others:
        raise ValueError(
            f"the run in {str(folder.path)!r} cannot be resumed with another length ({', '.join(changes)}): "
            f"{' and '.join(others)} to the {step} steps already done. Expected the same length, or a run with "
            "schedule='constant' ('wsd' too, before its decay) that still reads the windows it began with"
        )


def _section(folder: RunFolder, name: str) -> dict[str, Any]:
    folder.require_run()
    section = read_json(folder.settings_file).get(name)
    if not isinstance(section, dict):
        raise ValueError(f"{folder.settings_file} has no {name!r}: expected a file written by longnet train")
    return section
