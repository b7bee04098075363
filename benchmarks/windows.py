"""Windows, strided keys, blocks and offset grids beside the best kernel that exists for each.

    python -m benchmarks.windows --out windows.json

Windows stand beside FlexAttention with the same window, compiled; strided keys beside dense attention (cuDNN on a GPU), by
time over the share of its pairs; a window with LongNet's branches, and LongNet on an offset grid, beside LongNet alone. Results
are compared with the definition before anything is timed. On a GPU the host's time of short calls stands beside LongNet's too.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks import checks, results
from benchmarks.cases import CPU_QUICK, GPU, PASSES, Case, Record, draw
from benchmarks.device import Device, here
from benchmarks.timing import Contender, bare_dense, contender, interleave, ours
from longnet import dilated_attention
from longnet.geometry import Pattern, score_pairs

Kind = dict[str, Any]
ROUNDS, ALLOWED = 21, 2e-2
# Queries and keys of a tile of the GPU kernels.
TILE = 128
HOST_LIMIT, HOST_CALLS = 1.05, 10
LIMITS = {"flex": (0.9, 0.9), "dense": (1.25, 1.35), "longnet": (1.10, 1.10), "grid": (1.0, 1.0), "grids": (1.03, 1.03)}


@dataclass(frozen=True)
class Row:
    """One comparison: what a call is asked for, and what it stands beside.

    Args:
        beside: ``"flex"``, ``"dense"``, or LongNet alone: ``"longnet"`` by pairs, ``"grid"`` and ``"grids"`` by time.
    """

    case: Case
    kind: Kind
    beside: str

    @property
    def pattern(self) -> Pattern:
        return Pattern.compose(**{name: x for name, x in self.kind.items() if name != "segment_offset"})

    @property
    def share(self) -> float:
        """Pairs over those of what it stands beside, where that is dense attention or LongNet alone; else 1."""
        sizes = (self.case.heads, self.case.length, self.case.is_causal)
        other = {"dense": Pattern.parse(self.case.length, 1), "longnet": self.case.pattern}.get(self.beside)
        return 1.0 if other is None else score_pairs(self.pattern, *sizes) / score_pairs(other, *sizes)

    @property
    def shown(self) -> Kind:
        """The kind as a result holds it."""
        return {name: x.tolist() if isinstance(x, Tensor) else x for name, x in self.kind.items()}

    @property
    def tile_share(self) -> float | None:
        """As ``share``, of pairs in whole tiles; None where queries are dilated."""
        if self.beside not in ("flex", "dense"):
            return None
        other = self.pattern if self.beside == "flex" else Pattern.compose(None, 1, dilated_queries=False)
        return pairs_in_tiles(self.pattern, self.case) / pairs_in_tiles(other, self.case)


def pairs_in_tiles(pattern: Pattern, case: Case) -> int:
    """Pairs of the tiles that a causal call touches: of every ``TILE`` queries, keys in runs of ``TILE``."""
    total = 0
    for head in range(case.heads):
        for first in range(0, case.length, TILE):
            stop = min(first + TILE, case.length)
            counts = [stop - max(0, first + 1 - pattern.window)] if pattern.window else []
            counts += [one.count(0, stop, pattern.offset(one, head, case.heads)) for one in pattern.branches]
            total += sum(-(-count // TILE) for count in counts) * TILE * TILE
    return total


def strided(rate: int, block: int, window: int = 512) -> Kind:
    return {
        "segment_lengths": None,
        "dilation_rates": rate,
        "window": window,
        "dilated_queries": False,
        "dilation_block": block,
        "head_offsets": "grouped",
    }


def rows(on_gpu: bool) -> Iterator[Row]:
    base = replace(GPU, length=131072) if on_gpu else CPU_QUICK
    branches = {"segment_lengths": base.segment_lengths, "dilation_rates": base.dilation_rates}
    for case in (replace(base, head_dim=dim) for dim in ((64, 128) if on_gpu else (16,))):
        for window in (512, 4096) if on_gpu else (32,):
            yield Row(case, {"window": window}, "flex")
        yield Row(case, {**branches, "window": 512}, "longnet")
        yield Row(case, {**branches, "segment_offset": 1000}, "grid")
        yield Row(case, {**branches, "segment_offset": torch.tensor([1000])}, "grids")
        for length in (32768, 131072) if on_gpu else (256,):
            for rate in (2, 4, 8):
                for block in (1, 32):
                    yield Row(replace(case, length=length), strided(rate, block, 512 if on_gpu else 32), "dense")


def attend(row: Row, device: torch.device) -> Callable[..., Tensor]:
    kind = {"segment_lengths": (), "dilation_rates": (), **row.kind}
    if isinstance(kind.get("segment_offset"), Tensor):
        kind["segment_offset"] = kind["segment_offset"].to(device)
    return lambda q, k, v: dilated_attention(q, k, v, **kind, is_causal=row.case.is_causal)


def flex(row: Row, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention with the same keys, compiled where it can be trained."""
    case = row.case
    mask = row.pattern.mask_mod(heads=case.heads, is_causal=case.is_causal)
    make: Any
    compute: Any
    # Without the compiler it warns that it is slow: on a CPU it shows only that the benchmark works.
    make, compute = create_block_mask, flex_attention
    if device.type == "cuda":
        make, compute = torch.compile(make), torch.compile(compute)
    else:
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    blocks = make(mask, None, None, case.length, case.length, device=str(device))
    return lambda q, k, v: compute(q, k, v, block_mask=blocks)


