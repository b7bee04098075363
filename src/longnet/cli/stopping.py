"""Stop on a signal: finish and save the current step first."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit code of a command that was asked to stop, and has saved."""


class Stopping:
    """Whether a signal has asked to stop, and where it may interrupt.

    Args:
        say: called with a line of text on the first signal.
        after: what is finished first, in words.
    """

    def __init__(self, say: Callable[[str], None], after: str) -> None:
        self._say, self._after = say, after
        self._count, self._waiting = 0, False

    def asked(self) -> bool:
        """True from the first signal on."""
        return self._count > 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While waiting for input an interrupt loses nothing: the first signal raises KeyboardInterrupt too."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def handle_signal(self, number: int, frame: object) -> None:
        """The signal handler."""
        self._count += 1
        if self._count > 1 or self._waiting:
            raise KeyboardInterrupt
        self._say(f"Stopping after {self._after} (once more to stop at once)")


@contextmanager
def stop_on_signal(say: Callable[[str], None], after: str) -> Iterator[Stopping]:
    """The first SIGINT or SIGTERM lets ``after`` finish, so nothing is lost; a second one ends the program."""
    stopping = Stopping(say, after)
    before = {number: signal.signal(number, stopping.handle_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
