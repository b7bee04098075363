"""Processes that stay: eight ranks over gloo, started once, that run what a test sends them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MOST = 8
# What the ranks' tests import. The last two belong to torch.compile with the backend "aot_eager".
_IMPORTED = (
    *("torch", "pytest", "hypothesis", "longnet", "longnet.distributed", "longnet.training.ranks"),
    *("torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("torch._dynamo", "torch._functorch.aot_autograd"),
)
_PATIENCE = 120.0


def _serve(rank: int, store: str, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=MOST)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, MOST + 1)}
    while (job := _next(inbox)) is not None:
        size, function, arguments = job
        try:
            outbox.put((rank, True, function(groups[size], rank, *arguments)))
        except BaseException as error:
            outbox.put((rank, False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


def _next(inbox: Any) -> Any:
    """The next job; None at the end, also where the tests were killed."""
    while True:
        try:
            return inbox.get(timeout=5)
        except Empty:
            parent = parent_process()
            if parent is None or not parent.is_alive():
                return None


class Ranks:
    """Eight processes; the first K of them are a group of K."""

    def __init__(self, store: str) -> None:
        # Forked from a process that has imported all of this, and has run nothing: it would take each process seconds.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(list(_IMPORTED))
        self._outbox = context.Queue()
        self._inboxes = [context.Queue() for _ in range(MOST)]
        self._processes = [
            context.Process(target=_serve, args=(rank, store, inbox, self._outbox), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def outcomes(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[tuple[bool, Any]]:
        """What ``function(group, rank, *arguments)`` gave on every rank: (True, its result) or (False, its error in words)."""
        for inbox in self._inboxes[:size]:
            inbox.put((size, function, arguments))
        found = {}
        for _ in range(size):
            rank, ok, result = self._outbox.get(timeout=_PATIENCE)
            found[rank] = (ok, result)
        return [found[rank] for rank in range(size)]

    def __call__(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results by rank; raises the first error."""
        found = self.outcomes(size, function, *arguments)
        for rank, (ok, result) in enumerate(found):
            assert ok, f"rank {rank}: {result}"
        return [result for _, result in found]

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)
        for process in self._processes:
            process.join(5)
            process.kill()


@contextmanager
def started(store: str) -> Iterator[Ranks]:
    """Eight ranks until the end of the block."""
    ranks = Ranks(store)
    try:
        yield ranks
    finally:
        ranks.close()