def check(row: Row, device: Device) -> float:
    """How far a short call is from the definition.

    Raises:
        CheckFailed: by more than rounding.
    """
    case = replace(row.case, length=700, heads=4)
    tensors = draw(case, 1, device.device)
    found = attend(row, device.device)(*tensors.inputs)
    kind = {"segment_lengths": (), "dilation_rates": (), **row.kind}
    for name in ("segment_lengths", "dilation_rates"):
        kind[name] = kind[name] if isinstance(kind[name], tuple) else (kind[name],)
    exact = [x.double().cpu() for x in tensors.inputs]
    expected, _ = checks.oracle().dense_attention(*exact, **kind, is_causal=case.is_causal)
    error = checks.relative_error(found.cpu(), expected)
    return checks.require(f"{row.kind}", {"out": error}, ALLOWED)["out"]


def measure(row: Row, device: Device, rounds: int = ROUNDS) -> Record:
    """Seconds of both, by pass, and their ratio over the share of pairs."""
    tensors = draw(row.case, 0, device.device)
    own = contender("ours", attend(row, device.device), tensors)
    other: Contender
    if row.beside == "flex":
        other = contender("other", flex(row, device.device), tensors)
    elif row.beside == "dense":
        other = bare_dense(device, tensors, row.case.is_causal, "other")
    else:
        other = ours(row.case, tensors, "other")
    record: Record = {
        "case": row.case.to_dict(),
        "kind": row.shown,
        "beside": row.beside,
        "pairs": row.share,
        "passes": {},
    }
    record["error"] = check(row, device)
    # FlexAttention has no backward pass on a CPU.
    for number, which in enumerate(PASSES if device.kind == "cuda" or row.beside != "flex" else PASSES[:1]):
        seconds = interleave(device, {one.name: one.passes[which] for one in (own, other)}, rounds, rounds)
        ratio = median(a / b for a, b in zip(seconds["ours"], seconds["other"], strict=True)) / row.share
        limit = LIMITS[row.beside][number]
        record["passes"][which] = {"seconds": seconds, "ratio": ratio, "limit": limit}
        by_tiles = "" if row.tile_share is None else f", over tiles {ratio * row.share / row.tile_share:.3f}"
        ms = {name: 1e3 * median(values) for name, values in seconds.items()}
        print(
            f"N={row.case.length:,} D={row.case.head_dim} {row.shown} {which}: {ms['ours']:.3f} ms, {row.beside} "
            f"{ms['other']:.3f} ms, ratio over pairs {ratio:.3f} (limit {limit}){by_tiles}",
            flush=True,
        )
    device.release()
    return record


def host_kinds(device: torch.device) -> dict[str, Kind]:
    """Short calls by name, LongNet's first."""
    branches: Kind = {"segment_lengths": (256, 512, 1024), "dilation_rates": (1, 2, 4)}
    return {
        "LongNet": branches,
        "window": {"window": 128},
        "window and stride 4": strided(4, 1, 128),
        "LongNet and window": {**branches, "window": 128},
        "offset": {**branches, "segment_offset": 100},
        "offset of each row": {**branches, "segment_offset": torch.tensor([100], device=device)},
    }


def measure_host(device: Device, rounds: int = ROUNDS) -> list[Record]:
    """Seconds that the host needs to launch a call of 1,024 tokens, and their ratio to LongNet's."""
    case = replace(GPU, length=1024, heads=8, head_dim=64)
    calls = {
        name: contender(name, attend(Row(case, kind, "host"), device.device), draw(case, 0, device.device))
        for name, kind in host_kinds(device.device).items()
    }
    records = []
    for which in PASSES:
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds + 2):
            for name, call in calls.items():
                device.finish()
                began = time.perf_counter()
                for _ in range(HOST_CALLS):
                    call.passes[which]()
                # The first two rounds warm up.
                seconds[name] += [(time.perf_counter() - began) / HOST_CALLS] * (number > 1)
        for name, own in seconds.items():
            ratio = median(a / b for a, b in zip(own, seconds["LongNet"], strict=True))
            records.append({"kind": name, "pass": which, "seconds": own, "value": ratio, "limit": HOST_LIMIT})
            print(f"host, {name}, {which}: {1e6 * median(own):.0f} us, {ratio:.3f} of LongNet's", flush=True)
    return records


def run(out: Path | None, dims: tuple[int, ...] = (), rounds: int = ROUNDS) -> Record:
    """Measure what ``out`` does not hold yet.

    Raises:
        NoResult: ``out`` is another benchmark's, or of other sources, versions or another device.
    """
    device = here()
    result = results.started(kind="windows", device=device.describe(), rows=[])
    if out is not None and out.exists():
        result = results.continued(out, result)
    measured = {json.dumps([record["case"], record["kind"]]) for record in result["rows"]}
    for row in rows(device.kind == "cuda"):
        is_asked = not dims or row.case.head_dim in dims
        if is_asked and json.dumps([row.case.to_dict(), row.shown]) not in measured:
            result["rows"].append(measure(row, device, rounds))
            # After every row: a run that is cut short keeps what it has.
            results.save(result, out)
    if device.kind == "cuda":
        result["host"] = measure_host(device, rounds)
        results.save(result, out)
    return result


def main() -> None:
    options = results.program("windows", __doc__)
    options.add_argument("--dims", type=int, nargs="*", default=[], help="head dimensions; all by default")
    options.add_argument(
        "--rounds", type=int, default=ROUNDS, help="calls of each that are timed; %(default)s by default"
    )
    given = options.parse_args()
    try:
        run(given.out, tuple(given.dims), given.rounds)
    except results.NoResult as error:
        options.error(str(error))


if __name__ == "__main__":
    main()
