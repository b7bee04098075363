"""When a process of a run is lost: the others find out who, say so once, and end.

A collective over the host fails in all that are left. One over NCCL does not: it waits on the GPU, and with it the main thread,
while torchrun asks to stop with SIGTERM and half a minute later kills. So a thread of its own listens for that signal, and
answers the roll calls of others whatever the main thread does: who was not asked to stop, or is busy, is there all the same.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Self

import torch.distributed as dist
from torch.distributed import distributed_c10d

# So long a roll call waits for answers, and so often every process looks for a roll call.
_SECONDS, _LOOK = 5.0, 0.5


class LostProcess(RuntimeError):
    """Another process of the run is gone; the last checkpoint is whole, and any number of processes can go on from it."""


class RollCall:
    """Every process of the default group enters one, and leaves it when its work is done.

    Attributes:
        is_lost: whether one of them is known to be gone; nothing may be asked of the group then.
    """

    def __init__(self) -> None:
        self._store = distributed_c10d._get_default_store()
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._bell, self._ear = socket.socketpair()
        self._over, self._lock, self.is_lost = False, threading.Lock(), False

    def __enter__(self) -> Self:
        self._bell.setblocking(False)
        # A signal that is ignored rings no bell, so it gets a handler that does nothing: this process ends by itself.
        self._handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
        self._descriptor = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, daemon=True, name="longnet-roll-call")
        self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_lost:
            # The thread stays: it ends the process should something on the GPU keep it from ending.
            return
        self._over = True
        if error is None:
            self._store.set(f"longnet/left/{self._rank}", "yes")
        signal.set_wakeup_fd(self._descriptor)
        signal.signal(signal.SIGTERM, self._handler)
        self._listener.join()
        self._bell.close()
        self._ear.close()

    def lost(self) -> LostProcess | SystemExit | None:
        """What to raise if a process is gone, once the others were looked for: words on one process, a silent end on the rest."""
        with self._lock:
            if self.is_lost:
                return SystemExit(1)
            call = self._store.add("longnet/calls", 1)
            time.sleep(_SECONDS)
            there = [rank for rank in range(self._world) if self._store.check([f"longnet/here/{call}/{rank}"])]
            left = [rank for rank in range(self._world) if self._store.check([f"longnet/left/{rank}"])]
            gone = sorted({*range(self._world)} - {*there, *left, self._rank})
            if not gone:
                return None
            self.is_lost = True
        if self._rank != min(self._rank, *there):
            return SystemExit(1)
        names = ", ".join(map(str, gone))
        return LostProcess(
            f"process {names} of {self._world} is gone (killed, out of memory, or after an error of its own): training stopped. "
            "The run can go on from its last checkpoint with --resume, on any number of processes"
        )

    def _listen(self) -> None:
        """Until it is over: answer roll calls, and on SIGTERM hold one."""
        answered = 0
        self._ear.settimeout(_LOOK)
        while not self._over:
            calls = self._store.add("longnet/calls", 0)
            for call in range(answered + 1, calls + 1):
                self._store.set(f"longnet/here/{call}/{self._rank}", "yes")
            answered = calls
            try:
                heard = self._ear.recv(64)
            except TimeoutError:
                continue
            if signal.SIGTERM in heard:
                # A thread of its own, since this one has others' calls to answer.
                threading.Thread(target=self._answer, daemon=True, name="longnet-sigterm").start()

    def _answer(self) -> None:
        # The main thread may be about to find out by itself.
        time.sleep(2.0)
        if self._over:
            return
        error = self.lost()
        if isinstance(error, LostProcess):
            sys.stderr.write(f"longnet: error: {error}\n")
        if error is not None:
            # What the main thread has to say takes no time.
            time.sleep(3.0)
            os._exit(1)
