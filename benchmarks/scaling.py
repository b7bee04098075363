"""One sequence over several devices against one device: time at the same tokens a device, and the result.

    torchrun --nproc-per-node 2 -m benchmarks.scaling --out scaling.json     # GPUs over NCCL, or CPUs over gloo

Every rank first computes the whole sequence by itself and compares its shard of the sharded call with it, before anything is
timed. Then rounds time in turn a call on one device alone, and the sharded call of as many tokens a device; both wait for all
ranks first, and a round counts the slowest.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import checks, report, results
from benchmarks.cases import Case, Record, draw
from benchmarks.device import HostClock
from benchmarks.timing import Function, interleave

# Time of the sharded call over that of one device with as many tokens.
LIMIT, ROUNDS = 1.05, 9
# Error of the sharded result against one device's, both rounded to bfloat16 or float32.
ALLOWED = {"bfloat16": 8e-3, "float32": 1e-5}


class Ranks(HostClock):
    """All ranks begin together, and a call takes what the slowest took."""

    def start(self) -> float:
        dist.barrier()
        return super().start()

    stop = HostClock.start

    def seconds(self, start: float, stop: float) -> float:
        took = torch.tensor([stop - start], dtype=torch.float64, device=self.device)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return float(took)


def sizes(on_gpu: bool, ranks: int) -> Case:
    """A shard; the longest segment spans all ranks."""
    levels, shard, base = (6, 1 << 20, 2048) if on_gpu else (3, 1 << 12, 256)
    rates = tuple(4**i for i in range(levels))
    lengths = [base * rate for rate in rates]
    lengths[-1] = max(lengths[-1], shard * ranks)
    kind, heads = ("bfloat16", 16) if on_gpu else ("float32", 4)
    return Case(shard, kind, heads=heads, segment_lengths=tuple(lengths), dilation_rates=rates)


def run(out: Path | None) -> Record:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    case = sizes(on_gpu, ranks)
    whole = draw(replace(case, length=case.length * ranks), 0, device)
    mine = slice(rank * case.length, (rank + 1) * case.length)
    shard = whole.map(lambda x: x[:, :, mine].clone())
    alone = checks.attend_dilated(case)
    together = partial(alone, group=dist.group.WORLD)
    expected = checks.with_gradients(alone, whole)
    pairs = zip(checks.NAMES, checks.with_gradients(together, shard), expected, strict=True)
    errors = {name: checks.relative_error(got, want[:, :, mine]) for name, got, want in pairs}
    said: list[Any] = [None] * ranks
    dist.all_gather_object(said, errors)
    worst = {name: max(one[name] for one in said) for name in errors}
    checks.require("the sharded result against one device's", worst, ALLOWED[case.dtype])
    del whole, expected
    functions: dict[str, Function] = {
        "alone": lambda: checks.with_gradients(alone, shard),
        "together": lambda: checks.with_gradients(together, shard),
        "alone, forward": lambda: alone(*shard.inputs),
        "together, forward": lambda: together(*shard.inputs),
    }
    seconds = interleave(Ranks(device), functions, ROUNDS, ROUNDS)
    name, limit = (torch.cuda.get_device_name(device), LIMIT) if on_gpu else ("cpu", None)
    result = results.started(
        kind="scaling", device=name, ranks=ranks, shard=case.to_dict(), errors=worst, seconds=seconds,
        ratio=median(seconds["together"]) / median(seconds["alone"]), limit=limit,
    )  # fmt: skip
    if rank == 0:
        print(report.plain(result))
        results.save(result, out)
    return result


def main() -> None:
    parser = results.program("scaling", __doc__)
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start with torchrun --nproc-per-node K -m benchmarks.scaling")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        run(options.out)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
