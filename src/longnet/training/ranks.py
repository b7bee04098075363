"""The processes that train one model together: which part of a batch each holds, and what they decide together.

A batch does not depend on their number: its windows are split over the mesh axis ``dp`` and every window over ``cp``. So a run
may continue with more or fewer processes.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from longnet.distributed import parallelize, shard_sequence, unshard_sequence
from longnet.training.cut import Cut, choose_cut, even_cut
from longnet.training.liveness import Liveness
from longnet.training.models import Model
from longnet.training.settings import TrainSettings
from longnet.training.transformer import TransformerLM

# A process that waits this long for the others gives up.
_TIMEOUT = timedelta(minutes=10)
# How often this process has joined others.
_joined = count()


class Ranks:
    """This process among those of a mesh (dp, cp); alone without one.

    Attributes:
        is_first: whether this process prints and writes for all.
        dp, cp: windows trained on side by side, and processes that share each.
        control, background: groups of all processes over the host, for what they agree on and for saves meanwhile; None for
            one process.
        cut: gives the length of each process's part of a window from the window's length, both in tokens.
    """

    def __init__(self, mesh: DeviceMesh | None = None, control: Any = None, background: Any = None) -> None:
        self._mesh, self.control, self.background = mesh, control, background
        self.is_first = mesh is None or dist.get_rank() == 0
        self.dp, self.cp = (1, 1) if mesh is None else (mesh["dp"].size(), mesh["cp"].size())
        self.cut: Cut = partial(even_cut, ranks=self.cp)

    def describe(self) -> str:
        """A description for the log; empty for one process."""
        if self._mesh is None:
            return ""
        return f"{self.dp * self.cp} processes: {self.dp} x {self.cp}, windows side by side x shards of each"

    def check(self, batch: int, dtype: str, cp: int) -> None:
        """Raise ValueError unless ``cp`` is that of the mesh, and a batch can be split."""
        check_cp(cp, self.dp * self.cp)
        if cp != self.cp:
            raise ValueError(f"cp={cp} with ranks of cp={self.cp}: expected join_ranks(cp={cp}, ...)")
        if batch % self.dp:
            raise ValueError(
                f"batch={batch} over {self.dp} groups of processes (cp={self.cp}): expected a multiple of {self.dp}"
            )
        if self._mesh is not None and dtype == "float16":
            raise ValueError("dtype='float16' over several processes: expected 'bfloat16' or 'float32'")

    def prepare(self, model: Model) -> None:
        """Shard the model, in place; every process passes the same weights."""
        if self._mesh is None:
            return
        if isinstance(model, TransformerLM):
            model.shard(self._mesh)
        else:
            parallelize(model, self._mesh)

    def choose_cut(self, settings: TrainSettings, device: torch.device) -> list[str]:
        """Choose how windows are cut: the first process decides for all. Returns lines for the user, none for equal parts."""
        if self.cp == 1:
            return []
        found: list[Any] = [None]
        if self.is_first:
            try:
                found = [choose_cut(settings, device, self.dp, self.cp)]
            except RuntimeError as error:
                # The estimate failed inside torch; the run does not need it.
                reason = str(error).strip().splitlines()[0]
                found = [(self.cut, [f"Parts of a window are equal, as no estimate of a step could be made: {reason}"])]
        dist.broadcast_object_list(found, src=0, group=self.control)
        self.cut, lines = found[0]
        return list(lines)

    def check_shared(self, folder: str | Path) -> None:
        """Raise ValueError on all processes unless each sees what the first writes into ``folder``."""
        if self._mesh is None:
            return
        names = [f".{secrets.token_hex(8)}.shared"]
        dist.broadcast_object_list(names, src=0, group=self.control)
        file = Path(folder) / names[0]
        if self.is_first:
            file.touch()
        self.wait()
        blind = torch.tensor(0 if file.exists() else 1)
        dist.all_reduce(blind, group=self.control)
        if self.is_first:
            file.unlink()
        if blind:
            raise ValueError(
                f"checkpoint='sharded' and out={str(folder)!r}: {blind} of {dist.get_world_size()} processes do not see "
                "what the first one writes there. Expected a folder that all share, or checkpoint='whole'"
            )

    def vary_dropout(self, seed: int) -> None:
        """Give every process but the first random numbers of its own; the first has those of the run."""
        if not self.is_first:
            torch.manual_seed((seed + dist.get_rank() * 1_000_003) % 2**63)

    def own_windows(self, x: Tensor) -> Tensor:
        """This process's part of (windows, N)."""
        if self._mesh is None:
            return x
        share = len(x) // self.dp
        first = self._mesh["dp"].get_local_rank() * share
        return self.own_shard(x[first : first + share])

    def own_shard(self, x: Tensor) -> Tensor:
        """This process's part of every window of (windows, N)."""
        if self.cp == 1:
            return x
        assert self._mesh is not None
        return shard_sequence(x, self._mesh["cp"], lengths=self.cut(x.shape[1]))

    def whole_windows(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`own_shard`, on every process."""
        if self.cp == 1:
            return x
        assert self._mesh is not None
        return unshard_sequence(x, self._mesh["cp"])

    def decide(self, progress: float, stop: bool) -> tuple[float, bool]:
        """The first process's ``progress``, and whether any of them was asked to ``stop``."""
        if self._mesh is None:
            return progress, stop
        votes = torch.tensor([progress if self.is_first else 0.0, float(stop)], dtype=torch.float64)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.control)
        return float(votes[0]), bool(votes[1])

    def agree(self, error: Exception | None) -> None:
        """Raise the ``error`` of the first process on all of them, if it has one."""
        errors = [error]
        if self._mesh is not None:
            dist.broadcast_object_list(errors, src=0, group=self.control)
        if errors[0] is not None:
            raise errors[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self._mesh is not None:
            dist.barrier(group=self.control)


def check_cp(cp: int, world: int) -> None:
    """Raise ValueError unless ``cp`` processes can share each window among ``world`` of them."""
    if cp < 1 or world % cp:
        alone = f"expected 1 (to resume, --resume --cp 1), or start with torchrun --nproc-per-node {max(cp, 1)}"
        expected = alone if world == 1 else "expected a divisor of their number"
        raise ValueError(f"cp={cp} with {world} process(es): {expected}")


@contextmanager
def join_ranks(cp: int, device: str) -> Iterator[tuple[Ranks, str]]:
    """The ranks and the device of this process: among those that torchrun started, or alone; as often as they like.

    Args:
        cp: processes that share a window; it divides their number.
        device: a setting, see ``resolve_device``. With several processes each gets its own GPU.

    Raises:
        ValueError: a ``cp`` that does not fit.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_cp(cp, world)
    if world == 1:
        yield Ranks(), device
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(torch.device(device))
    store, rank, world = next(rendezvous("env://", timeout=_TIMEOUT))
    # Keys of an earlier group would be taken for those of this one, and its processes would wait for ever.
    store = dist.PrefixStore(f"longnet/{next(_joined)}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_TIMEOUT)
    liveness = Liveness()
    can_leave = True
    try:
        with liveness:
            try:
                mesh = init_device_mesh("cuda" if on_gpu else "cpu", (world // cp, cp), mesh_dim_names=("dp", "cp"))
                control, background = (dist.new_group(backend="gloo", timeout=_TIMEOUT) for _ in range(2))
                yield Ranks(mesh, control, background), device
            except (Exception, KeyboardInterrupt) as error:
                if is_of_a_collective(error) and (lost := liveness.lost()) is not None:
                    raise lost from error
                can_leave = liveness.fail()
                raise
    finally:
        # Over NCCL this would wait for a process that is gone, or that waits for this one.
        if can_leave and not liveness.is_lost:
            dist.destroy_process_group()


def is_of_a_collective(error: BaseException) -> bool:
    """Whether processes could not communicate: one of them may be gone."""
    text = str(error)
    is_named = isinstance(error, RuntimeError) and ("gloo" in text or "Connection closed by peer" in text)
    return is_named or isinstance(error, dist.DistError)


def whole(x: Tensor) -> Tensor:
    """The whole of a tensor; if it is sharded over processes, all of them must call."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def spread_like(x: Tensor, value: Tensor) -> Tensor:
    """``value``, whole and the same on every process, moved to the device of ``x`` and sharded as ``x`` is."""
    value = value.to(x.device)
    return (
        distribute_tensor(value, x.device_mesh, x.placements, src_data_rank=None) if isinstance(x, DTensor) else value
    )
