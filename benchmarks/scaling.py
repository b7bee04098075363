"""One sequence over several devices against one device: time at the same tokens a device, bytes sent, and the result.

    torchrun --nproc-per-node 2 -m benchmarks.scaling --out scaling.json     # GPUs over NCCL, or CPUs over gloo

Every rank first computes the whole sequence by itself and compares its shard of the sharded call with it, and the bytes that
it sent with the plan's, before anything is timed. Then rounds time in turn a call on one device alone, and the sharded call of
as many tokens a device; both wait for all ranks first, and a round counts the slowest. Where dense attention is "gathered",
torch's own kernel reads the keys and values of all ranks before. ``--only`` names patterns.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn.attention.bias import causal_lower_right

from benchmarks import checks, report, results
from benchmarks.cases import Case, Record, draw
from benchmarks.device import HostClock
from benchmarks.timing import Function, interleave
from longnet import dilated_attention
from longnet.geometry import Pattern, score_pairs, score_pairs_by_shard
from longnet.geometry.shards import Shards, rows_sent

# Time of the sharded call over that of one device with as many tokens, where no rank has more pairs than one device.
LIMIT, ROUNDS = 1.08, 9
# Error of the sharded result against one device's, both rounded to bfloat16 or float32.
ALLOWED = {"bfloat16": 8e-3, "float32": 1e-5}
FAR = {"segment_lengths": None, "dilation_rates": 4, "dilated_queries": False, "window": 512}
DENSE = {"segment_lengths": None, "dilation_rates": 1}


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


@dataclass(frozen=True)
class Row:
    """A pattern over shards of ``tokens`` each.

    Args:
        even: whether all ranks compute about as many pairs, so that a limit can be asked for.
        gathered: whether keys and values are gathered for torch's own dense attention.
    """

    name: str
    tokens: int
    kind: dict[str, Any]
    even: bool = True
    gathered: bool = False

    @property
    def pattern(self) -> Pattern:
        return Pattern.compose(**self.kind)


def rows_of(on_gpu: bool, ranks: int) -> tuple[Row, ...]:
    """What is measured; segments without end and dense attention over fewer tokens, as their cost is quadratic."""
    levels, shard, base, short = (6, 1 << 20, 2048, 1 << 16) if on_gpu else (3, 1 << 12, 256, 1 << 10)
    rates = tuple(4**i for i in range(levels))
    lengths = [base * rate for rate in rates]
    lengths[-1] = max(lengths[-1], shard * ranks)
    return (
        Row("a segment over all ranks", shard, {"segment_lengths": tuple(lengths), "dilation_rates": rates}),
        Row(
            "published",
            shard,
            {"segment_lengths": tuple(base * n for n in (1, 2, 4, 8, 16)), "dilation_rates": (1, 2, 4, 6, 12)},
        ),
        Row("window 512", shard, {"segment_lengths": (), "dilation_rates": (), "window": 512}),
        Row("window 512 and every fourth key", short, FAR, even=False),
        Row("dense, in shards", short, DENSE, even=False),
        Row("dense, gathered", short, DENSE, even=False, gathered=True),
    )


def gathered_dense(query: Tensor, key: Tensor, value: Tensor, *, group: Any = None) -> Tensor:
    """Causal dense attention of this rank's queries over the keys of all ranks up to it."""
    if group is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    mine = dist.get_rank(group) + 1
    # One call for both, so that all ranks give back gradients in the same order.
    key, value = torch.cat(all_gather(torch.stack((key, value)), group)[:mine], 3).unbind()
    mask = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@contextmanager
def counting() -> Any:
    """A list that grows by the bytes of each collective call that sends rows."""
    sent: list[int] = []
    real = dist.all_to_all_single

    def counted(into: Tensor, given: Tensor, received: list[int], parts: list[int], **options: Any) -> Any:
        sent.append(sum(parts))
        return real(into, given, received, parts, **options)

    dist.all_to_all_single = counted  # type: ignore[assignment]
    try:
        yield sent
    finally:
        dist.all_to_all_single = real


