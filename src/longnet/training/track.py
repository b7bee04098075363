"""Trackers: callbacks of a run that send its metrics to TensorBoard, Weights & Biases or Trackio.

``metrics.jsonl`` stays the record of a run, and a tracker shows it. So a tracker that cannot start is refused before the run,
and one that fails later is given up with a warning: a lost connection ends no training.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

from longnet.training.folder import RunFolder
from longnet.training.ranks import Ranks
from longnet.training.settings import TrainSettings

Callback: TypeAlias = Callable[[Mapping[str, Any]], None]
"""Is given each line of ``metrics.jsonl``, after it is written."""

_SENT = {
    "train": ("loss", "bits_per_byte", "lr", "grad_norm", "tokens", "tokens_per_second"),
    "eval": ("loss", "bits_per_byte"),
}
_Log: TypeAlias = Callable[[dict[str, float], int], object]
_Close: TypeAlias = Callable[[], object]


def check_tracker(track: str) -> None:
    """Raise ValueError unless the library of ``track`` is installed."""
    # A folder of that name, which wandb makes where it runs, is found too, and has no origin.
    if track != "none" and getattr(find_spec(track), "origin", None) is None:
        raise ValueError(
            f"track={track!r} needs {track}, which is not installed: expected `pip install {track}` first, or track='none'"
        )


@contextmanager
def tracked(settings: TrainSettings, folder: RunFolder, step: int, ranks: Ranks) -> Iterator[list[Callback]]:
    """The tracker of a run that goes on after ``step``, as a callback of the first process; no callback elsewhere.

    Raises:
        ValueError: the tracker cannot start; on every process.
    """
    tracker, error = None, None
    if ranks.is_first and settings.track != "none":
        start = _start_tensorboard if settings.track == "tensorboard" else _start_wandb_or_trackio
        try:
            tracker = _Tracker(settings.track, *start(settings, folder, step))
        except Exception as problem:
            error = ValueError(
                f"track={settings.track!r} cannot start ({type(problem).__name__}: {problem}): expected a {settings.track} that "
                "works here, or track='none'"
            )
    ranks.agree(error)
    with nullcontext() if tracker is None else closing(tracker):
        yield [] if tracker is None else [tracker.send]


class _Tracker:
    """Sends lines until the library raises an error. That is a warning, once."""

    def __init__(self, name: str, log: _Log, close: _Close) -> None:
        self._name, self._log, self._close, self._failed = name, log, close, False

    def send(self, line: Mapping[str, Any]) -> None:
        if not self._failed:
            kind, step = line["kind"], line["step"]
            values = {f"{kind}/{name}": line[name] for name in _SENT[kind] if line[name] is not None}
            self._try(lambda: self._log(values, step), f"at step {step}")

    def close(self) -> None:
        self._try(self._close, "when it was closed")

    def _try(self, call: Callable[[], object], when: str) -> None:
        try:
            call()
        except Exception as error:
            if not self._failed:
                self._failed = True
                warnings.warn(
                    f"track={self._name!r} failed {when} ({type(error).__name__}: {error}). The run goes on and is tracked no "
                    "more until it is resumed; metrics.jsonl has every line",
                    RuntimeWarning,
                    stacklevel=2,
                )


def _start_tensorboard(settings: TrainSettings, folder: RunFolder, step: int) -> tuple[_Log, _Close]:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    # TensorBoard drops what a killed run has written after its last checkpoint.
    writer: Any = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)
    config = settings.to_dict()
    config |= {f"model.{name}": value for name, value in config.pop("model").items()}
    config = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in config.items()}
    # Not writer.add_hparams: it makes a second file, and TensorBoard reads only the newest one of a live run.
    for summary in hparams(config, {}):
        writer.file_writer.add_summary(summary)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def _start_wandb_or_trackio(settings: TrainSettings, folder: RunFolder, step: int) -> tuple[_Log, _Close]:
    name = settings.track
    # The key is in the run folder: a run that is resumed, from wherever it has been moved, goes on as the same one.
    file = folder.path / name / "run.txt"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(secrets.token_hex(4))
    key = file.read_text()
    project = os.environ.get(f"{name.upper()}_PROJECT", "longnet")
    own = {"id": key, "dir": str(folder.path)} if name == "wandb" else {}
    run = import_module(name).init(
        project=project, name=f"{folder.path.resolve().name}-{key}", config=settings.to_dict(), resume="allow", **own
    )
    return run.log, run.finish
