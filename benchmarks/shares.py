"""What each of several ranks computes of one sequence, one rank after the other on one device, against a device alone.

    python -m benchmarks.shares --ranks 8 --out shares-8.json

The patterns are those of ``benchmarks.scaling``, and the same code runs, but rows travel through memory: this shows whether ranks
compute more than one device with as many tokens does, without what the network and waiting for one another take. At a smaller
size, every rank's results are compared with one device's first. ``--only`` names patterns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import checks, report, results
from benchmarks.cases import Case, Record, Tensors, draw
from benchmarks.device import HostClock
from benchmarks.scaling import ALLOWED, LIMIT, ROUNDS, Row, rows_of
from benchmarks.timing import Function, interleave
from longnet.attention.backends import Backend, select_backend
from longnet.attention.call import AttentionInputs, SavedForward, checked_inputs
from longnet.attention.sharding.attend import Shard
from longnet.attention.sharding.plan import Place
from longnet.attention.sharding.ranges import RangeShard
from longnet.geometry import score_pairs, score_pairs_by_shard
from longnet.geometry.shards import Shards

# Tokens of a rank whose results are checked, and ranks at most.
CHECKED, MOST = 1 << 12, 64


class Post:
    """Rows between ranks of which one runs at a time: what one sends is kept until its receiver runs."""

    def __init__(self) -> None:
        self.rank = 0
        self.letters: dict[tuple[int, int], Tensor] = {}

    def all_to_all_single(
        self, into: Tensor, given: Tensor, received: Sequence[int], parts: Sequence[int], **options: Any
    ) -> Post:
        for to, rows in enumerate(given.split(list(parts))):
            if len(rows):
                self.letters[self.rank, to] = rows
        found = [self.letters[sender, self.rank] for sender, count in enumerate(received) if count]
        if found:
            torch.cat(found, out=into)
        return self

    def wait(self) -> None:
        """Nothing is under way."""


@contextmanager
def posting() -> Iterator[Post]:
    """Ranks of this process send rows by the post that it gives."""
    post, real = Post(), dist.all_to_all_single
    dist.all_to_all_single = post.all_to_all_single  # type: ignore[assignment]
    try:
        yield post
    finally:
        dist.all_to_all_single = real


@dataclass
class Part:
    """One rank's shard of a call, and what its forward pass saved."""

    shard: Shard | RangeShard
    inputs: AttentionInputs
    grad_out: Tensor
    post: Post
    saved: tuple[SavedForward, Tensor] | None = None

    @property
    def rank(self) -> int:
        return self.shard.place.rank

    def forward(self) -> Tensor:
        self.post.rank = self.rank
        out, lse, received = self.shard.forward()
        self.saved = SavedForward(self.inputs, out, lse), received
        return out

    def backward(self) -> tuple[Tensor, ...]:
        assert self.saved is not None
        self.post.rank = self.rank
        return self.shard.backward(self.saved[0], self.grad_out, None, self.saved[1])[:3]

    def both(self) -> None:
        self.forward()
        self.backward()


def parts_of(row: Row, tensors: Tensors, ranks: int, post: Post) -> tuple[list[Part], Backend]:
    """The sequence in equal shards, and the backend that computes them."""
    length, found = tensors.query.shape[2] // ranks, []
    for rank in range(ranks):
        own = tensors.map(lambda x: x[:, :, rank * length : (rank + 1) * length].clone())  # noqa: B023
        inputs = checked_inputs(*own.inputs, row.pattern, is_causal=True, scale=None)
        backend = select_backend("auto", inputs)
        heads, kv_heads = own.query.shape[1], own.key.shape[1]
        place = Place(inputs.spec.pattern, heads, kv_heads, Shards((length,) * ranks), rank, True)
        shard = (
            Shard(inputs, place, backend, None)  # type: ignore[arg-type]
            if inputs.beyond_paper is None
            else RangeShard(inputs, place, backend, None, ())  # type: ignore[arg-type]
        )
        found.append(Part(shard, inputs, own.grad_out, post))
    return found, backend


