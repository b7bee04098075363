"""When a process of a run is lost, the others find out which one, report it once, and end.

A collective over the host fails in all other processes. One over NCCL does not: it blocks the main thread, which waits for the
GPU. torchrun sends SIGTERM, and half a minute later kills. So a separate thread listens for that signal. It also answers the
liveness checks of other processes while the main thread is busy, so a busy process counts as alive.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

import torch.distributed as dist

from longnet.runtime.torch_internals import default_store

# Seconds that a liveness check waits for answers, and seconds after which a process looks for a new check.
_ANSWER_SECONDS, _POLL_SECONDS = 5.0, 0.5
_STOPPED = "training stopped. --resume continues the run from its last checkpoint, on any number of processes"


class LostProcess(RuntimeError):
    """Another process of the run is gone. The last checkpoint is whole, and any number of processes can resume it."""


class Liveness:
    """A context that every process of the default group enters, and leaves when its work is done.

    Attributes:
        is_lost: whether a process is known to be gone; the group must not be used then.
    """

    def __init__(self) -> None:
        self._store = default_store()
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._wakeup_send, self._wakeup_recv = socket.socketpair()
        self._over, self._lock, self.is_lost = False, threading.Lock(), False

    def __enter__(self) -> Self:
        self._wakeup_send.setblocking(False)
        # An ignored signal wakes no thread, so it gets a handler that does nothing: this process ends by itself.
        self._handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
        self._descriptor = signal.set_wakeup_fd(self._wakeup_send.fileno(), warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, daemon=True, name="longnet-liveness")
        self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_lost:
            # The thread stays: it ends the process if work on the GPU keeps it from ending.
            return
        self._over = True
        if error is None:
            with suppress(dist.DistError):
                self._store.set(f"longnet/left/{self._rank}", "yes")
        signal.set_wakeup_fd(self._descriptor)
        signal.signal(signal.SIGTERM, self._handler)
        self._listener.join()
        self._wakeup_send.close()
        self._wakeup_recv.close()

    def lost(self) -> LostProcess | SystemExit | None:
        """Check that all are alive; if one is gone, return what to raise: a message on one process, a silent exit on others."""
        with self._lock:
            if self.is_lost:
                return SystemExit(1)
            try:
                return self._find_lost()
            except dist.DistError:
                # The store is torchrun's, of the first machine. One process of each machine says so.
                self.is_lost = True
                is_first = os.environ.get("LOCAL_RANK", "0") == "0"
                return LostProcess(f"torchrun is gone: {_STOPPED}") if is_first else SystemExit(1)

    def fail(self) -> bool:
        """After an error in this process: whether all others have one too, within a few seconds.

        If not, they may wait for this process on their GPUs, and its own GPU for them. Then the process ends without waiting
        for its GPU once Python's main thread is done.
        """
        with suppress(dist.DistError):
            self._store.set(f"longnet/failed/{self._rank}", "yes")
            names = [f"longnet/failed/{rank}" for rank in range(self._world)]
            until = time.monotonic() + _ANSWER_SECONDS
            while not (together := self._store.check(names)) and time.monotonic() < until:
                time.sleep(0.05)
            if together:
                return True
        atexit.register(_end)
        return False

    def _find_lost(self) -> LostProcess | SystemExit | None:
        """A check of all processes; the caller holds the lock."""
        check = self._store.add("longnet/calls", 1)
        time.sleep(_ANSWER_SECONDS)
        present, left, ending = (
            {rank for rank in range(self._world) if self._store.check([f"longnet/{name}/{rank}"])}
            for name in (f"here/{check}", "left", "ending")
        )
        lost = sorted({*range(self._world)} - present - left - ending - {self._rank})
        if not lost:
            return None
        self.is_lost = True
        # Who looks later, on a busy machine, does not take this process for lost once it has ended.
        self._store.set(f"longnet/ending/{self._rank}", "yes")
        if self._rank != min({self._rank} | present | ending):
            return SystemExit(1)
        names = ", ".join(map(str, lost))
        return LostProcess(
            f"process {names} of {self._world} is gone (killed, out of memory, or after an error of its own): {_STOPPED}"
        )

    def _listen(self) -> None:
        """Until the work is done, answer liveness checks; start one on SIGTERM, and when the store is gone."""
        answered = 0
        self._wakeup_recv.settimeout(_POLL_SECONDS)
        while not self._over:
            try:
                checks = self._store.add("longnet/calls", 0)
                for check in range(answered + 1, checks + 1):
                    self._store.set(f"longnet/here/{check}/{self._rank}", "yes")
            except dist.DistError:
                self._answer()
                return
            answered = checks
            try:
                signals = self._wakeup_recv.recv(64)
            except TimeoutError:
                continue
            if signal.SIGTERM in signals:
                # In another thread, since this one answers the checks.
                threading.Thread(target=self._answer, daemon=True, name="longnet-sigterm").start()

    def _answer(self) -> None:
        # The main thread may find out by itself meanwhile.
        time.sleep(2.0)
        if self._over:
            return
        error = self.lost()
        if isinstance(error, LostProcess):
            sys.stderr.write(f"longnet: error: {error}\n")
        if error is not None:
            # Enough time for the main thread to report.
            time.sleep(3.0)
            os._exit(1)


def _end() -> None:
    """End the process at once, with what it has printed."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)