def planned_bytes(row: Row, case: Case, ranks: int, rank: int) -> int:
    """Keys and values that ``rank`` sends in a forward pass."""
    if row.gathered:
        return (ranks - 1) * case.heads * case.length * 2 * case.head_dim * case.torch_dtype.itemsize
    shards = Shards((case.length,) * ranks)
    rows = rows_sent(row.pattern, case.heads, case.heads, shards, rank, case.is_causal)
    return sum(rows.values()) * 2 * case.head_dim * case.torch_dtype.itemsize


def of_all(value: object) -> list[Any]:
    """What every rank has."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def measure(row: Row, case: Case, device: torch.device) -> Record:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = draw(replace(case, length=case.length * ranks), 0, device)
    mine = slice(rank * case.length, (rank + 1) * case.length)
    shard = whole.map(lambda x: x[:, :, mine].clone())
    alone: Callable[..., Tensor] = (
        gathered_dense if row.gathered else partial(dilated_attention, **row.kind, is_causal=True)
    )
    together = partial(alone, group=dist.group.WORLD)
    expected = checks.with_gradients(alone, whole)
    with counting() as sent:
        found = checks.with_gradients(together, shard)
    errors = {
        name: checks.relative_error(got, want[:, :, mine])
        for name, got, want in zip(checks.NAMES, found, expected, strict=True)
    }
    said = of_all(errors)
    worst = {name: max(one[name] for one in said) for name in errors}
    checks.require(f"the sharded result against one device's, {row.name}", worst, ALLOWED[case.dtype])
    # Of the forward pass; the backward pass returns the gradients of what was received.
    planned = [planned_bytes(row, case, ranks, one) for one in range(ranks)]
    bytes_sent = planned if row.gathered else of_all(sent[0] if sent else 0)
    if bytes_sent != planned:
        raise AssertionError(f"{row.name}: ranks sent {bytes_sent} bytes, and the plan says {planned}")
    del whole, expected, found
    functions: dict[str, Function] = {
        "alone": lambda: checks.with_gradients(alone, shard),
        "together": lambda: checks.with_gradients(together, shard),
        "alone, forward": lambda: alone(*shard.inputs),
        "together, forward": lambda: together(*shard.inputs),
    }
    seconds = interleave(Ranks(device), functions, ROUNDS, ROUNDS)
    pairs = score_pairs_by_shard(row.pattern, heads=case.heads, shard_lengths=(case.length,) * ranks, is_causal=True)
    return {
        "pattern": row.name, "shard": case.length, "kind": row.kind, "errors": worst, "seconds": seconds,
        "bytes_sent": bytes_sent, "ratio": median(seconds["together"]) / median(seconds["alone"]),
        "pairs": max(pairs) / score_pairs(row.pattern, case.heads, case.length, True), "even": row.even,
    }  # fmt: skip


def run(out: Path | None, only: list[str]) -> Record:
    ranks = dist.get_world_size()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    kind, heads = ("bfloat16", 16) if on_gpu else ("float32", 4)
    result = results.started(
        kind="scaling", device=torch.cuda.get_device_name(device) if on_gpu else "cpu", ranks=ranks, heads=heads, head_dim=64,
        dtype=kind, limit=LIMIT if on_gpu else None, patterns=[],
    )  # fmt: skip
    for row in rows_of(on_gpu, ranks):
        if only and row.name not in only:
            continue
        if dist.get_rank() == 0:
            print(f"{row.name}: {ranks} x {row.tokens:,} tokens", flush=True)
        result["patterns"].append(measure(row, Case(row.tokens, kind, heads=heads), device))
        if dist.get_rank() == 0:
            results.save(result, out)
    if dist.get_rank() == 0:
        print(report.plain(result))
    return result


def main() -> None:
    parser = results.program("scaling", __doc__)
    parser.add_argument(
        "--only", nargs="+", default=[], choices=[row.name for row in rows_of(False, 1)], help="patterns"
    )
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start with torchrun --nproc-per-node K -m benchmarks.scaling")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        run(options.out, options.only)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