def run_all(parts: Sequence[Part]) -> list[tuple[Tensor, ...]]:
    """(out, grad_query, grad_key, grad_value) of every rank. Causal: keys travel to later ranks, and gradients back."""
    outs = [part.forward() for part in parts]
    grads = [part.backward() for part in reversed(parts)]
    return [(out, *of_rank) for out, of_rank in zip(outs, reversed(grads), strict=True)]


def alone(backend: Backend, part: Part) -> tuple[Function, Function]:
    """The forward pass of one device that has the part's tokens alone, and both passes."""

    def forward() -> SavedForward:
        return SavedForward(part.inputs, *backend.run(part.inputs))

    return forward, lambda: backend.run_backward(forward(), part.grad_out, None)


def check(row: Row, case: Case, ranks: int, device: torch.device) -> dict[str, float]:
    """Errors of the sharded result against one device's; raises on one above what is allowed."""
    whole = draw(case, 0, device)
    inputs = checked_inputs(*whole.inputs, row.pattern, is_causal=True, scale=None)
    with posting() as post:
        parts, backend = parts_of(row, whole, ranks, post)
        found = [torch.cat(of_ranks, 2) for of_ranks in zip(*run_all(parts), strict=True)]
    saved = SavedForward(inputs, *backend.run(inputs))
    wanted = (saved.out, *backend.run_backward(saved, whole.grad_out, None)[:3])
    pairs = zip(checks.NAMES, found, wanted, strict=True)
    errors = {name: checks.relative_error(got, want) for name, got, want in pairs}
    checks.require(f"what the ranks compute against one device's result, {row.name}", errors, ALLOWED[case.dtype])
    return errors


def measure(row: Row, case: Case, ranks: int, device: torch.device) -> Record:
    checked = Case(min(case.length, CHECKED) * ranks, case.dtype, heads=case.heads)
    errors = check(row, checked, ranks, device)
    with posting() as post:
        whole = draw(Case(case.length * ranks, case.dtype, heads=case.heads), 0, device)
        parts, backend = parts_of(row, whole, ranks, post)
        del whole
        run_all(parts)
        forward, both = alone(backend, parts[0])
        functions: dict[str, Function] = {"alone": both, "alone, forward": forward}
        for part in parts:
            functions |= {f"rank {part.rank}": part.both, f"rank {part.rank}, forward": part.forward}
        seconds = interleave(HostClock(device), functions, ROUNDS, ROUNDS)
    slowest = max((f"rank {rank}" for rank in range(ranks)), key=lambda name: median(seconds[name]))
    pairs = score_pairs_by_shard(row.pattern, heads=case.heads, shard_lengths=(case.length,) * ranks, is_causal=True)
    one = score_pairs(row.pattern, case.heads, case.length, True)
    return {
        "pattern": row.name, "shard": case.length, "kind": row.kind, "errors": errors, "checked_tokens": checked.length,
        "seconds": seconds, "slowest": slowest, "pairs": max(pairs) / one, "even": row.even,
    }  # fmt: skip


@torch.no_grad()
def run(out: Path | None, ranks: int, only: Sequence[str]) -> Record:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    kind, heads = ("bfloat16", 16) if on_gpu else ("float32", 4)
    result = results.started(
        kind="shares", device=torch.cuda.get_device_name(device) if on_gpu else "cpu", ranks=ranks, heads=heads, head_dim=64,
        dtype=kind, limit=LIMIT if on_gpu else None, patterns=[],
    )  # fmt: skip
    for row in rows_of(on_gpu, ranks):
        if row.gathered or (only and row.name not in only):
            continue
        print(f"{row.name}: {ranks} x {row.tokens:,} tokens", flush=True)
        result["patterns"].append(measure(row, Case(row.tokens, kind, heads=heads), ranks, device))
        results.save(result, out)
    print(report.plain(result))
    return result


def main() -> None:
    parser = results.program("shares", __doc__)
    names = [row.name for row in rows_of(False, 1) if not row.gathered]
    parser.add_argument("--only", nargs="+", default=[], choices=names, help="patterns")
    parser.add_argument("--ranks", type=int, default=2, help="among which the sequence is cut")
    options = parser.parse_args()
    if not 2 <= options.ranks <= MOST:
        parser.error(f"--ranks {options.ranks}: expected 2 to {MOST}, as one device holds the tokens of all")
    run(options.out, options.ranks, options.only)


if __name__ == "__main__":
    main()
