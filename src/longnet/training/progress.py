"""Progress of a run: one bar on a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn


class Reporter(Protocol):
    """Receives progress, one task at a time. Its methods do nothing by themselves.

    Attributes:
        is_closed: whether the stream that it writes to was closed by its reader.
    """

    is_closed: bool = False

    def say(self, text: str) -> None:
        """A line that stays."""
        return

    def begin(self, title: str, done: float | None = 0.0) -> None:
        """A task starts with a share ``done`` in [0, 1] already done; None if its length is unknown."""
        return

    def advance(self, done: float | None, detail: str = "") -> None:
        """The task is at ``done`` (None as in ``begin``); ``detail`` is shown beside it."""
        return

    def end(self) -> None:
        """The task is over."""
        return


class SilentReporter(Reporter):
    """Reports nothing."""


@contextmanager
def task(reporter: Reporter, title: str, done: float | None = 0.0) -> Iterator[None]:
    """A task of a reporter, which ends with it."""
    reporter.begin(title, done)
    try:
        yield
    finally:
        reporter.end()


class LineReporter(Reporter):
    """Plain lines, for a file or a pipe.

    Args:
        stream: where to write.
        interval: fewest seconds between two lines of one task.
        outlives_reader: when the reader closes the pipe, as ``head`` does, set ``is_closed`` and write nothing more, in place of
            raising BrokenPipeError.
    """

    def __init__(self, stream: TextIO, interval: float = 5.0, outlives_reader: bool = False) -> None:
        self._stream = stream
        self._interval = interval
        self._outlives_reader = outlives_reader
        self._clock = _Clock()
        self._title = ""
        self._last: tuple[float | None, str] | None = None
        self._due = 0.0

    def say(self, text: str) -> None:
        if self.is_closed:
            return
        try:
            print(text, file=self._stream, flush=True)
        except BrokenPipeError:
            if not self._outlives_reader:
                raise
            self.is_closed = True
            # What is left in the stream's buffer would raise once more when Python ends.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def begin(self, title: str, done: float | None = 0.0) -> None:
        self._title, self._clock, self._last = title, _Clock(done), None
        self._due = time.monotonic() + self._interval

    def advance(self, done: float | None, detail: str = "") -> None:
        self._last = (done, detail)
        if time.monotonic() >= self._due:
            self._print()

    def end(self) -> None:
        if self._last is not None:
            self._print()

    def _print(self) -> None:
        if self._last is None:
            return
        done, detail = self._last
        title = self._title if done is None else f"{self._title} {done:4.0%}"
        parts = [title, *([detail] if detail else []), self._clock.left(done)]
        self.say("  ".join(parts))
        self._last, self._due = None, time.monotonic() + self._interval


class TerminalReporter(Reporter):
    """One rich progress bar, lines above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._clock = _Clock()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, emoji=False)

    def begin(self, title: str, done: float | None = 0.0) -> None:
        self._clock = _Clock(done)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False, style="cyan"),
            console=self._console,
        )
        self._task = self._progress.add_task(title, total=None if done is None else 1.0, detail="", left="")
        self._progress.update(self._task, completed=done)
        self._progress.start()

    def advance(self, done: float | None, detail: str = "") -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, detail=detail, left=self._clock.left(done))

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def make_reporter(stream: TextIO | None = None, outlives_reader: bool = False) -> Reporter:
    """A bar if ``stream`` (default: standard output) is a terminal, a :class:`LineReporter` if not."""
    target = stream or sys.stdout
    if target.isatty():
        return TerminalReporter(Console(file=target))
    return LineReporter(target, outlives_reader=outlives_reader)


def format_seconds(seconds: float) -> str:
    """``75`` as ``1:15``, ``3700`` as ``1:01:40``."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Clock:
    """Estimates the time left from the share done since the start."""

    def __init__(self, done: float | None = 0.0) -> None:
        self._from = done or 0.0
        self._start = time.monotonic()

    def left(self, done: float | None) -> str:
        gained = (done or 0.0) - self._from
        if gained <= 0:
            return ""
        return f"{format_seconds((time.monotonic() - self._start) * (1.0 - (done or 0.0)) / gained)} left"
