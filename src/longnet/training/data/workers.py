"""Processes that turn text into tokens: the table of words holds Python's lock, so threads would wait for each other.

They are commands of their own: a fork is unsafe beside threads and CUDA, and ``multiprocessing`` would run the user's script
again. A process ends when its input does, so none is left when the one that prepares is killed.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from types import TracebackType
from typing import Any, Self

import numpy as np

from longnet.training.data.sources import whole_character
from longnet.training.data.tokenizer import Tokenizer

# Bytes of text: of a task, and those after which processes are started, as a start takes as long as some megabytes.
_TASK, _FIRST = 1 << 20, 1 << 22
_MOST = 8  # Processes: each takes about 250 MiB.
# Under this name longnet imports no torch, which would take seconds and as much memory again.
_CODE = "import sys; sys.path[:] = {!r}; sys.argv = ['longnet']; from longnet.training.data.workers import work; work()"
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"}


def count_workers() -> int:
    """One for each CPU that this process may use, 8 at most; 0 for a single CPU."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, _MOST) if cpus > 1 else 0


class Workers:
    """A context that encodes texts as ``tokenizer`` does, on all CPUs once there is enough text.

    A tokenizer of bytes, or one whose texts have no place to be cut, works in this process.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._seen = tokenizer, 0
        is_split = not tokenizer.is_bytes and tokenizer.last_place(b"a b") > 0
        self._count = count_workers() if is_split else 0
        self._pool = ThreadPoolExecutor(max(1, self._count))
        self._own, self._processes = threading.local(), list[subprocess.Popen[bytes]]()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._pool.shutdown()
        for process in self._processes:  # A thread may have started one meanwhile.
            process.kill()
            with suppress(BrokenPipeError), process:
                pass

    def encode(self, texts: Sequence[bytes]) -> Iterator[np.ndarray]:
        """The tokens of each text, as of :meth:`Tokenizer.encode`; the work begins with the call.

        Raises:
            ChildProcessError: a process was killed. What the tokenizer raises in a process is raised here.
        """
        self._seen += sum(map(len, texts))
        if not self._count or self._seen < _FIRST:
            return self._tokenizer.encode(texts)
        counts, tasks, size = [], list[list[bytes]]([[]]), 0
        for text in texts:
            parts = self._cut(text)
            counts.append(len(parts))
            for part in parts:
                tasks[-1].append(part)
                size += len(part)
                if size >= _TASK:
                    tasks.append([])
                    size = 0
        return _join(counts, [self._pool.submit(self._ask, task) for task in tasks])

    def _cut(self, text: bytes) -> list[bytes]:
        """A text in parts of about 1 MiB, cut where a cut changes no token."""
        parts, start, stop = [], 0, _TASK
        while stop < len(text):
            stop = whole_character(text, stop)
            if place := self._tokenizer.last_place(text[start:stop]):
                parts.append(text[start : start + place])
                start = stop = start + place
            stop += _TASK
        return [*parts, text[start:]]

    def _ask(self, task: list[bytes]) -> list[np.ndarray]:
        """Tokens by the process of this thread."""
        try:
            if (process := getattr(self._own, "process", None)) is None:
                process = self._own.process = self._start()
            _send(task, process.stdin)
            answer = _receive(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise ChildProcessError(
                "a process that turns text into tokens is gone (killed, or out of memory): the same command goes on"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | _ENVIRONMENT,
            process_group=0,  # Ctrl-C reaches the process that prepares, which ends the others.
        )
        self._processes.append(process)
        _send(self._tokenizer, process.stdin)
        return process


def _join(counts: list[int], tasks: list[Future[list[np.ndarray]]]) -> Iterator[np.ndarray]:
    """The tokens of each text; ``counts`` says how many parts each text was cut into."""
    parts = chain.from_iterable(task.result() for task in tasks)
    for count in counts:
        yield np.concatenate(list(islice(parts, count)))


def _send(value: Any, pipe: Any) -> None:
    pickle.dump(value, pipe)
    pipe.flush()


def _receive(pipe: Any) -> Any:
    return pickle.load(pipe)


def work() -> None:
    """What a process does: answer the tasks of its standard input, until that ends."""
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        tokenizer = _receive(sys.stdin.buffer)
        while True:
            texts = _receive(sys.stdin.buffer)
            try:
                answer: list[np.ndarray] | Exception = list(tokenizer.encode(texts))
            except Exception as error:
                answer = error
            _send(answer, sys.stdout.buffer)
    os._exit(0)
